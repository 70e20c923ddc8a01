"""python -m benchmarks.gradient_variance.flickr8k_curves [--loss infonce] [--out docs/gradient_variance]

Figure and table of the training curves that ``benchmarks.gradient_variance.flickr8k`` has saved: rSum against steps
and against seconds, and when each sampler first reaches the best rSum of uniform batches with the same seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.gradient_variance.figures import plt
from benchmarks.gradient_variance.report import interval

COLOURS = {
    "uniform": "#000000",
    "doubled batch": "#8c8c8c",
    "importance": "#e69f00",
    "clustered": "#cc79a7",
    "uniform, separate negatives": "#56b4e9",
}


def runs_by_sampler(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each sampler by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(record["runs"], key=lambda run: run["seed"]):
        found.setdefault(run["sampler"], []).append(run)
    return {name: found[name] for name in COLOURS if name in found}


def reached(run: dict[str, Any], rsum: float, axis: str) -> float | None:
    """Step or second of the first validation at which a run has at least that rSum."""
    return next((point[axis] for point in run["points"] if point["rsum"] >= rsum), None)


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Per sampler the best rSum, and time to the uniform run's best one over the uniform run's own time."""
    runs = runs_by_sampler(record)
    uniform = {run["seed"]: run for run in runs["uniform"]}
    rows = []
    for name, of in runs.items():
        row: dict[str, Any] = {"sampler": name, "seeds": len(of)}
        row["best"] = interval([max(p["rsum"] for p in run["points"]) for run in of])
        for axis in ("step", "seconds"):
            ratios = []
            for run in of:
                base = uniform[run["seed"]]
                target = max(p["rsum"] for p in base["points"])
                at, own = reached(run, target, axis), reached(base, target, axis)
                if at is not None and own is not None:
                    ratios.append(at / own)
            row[axis], row["reached"] = interval(ratios) if ratios else None, len(ratios)
        decisions = [decision for run in of for decision in run["decisions"]]
        row["measured"] = float(np.mean([d["measured"] for d in decisions])) if decisions else None
        row["epochs_drawn"] = f"{sum(d['go'] for d in decisions)} of {len(decisions)}" if decisions else None
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""

    def shown(of: dict[str, float] | None, digits: int) -> str:
        return f"{of['mean']:.{digits}f} ± {of['high'] - of['mean']:.{digits}f}" if of else "–"

    lines = [
        "| sampler | seeds | best rSum | steps to uniform's best | seconds | reached | measured | epochs drawn so |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        measured = "–" if row["measured"] is None else f"{row['measured']:.2f}"
        lines.append(
            f"| {row['sampler']} | {row['seeds']} | {shown(row['best'], 1)} | {shown(row['step'], 2)} | "
            f"{shown(row['seconds'], 2)} | {row['reached']} of {row['seeds']} | {measured} | "
            f"{row['epochs_drawn'] or '–'} |"
        )
    return "\n".join(lines)


def draw(axes: Axes, record: dict[str, Any], axis: str) -> None:
    """Mean over seeds, and its 95 % interval as a band."""
    for name, of in runs_by_sampler(record).items():
        steps = sorted(set.intersection(*({p["step"] for p in run["points"]} for run in of)))
        points = [{p["step"]: p for p in run["points"]} for run in of]
        bands = [interval([p[step]["rsum"] for p in points]) for step in steps]
        at = [float(np.mean([p[step][axis] for p in points])) for step in steps]
        means, low, high = ([band[key] for band in bands if band] for key in ("mean", "low", "high"))
        axes.plot(at, means, color=COLOURS[name], label=name, linewidth=1.6)
        axes.fill_between(at, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.set_xlabel("training step (updates)" if axis == "step" else "seconds on one processor core")
    axes.set_ylabel("validation rSum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", default="infonce")
    parser.add_argument("--out", type=Path, default=Path("docs/gradient_variance"))
    args = parser.parse_args()
    files = sorted(args.out.glob(f"flickr8k_{args.loss}_*.json"), key=lambda file: int(file.stem.rpartition("_")[2]))
    records = [json.loads(file.read_text()) for file in files]
    figure, axes = plt.subplots(
        len(records), 2, figsize=(9, 0.9 + 2.7 * len(records)), squeeze=False, layout="constrained"
    )
    for row, record in zip(axes, records, strict=True):
        share = record["settings"]["fraction"]
        print(f"\n{share:.0%} of the pairs are copies of {record['settings']['copied']}, {args.loss}\n")
        print(markdown(summary(record)))
        for column, axis in zip(row, ("step", "seconds"), strict=True):
            draw(column, record, axis)
        row[0].set_title(f"{share:.0%} of the pairs are copies of {record['settings']['copied']}", loc="left")
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(
        f"Flickr8k heads, {args.loss}: mean over seeds and its 95 % interval; 1,000 images, 5,000 captions",
        fontsize=10,
    )
    figure.savefig(args.out / f"flickr8k_{args.loss}.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
