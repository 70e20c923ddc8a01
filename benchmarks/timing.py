"""Interleaved timing of alternatives in one process, reported as ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch


def compare(alternatives: Mapping[str, Callable[[], object]], repeats: int = 7) -> dict[str, dict[str, float]]:
    """Time the alternatives in turn, on one torch thread, so that a slow moment of the machine hits all.

    Args:
        alternatives: Functions by name; ratios are to the first.
        repeats: Rounds, after one that is not counted.

    Returns:
        For each name ``min`` and ``median`` in seconds, ``ratio`` (of the minima) and ``low`` and ``high``,
        the quartiles of the ratios within a round. Ready for ``json.dumps``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = np.empty((repeats + 1, len(alternatives)))
    try:
        for times in seconds:
            for column, function in enumerate(alternatives.values()):
                begin = time.perf_counter()
                function()
                times[column] = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    seconds = seconds[1:]
    low, high = np.percentile(seconds / seconds[:, :1], [25, 75], axis=0)
    least, median = seconds.min(axis=0), np.median(seconds, axis=0)
    return {
        name: {
            "min": float(least[column]),
            "median": float(median[column]),
            "ratio": float(least[column] / least[0]),
            "low": float(low[column]),
            "high": float(high[column]),
        }
        for column, name in enumerate(alternatives)
    }


def format_comparison(results: Mapping[str, Mapping[str, float]]) -> str:
    """A text table of what :func:`compare` returned."""
    width = max(map(len, results))
    lines = [f"{'':{width}}  {'min s':>9}  {'median s':>9}  {'ratio':>7}  quartiles"]
    for name, of in results.items():
        lines.append(
            f"{name:{width}}  {of['min']:9.4f}  {of['median']:9.4f}  {of['ratio']:7.3f}  "
            f"{of['low']:.3f}..{of['high']:.3f}"
        )
    return "\n".join(lines)
