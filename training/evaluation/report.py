"""Retrieval metrics as text: a table for the terminal and a Markdown table of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from training.evaluation.protocols import RetrievalMetrics, WorstQuery


def format_table(metrics: RetrievalMetrics, data: str, split: str) -> str:
    """A small table for the terminal, headed by what was measured on.

    Args:
        metrics: What :func:`~training.evaluation.protocols.evaluate` returned.
        data: Name of the data set.
        split: Name of the split.
    """
    lines = [
        _heading(metrics, data, split),
        f"{'':15}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'medR':>7}{'meanR':>9}",
    ]
    for name, of in (("image to text", metrics.i2t), ("text to image", metrics.t2i)):
        lines.append(f"{name:15}{of.r1:7.1f}{of.r5:7.1f}{of.r10:7.1f}{of.medr:7.1f}{of.meanr:9.1f}")
    queries = metrics.images + metrics.captions
    lines.append(f"rSum {metrics.rsum:.1f}; {metrics.ties:,} of {queries:,} queries tied")
    return "\n".join(lines)


def markdown_table(runs: Mapping[str, Sequence[RetrievalMetrics]], data: str, split: str) -> str:
    """A Markdown table with one row per named run, mean ± sample standard deviation over its seeds.

    Args:
        runs: For each name the metrics of its seeds, at least one; all on the same test set.
        data: Name of the data set.
        split: Name of the split.

    Raises:
        ValueError: If the runs were not all evaluated on the same images, captions and folds.
    """
    every = [seed for seeds in runs.values() for seed in seeds]
    if len({(m.images, m.captions, m.folds) for m in every}) != 1:
        raise ValueError("the runs were not all evaluated on the same images, captions and folds")
    lines = [
        _heading(every[0], data, split),
        "",
        "| run | seeds | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | rSum | ties |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, seeds in runs.items():
        columns = [
            [getattr(direction, recall) for direction in directions]
            for directions in ([m.i2t for m in seeds], [m.t2i for m in seeds])
            for recall in ("r1", "r5", "r10")
        ]
        columns += [[m.rsum for m in seeds], [m.ties for m in seeds]]
        lines.append("| " + " | ".join([name, str(len(seeds)), *map(_mean_std, columns)]) + " |")
    return "\n".join(lines)


def format_worst(worst: Mapping[str, Sequence[WorstQuery]]) -> str:
    """The queries that :func:`~training.evaluation.protocols.worst_queries` found, a line each."""
    lines = []
    for direction, title in (("t2i", "worst captions"), ("i2t", "worst images")):
        lines.append(title)
        for query in worst[direction]:
            lines.append(f"  rank {query.rank + 1:6g}  {query.image}  “{query.captions[0]}”")
    return "\n".join(lines)


def _heading(metrics: RetrievalMetrics, data: str, split: str) -> str:
    folds = f", mean of {metrics.folds} folds" if metrics.folds else ""
    return f"{data} [{split}]: {metrics.images:,} images, {metrics.captions:,} captions{folds}"


def _mean_std(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"
