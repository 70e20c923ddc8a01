"""Training runs of models whose per-item gradients are small enough to be explicit, measured on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.gradient_variance.measure import SVRG, UNIFORM, Sampler, build_samplers
from benchmarks.gradient_variance.report import Moment, Reading
from training.sampling.clustering import Floats, Labels
from training.sampling.stratified import Draw


class Problem(Protocol):
    """A loss that is the mean over N items, with weights ``(D,)``."""

    start: Floats

    def gradients(self, weights: Floats, items: slice | Labels = slice(None)) -> Floats:
        """Per-item gradients ``(n, D)``, of all items or the given ones."""

    def losses(self, weights: Floats) -> Floats:
        """``(N,)``."""


@dataclass(frozen=True)
class LinearModel:
    """A score that is linear in the weights, under half the squared error or the logistic loss (targets ±1)."""

    inputs: Floats
    targets: Floats
    loss: Literal["squared", "logistic"]

    @property
    def start(self) -> Floats:
        return np.zeros(self.inputs.shape[1], dtype=self.inputs.dtype)

    def gradients(self, weights: Floats, items: slice | Labels = slice(None)) -> Floats:
        inputs, targets = self.inputs[items], self.targets[items]
        scores = inputs @ weights
        if self.loss == "squared":
            return inputs * (scores - targets)[:, None]
        return inputs * (-targets * sigmoid(-targets * scores))[:, None]

    def losses(self, weights: Floats) -> Floats:
        scores = self.inputs @ weights
        if self.loss == "squared":
            return np.square(scores - self.targets) / 2
        return np.logaddexp(0, -self.targets * scores)


@dataclass(frozen=True)
class Mean:
    """Half the squared distance of the weights to each point."""

    points: Floats

    @property
    def start(self) -> Floats:
        return np.zeros(self.points.shape[1])

    def gradients(self, weights: Floats, items: slice | Labels = slice(None)) -> Floats:
        return weights - self.points[items]

    def losses(self, weights: Floats) -> Floats:
        return np.square(weights - self.points).sum(axis=1) / 2


def sigmoid(scores: Floats) -> Floats:
    return (1 + np.tanh(scores / 2)) / 2


def with_copies(count: int, distinct: int, fraction: float, rng: np.random.Generator) -> Labels:
    """Indices of items, the last ``fraction`` of them random copies of the first ``distinct``, ``(count,)``."""
    chosen = np.arange(count)
    copies = round(count * fraction)
    if copies:
        chosen[-copies:] = rng.integers(distinct, size=copies)
    return chosen


@dataclass(frozen=True)
class Run:
    """How to train and when to measure.

    Attributes:
        rate: Learning rate of plain SGD with uniform batches.
        steps: Number of updates.
        snapshot_every: Steps between two snapshots.
        measure_every: Steps between two measurements; divides ``snapshot_every``.
        batch_size: B.
        clusters: K.
        draws: Batches of a Monte Carlo estimate; 0 for none.
        monte_carlo_every: Steps between two of those.
        sweeps: Largest number of passes of a clustering.
        decay: Weight decay.
        first_snapshot: Step of the first snapshot.
    """

    rate: float
    steps: int
    snapshot_every: int
    measure_every: int
    batch_size: int = 10
    clusters: int = 10
    draws: int = 200
    monte_carlo_every: int = 1
    sweeps: int = 50
    decay: float = 0.0
    first_snapshot: int = 0


def shuffled(count: int, size: int, rng: np.random.Generator) -> Iterator[Labels]:
    """Batches of a fresh shuffle each epoch, without end; an incomplete last one is left out."""
    while True:
        order = rng.permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def train(problem: Problem, run: Run, seed: int) -> list[Moment]:
    """Train and measure all samplers, before and after each refresh at a snapshot."""
    weights = problem.start
    count = len(problem.losses(weights))
    stream = shuffled(count, run.batch_size, np.random.default_rng(seed))
    samplers: dict[str, Sampler] = {}
    old, taken = np.empty(0), 0
    moments = []
    for step in range(run.steps + 1):
        if step % run.measure_every == 0:
            gradients = problem.gradients(weights)
            draws = run.draws if step % run.monte_carlo_every == 0 else 0
            if samplers:
                moments.append(measure(samplers, gradients, old, step, step - taken, draws))
            if step % run.snapshot_every == 0 and step >= run.first_snapshot:
                lengths = np.sqrt(squared_lengths(gradients))
                losses = problem.losses(weights).astype(np.float64)
                samplers = build_samplers(
                    gradients, lengths, losses, run.batch_size, run.clusters, run.sweeps, seed + step
                )
                old, taken = gradients, step
                moments.append(measure(samplers, gradients, old, step, 0, draws))
        mean = problem.gradients(weights, next(stream)).mean(axis=0)
        weights = weights - run.rate * (mean + run.decay * weights)
    return moments


def measure(samplers: dict[str, Sampler], gradients: Floats, old: Floats, step: int, age: int, draws: int) -> Moment:
    """Exact variances of all samplers and, with draws, their Monte Carlo estimates."""

    def estimate(sampler: Sampler, values: Floats, squares: Floats, predicted: float | None) -> Reading:
        exact = sampler.exact(values, squares)
        if not draws:
            return Reading(exact, None, predicted)
        report = sampler.monte_carlo(mean_of(values), draws, first=2 * step + (age == 0))
        return Reading(exact, report, predicted)

    fresh = age == 0
    squares = squared_lengths(gradients)
    readings = {
        name: estimate(of, gradients, squares, of.predicted if fresh else None) for name, of in samplers.items()
    }
    if not fresh:  # at the snapshot its variance is zero
        change = gradients - old
        readings[SVRG] = estimate(samplers[UNIFORM], change, squared_lengths(change), None)
    return Moment(step, age, readings)


def squared_lengths(values: Floats) -> Floats:
    return np.einsum("nd,nd->n", values, values, dtype=np.float64)


def mean_of(values: Floats) -> Callable[[Draw], Sequence[Tensor]]:
    """Weighted mean gradient of a draw. SVRG's constant part has no variance and is left out."""

    def gradient(draw: Draw) -> Sequence[Tensor]:
        return [torch.from_numpy((draw.weights @ values[draw.indices]) / len(draw.weights))]

    return gradient
