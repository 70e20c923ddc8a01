"""The samplers that are compared, and the variance of their mini-batch gradients at given weights.

All samplers are built from the per-item gradients at a snapshot and measured, there and later, at the weights of
one and the same training run. Uniform batches are shuffles: their variance has the factor (N - B) / (N - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from training.sampling.clustering import Allocation, Clusters, Floats, Labels, fit_clusters
from training.sampling.stratified import (
    Draw,
    ImportanceBatches,
    StratifiedBatches,
    WeightedBatches,
    systematic_counts,
)
from training.sampling.variance import GradientVariance, VarianceReport

ORDERS = 50  # of the strata, to know how rounded counts vary
IMPORTANCE_MIX = 0.01  # an item with no gradient at the snapshot must still be drawn

UNIFORM, DOUBLED, NORM, LOSS, SVRG = "uniform", "doubled batch", "gradient-norm importance", "loss importance", "SVRG"


class Clustering(NamedTuple):
    allocation: Allocation
    method: Literal["exact_moves", "assign_update", "kmeans"] = "exact_moves"
    mix: float = 0.0


CLUSTERED = {
    "clustered, equal": Clustering("equal"),
    "clustered, proportional": Clustering("proportional"),
    "clustered, Neyman": Clustering("neyman"),
    "clustered, Neyman, mix 0.2": Clustering("neyman", mix=0.2),
    "assign-update, equal": Clustering("equal", "assign_update"),
    "k-means, equal": Clustering("equal", "kmeans"),
}
SAMPLERS = (UNIFORM, DOUBLED, NORM, LOSS, *CLUSTERED, SVRG)
PROPORTIONAL = tuple(name for name, of in CLUSTERED.items() if of.allocation == "proportional")


class Strata:
    """First and second moments of how often a stratified sampler draws from each stratum.

    Expected counts are rounded with one random offset along a random order of the strata: the offset is averaged
    out exactly, for some orders, because a large and rarely drawn item would spoil an average over random ones.

    Args:
        labels: Cluster of each item, ``(N,)``.
        expected: Expected draws from each cluster, ``(K,)``.
        seed: Decides the orders.
    """

    def __init__(self, labels: Labels, expected: Floats, seed: int) -> None:
        self.labels, self.expected, self.seed = labels, expected, seed
        self.sizes = np.bincount(labels).astype(np.float64)

    @cached_property
    def moments(self) -> tuple[Floats, Floats]:
        """Covariance of the counts, and ``E r (N_k - r) / (N_k - 1)`` of what they leave of whole shuffles."""
        expected, sizes = self.expected, self.sizes
        rng = np.random.default_rng(self.seed)
        second, spread = np.zeros((len(expected), len(expected))), np.zeros(len(expected))
        for _ in range(ORDERS):
            order = rng.permutation(len(expected))
            changes = np.unique(np.append([0.0, 1.0], expected[order].cumsum() % 1.0))
            for offset, share in zip((changes[1:] + changes[:-1]) / 2, np.diff(changes), strict=True):
                drawn = systematic_counts(expected, offset, order)
                second += share / ORDERS * np.outer(drawn, drawn)
                # A stratum that was drawn completely adds nothing: only the rest of its shuffle varies.
                rest = drawn % sizes
                spread += share / ORDERS * rest * (sizes - rest) / np.maximum(sizes - 1, 1)
        return second - np.outer(expected, expected), spread

    def variance(self, gradients: Floats, lengths: Floats, weights: Floats) -> float:
        """Variance of the sum of the drawn items' weighted gradients.

        Args:
            gradients: ``(N, D)``.
            lengths: Their squared lengths, ``(N,)``.
            weights: ``(N,)``.
        """
        member = np.zeros((len(self.sizes), len(weights)), dtype=gradients.dtype)  # (K, N)
        member[self.labels, np.arange(len(weights))] = weights
        squares = np.bincount(self.labels, weights=np.square(weights) * lengths)
        means = (member @ gradients).astype(np.float64) / self.sizes[:, None]  # (K, D)
        products = means @ means.T
        within = np.maximum(squares / self.sizes - products.diagonal(), 0)
        covariance, spread = self.moments
        return float(spread @ within + (covariance * products).sum())


@dataclass(frozen=True)
class Sampler:
    """Batches, the moments of their strata if they have any, and the variance ratio that is predicted for them."""

    batches: WeightedBatches
    strata: Strata | None = None
    predicted: float | None = None

    def exact(self, gradients: Floats, lengths: Floats) -> float:
        """Variance of the mini-batch gradient from all per-item gradients ``(N, D)`` and their squared lengths."""
        weights, size = self.batches.weights, self.batches.batch_size
        if self.strata is not None:
            return self.strata.variance(gradients, lengths, weights) / size**2
        mean_square = np.square(gradients.mean(axis=0, dtype=np.float64)).sum()
        return float((weights @ lengths / len(lengths) - mean_square) / size)

    def monte_carlo(self, gradient: Callable[[Draw], Sequence[Tensor]], draws: int, first: int) -> VarianceReport:
        """Estimate it from the first batches of independent epochs, counted from ``first``."""
        variance = GradientVariance(self.batches.batch_size)
        for epoch in range(first, first + draws):
            variance.add(gradient(next(self.batches.epoch(epoch))))
        return variance.report()


def uniform(count: int, batch_size: int, seed: int) -> Sampler:
    labels = np.zeros(count, dtype=np.int64)
    batches = StratifiedBatches(labels, batch_size, mix=0.0, seed=seed)
    return Sampler(batches, Strata(labels, batches.expected, seed))


def build_samplers(
    vectors: Floats, norms: Floats, losses: Floats, batch_size: int, count: int, sweeps: int, seed: int
) -> dict[str, Sampler]:
    """All samplers but SVRG, from what is known at a snapshot.

    Args:
        vectors: Per-item gradients or sketches, ``(N, m)``.
        norms: Gradient lengths, ``(N,)``.
        losses: ``(N,)``.
        batch_size: B.
        count: Number of clusters K.
        sweeps: Largest number of passes of a clustering.
        seed: Decides clusters and batches.
    """
    mean_square = float(np.square(vectors.mean(axis=0, dtype=np.float64)).sum())
    total = float(np.square(vectors, dtype=np.float64).sum()) / len(vectors) - mean_square  # S / N
    samplers = {
        UNIFORM: uniform(len(vectors), batch_size, seed),
        DOUBLED: uniform(len(vectors), 2 * batch_size, seed),
    }
    for name, scores in ((NORM, norms), (LOSS, losses)):
        draws = ImportanceBatches(scores, batch_size, mix=IMPORTANCE_MIX, seed=seed)
        variance = float(draws.weights @ np.square(norms)) / len(vectors) - mean_square
        samplers[name] = Sampler(draws, None, variance / total if total > 0 else 1.0)
    fitted: dict[tuple[Allocation, str], Clusters] = {}
    for name, (allocation, method, mix) in CLUSTERED.items():
        if (allocation, method) not in fitted:
            init: Literal["random", "kmeans++"] = "random" if method == "exact_moves" else "kmeans++"
            fitted[allocation, method] = fit_clusters(
                vectors, count, allocation, method, init, max_sweeps=sweeps, seed=seed
            )
        clusters = fitted[allocation, method]
        deviations = np.sqrt(clusters.scatter / clusters.sizes)
        batches = StratifiedBatches(clusters.labels, batch_size, allocation, deviations, mix, seed)
        predicted = None if mix else clusters.variance_ratio(allocation)
        samplers[name] = Sampler(batches, Strata(clusters.labels, batches.expected, seed), predicted)
    return samplers
