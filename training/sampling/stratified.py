"""Batches drawn from clusters, with the weights that keep the mean gradient unbiased."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.batches import epoch_length
from training.sampling.clustering import Allocation, Floats, Labels


@dataclass(frozen=True)
class Draw:
    """One batch of items.

    Attributes:
        indices: int64 ``(B,)``, the items.
        weights: float64 ``(B,)``; ``Σ w_b g_b / B`` is an unbiased estimate of the mean gradient.
        strata: int64 ``(B,)``, the cluster that each item was drawn from; 0 where there are none.
    """

    indices: Labels
    weights: Floats
    strata: Labels


class WeightedBatches(ABC):
    """Batches of weighted items, a function of ``(seed, epoch, step)`` alone.

    Attributes:
        weights: Of each item, float64 ``(N,)``.
        strata: What each item is drawn from, int64 ``(N,)``.
        expected: Draws expected from each stratum in a batch, float64 ``(K,)``.

    Every process draws the same batch of ``batch_size`` items and keeps its share of it: together the ranks
    hold exactly what one process would.

    Args:
        expected: How often each item is expected in a batch, float64 ``(N,)``, with the sum B. An item's
            weight is ``B / (N expected)``: by the expected count, never the realised one, which can be 0.
        batch_size: Items per batch B, over all ranks.
        seed: Decides all batches.
        rank: This process.
        world_size: Number of processes; must divide ``batch_size``.

    Raises:
        ValueError: If the batch cannot be shared, or an item would never be drawn.
    """

    strata: Labels
    expected: NDArray[np.float64]

    def __init__(self, expected: Floats, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: cannot share batches of {batch_size} among {world_size} processes")
        if not (expected > 0).all():
            raise ValueError(f"item {int(expected.argmin())} would never be drawn")
        self.batch_size, self.seed = batch_size, seed
        self.weights: NDArray[np.float64] = batch_size / (len(expected) * expected)
        self._share = slice(rank, None, world_size)

    def __len__(self) -> int:
        """Batches per epoch: as many as it takes a uniform shuffle to visit every item."""
        return epoch_length(len(self.weights), self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Draw]:
        """The epoch's batches from position ``start`` on, each of full size."""
        for indices, strata in self._batches(np.random.default_rng((self.seed, epoch)), start):
            own = indices[self._share]
            yield Draw(own, self.weights[own], strata[self._share])

    @abstractmethod
    def _batches(self, rng: np.random.Generator, start: int) -> Iterator[tuple[Labels, Labels]]:
        """Indices and strata of whole batches."""


def allocate(
    sizes: Floats, deviations: Floats, batch_size: float, allocation: Allocation, mix: float = 0.0
) -> NDArray[np.float64]:
    """Expected draws from each cluster, ``(K,)``, with the sum ``batch_size``.

    Args:
        sizes: ``N_k > 0``, ``(K,)``.
        deviations: ``σ_k``, the root mean squared distance of a cluster's gradients to their mean, ``(K,)``, up to
            a common factor; only ``neyman`` looks at them.
        batch_size: Draws to hand out.
        allocation: ``equal``; ``proportional`` to size; ``neyman``: one draw for each cluster, or its proportional
            share if that is less, and the rest proportional to ``N_k σ_k``. Without that one draw a large cluster
            without scatter would be in some batches, with a large weight, and not in others.
        mix: Fraction η of the draws that is proportional whatever the allocation.
    """
    proportional = sizes / sizes.sum()
    if allocation == "equal":
        own = np.full(len(sizes), batch_size / len(sizes))
    elif allocation == "proportional" or not (deviations > 0).any():
        own = batch_size * proportional
    else:
        least = np.minimum(1, batch_size * proportional)
        share = sizes * deviations
        own = least + (batch_size - least.sum()) * (share / share.sum())
    expected: NDArray[np.float64] = (1 - mix) * own + mix * batch_size * proportional
    return expected


def systematic_counts(expected: Floats, offset: float, order: Labels) -> Labels:
    """Round expected counts to whole ones with the same sum and the exact expectation.

    Clusters lie end to end on a line, in the given order and as long as their expected counts; they get the
    points ``offset, offset + 1, …`` that fall on them (Madow, 1949). So ``n_k`` is ``⌊c_k⌋`` or ``⌈c_k⌉``, and for an
    offset uniform in [0, 1) its mean is ``c_k``. A random order keeps neighbours from always excluding each
    other.

    Args:
        expected: ``c_k``, float64 ``(K,)``, with a whole sum.
        offset: From 0 up to, but not including, 1.
        order: A permutation of the K clusters.
    """
    ends = np.floor(expected[order].cumsum() - offset + 1e-9)  # points below the end of each cluster, less one
    ends[-1] = round(expected.sum()) - 1
    counts = np.empty(len(expected), dtype=np.int64)
    counts[order] = np.diff(np.maximum(ends, -1), prepend=-1)
    return counts


