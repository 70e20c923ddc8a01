"""Ranks under attack as figures: recall with bootstrap intervals, area under the curve, success, rank shifts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Ranks = NDArray[np.int64]


class Interval(NamedTuple):
    """An estimate with its 95 % percentile-bootstrap interval.

    Attributes:
        value: On the sample.
        low: 2.5th percentile over resamples.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float


def share(part: NDArray[np.int64], whole: NDArray[np.int64], seed: int = 0) -> Interval:
    """``100 Σ part / Σ whole`` over rows drawn with replacement; NaN where there is nothing to count.

    Args:
        part: int64 ``(N,)``; what belongs together, as the captions of one picture do, is one row.
        whole: int64 ``(N,)``.
        seed: Decides the resamples.
    """
    count = len(part)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)  # (R, N)
    totals = drawn @ whole
    rates = 100 * (drawn @ part)[totals > 0] / totals[totals > 0]
    if not whole.sum():
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(rates, [2.5, 97.5])
    return Interval(100 * float(part.sum() / whole.sum()), float(low), float(high))


def finite(interval: Interval) -> dict[str, float | None]:
    """For JSON, which knows neither NaN nor infinity: None in their place."""
    return {name: value if np.isfinite(value) else None for name, value in interval._asdict().items()}


def recall(ranks: Ranks, k: int, seed: int = 0) -> Interval:
    """Percent of searches whose item is among the first ``k``; ``ranks`` ``(N, P)``, -1 where there is no search."""
    return share(((ranks < k) & (ranks >= 0)).sum(1), (ranks >= 0).sum(1), seed)


def median_rank(ranks: Ranks) -> float:
    """medR counted from one, as :class:`~training.evaluation.protocols.DirectionMetrics` does."""
    return float(np.floor(np.median(ranks[ranks >= 0])) + 1)


def success(clean: Ranks, attacked: Ranks, k: int, promote: bool = False, seed: int = 0) -> Interval:
    """Attack success at K, percent: of the searches that the clean item wins (loses), those it loses (wins) then.

    NaN where there is none.
    """
    before, after = ((ranks < k) != promote for ranks in (clean, attacked))
    there = (clean >= 0) & before
    return share((there & ~after).sum(1), there.sum(1), seed)


def shift(clean: Ranks, attacked: Ranks) -> dict[str, float]:
    """Median and 90th percentile of how many ranks an item has moved; positive is down."""
    moved = (attacked - clean)[clean >= 0]
    median, high = np.percentile(moved, [50, 90])
    return {"median": float(median), "p90": float(high)}


def area(epsilons: Sequence[float], recalls: Sequence[float]) -> float:
    """Area under R@1(ε) from 0 to the largest ε by trapezoids, as a fraction of the clean model's constant R@1."""
    if not recalls[0] or not epsilons[-1]:
        return 0.0
    x, y = np.asarray(epsilons), np.asarray(recalls)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] * y[0]))


def point(clean: Ranks, attacked: Ranks, promote: bool = False) -> dict[str, Any]:
    """All figures of one ε, ready for JSON: recall, medR, attack success and rank shift."""
    figures: dict[str, Any] = {f"r{k}": recall(attacked, k)._asdict() for k in (1, 5, 10)}
    figures |= {f"asr{k}": finite(success(clean, attacked, k, promote)) for k in (1, 5, 10)}
    return {**figures, "medr": median_rank(attacked), "shift": shift(clean, attacked)}


def epsilon50(radii: NDArray[np.float64], seed: int = 0) -> Interval:
    """Median over the clean hits of the smallest ε known to break each; inf where none is."""
    drawn = np.random.default_rng(seed).integers(0, len(radii), (RESAMPLES, len(radii)))
    # Without interpolation, which knows no infinity.
    medians = np.percentile(radii[drawn], 50, axis=1, method="higher")
    low, high = np.percentile(medians, [2.5, 97.5], method="nearest")
    return Interval(float(np.percentile(radii, 50, method="higher")), float(low), float(high))


def join(parts: Sequence[Any]) -> Ranks:
    """Ranks ``(E, n, P)`` of several chunks in one array ``(E, N, P)``, padded by -1 where P differs."""
    arrays = [np.asarray(part, dtype=np.int64) for part in parts]
    width = max(array.shape[-1] for array in arrays)
    return np.concatenate(
        [np.pad(a, [(0, 0), (0, 0), (0, width - a.shape[-1])], constant_values=-1) for a in arrays], axis=1
    )


