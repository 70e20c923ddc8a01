"""Figures of the experiments: one look for each sampler in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.gradient_variance.measure import DOUBLED, LOSS, NORM, SAMPLERS, SVRG, UNIFORM

mpl.use("Agg")
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
    }
)

# Samplers that often coincide have lines of different widths, the thinner on top.
LOOKS: dict[str, dict[str, Any]] = {
    UNIFORM: {"color": "#000000", "linestyle": "-", "linewidth": 3.2},
    DOUBLED: {"color": "#8c8c8c", "linestyle": "-", "linewidth": 1.6},
    NORM: {"color": "#e69f00", "linestyle": "-", "linewidth": 3.0},
    LOSS: {"color": "#8c510a", "linestyle": "-", "linewidth": 1.2},
    "clustered, equal": {"color": "#0072b2", "linestyle": "-", "linewidth": 2.0},
    "clustered, proportional": {"color": "#009e73", "linestyle": "-", "linewidth": 1.4},
    "clustered, Neyman": {"color": "#cc79a7", "linestyle": "-", "linewidth": 1.0},
    "clustered, Neyman, mix 0.2": {"color": "#cc79a7", "linestyle": ":", "linewidth": 1.4},
    "assign-update, equal": {"color": "#56b4e9", "linestyle": "--", "linewidth": 1.3},
    "k-means, equal": {"color": "#d55e00", "linestyle": "--", "linewidth": 1.3},
    SVRG: {"color": "#6a3d9a", "linestyle": "-.", "linewidth": 1.3},
}


def variance_curves(
    path: Path, title: str, problems: Mapping[str, Sequence[Mapping[str, Any]]], kind: str, columns: int
) -> None:
    """Variance against step, one panel a problem; dots mark snapshots."""
    rows = -(-len(problems) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(9, 0.9 + 3.1 * rows), squeeze=False, layout="constrained")
    for number, (axis, (name, moments)) in enumerate(zip(axes.flat, problems.items(), strict=True)):
        for sampler, look in LOOKS.items():
            of = [moment["samplers"].get(sampler, {}).get(kind) for moment in moments]
            # Between two snapshots SVRG starts from nothing: a gap, as where a variance is rounding alone.
            means = [
                reading["mean"]
                if reading and reading["mean"] > 1e-9 * moment["samplers"][UNIFORM][kind]["mean"]
                else nan
                for reading, moment in zip(of, moments, strict=True)
            ]
            if all(isnan(mean) for mean in means):
                continue
            steps = [moment["step"] for moment in moments]
            fresh = [number for number, moment in enumerate(moments) if moment["age"] == 0]
            (curve,) = axis.plot(steps, means, label=sampler, **look)
            if sampler not in (UNIFORM, DOUBLED, SVRG):  # which a snapshot does not change, or sets to zero
                curve.set(marker="o", markersize=look["linewidth"] + 2, markevery=fresh)
        axis.set_yscale("log")
        axis.set_title(name)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        low, high = axis.get_ylim()
        if high < 30 * low:  # too little for powers of ten
            axis.yaxis.set_major_formatter(FuncFormatter(lambda variance, _: f"{variance:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda variance, _: f"{variance:g}"))
        if number >= len(problems) - columns:
            axis.set_xlabel("training step (updates)")
        if number % columns == 0:
            axis.set_ylabel("gradient variance (trace)")
    finish(figure, axes.flat[0], title, path)


def ratio_sweep(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, Mapping[float, Mapping[str, Mapping[str, float] | None]]]],
    columns: int,
    label: str,
) -> None:
    """Variance ratio to uniform batches against a swept setting; one panel each, all with one scale."""
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(9, 1.1 + 2.5 * rows), squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    for number, (axis, (name, sweep)) in enumerate(zip(axes.flat, panels, strict=True)):
        for sampler, look in LOOKS.items():
            # With no more distinct points than clusters a ratio can be rounding alone: a gap.
            known = [(at, of) for at, samplers in sweep.items() if (of := samplers.get(sampler)) and of["mean"] > 1e-6]
            if known:
                values, means = [at for at, _ in known], [of["mean"] for _, of in known]
                axis.plot(values, means, label=sampler, marker="o", markersize=look["linewidth"] + 1, **look)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        if number >= len(panels) - columns:
            axis.set_xlabel(label)
        if number % columns == 0:
            axis.set_ylabel("variance ÷ uniform")
    finish(figure, axes.flat[0], title, path)


def finish(figure: Figure, axis: Axes, title: str, path: Path) -> None:
    handles, labels = axis.get_legend_handles_labels()
    ordered = sorted(zip(labels, handles, strict=True), key=lambda pair: SAMPLERS.index(pair[0]))
    figure.legend([h for _, h in ordered], [name for name, _ in ordered], loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
