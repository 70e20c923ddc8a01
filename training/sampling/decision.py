"""Does drawing by gradient pay? What was found, and the rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from training.sampling.clustering import Clusters

PAYS = 0.5  # what doubling the batch does to the variance, at twice the cost


@dataclass(frozen=True)
class Decision:
    """What a refresh found, ready for the log.

    Attributes:
        clusters: Their number.
        largest: Items in the largest.
        smallest: Items in the smallest.
        moved: Items that changed their cluster.
        explained: Part of the recorded gradients' scatter that lies between clusters.
        equal: Variance of equal allocation over that of uniform batches, predicted from recorded gradients.
        proportional: The same of proportional allocation.
        neyman: The same of Neyman allocation.
        importance: The same of independent draws by gradient norm.
        measured: The ratio of what is configured, on fresh gradients of its own draws.
        scatter: ``E|g - E g|²`` of single items, fresh.
        effective: Effective sample size of a batch's weights, ``(Σ w)² / (B Σ w²)``, from 0 to 1.
        refresh_seconds: What refreshing took.
        overhead: What drawing by gradient costs beside a uniform epoch, negatives included; rounded up to 5 %.
        go: Whether the next epoch is drawn so.
    """

    clusters: int
    largest: int
    smallest: int
    moved: int
    explained: float
    equal: float
    proportional: float
    neyman: float
    importance: float
    measured: float
    scatter: float
    effective: float
    refresh_seconds: float
    overhead: float
    go: bool

    def __str__(self) -> str:
        cost = self.measured * (1 + self.overhead)
        verdict = "drawing by gradient" if self.go else "uniform batches"
        return (
            f"{self.clusters} clusters of {self.smallest}–{self.largest} pairs explain {self.explained:.0%}; "
            f"variance ÷ uniform: equal {self.equal:.2f}, proportional {self.proportional:.2f}, "
            f"neyman {self.neyman:.2f}, importance {self.importance:.2f}; "
            f"measured {self.measured:.2f} × time {1 + self.overhead:.2f} = {cost:.2f} "
            f"{'<' if self.go else '≥'} {PAYS} → {verdict}"
        )


def round_up(overhead: float) -> float:
    """To the next 5 %: a decision should not hang on a millisecond, or a resumed run could take another."""
    return math.ceil(overhead * 20) / 20


def importance_ratio(clusters: Clusters, length: float) -> float:
    """Variance of draws by gradient norm over that of uniform ones, ``((mean |g|)² - |μ|²) N / S``."""
    count, scatter = clusters.sizes.sum(), clusters.total_scatter
    mean_square = float(np.square(clusters.mean + clusters.sums.sum(axis=0) / count).sum())
    return float((length**2 - mean_square) * count / scatter) if scatter > 0 else 1.0