class StratifiedBatches(WeightedBatches):
    """Stratified batches: some items from each cluster, weighted by how rarely they are drawn.

    ``Σ_k (N_k / N) (1 / c_k) Σ_{j drawn from k} g_j`` has the mean gradient as its expectation for any partition
    (Faghri et al., 2020, section 3). Within a cluster items come in shuffled order, each once before any
    comes again. With a single cluster this is a plain shuffle with weights 1.

    Args:
        labels: Cluster of each item, int64 ``(N,)``; -1 for items that no clustering has seen, which form a
            cluster of their own.
        batch_size: Items per batch, over all ranks.
        allocation: See :func:`allocate`. ``proportional`` is safe: whatever the clusters, its variance is not
            above that of uniform batches. ``equal`` and ``neyman`` gain more while the clusters are fresh, and
            can lose when gradients have moved on.
        deviations: ``σ_k`` of clusters 0, 1, …; for ``neyman``. Unseen items count as the largest.
        mix: Fraction η of the batch that is shared in proportion to size whatever the allocation, so that no
            weight exceeds 1 / η. Drawing it from all items alike would have the same weights and more variance.
        seed: Decides all batches.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: For a mix outside 0 to 1, missing deviations, or as of :class:`WeightedBatches`.

    Example:
        >>> batches = StratifiedBatches(np.array([0, 0, 0, 1]), batch_size=2, allocation="equal", mix=0.0)
        >>> [sorted(draw.weights.tolist()) for draw in batches.epoch(0)]
        [[0.5, 1.5], [0.5, 1.5]]
    """

    def __init__(
        self,
        labels: Labels,
        batch_size: int,
        allocation: Allocation = "proportional",
        deviations: Floats | None = None,
        mix: float = 0.2,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= mix <= 1:
            raise ValueError(f"mix = {mix} must be from 0 to 1")
        if allocation == "neyman" and deviations is None:
            raise ValueError("neyman allocation needs the clusters' deviations")
        names, strata = np.unique(np.where(labels < 0, labels.max() + 1, labels), return_inverse=True)
        sizes = np.bincount(strata).astype(np.float64)
        known = np.ones(1) if deviations is None else deviations
        padded = np.append(known, known.max())[np.minimum(names, len(known))]
        self.expected = allocate(sizes, padded, batch_size, allocation, mix)
        super().__init__((self.expected / sizes)[strata], batch_size, seed, rank, world_size)
        self.strata = strata.astype(np.int64)
        self._sizes = sizes.astype(np.int64)
        self._starts = np.append(0, self._sizes.cumsum()[:-1])
        self._members = np.argsort(strata, kind="stable")

    def _batches(self, rng: np.random.Generator, start: int) -> Iterator[tuple[Labels, Labels]]:
        count, members, sizes = len(self._sizes), self._members, self._sizes
        ids = np.arange(count)
        stratum = np.repeat(ids, sizes)
        shuffled = members[np.argsort(stratum + rng.random(len(members)))]  # what each stratum is drawing from
        ahead = members[np.argsort(stratum + rng.random(len(members)))]  # and what it will draw from after that
        position = np.zeros(count, dtype=np.int64)
        for step in range(len(self)):
            counts = systematic_counts(self.expected, rng.random(), rng.permutation(count))
            if step >= start:
                strata = np.repeat(ids, counts)
                within = np.arange(self.batch_size) - np.repeat(counts.cumsum() - counts, counts)
                place, base, size = position[strata] + within, self._starts[strata], sizes[strata]
                yield np.where(place < size, shuffled[base + place % size], ahead[base + place % size]), strata
            position += counts
            for k in np.flatnonzero(position >= sizes):
                segment = slice(self._starts[k], self._starts[k] + sizes[k])
                shuffled[segment] = ahead[segment]
                ahead[segment] = rng.permutation(members[segment])
                position[k] %= sizes[k]


class ImportanceBatches(WeightedBatches):
    """Independent draws with probabilities proportional to scores (Katharopoulos & Fleuret, 2018).

    With each item's gradient norm as its score the variance is the least that independent draws can have,
    ``((mean |g|)² - |μ|²) / B``; the loss is the cheaper score.

    Args:
        scores: Non-negative, ``(N,)``; all zero means uniform.
        batch_size: Items per batch, over all ranks.
        mix: Fraction η of uniform probability. No weight exceeds 1 / η.
        seed: Decides all batches.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: For negative scores or a mix outside 0 to 1, or as of :class:`WeightedBatches`.
    """

    def __init__(
        self, scores: Floats, batch_size: int, mix: float = 0.2, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= mix <= 1 or not (scores >= 0).all():
            raise ValueError("importance sampling needs scores that are not negative and a mix from 0 to 1")
        uniform = np.full(len(scores), 1 / len(scores))
        own = scores / scores.sum() if scores.sum() > 0 else uniform
        probabilities: NDArray[np.float64] = (1 - mix) * own + mix * uniform
        super().__init__(batch_size * probabilities, batch_size, seed, rank, world_size)
        self.strata, self.expected = np.zeros(len(scores), dtype=np.int64), np.array([float(batch_size)])
        self._cumulative = probabilities.cumsum() / probabilities.sum()

    def _batches(self, rng: np.random.Generator, start: int) -> Iterator[tuple[Labels, Labels]]:
        rng.bit_generator.advance(start * self.batch_size)  # type: ignore[attr-defined]  # PCG64 can
        for _ in range(start, len(self)):
            indices = np.searchsorted(self._cumulative, rng.random(self.batch_size), side="right")
            yield indices.astype(np.int64), np.zeros(self.batch_size, dtype=np.int64)
