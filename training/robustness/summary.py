"""Ranks under attack as figures: recall with exact intervals, area under the curve, success, rank shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TAIL = 0.025
"""Probability that an interval may leave on either side."""
Ranks = NDArray[np.int64]


class Interval(NamedTuple):
    """An estimate with an interval that covers the truth in at least 95 % of samples, whatever the truth is.

    Attributes:
        value: On the sample.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def percent(part: int, whole: int) -> float:
    """A share of counts; the one way to compute it, so that equal shares are equal in every bit."""
    return 100 * part / whole


def share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Interval:
    """``100 Σ part / Σ whole`` with the interval of Clopper and Pearson (1934); NaN where there is nothing to count.

    Rows count as one observation each, so that the interval holds however much what is in a row is alike. If rows
    differ in size they count as ``(Σ whole)² / Σ whole²`` (Kish, 1965), which is less. Fractions of observations are
    rounded to the wider interval.

    Args:
        part: int64 ``(N,)``; what belongs together, as the captions of one picture do, is one row.
        whole: int64 ``(N,)``.
    """
    hits, total = int(part.sum()), int(whole.sum())
    if not total:
        return Interval(float("nan"), float("nan"), float("nan"))
    count = total**2 // int(np.square(whole).sum())
    low = 100 * _least_share(hits * count // total, count)
    high = 100 - 100 * _least_share((total - hits) * count // total, count)
    return Interval(percent(hits, total), low, high)


def _log_binomials(count: int) -> NDArray[np.float64]:
    """``log C(n, i)`` for i from 0 to n."""
    factorials = np.concatenate([[0.0], np.log(np.arange(1, count + 1)).cumsum()])
    logarithms: NDArray[np.float64] = factorials[-1] - factorials - factorials[::-1]
    return logarithms


def _least_share(hits: int, count: int) -> float:
    """The share at which so many hits or more have the probability :data:`TAIL`; 0 where there are none."""
    if not hits:
        return 0.0
    of, binomials = np.arange(hits, count + 1), _log_binomials(count)[hits:]
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        tail = np.exp(binomials + of * math.log(middle) + (count - of) * math.log1p(-middle)).sum()
        low, high = (middle, high) if tail < TAIL else (low, middle)
    return low


def finite(interval: Interval) -> dict[str, float | None]:
    """For JSON, which knows neither NaN nor infinity: None in their place."""
    return {name: value if np.isfinite(value) else None for name, value in interval._asdict().items()}


def recall(ranks: Ranks, k: int) -> Interval:
    """Percent of searches whose item is among the first ``k``; ``ranks`` ``(N, P)``, -1 where there is no search."""
    return share(((ranks < k) & (ranks >= 0)).sum(1), (ranks >= 0).sum(1))


def median_rank(ranks: Ranks) -> float:
    """medR counted from one, as :class:`~training.evaluation.protocols.DirectionMetrics` does."""
    return float(np.floor(np.median(ranks[ranks >= 0])) + 1)


def success(clean: Ranks, attacked: Ranks, k: int, promote: bool = False) -> Interval:
    """Attack success at K, percent: of the searches that the clean item wins (loses), those it loses (wins) then.

    NaN where there is none.
    """
    before, after = ((ranks < k) != promote for ranks in (clean, attacked))
    there = (clean >= 0) & before
    return share((there & ~after).sum(1), there.sum(1))


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


def epsilon50(radii: NDArray[np.float64]) -> Interval:
    """Median over the clean hits of the smallest ε known to break each; inf where none is.

    The interval lies between two of the radii in order, by the binomial test of the median (the sign test), which
    knows no distribution; fewer than six radii leave it open, from 0 to inf.
    """
    ordered, count = np.sort(radii), len(radii)
    below = np.exp(_log_binomials(count) - count * math.log(2)).cumsum() <= TAIL
    left = int(below.sum())  # so many radii may be left out on either side
    low, high = (ordered[left - 1], ordered[-left]) if left else (0.0, np.inf)
    return Interval(float(ordered[count // 2]), float(low), float(high))


def join(parts: Sequence[Any]) -> Ranks:
    """Ranks ``(E, n, P)`` of several chunks in one array ``(E, N, P)``, padded by -1 where P differs."""
    arrays = [np.asarray(part, dtype=np.int64) for part in parts]
    width = max(array.shape[-1] for array in arrays)
    return np.concatenate(
        [np.pad(a, [(0, 0), (0, 0), (0, width - a.shape[-1])], constant_values=-1) for a in arrays], axis=1
    )


def curve(
    epsilons: Sequence[float], ranks: Ranks, rounded: Ranks, changed: NDArray[np.int64], threat: str
) -> dict[str, Any]:
    """Figures at every ε, the first of which is 0, with R@1 of 8-bit pictures, and the area under R@1.

    Args:
        epsilons: E radii, the first 0.
        ranks: ``(E, N, P)``.
        rounded: The same for pictures rounded to 8 bits.
        changed: int64 ``(2, E)``; how many pictures differ from the clean ones, before and after rounding.
        threat: Its name, which says whether success is to rise or to fall.
    """
    promote = threat == "gallery-promote"
    points = [
        {
            "epsilon": epsilon,
            **point(ranks[0], of, promote),
            "r1_8bit": recall(eight, 1)._asdict(),
            "changed": int(exact),
            "changed_8bit": int(whole),
        }
        for epsilon, of, eight, exact, whole in zip(epsilons, ranks, rounded, *changed, strict=True)
    ]
    measured = [of for of in points if of["changed"] or not of["epsilon"]]
    return {
        "queries": int((ranks[0] >= 0).sum()),
        "pictures": ranks.shape[1],
        "curve": points,
        "area": area([of["epsilon"] for of in measured], [of["r1"]["value"] for of in measured]),
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


def text_edits(ranks: Ranks, ids: list[str], pairs: list[list[str]], editable: int) -> dict[str, Any]:
    """Figures of clean and of edited captions, and the worst falls among the clean hits.

    Args:
        ranks: ``(2, N, 1)``, clean and edited.
        ids: Caption ids.
        pairs: Each caption as it was and as it was edited.
        editable: Captions that some edit could have changed.
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
        "editable": editable,
        "changed": sum(old != new for old, new in pairs),
        "ids": ids,
        "clean": point(clean, clean),
        "attacked": point(clean, edited),
        "ranks": ranks.tolist(),
        "worst": worst[:10],
    }


def corruptions(
    parts: Sequence[dict[str, dict[str, Any]]], changed: Sequence[dict[str, dict[str, int]]], ids: list[str]
) -> dict[str, Any]:
    """R@1 of every corruption and severity, and its mean over those that changed a picture, relative to the clean one.

    Args:
        parts: For each chunk, corruption → severity → ranks ``(n, 1)``; ``clean`` has one severity, 0.
        changed: For each chunk, corruption → severity → how many pictures differ from the clean ones.
        ids: Image ids.
    """

    def ranks(name: str, severity: str) -> Ranks:
        return np.concatenate([np.asarray(part[name][severity], dtype=np.int64) for part in parts])

    names = [name for name in parts[0] if name != "clean"]
    table = {
        name: {severity: recall(ranks(name, severity), 1)._asdict() for severity in parts[0][name]} for name in names
    }
    counts = {name: {s: sum(part[name][s] for part in changed) for s in table[name]} for name in names}
    clean = recall(ranks("clean", "0"), 1)
    values = [of["value"] for name in names for severity, of in table[name].items() if counts[name][severity]]
    mean = float(np.mean(values)) if values else None
    return {
        "queries": len(ids),
        "changed": counts,
        "ids": ids,
        "clean": clean._asdict(),
        "r1": table,
        "mean_r1": mean,
        "relative": mean / clean.value if clean.value and mean is not None else None,
        "ranks": {name: {s: ranks(name, s)[:, 0].tolist() for s in parts[0][name]} for name in parts[0]},
    }


def unchanged(found: dict[str, Any]) -> list[str]:
    """Levels of a threat that changed nothing, so that what stays there is no robustness; none in older records."""
    if "curve" in found:
        return [f"ε = {of['epsilon']:.3g}" for of in found["curve"] if of["epsilon"] and of.get("changed") == 0]
    if "editable" in found:
        return [] if found["editable"] else ["edits"]
    counts = found.get("changed", {})
    return [f"{name} {severity}" for name, of in counts.items() for severity, count in of.items() if not count]


def threat(name: str, parts: Sequence[dict[str, Any]], ids: list[str], radii: Sequence[float]) -> dict[str, Any]:
    """Everything about one threat, from what its chunks recorded.

    Args:
        name: Of the threat.
        parts: Records of the chunks.
        ids: Of all images or captions in them.
        radii: Of the attacks on pictures, the first 0.
    """
    if name == "corruption":
        return corruptions([part["ranks"] for part in parts], [part["changed"] for part in parts], ids)
    ranks = join([part["ranks"] for part in parts])
    if name == "query-text":
        pairs = [pair for part in parts for pair in part["texts"]]
        return text_edits(ranks, ids, pairs, sum(part["editable"] for part in parts))
    changed = np.sum([part["changed"] for part in parts], axis=0)
    found = curve(radii, ranks, join([part["rounded"] for part in parts]), changed, name)
    found |= {
        "ids": ids,
        "passes": sum(part["passes"] for part in parts),
        "violation": max(part["violation"] for part in parts),
        "flat": sum(part["flat"] for part in parts),
        "ranks": ranks.tolist(),
    }
    if name == "query-image":
        smallest = np.concatenate([part["epsilon50"] for part in parts])
        cosines = np.concatenate([np.asarray(part["cosines"]) for part in parts], axis=1)
        found |= query_extras(smallest, cosines)
        found["spectrum"] = spectrum([part["spectra"] for part in parts], [len(part["rows"]) for part in parts])
        flips = sorted((flip for part in parts for flip in part["flips"]), key=lambda flip: -flip["rank"])
        found["flips"] = flips[:6]
    return found
