"""The study of ``vse bias`` as tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.robustness.linear.study import ADAM, ATTACKS, NET, OPTIMISERS
from vse_app.figures import NORM_NAMES, new_figure, save_figure, tidy

Row = dict[str, Any]
NAMES = NORM_NAMES | {"fourier-l1": "Fourier-ℓ1", "fourier-linf": "Fourier-ℓ∞"}
_COLOURS = dict(zip((*OPTIMISERS, ADAM), ("#0072b2", "#d55e00", "#009e73", "#7a7a7a"), strict=True))


def format_study(record: dict[str, Any]) -> str:
    """All tables as text; shares are of the largest margin, mean ± standard deviation over data sets."""
    config = record["config"]
    lines = [
        f"d = {config['dim']}, points drawn from N(0, I), labels from a random direction; "
        f"data sets for each ratio d / N: {config['seeds']}.",
        "Share of the largest margin: 1 is the most robust linear model there is, below 0 a point is misclassified.",
    ]
    lines += _part(f"Optimisers, {config['steps']:,} steps", record["margins"], [*OPTIMISERS, ADAM])
    lines += _part(f"Architecture, {config['net_steps']:,} steps", record["nets"], [NET, "gradient descent"])
    lines += ["", "Largest margins, which are the ε* of attacks in the dual norm (mean)"]
    lines += _table(
        ["ratio", "points", *(f"{NAMES[norm]} (attack {NAMES[attack]})" for norm, attack in ATTACKS.items())],
        [
            [
                f"{ratio:g}",
                str(rows[0]["points"]),
                *(f"{np.mean([r['margins'][n] for r in rows]):.3f}" for n in ATTACKS),
            ]
            for ratio, rows in _by_ratio([row for row in record["margins"] if row["name"] == "reference"])
        ],
    )
    sweep = f"{config['sweep_steps']:,} steps"
    lines += ["", f"Penalty on ‖w‖₁, {sweep}: ℓ1 margin"]
    lines += _sweep(record["regularisers"], _l1)
    lines += ["", f"Adversarial training in ℓ∞, {sweep}: ℓ1 margin, and share of points lost at that ε"]
    lines += _sweep(
        record["adversarial"],
        lambda rows: f"{_l1(rows)}; {100 * np.mean([row['robust_error'] for row in rows]):.0f} %",
    )
    return "\n".join(lines)


def write_figures(record: dict[str, Any], out: Path) -> list[str]:
    """Draw the figures; returns their names.

    Raises:
        InputError: If matplotlib is missing.
    """
    drawings: dict[str, Callable[[Any, dict[str, Any]], None]] = {
        "optimisers.png": _draw_optimisers,
        "sweeps.png": _draw_sweeps,
        "fourier.png": _draw_fourier,
    }
    for name, draw in drawings.items():
        figure = new_figure(10, 3.6)
        draw(figure, record)
        for axes in figure.axes:
            tidy(axes)
        save_figure(figure, out / name)
    return list(drawings)


def _part(title: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    lines = ["", f"{title}: the margin in …"]
    body = []
    for ratio, group in _by_ratio(rows):
        for name in names:
            chosen = [row for row in group if row["name"] == name]
            if chosen:
                body.append([f"{ratio:g}", name, *(_spread([r["shares"][norm] for r in chosen]) for norm in ATTACKS)])
    return lines + _table(["ratio", "", *(NAMES[norm] for norm in ATTACKS)], body)


def _sweep(rows: Sequence[Row], cell: Callable[[list[Row]], str]) -> list[str]:
    """A line per setting, a column per ratio."""
    groups = _by_ratio(rows)
    body = [
        [name, *(cell([row for row in group if row["name"] == name]) for _, group in groups)]
        for name in dict.fromkeys(row["name"] for row in rows)
    ]
    return _table(["", *(f"d / N = {ratio:g}" for ratio, _ in groups)], body)


def _l1(rows: Sequence[Row]) -> str:
    return _spread([row["shares"]["l1"] for row in rows])


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[n]) for line in (head, *body)) for n in range(len(head))]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *body)
    ]


def _by_ratio(rows: Sequence[Row]) -> list[tuple[float, list[Row]]]:
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    return [(ratio, [row for row in rows if row["ratio"] == ratio]) for ratio in ratios]


def _means(rows: Sequence[Row], name: str, norm: str) -> tuple[list[float], NDArray[np.float64]]:
    groups = [(ratio, [row for row in group if row["name"] == name]) for ratio, group in _by_ratio(rows)]
    return [ratio for ratio, _ in groups], np.array([[row["shares"][norm] for row in group] for _, group in groups])


def _draw_optimisers(figure: Any, record: dict[str, Any]) -> None:
    """Share of the largest margin against d / N, one panel per norm."""
    panels = figure.subplots(1, len(ATTACKS), sharey=True)
    for axes, (norm, attack) in zip(panels, ATTACKS.items(), strict=True):
        for name in (*OPTIMISERS, ADAM):
            ratios, values = _means(record["margins"], name, norm)
            own = OPTIMISERS.get(name) == norm
            axes.plot(
                ratios, values.mean(1), marker="o", color=_COLOURS[name], label=name, linewidth=2.5 if own else 1.2
            )
            axes.fill_between(ratios, values.min(1), values.max(1), color=_COLOURS[name], alpha=0.15, linewidth=0)
        axes.set(
            title=f"{NAMES[norm]} margin\n(attacks in {NAMES[attack]})",
            xscale="log",
            xlabel="d / N",
            ylim=(0, 1.05),
        )
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios], minor=False)
        axes.minorticks_off()
    panels[0].set_ylabel("share of the largest")
    panels[0].legend(fontsize=7, loc="lower left")


def _draw_sweeps(figure: Any, record: dict[str, Any]) -> None:
    """What a penalty and adversarial training buy, against coordinate descent, which is given nothing."""
    left, right = figure.subplots(1, 2, sharey=True)
    for ratio, rows in _by_ratio(record["regularisers"]):
        weights = list(dict.fromkeys(row["weight"] for row in rows))
        values = [np.mean([r["shares"]["l1"] for r in rows if r["weight"] == weight]) for weight in weights]
        (line,) = left.plot(weights, values, marker="o", label=f"d / N = {ratio:g}")
        free = [
            r["shares"]["l1"] for r in record["margins"] if r["ratio"] == ratio and r["name"] == "coordinate descent"
        ]
        for axes in (left, right):
            axes.axhline(np.mean(free), color=line.get_color(), linestyle=":", linewidth=1)
    for ratio, rows in _by_ratio(record["adversarial"]):
        shares = list(dict.fromkeys(row["share"] for row in rows))
        values = [np.mean([r["shares"]["l1"] for r in rows if r["share"] == share]) for share in shares]
        right.plot(shares, values, marker="o", label=f"d / N = {ratio:g}")
    left.set(
        xscale="log", xlabel="λ of the penalty on ‖w‖₁", ylabel="ℓ1 margin, share of the largest", ylim=(-0.5, 1.05)
    )
    left.invert_xaxis()
    right.set(xlabel="ε of adversarial training, in ε*")
    right.axvline(1, color="#7a7a7a", linewidth=0.8)
    left.legend(fontsize=8, title="dotted: coordinate descent", title_fontsize=7)


def _draw_fourier(figure: Any, record: dict[str, Any]) -> None:
    """Points that stay under a Fourier-ℓ∞ attack: two convolutions against one linear layer."""
    groups = _by_ratio(record["nets"])
    panels = np.atleast_1d(figure.subplots(1, len(groups), sharey=True))
    for axes, (ratio, rows) in zip(panels, groups, strict=True):
        for name, colour in ((NET, "#0072b2"), ("gradient descent", "#d55e00")):
            curves = np.array([row["stay"]["fourier-l1"] for row in rows if row["name"] == name])
            axes.step(np.linspace(0, 2, curves.shape[1]), 100 * curves.mean(0), color=colour, label=name, where="post")
        axes.axvline(1, color="#7a7a7a", linewidth=0.8)
        axes.set(title=f"d / N = {ratio:g}", xlabel="ε of the Fourier-ℓ∞ attack, in ε*")
    panels[0].set_ylabel("points that stay, %")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
