"""python -m benchmarks.gradient_variance.random_features [--quick] [--out docs/gradient_variance]

Logistic regression on random ReLU features of Gaussian inputs, labelled by a random teacher, over the ratio of
features to points (overparametrisation τ), the learning rate and the part of the points that are copies of five.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np

from benchmarks.gradient_variance.figures import ratio_sweep
from benchmarks.gradient_variance.measure import SAMPLERS, SVRG
from benchmarks.gradient_variance.report import Moment, arguments, save
from benchmarks.gradient_variance.trajectory import LinearModel, Run, train, with_copies
from training.sampling.clustering import Floats

FEATURES, INPUTS, TEACHER, DISTINCT = 1000, 100, 100, 5
FULL = Run(
    rate=0.0, steps=5_000, snapshot_every=2_500, measure_every=2_500, monte_carlo_every=5_000, draws=50, sweeps=5,
    decay=1e-4, first_snapshot=2_500,
)  # fmt: skip
QUICK = replace(FULL, steps=500, first_snapshot=250, snapshot_every=250, measure_every=250, monte_carlo_every=500)
TAUS, RATES, DUPLICATED = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0), (0.1, 0.01, 0.001), (0.0, 0.5, 0.9)


def features(inputs: Floats, width: int, rng: np.random.Generator) -> Floats:
    directions = rng.standard_normal((width, inputs.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.maximum(inputs @ directions.T, 0)


def problem(tau: float, duplicated: float, seed: int) -> LinearModel:
    rng = np.random.default_rng(seed)
    count = round(FEATURES / tau)
    inputs = rng.standard_normal((count, INPUTS))
    scores = features(inputs, TEACHER, rng) @ rng.standard_normal(TEACHER)
    targets = np.where(scores > scores.mean(), 1, -1).astype(np.float32)
    chosen = with_copies(count, DISTINCT, duplicated, rng)
    return LinearModel(features(inputs, FEATURES, rng).astype(np.float32)[chosen], targets[chosen], "logistic")


def last_ratios(moments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios at the last snapshot; of SVRG, which has none when fresh, just before it."""
    stale, fresh = moments[-2:]
    ratios = {name: of["exact_ratio"] for name, of in fresh["samplers"].items()}
    return {**ratios, SVRG: stale["samplers"][SVRG]["exact_ratio"]}


def main() -> None:
    args, begin = arguments(__doc__), time.perf_counter()
    taus, run, seeds = ((0.5, 2.0), QUICK, range(2)) if args.quick else (TAUS, FULL, range(3))
    grid = {(f, rate, tau): f"{f:.0%} duplicates, learning rate {rate:g}, tau {tau:g}"
            for f, rate, tau in product(DUPLICATED, RATES, taus)}  # fmt: skip
    runs: dict[str, list[list[Moment]]] = {}
    for (fraction, rate, tau), title in grid.items():
        # Monte Carlo, which costs more than all else here, checks one seed.
        runs[title] = [
            train(problem(tau, fraction, seed), replace(run, rate=rate, draws=0 if seed else run.draws), seed)
            for seed in seeds
        ]
    settings = {
        "features": FEATURES,
        "inputs": INPUTS,
        "teacher_width": TEACHER,
        "duplicated_points": DISTINCT,
        "points": {f"{tau:g}": round(FEATURES / tau) for tau in taus},
        "seeds": list(seeds),
        "monte_carlo_seeds": [0],
        **asdict(run),
        "rate": list(RATES),
    }
    summaries = save(args.out, "random_features", settings, runs, begin, last=2)
    ratios = {key: last_ratios(summaries[title]) for key, title in grid.items()}
    print("| duplicates, learning rate, tau | " + " | ".join(SAMPLERS) + " |\n" + "|---" * (len(SAMPLERS) + 1) + "|")
    for (fraction, rate, tau), of in ratios.items():
        cells = [f"{of[name]['mean']:.2g}" if of[name] else "–" for name in SAMPLERS]
        print(f"| {fraction:.0%}, {rate:g}, {tau:g} | " + " | ".join(cells) + " |")
    panels = [
        (f"{fraction:.0%} duplicates, learning rate {rate:g}", {tau: ratios[fraction, rate, tau] for tau in taus})
        for fraction, rate in product(DUPLICATED, RATES)
    ]
    heading = (
        f"{FEATURES} random features, N = {FEATURES}/τ, B = K = {run.batch_size}, after {run.steps:,} steps\n"
        f"fresh clusters and scores; SVRG {run.snapshot_every:,} steps after its snapshot"
    )
    ratio_sweep(args.out / "random_features.png", heading, panels, 3, "overparametrisation τ = features ÷ points")


if __name__ == "__main__":
    main()
