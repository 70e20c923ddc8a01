"""Gradient clustering: a partition of the training items that makes stratified batches vary little.

Per-item gradients ``g_i``, or their sketches, are plain vectors here. For cluster k of ``N_k`` items with sum
``s_k`` and sum of squared lengths ``Q_k``, the scatter is ``S_k = Q_k - |s_k|² / N_k`` and the objective of
gradient clustering is the sum of ``J_k = N_k S_k`` (Faghri et al., *A Study of Gradient Variance in Deep
Learning*, 2020, arXiv 2007.04532, section 3). Everything follows from ``(N_k, Q_k, s_k)``, and none of it from where
the vectors have their origin: it is put in their mean, or ``Q_k`` and ``|s_k|² / N_k`` could agree in every digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Labels = NDArray[np.int64]
Allocation = Literal["equal", "proportional", "neyman"]

ROWS = 8192  # vectors that are in float64 at a time
BLOCK = 512  # items whose best moves are searched with one matrix product
TOGETHER = 32  # more of them than this move together if that lowers the objective, else one by one

# Each allocation of a batch to clusters has its own objective: what the variance is proportional to (see
# ``Clusters.variance_ratio``), as a sum over clusters of a function of (N, Q, |s|²).
OBJECTIVES: dict[Allocation, Callable[[Any, Any, Any], Any]] = {
    "equal": lambda n, q, s2: n * q - s2,
    "proportional": lambda n, q, s2: q - s2 / np.maximum(n, 1),
    "neyman": lambda n, q, s2: np.sqrt(np.maximum(n * q - s2, 0)),
}


@dataclass(frozen=True)
class Clusters:
    """A partition of N vectors with its statistics, float64.

    Attributes:
        labels: int64 ``(N,)``, from 0 to K - 1; no cluster is empty.
        sizes: ``N_k``, ``(K,)``.
        sums: ``s_k``, ``(K, m)``, of vectors less ``mean``.
        squares: ``Q_k``, ``(K,)``, of vectors less ``mean``.
        mean: Of all vectors, ``(m,)``.
        objective: The objective after each sweep or iteration that led here, the start first.
        moved: Items that changed their cluster in each.
    """

    labels: Labels
    sizes: Floats
    sums: Floats
    squares: Floats
    mean: Floats
    objective: tuple[float, ...] = ()
    moved: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, vectors: Floats, labels: Labels, objective: tuple[float, ...] = (), moved: tuple[int, ...] = ()
    ) -> Clusters:
        """Statistics of a given partition; empty clusters are dropped and the others renumbered.

        Args:
            vectors: ``(N, m)``.
            labels: int ``(N,)``, any non-negative numbers.
            objective: See the class.
            moved: See the class.
        """
        _, labels = np.unique(labels, return_inverse=True)
        centred = _Centred(vectors)
        statistics = centred.statistics(labels, int(labels.max()) + 1)
        return cls(labels.astype(np.int64), *statistics, centred.mean, objective, moved)

    @property
    def centers(self) -> Floats:
        """Mean of each cluster, ``(K, m)``."""
        centers: Floats = self.mean + self.sums / self.sizes[:, None]
        return centers

    @property
    def scatter(self) -> Floats:
        """``S_k``, the squared distances to the cluster's mean, ``(K,)``."""
        scatter: Floats = np.maximum(self.squares - np.square(self.sums).sum(axis=1) / self.sizes, 0)
        return scatter

    @property
    def total_scatter(self) -> float:
        """``S``, the squared distances of all items to the common mean."""
        return float(max(self.squares.sum() - np.square(self.sums.sum(axis=0)).sum() / self.sizes.sum(), 0))

    @property
    def explained(self) -> float:
        """``1 - Σ S_k / S``: the part of the scatter that lies between clusters; 0 where there is no scatter."""
        return 1 - self.variance_ratio("proportional")

    def variance_ratio(self, allocation: Allocation) -> float:
        """Variance of a stratified mini-batch gradient over that of a uniform one of the same size.

        With ``n_k`` draws from cluster k: ``Σ (N_k / N)² (S_k / N_k) / n_k`` against ``S / (N B)``. Equal
        ``n_k = B / K`` give ``K Σ J_k / (N S)``; ``n_k = B N_k / N`` give ``Σ S_k / S``, never above 1; the
        best, ``n_k ∝ √J_k`` (Neyman, 1934), give ``(Σ √J_k)² / (N S)``. Draws with replacement, no rounding;
        1 where there is no scatter.
        """
        scatter, count, total = self.scatter, self.sizes.sum(), self.total_scatter
        if total <= 0:
            return 1.0
        if allocation == "proportional":
            return float(scatter.sum() / total)
        weighted = self.sizes * scatter
        if allocation == "equal":
            return float(len(self.sizes) * weighted.sum() / (count * total))
        return float(np.sqrt(weighted).sum() ** 2 / (count * total))