def curve(epsilons: Sequence[float], ranks: Ranks, rounded: Ranks, threat: str) -> dict[str, Any]:
    """Figures at every ε, the first of which is 0, with R@1 of 8-bit pictures, and the area under R@1.

    Args:
        epsilons: E radii, the first 0.
        ranks: ``(E, N, P)``.
        rounded: The same for pictures rounded to 8 bits.
        threat: Its name, which says whether success is to rise or to fall.
    """
    promote = threat == "gallery-promote"
    points = [
        {"epsilon": epsilon, **point(ranks[0], of, promote), "r1_8bit": recall(eight, 1)._asdict()}
        for epsilon, of, eight in zip(epsilons, ranks, rounded, strict=True)
    ]
    return {
        "queries": int((ranks[0] >= 0).sum()),
        "curve": points,
        "area": area(epsilons, [of["r1"]["value"] for of in points]),
    }


def query_extras(smallest: NDArray[np.float64], cosines: NDArray[np.float64]) -> dict[str, Any]:
    """ε50 of the clean hits, and mean scores of the best own and the best other caption at every ε.

    Args:
        smallest: ``(N,)``; 0 where the clean query does not rank first, inf where nothing broke it.
        cosines: ``(E, N, 2)``.
    """
    hits = smallest[smallest > 0]
    return {
        "epsilon50": finite(epsilon50(hits)) if len(hits) else None,
        "unbroken": int(np.isinf(hits).sum()),
        "smallest_epsilon": [float(value) if np.isfinite(value) else None for value in smallest],
        "own_score": cosines[..., 0].mean(1).tolist(),
        "other_score": cosines[..., 1].mean(1).tolist(),
    }


def spectrum(parts: Sequence[Any], counts: Sequence[int]) -> dict[str, Any]:
    """Mean amplitude of the perturbations at every ε, 0 included, in bins of radial frequency.

    Args:
        parts: ``(C, E, 2, K)``; of each chunk and ε what
            :func:`~training.robustness.spectrum.radial_spectrum` returned.
        counts: Pictures in each chunk.
    """
    values = np.asarray(parts)
    amplitude = np.average(values[:, :, 1], axis=0, weights=counts)  # (E, K)
    return {"radius": values[0, 0, 0].tolist(), "amplitude": amplitude.tolist()}


def text_edits(ranks: Ranks, ids: list[str], pairs: list[list[str]]) -> dict[str, Any]:
    """Figures of clean and of edited captions, and the worst falls among the clean hits.

    Args:
        ranks: ``(2, N, 1)``, clean and edited.
        ids: Caption ids.
        pairs: Each caption as it was and as it was edited.
    """
    clean, edited = ranks
    order = np.argsort(-(edited - clean)[:, 0], kind="stable").tolist()
    worst = [
        {"caption": pairs[row][0], "edited": pairs[row][1], "rank": int(edited[row, 0])}
        for row in order
        if clean[row, 0] == 0 and edited[row, 0] > 0
    ]
    return {
        "queries": len(ids),
        "ids": ids,
        "clean": point(clean, clean),
        "attacked": point(clean, edited),
        "ranks": ranks.tolist(),
        "worst": worst[:10],
    }


def corruptions(parts: Sequence[dict[str, dict[str, Any]]], ids: list[str]) -> dict[str, Any]:
    """R@1 of every corruption and severity, and its mean over them relative to the clean model's.

    Args:
        parts: For each chunk, corruption → severity → ranks ``(n, 1)``; ``clean`` has one severity, 0.
        ids: Image ids.
    """

    def ranks(name: str, severity: str) -> Ranks:
        return np.concatenate([np.asarray(part[name][severity], dtype=np.int64) for part in parts])

    names = [name for name in parts[0] if name != "clean"]
    table = {
        name: {severity: recall(ranks(name, severity), 1)._asdict() for severity in parts[0][name]} for name in names
    }
    clean = recall(ranks("clean", "0"), 1)
    mean = float(np.mean([figure["value"] for severities in table.values() for figure in severities.values()]))
    return {
        "queries": len(ids),
        "ids": ids,
        "clean": clean._asdict(),
        "r1": table,
        "mean_r1": mean,
        "relative": mean / clean.value if clean.value else None,
        "ranks": {name: {s: ranks(name, s)[:, 0].tolist() for s in parts[0][name]} for name in parts[0]},
    }
