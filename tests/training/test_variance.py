from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.sampling.clustering import Clusters, fit_clusters
from training.sampling.stratified import ImportanceBatches, StratifiedBatches
from training.sampling.variance import (
    Bias,
    GradientVariance,
    VarianceReport,
    batch_variance,
    gradient_bias,
    sampled_gain,
)


def collect(draws: Tensor, batch_size: int = 1) -> VarianceReport:
    variance = GradientVariance(batch_size)
    for draw in draws:
        variance.add([draw[:2], draw[2:].reshape(2, -1)])  # two layers of any shape
    return variance.report()


class TestGradientVariance:
    @pytest.mark.parametrize("count", [4, 5, 50])
    def test_equals_the_naive_estimates(self, count: int) -> None:
        draws = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) + 0.5
        report = collect(draws, batch_size=7)
        each = draws.var(dim=0, correction=1)
        assert report.variance == pytest.approx(float(each.sum()))
        assert report.layers == pytest.approx((float(each[:2].sum()), float(each[2:].sum())))
        pairs = [float(draws[i] @ draws[j]) for i, j in itertools.product(range(0, count, 2), range(1, count, 2))]
        assert report.mean_square == pytest.approx(float(np.mean(pairs)))
        assert report.normalised == pytest.approx(report.variance / (report.variance + max(report.mean_square, 0)))
        if report.mean_square > 0:
            assert report.noise_scale == pytest.approx(7 * report.variance / report.mean_square)
        assert report.low <= report.variance <= report.high

    def test_is_unbiased(self) -> None:
        """Averages over many small samples: N(1, 4) in six coordinates."""
        generator = torch.Generator().manual_seed(0)
        reports = [collect(1 + 2 * torch.randn(6, 6, generator=generator)) for _ in range(2000)]
        assert np.mean([r.variance for r in reports]) == pytest.approx(24, rel=0.02)
        assert np.mean([r.mean_square for r in reports]) == pytest.approx(6, rel=0.05)

    def test_pure_noise_is_all_noise(self) -> None:
        """With ten draws the published estimator would find 1.125."""
        generator = torch.Generator().manual_seed(1)
        values = [collect(torch.randn(10, 2000, generator=generator)).normalised for _ in range(20)]
        assert np.mean(values) == pytest.approx(1, abs=0.02)
        assert max(values) <= 1

    def test_interval_covers(self) -> None:
        generator = torch.Generator().manual_seed(2)
        reports = [collect(torch.randn(60, 6, generator=generator)) for _ in range(200)]
        assert np.mean([r.low <= 6 <= r.high for r in reports]) > 0.85

    def test_no_noise(self) -> None:
        report = collect(torch.ones(8, 6))
        assert (report.variance, report.normalised, report.noise_scale) == (0, 0, 0)
        assert collect(torch.zeros(8, 6)).to_json()["noise_scale"] is None

    def test_too_few_draws(self) -> None:
        with pytest.raises(ValueError, match="3 draws are too few"):
            collect(torch.ones(3, 6))


class TestBias:
    def test_tells_equal_from_different_means(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def shifted(by: float) -> Bias:
            return gradient_bias(
                lambda: by + torch.randn(50, generator=generator), lambda: torch.randn(50, generator=generator), 400
            )

        assert not shifted(0).significant
        biased = shifted(0.5)
        assert biased.significant
        assert biased.square == pytest.approx(50 * 0.25, rel=0.15)

    def test_finds_a_batch_drawn_with_wrong_weights(self) -> None:
        gradients = torch.randn(200, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
        gradients[:20] += 5
        labels = np.repeat([0, 1], [20, 180])
        batches = StratifiedBatches(labels, 20, "equal", mix=0.0)

        def mean(weighted: bool) -> Bias:
            draws = (next(batches.epoch(epoch)) for epoch in range(400))

            def gradient() -> Tensor:
                draw = next(draws)
                weights = draw.weights if weighted else np.ones(20)
                return torch.from_numpy(weights) @ gradients[draw.indices] / 20

            return gradient_bias(gradient, lambda: gradients.mean(dim=0), 400)

        assert not mean(weighted=True).significant
        assert mean(weighted=False).significant


def data(count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(7, size=count)
    return rng.standard_normal((count, 5)) * (1 + labels[:, None]) + 4 * rng.standard_normal((7, 5))[labels], labels


@pytest.mark.parametrize("allocation", ["equal", "proportional", "neyman"])
@pytest.mark.parametrize("batch_size", [12, 40])
def test_sampled_gain_is_what_batches_do(allocation: str, batch_size: int) -> None:
    """From the draws of a few batches it finds the variances that many batches have, rounding included."""
    gradients, labels = data(3000)
    clusters = Clusters.of(gradients, labels)
    deviations = np.sqrt(clusters.scatter / clusters.sizes)
    batches = StratifiedBatches(labels, batch_size, allocation, deviations)  # type: ignore[arg-type]
    draws = [next(batches.epoch(epoch)) for epoch in range(3000)]
    means = np.array([(d.weights[:, None] * gradients[d.indices]).mean(axis=0) for d in draws])
    variance = means.var(axis=0, ddof=1).sum() * batch_size
    gains = []
    for start in range(0, 600, 12):
        chosen = draws[start : start + 12]
        items, weights, strata = (
            np.concatenate([getattr(d, n) for d in chosen]) for n in ("indices", "weights", "strata")
        )
        gains.append(sampled_gain(gradients[items], weights, strata, batches.expected, len(chosen)))
    assert np.mean([gain.sampler for gain in gains]) == pytest.approx(variance, rel=0.08)
    exact = batch_variance(gradients, batches.weights, batches.strata, batches.expected)
    assert exact * batch_size == pytest.approx(variance, rel=0.06)
    assert np.mean([gain.uniform for gain in gains]) == pytest.approx(clusters.total_scatter / 3000, rel=0.05)


def test_batch_variance_of_importance_is_its_formula() -> None:
    gradients, _ = data(500)
    lengths = np.linalg.norm(gradients, axis=1)
    batches = ImportanceBatches(lengths, 20, mix=0.0)
    expected = (lengths.mean() ** 2 - np.square(gradients.mean(axis=0)).sum()) / 20
    found = batch_variance(gradients, batches.weights, batches.strata, batches.expected)
    assert found == pytest.approx(expected)


def test_sampled_gain_without_any_gradient() -> None:
    gain = sampled_gain(np.zeros((8, 3)), np.ones(8), np.zeros(8, dtype=np.int64), np.array([4.0]), 2)
    assert (gain.sampler, gain.uniform, gain.ratio) == (0, 0, 1)


def test_proportional_batches_never_vary_more_than_uniform_ones() -> None:
    gradients, _ = data(1000)
    for seed in range(3):
        clusters = fit_clusters(gradients, 12, "proportional", seed=seed)
        variances = []
        for labels in (clusters.labels, np.zeros(1000, dtype=np.int64)):
            batches = StratifiedBatches(labels, 24, mix=0.0, seed=seed)
            draws = (next(batches.epoch(epoch)) for epoch in range(800))
            variances.append(np.array([gradients[d.indices].mean(axis=0) for d in draws]).var(axis=0).sum())
        assert variances[0] < variances[1]