def fit_clusters(
    vectors: Floats,
    count: int,
    objective: Allocation = "equal",
    method: Literal["exact_moves", "assign_update", "kmeans"] = "exact_moves",
    init: Literal["random", "kmeans++"] | Labels = "random",
    max_sweeps: int = 50,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Clusters:
    """Partition vectors into at most ``count`` clusters.

    ``exact_moves`` moves items to where the objective falls most, by its exact change: many at once where all
    these moves together lower it, else one at a time. So it never rises, and no single move is left that would
    lower it if sweeps go on. ``assign_update`` is the paper's
    alternation, ``argmin_k N_k |g_i - C_k|²`` and new means, which is no descent method; its best iterate
    is kept. ``kmeans`` is Lloyd's algorithm. The last two are baselines and know no other objective.

    Args:
        vectors: ``(N, m)`` float32 or float64, one per item: gradients or their sketches.
        count: Largest number of clusters K.
        objective: The allocation whose variance is to fall; for ``exact_moves``.
        method: See above.
        init: Random labels, k-means++ seeds, or labels ``(N,)`` to start from, such as the last ones.
        max_sweeps: Passes over all items.
        tolerance: Stop after a pass that lowered the objective by less than this fraction; 0 goes on until
            nothing moves.
        seed: Decides initial labels and the order of the items.

    Returns:
        The clusters; with fewer vectors than ``count``, or many equal ones, there are fewer.

    Raises:
        ValueError: For vectors that are not finite, no vectors, or ``count`` below 1.
    """
    if count < 1 or len(vectors) < 1:
        raise ValueError(f"cannot make {count} clusters of {len(vectors)} vectors")
    if not np.isfinite(vectors).all():
        raise ValueError("gradients are not finite")
    rng = np.random.default_rng(seed)
    count = min(count, len(vectors))
    centred = _Centred(vectors)
    labels = _initial(centred, count, init, rng)
    if method == "exact_moves":
        return _exact_moves(centred, labels, count, OBJECTIVES[objective], max_sweeps, tolerance, rng)
    return _alternate(centred, labels, count, method == "assign_update", max_sweeps, tolerance, rng)


class _Centred:
    """Vectors less their mean, in float64; only the rows that are asked for are held."""

    def __init__(self, vectors: Floats) -> None:
        self.vectors = vectors
        self.mean: Floats = vectors.mean(axis=0, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: Any) -> Floats:
        rest: Floats = self.vectors[rows] - self.mean
        return rest

    def map(self, function: Callable[[Floats], Floats | Labels]) -> Any:
        """What a function of rows gives for all of them, :data:`ROWS` at a time."""
        return np.concatenate([function(self[start : start + ROWS]) for start in range(0, len(self), ROWS)])

    def squared_lengths(self) -> Floats:
        """``(N,)``."""
        lengths: Floats = self.map(lambda rows: np.square(rows).sum(axis=1))
        return lengths

    def statistics(self, labels: Labels, count: int) -> tuple[Floats, Floats, Floats]:
        """``N_k``, ``s_k`` and ``Q_k`` of ``count`` clusters."""
        order, sizes = np.argsort(labels, kind="stable"), np.bincount(labels, minlength=count)
        sums = np.zeros((count, self.vectors.shape[1]))
        for cluster, members in enumerate(np.split(order, sizes.cumsum()[:-1])):
            for start in range(0, len(members), ROWS):
                sums[cluster] += self[members[start : start + ROWS]].sum(axis=0)
        squares = np.bincount(labels, weights=self.squared_lengths(), minlength=count).astype(np.float64)
        return sizes.astype(np.float64), sums, squares


def _exact_moves(
    vectors: _Centred,
    labels: Labels,
    count: int,
    cost: Callable[[Any, Any, Any], Any],
    max_sweeps: int,
    tolerance: float,
    rng: np.random.Generator,
) -> Clusters:
    labels, dtype = labels.copy(), vectors.vectors.dtype
    sizes, sums, squares = vectors.statistics(labels, count)
    lengths = vectors.squared_lengths()
    objective = [float(cost(sizes, squares, np.square(sums).sum(axis=1)).sum())]
    moved: list[int] = []
    negligible = 1e-12 * max(objective[0], 1e-300) / len(vectors)  # below this a gain is rounding
    for _ in range(max_sweeps):
        moves = 0
        order = rng.permutation(len(vectors))
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            rows, own, length = np.arange(len(block)), labels[block], lengths[block]
            norms = np.square(sums).sum(axis=1)  # (K,)
            now = cost(sizes, squares, norms)  # (K,)
            dots = (vectors[block].astype(dtype) @ sums.astype(dtype).T).astype(np.float64)  # (b, K)
            joined = norms + 2 * dots + length[:, None]
            rise = cost(sizes + 1, squares + length[:, None], joined) - now  # (b, K)
            left = norms[own] - 2 * dots[rows, own] + length
            rise += (cost(sizes[own] - 1, squares[own] - length, left) - now[own])[:, None]
            rise[rows, own] = np.inf
            target = rise.argmin(axis=1)
            wanted = np.flatnonzero(rise[rows, target] < -negligible)
            if len(wanted) > TOGETHER:
                joint = _moved((sizes, sums, squares), vectors[block[wanted]], own[wanted], target[wanted])
                if cost(joint[0], joint[2], np.square(joint[1]).sum(axis=1)).sum() < now.sum():
                    sizes, sums, squares = joint
                    labels[block[wanted]] = target[wanted]
                    moves += len(wanted)
                    continue
            # The moves before it in the block may have spoiled or improved a move: weigh it again, exactly.
            for i in wanted:
                item, here, there = block[i], own[i], target[i]
                pair = [here, there]
                g, g2 = vectors[item], length[i]
                s = sums[pair]
                s2 = np.square(s).sum(axis=1)
                sign = np.array([-1.0, 1.0])
                after = cost(sizes[pair] + sign, squares[pair] + sign * g2, s2 + 2 * sign * (s @ g) + g2)
                if (after - cost(sizes[pair], squares[pair], s2)).sum() < -negligible:
                    sizes[pair] += sign
                    squares[pair] += sign * g2
                    sums[here] -= g
                    sums[there] += g
                    labels[item] = there
                    moves += 1
        objective.append(float(cost(sizes, squares, np.square(sums).sum(axis=1)).sum()))
        moved.append(moves)
        if moves == 0 or objective[-2] - objective[-1] < tolerance * objective[-2]:
            break
    return Clusters.of(vectors.vectors, labels, tuple(objective), tuple(moved))


def _moved(
    statistics: tuple[Floats, Floats, Floats], moving: Floats, own: Labels, target: Labels
) -> tuple[Floats, Floats, Floats]:
    """``N_k``, ``s_k``, ``Q_k`` after some items have gone from their own to their target clusters."""
    sizes, sums, squares = statistics
    clusters = np.arange(len(sizes))[:, None]
    change = (clusters == target).astype(np.float64) - (clusters == own)  # (K, b)
    return sizes + change.sum(axis=1), sums + change @ moving, squares + change @ np.square(moving).sum(axis=1)


def _alternate(
    vectors: _Centred,
    labels: Labels,
    count: int,
    weighted: bool,
    iterations: int,
    tolerance: float,
    rng: np.random.Generator,
) -> Clusters:
    cost = OBJECTIVES["equal" if weighted else "proportional"]
    objective: list[float] = []
    moved: list[int] = []
    best = labels
    for _ in range(iterations + 1):
        sizes, sums, squares = vectors.statistics(labels, count)
        costs = cost(sizes, squares, np.square(sums).sum(axis=1))
        objective.append(float(costs.sum()))
        if objective[-1] <= min(objective):
            best = labels
        settled = len(objective) > 1 and abs(objective[-2] - objective[-1]) < tolerance * objective[-2]
        if len(objective) > iterations or settled or (moved and moved[-1] == 0):
            break
        if not sizes.all():  # as its authors did: half of the costliest cluster refills an empty one
            half = rng.permutation(np.flatnonzero(labels == costs.argmax()))[::2]
            labels = labels.copy()
            labels[half] = sizes.argmin()
            sizes, sums, squares = vectors.statistics(labels, count)
        previous = labels
        centers = sums / np.maximum(sizes, 1)[:, None]
        labels = _nearest(vectors, centers, sizes if weighted else np.ones(count))
        moved.append(int((labels != previous).sum()))
    return Clusters.of(vectors.vectors, best, tuple(objective), tuple(moved))


def _nearest(vectors: _Centred, centers: Floats, weights: Floats) -> Labels:
    """``argmin_k w_k |g_i - C_k|²``, int64 ``(N,)``; clusters of weight 0, the empty ones, are never chosen.

    Args:
        vectors: ``(N, m)``.
        centers: ``C_k``, ``(K, m)``, less the vectors' mean.
        weights: ``w_k``, ``(K,)``.
    """
    norms = np.square(centers).sum(axis=1)

    def best(rows: Floats) -> Labels:
        distances = np.square(rows).sum(axis=1)[:, None] - 2 * rows @ centers.T + norms
        chosen: Labels = np.where(weights > 0, weights * distances, np.inf).argmin(axis=1)
        return chosen

    labels: Labels = vectors.map(best)
    return labels


def _initial(vectors: _Centred, count: int, init: str | Labels, rng: np.random.Generator) -> Labels:
    if not isinstance(init, str):
        if init.shape != (len(vectors),) or init.min() < 0 or init.max() >= count:
            raise ValueError(f"initial labels must be {len(vectors)} numbers from 0 to {count - 1}")
        return init.astype(np.int64)
    if init == "random":
        return rng.permutation(np.arange(len(vectors)) % count)
    seeds = [int(rng.integers(len(vectors)))]
    squared = vectors.squared_lengths()
    distance = np.full(len(vectors), np.inf)
    while len(seeds) < count:
        latest = vectors[seeds[-1]]
        dots = vectors.map(lambda rows, latest=latest: rows @ latest)  # type: ignore[misc]
        distance = np.minimum(distance, np.maximum(squared - 2 * dots + squared[seeds[-1]], 0))
        if not distance.sum() > 0:
            break
        seeds.append(int(rng.choice(len(vectors), p=distance / distance.sum())))
    return _nearest(vectors, vectors[seeds], np.ones(len(seeds)))


def merge_small(clusters: Clusters, vectors: Floats, minimum: int) -> Clusters:
    """Join every cluster of fewer than ``minimum`` items with the one where ``Σ J_k`` rises least.

    Smallest first, so that the result depends on nothing but the clusters; a single cluster is left alone.
    """
    sizes, sums, squares = clusters.sizes.copy(), clusters.sums.copy(), clusters.squares.copy()
    names = np.arange(len(sizes))
    cost = OBJECTIVES["equal"]
    while True:
        alive = np.flatnonzero(sizes)
        small = alive[sizes[alive].argmin()]
        if len(alive) == 1 or sizes[small] >= minimum:
            return Clusters.of(vectors, names[clusters.labels], clusters.objective, clusters.moved)
        others = alive[alive != small]
        joined = cost(
            sizes[others] + sizes[small],
            squares[others] + squares[small],
            np.square(sums[others] + sums[small]).sum(axis=1),
        )
        into = others[(joined - cost(sizes[others], squares[others], np.square(sums[others]).sum(axis=1))).argmin()]
        for statistic in (sizes, sums, squares):
            statistic[into] += statistic[small]
            statistic[small] = 0
        names[names == small] = into


class OnlineClusters:
    """Clusters that follow moving gradients batch by batch, between two fits.

    Each batch is assigned to the nearest centers, weighted by size; centers and sizes are exponential
    averages (section 4.2 of the paper). A cluster that starves is started anew from a random item of the
    batch.

    Args:
        clusters: Where to begin.
        decay: Weight of the past, below 1.
        starved: A cluster smaller than this fraction of an equal share is started anew.
        seed: Decides which item.
    """

    def __init__(self, clusters: Clusters, decay: float = 0.99, starved: float = 0.01, seed: int = 0) -> None:
        self.centers = clusters.centers
        self.sizes = clusters.sizes / clusters.sizes.sum()
        self.decay, self.starved = decay, starved
        self._rng = np.random.default_rng(seed)

    def update(self, vectors: Floats) -> Labels:
        """Assign a batch ``(b, m)`` and follow it; returns int64 ``(b,)``."""
        centred = _Centred(vectors)
        labels = _nearest(centred, self.centers - centred.mean, self.sizes)
        counts, sums, _ = centred.statistics(labels, len(self.sizes))
        share = (1 - self.decay) * counts / len(vectors)
        sizes = self.decay * self.sizes + share
        means = centred.mean + sums / np.maximum(counts, 1)[:, None]
        self.centers += (share / sizes)[:, None] * (means - self.centers)
        self.sizes = sizes
        for cluster in np.flatnonzero(sizes < self.starved / len(sizes)):
            self.centers[cluster] = vectors[self._rng.integers(len(vectors))]
            self.sizes[cluster] = 1 / len(sizes)
        self.sizes /= self.sizes.sum()
        return labels
