"""python -m benchmarks.gradient_variance.digits [--quick] [--out docs/gradient_variance]

A multilayer perceptron and a small convolutional network, without batch norm, on drawn digits, with and without 90 %
of the images being copies of ten. Clusters are of sketches of all layers' gradients, taken at snapshots.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gradient_variance.digit_images import draw_digits
from benchmarks.gradient_variance.figures import variance_curves
from benchmarks.gradient_variance.measure import Sampler, build_samplers
from benchmarks.gradient_variance.report import Moment, Reading, arguments, markdown_table, save
from benchmarks.gradient_variance.trajectory import shuffled, with_copies
from training.sampling.clustering import Floats, Labels
from training.sampling.gradient_factors import GradientSketch, record_factors
from training.sampling.stratified import Draw

IMAGES, DISTINCT, BATCH, CLUSTERS, RATE, SKETCH, SWEEPS = 10_000, 10, 128, 128, 0.02, 256, 5


@dataclass(frozen=True)
class Run:
    """Steps of training, between snapshots and between measurements; batches of each measurement; images."""

    steps: int = 2_000
    snapshot_every: int = 1_000
    measure_every: int = 500
    draws: int = 40
    images: int = IMAGES


QUICK = Run(steps=100, snapshot_every=50, measure_every=50, draws=20, images=2_000)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(392, 10),
    )


MODELS = {"MLP": perceptron, "CNN": convolutional}


class Training:
    """A model on the chosen images, trained by SGD with uniform batches."""

    def __init__(self, model: str, images: Tensor, labels: Tensor, chosen: Labels, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = MODELS[model]()
        self.parameters = list(self.model.parameters())
        self.layers = [layer for layer in self.model if isinstance(layer, nn.Linear | nn.Conv2d)]
        self.images, self.labels, self.chosen = images, labels, chosen
        self.sketch = GradientSketch(SKETCH, seed)

    def costs(self, distinct: Labels) -> Tensor:
        """Cross entropy of images by their numbers, ``(B,)``."""
        return F.cross_entropy(self.model(self.images[distinct]), self.labels[distinct], reduction="none")

    def gradient(self, draw: Draw) -> tuple[Tensor, ...]:
        weights = torch.from_numpy(draw.weights).float()
        return torch.autograd.grad((weights * self.costs(self.chosen[draw.indices])).mean(), self.parameters)

    def step(self, items: Labels) -> None:
        gradients = torch.autograd.grad(self.costs(self.chosen[items]).mean(), self.parameters)
        with torch.no_grad():
            torch._foreach_add_(self.parameters, gradients, alpha=-RATE)

    def snapshot(self) -> tuple[Floats, Floats, Floats]:
        """Sketches ``(N, m)``, gradient lengths and losses ``(N,)``; copies are computed once."""
        distinct, inverse = np.unique(self.chosen, return_inverse=True)
        sketches, lengths, losses = [], [], []
        for block in np.array_split(distinct, -(-len(distinct) // 250)):
            factors = record_factors(self.layers, lambda block=block: self.costs(block))
            sketches.append(self.sketch(factors))
            lengths.append(torch.stack([layer.squared_norms() for layer in factors]).sum(dim=0))
            losses.append(self.costs(block).detach())
        vectors, squares, costs = (torch.cat(parts).numpy()[inverse] for parts in (sketches, lengths, losses))
        return vectors, np.sqrt(squares.astype(np.float64)), costs.astype(np.float64)


def train(model: str, duplicated: float, run: Run, seed: int) -> list[Moment]:
    rng = np.random.default_rng(seed)
    images, labels = draw_digits(run.images, seed)
    chosen = with_copies(run.images, DISTINCT, duplicated, rng)
    training = Training(model, torch.from_numpy(images), torch.from_numpy(labels), chosen, seed)
    stream = shuffled(run.images, BATCH, rng)
    samplers: dict[str, Sampler] = {}
    taken = 0
    moments = []

    def measure(step: int) -> Moment:
        fresh = step == taken
        return Moment(
            step,
            step - taken,
            {
                name: Reading(
                    None,
                    sampler.monte_carlo(training.gradient, run.draws, first=2 * step + fresh),
                    sampler.predicted if fresh else None,
                )
                for name, sampler in samplers.items()
            },
        )

    for step in range(run.steps + 1):
        if step % run.measure_every == 0:
            if samplers:
                moments.append(measure(step))
            if step % run.snapshot_every == 0:
                samplers = build_samplers(*training.snapshot(), BATCH, CLUSTERS, SWEEPS, seed + step)
                taken = step
                moments.append(measure(step))
        training.step(next(stream))
    return moments


def main() -> None:
    args, begin = arguments(__doc__), time.perf_counter()
    torch.set_num_threads(1)
    run, seeds = (QUICK, range(1)) if args.quick else (Run(), range(2))
    runs = {
        f"{model}, {fraction:.0%} duplicates": [train(model, fraction, run, seed) for seed in seeds]
        for model in MODELS
        for fraction in (0.0, 0.9)
    }
    settings = {
        "duplicated_images": DISTINCT,
        "batch_size": BATCH,
        "clusters": CLUSTERS,
        "rate": RATE,
        "sketch": SKETCH,
        "sweeps": SWEEPS,
        "seeds": list(seeds),
        **vars(run),
    }
    summaries = save(args.out, "digits", settings, runs, begin)
    print(markdown_table(summaries, "monte_carlo"))
    heading = (
        f"Drawn digits, N = {run.images:,}, B = K = {BATCH}, learning rate {RATE:g}\n"
        f"sketches of {SKETCH} numbers, snapshot every {run.snapshot_every:,} steps (dots)"
    )
    variance_curves(args.out / "digits.png", heading, summaries, "monte_carlo", columns=2)


if __name__ == "__main__":
    main()
