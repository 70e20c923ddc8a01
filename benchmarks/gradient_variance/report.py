"""Readings of several seeds together: JSON, Markdown table, and how far proportional allocation ever went."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gradient_variance.measure import IMPORTANCE_MIX, PROPORTIONAL, SAMPLERS, UNIFORM
from training.sampling.variance import VarianceReport

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571)  # 97.5 %, one to five degrees of freedom


@dataclass(frozen=True)
class Reading:
    """Variance of one sampler: exact, by Monte Carlo, and its predicted ratio to uniform at a snapshot."""

    exact: float | None
    report: VarianceReport | None
    predicted: float | None

    @property
    def monte_carlo(self) -> float | None:
        return self.report and self.report.variance


@dataclass(frozen=True)
class Moment:
    """What was read ``age`` steps after the samplers' snapshot."""

    step: int
    age: int
    readings: Mapping[str, Reading]


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few steps of one or two seeds, to see it work")
    parser.add_argument("--out", type=Path, default=Path("docs/gradient_variance"))
    return parser.parse_args()


def interval(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean over seeds with its 95 % interval by Student's t; None where a seed has no value."""
    known = np.array([value for value in values if value is not None and np.isfinite(value)])
    if len(known) < len(values):
        return None
    mean = float(known.mean())
    half = 0.0
    if len(known) > 1:
        half = T_QUANTILES[len(known) - 2] * float(known.std(ddof=1)) / len(known) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarise(runs: Sequence[Sequence[Moment]]) -> list[dict[str, Any]]:
    """One entry for each moment of the runs, which have the same moments and differ in their seed."""

    def ratio(moment: Moment, name: str, kind: str) -> float | None:
        own, base = getattr(moment.readings[name], kind), getattr(moment.readings[UNIFORM], kind)
        return own / base if own is not None and base else None

    summary = []
    for moments in zip(*runs, strict=True):
        samplers = {}
        for name in moments[0].readings:
            of = [moment.readings[name] for moment in moments]
            samplers[name] = {
                "exact": interval([reading.exact for reading in of]),
                "monte_carlo": interval([reading.monte_carlo for reading in of]),
                "exact_ratio": interval([ratio(moment, name, "exact") for moment in moments]),
                "monte_carlo_ratio": interval([ratio(moment, name, "monte_carlo") for moment in moments]),
                "predicted_ratio": interval([reading.predicted for reading in of]),
            }
        summary.append({"step": moments[0].step, "age": moments[0].age, "samplers": samplers})
    return summary


def largest_proportional(runs: Sequence[Sequence[Moment]]) -> dict[str, float | None]:
    """Largest fresh ratio of proportional allocation to uniform batches, over all runs and moments.

    The largest of many noisy ratios is above their common mean, so there is also the largest lower end of a Monte
    Carlo ratio's interval (of the proportional sampler's variance; that of the uniform one is taken as known).
    """
    ratios: dict[str, list[float]] = {"predicted": [], "exact": [], "monte carlo": [], "monte carlo, lower end": []}
    for moment in (moment for run in runs for moment in run if moment.age == 0):
        base = moment.readings[UNIFORM]
        for own in (moment.readings[name] for name in PROPORTIONAL):
            if own.predicted is not None:
                ratios["predicted"].append(own.predicted)
            if own.exact is not None and base.exact:
                ratios["exact"].append(own.exact / base.exact)
            if own.report is not None and base.report is not None and base.report.variance:
                ratios["monte carlo"].append(own.report.variance / base.report.variance)
                ratios["monte carlo, lower end"].append(own.report.low / base.report.variance)
    return {kind: max(values, default=None) for kind, values in ratios.items()}


def disagreement(runs: Sequence[Sequence[Moment]]) -> dict[str, float] | None:
    """How far Monte Carlo is from the exact variance, relative to it, over all samplers and moments."""
    both = [
        (reading.exact, reading.report)
        for run in runs
        for moment in run
        for reading in moment.readings.values()
        if reading.report is not None and reading.exact
    ]
    if not both:
        return None
    errors = np.array([report.variance / exact - 1 for exact, report in both])
    return {
        "compared": len(errors),
        "mean": float(errors.mean()),
        "root_mean_square": float(np.sqrt(np.square(errors).mean())),
        "largest": float(np.abs(errors).max()),
        "outside": float(np.mean([not report.low <= exact <= report.high for exact, report in both])),
    }


def markdown_table(problems: Mapping[str, Sequence[Mapping[str, Any]]], kind: str) -> str:
    """Ratios to uniform batches at the last snapshot: predicted, fresh, and with the samplers of the one before."""
    lines = [
        f"| {kind} variance ÷ uniform: predicted; fresh; stale | " + " | ".join(problems) + " |",
        "|---" * (len(problems) + 1) + "|",
    ]

    def ratio(moment: Mapping[str, Any], name: str, kind: str) -> str:
        of = moment["samplers"].get(name, {}).get(f"{kind}_ratio")
        return f"{of['mean']:.3g} ± {of['high'] - of['mean']:.1g}" if of else "–"

    for name in SAMPLERS:
        if any(name in moment["samplers"] for moments in problems.values() for moment in moments):
            cells = []
            for moments in problems.values():
                stale, fresh = moments[-2:]
                cells.append(
                    f"{ratio(fresh, name, 'predicted')}; {ratio(fresh, name, kind)}; {ratio(stale, name, kind)}"
                )
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(
    out: Path,
    name: str,
    settings: Mapping[str, Any],
    problems: Mapping[str, Sequence[Sequence[Moment]]],
    begin: float,
    last: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Write ``NAME.json``, print what every experiment prints, and return the summaries by problem.

    Args:
        out: Directory.
        name: Of the experiment.
        settings: Everything that decides the numbers.
        problems: Runs by problem.
        begin: ``time.perf_counter()`` at the start.
        last: Keep the last so many moments only; 0 keeps all.
    """
    summaries = {title: summarise(runs)[-last:] for title, runs in problems.items()}
    everything = [run for runs in problems.values() for run in runs]
    largest, error = largest_proportional(everything), disagreement(everything)
    content = {
        "settings": {**settings, "importance_mix": IMPORTANCE_MIX},
        "largest_fresh_proportional_ratio": largest,
        "monte_carlo_against_exact": error,
        "problems": summaries,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(shortened(content), indent=1) + "\n")
    shown = ", ".join(f"{kind} {value:.4f}" for kind, value in largest.items() if value is not None)
    print(f"{name}: {time.perf_counter() - begin:.0f} s\nlargest fresh ratio of proportional allocation: {shown}")
    if error:
        print(
            f"Monte Carlo ÷ exact - 1, {error['compared']} comparisons: mean {error['mean']:+.4f}, "
            f"root mean square {error['root_mean_square']:.4f}, largest {error['largest']:.4f}, "
            f"outside the 95 % interval {error['outside']:.1%}"
        )
    return summaries


def shortened(value: Any) -> Any:
    """Numbers with six digits, which is more than any of them means."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value] if isinstance(value, list | tuple) else value
