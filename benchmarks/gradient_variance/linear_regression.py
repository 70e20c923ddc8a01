"""python -m benchmarks.gradient_variance.linear_regression [--quick] [--out docs/gradient_variance]

Linear regression with 1000 Gaussian inputs on 500 points, without and with 100 more copies of each of ten points.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np

from benchmarks.gradient_variance.figures import variance_curves
from benchmarks.gradient_variance.report import arguments, markdown_table, save
from benchmarks.gradient_variance.trajectory import LinearModel, Run, train

POINTS, DIMENSION, COPIED, COPIES, NOISE = 500, 1000, 10, 100, 0.1
FULL = Run(rate=5e-5, steps=100_000, snapshot_every=20_000, measure_every=5_000, draws=200, monte_carlo_every=20_000)
QUICK = Run(rate=5e-5, steps=2_000, snapshot_every=1_000, measure_every=500, draws=50, monte_carlo_every=1_000)


def problem(copies: int, seed: int) -> LinearModel:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((POINTS, DIMENSION))
    targets = inputs @ rng.standard_normal(DIMENSION) / DIMENSION**0.5 + NOISE * rng.standard_normal(POINTS)
    chosen = np.append(np.arange(POINTS), np.repeat(np.arange(COPIED), copies))
    return LinearModel(inputs[chosen], targets[chosen], "squared")


def main() -> None:
    args, begin = arguments(__doc__), time.perf_counter()
    run, seeds = (QUICK, range(2)) if args.quick else (FULL, range(3))
    titles = {"no duplicates": 0, f"{COPIED} points copied {COPIES} times": COPIES}
    runs = {title: [train(problem(copies, seed), run, seed) for seed in seeds] for title, copies in titles.items()}
    settings = {
        "points": POINTS,
        "dimension": DIMENSION,
        "copied_points": COPIED,
        "copies": COPIES,
        "target_noise": NOISE,
        "seeds": list(seeds),
        **asdict(run),
    }
    summaries = save(args.out, "linear_regression", settings, runs, begin)
    print(markdown_table(summaries, "exact"))
    heading = (
        f"Linear regression, {POINTS} distinct points, D = {DIMENSION}, B = K = {run.batch_size}\n"
        f"learning rate {run.rate:g}, snapshot every {run.snapshot_every:,} steps (dots)"
    )
    variance_curves(args.out / "linear_regression.png", heading, summaries, "exact", columns=2)


if __name__ == "__main__":
    main()
