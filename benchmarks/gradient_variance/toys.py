"""python -m benchmarks.gradient_variance.toys [--quick] [--out docs/gradient_variance]

Logistic regression with 100 Gaussian inputs on 1000 points, 0, 50 and 90 % of them copies of five, and the mean of a
mixture of ten Gaussians.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import numpy as np

from benchmarks.gradient_variance.figures import variance_curves
from benchmarks.gradient_variance.report import arguments, markdown_table, save
from benchmarks.gradient_variance.trajectory import LinearModel, Mean, Run, train, with_copies

POINTS, DIMENSION, DISTINCT = 1000, 100, 5
MIXTURE_POINTS, COMPONENTS, MIXTURE_DIMENSION, DISTANCE = 3000, 10, 20, 3.0
FULL = Run(rate=0.1, steps=4_000, snapshot_every=1_000, measure_every=250, draws=200, monte_carlo_every=1_000)
QUICK = Run(rate=0.1, steps=400, snapshot_every=200, measure_every=100, draws=50, monte_carlo_every=200)


def logistic(duplicated: float, seed: int) -> LinearModel:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((POINTS, DIMENSION))
    targets = np.sign(inputs @ rng.standard_normal(DIMENSION))
    chosen = with_copies(POINTS, DISTINCT, duplicated, rng)
    return LinearModel(inputs[chosen], targets[chosen], "logistic")


def mixture(seed: int) -> Mean:
    """Unit Gaussians around centers that are Gaussian with a standard deviation of ``DISTANCE``."""
    rng = np.random.default_rng(seed)
    centers = DISTANCE * rng.standard_normal((COMPONENTS, MIXTURE_DIMENSION))
    member = rng.integers(COMPONENTS, size=MIXTURE_POINTS)
    return Mean(centers[member] + rng.standard_normal((MIXTURE_POINTS, MIXTURE_DIMENSION)))


def main() -> None:
    args, begin = arguments(__doc__), time.perf_counter()
    run, seeds = (QUICK, range(2)) if args.quick else (FULL, range(3))
    mixture_run = replace(run, batch_size=20, clusters=20)
    runs = {
        f"logistic, {fraction:.0%} duplicates, B = K = {run.clusters}": [
            train(logistic(fraction, seed), run, seed) for seed in seeds
        ]
        for fraction in (0.0, 0.5, 0.9)
    }
    title = f"{COMPONENTS}-component mixture, B = K = {mixture_run.clusters}"
    runs[title] = [train(mixture(seed), mixture_run, seed) for seed in seeds]
    settings = {
        "logistic": {"points": POINTS, "dimension": DIMENSION, "duplicated_points": DISTINCT, **asdict(run)},
        "mixture": {
            "points": MIXTURE_POINTS,
            "dimension": MIXTURE_DIMENSION,
            "components": COMPONENTS,
            "deviation_of_centers": DISTANCE,
            **asdict(mixture_run),
        },
        "seeds": list(seeds),
    }
    summaries = save(args.out, "toys", settings, runs, begin)
    print(markdown_table(summaries, "exact"))
    heading = (
        f"Logistic regression, N = {POINTS}, D = {DIMENSION}, learning rate {run.rate:g}, and a Gaussian mixture, "
        f"N = {MIXTURE_POINTS}, D = {MIXTURE_DIMENSION}\nsnapshot every {run.snapshot_every:,} steps (dots)"
    )
    variance_curves(args.out / "toys.png", heading, summaries, "exact", columns=2)


if __name__ == "__main__":
    main()
