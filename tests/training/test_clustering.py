from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from numpy.typing import NDArray

from training.sampling.clustering import OBJECTIVES, Allocation, Clusters, OnlineClusters, fit_clusters, merge_small

ALLOCATIONS: list[Allocation] = ["equal", "proportional", "neyman"]


def vectors(count: int = 60, dim: int = 4, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) * rng.random((count, 1)) * 3


def mixture(count: int, components: int, dim: int, spread: float, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    centers = spread * rng.standard_normal((components, dim))
    return centers[rng.integers(components, size=count)] + rng.standard_normal((count, dim))


def logistic_gradients(duplicated: float, seed: int) -> NDArray[np.float64]:
    """Per-item gradients of logistic regression after 200 steps; a fraction of the items are copies of five."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((1000, 100))
    labels = np.sign(inputs @ rng.standard_normal(100))
    copies = round(1000 * duplicated)
    if copies:
        source = rng.integers(5, size=copies)
        inputs[-copies:], labels[-copies:] = inputs[source], labels[source]
    weights = np.zeros(100)
    for _ in range(200):
        slope = labels / (1 + np.exp(labels * (inputs @ weights)))
        weights += (inputs * slope[:, None]).mean(axis=0)
    return -inputs * (labels / (1 + np.exp(labels * (inputs @ weights))))[:, None]


def naive_scatter(x: NDArray[np.float64], labels: NDArray[np.int64]) -> list[float]:
    return [float(np.square(x[labels == k] - x[labels == k].mean(axis=0)).sum()) for k in np.unique(labels)]


class TestStatistics:
    def test_equal_their_definitions(self) -> None:
        x, labels = vectors(), np.random.default_rng(1).integers(5, size=60)
        clusters = Clusters.of(x, labels)
        np.testing.assert_allclose(clusters.scatter, naive_scatter(x, labels), rtol=1e-12)
        assert clusters.total_scatter == pytest.approx(np.square(x - x.mean(axis=0)).sum(), rel=1e-12)
        assert clusters.explained == pytest.approx(1 - sum(naive_scatter(x, labels)) / clusters.total_scatter)

    def test_objective_is_half_the_sum_of_pairwise_distances(self) -> None:
        x, labels = vectors(), np.random.default_rng(1).integers(5, size=60)
        clusters = Clusters.of(x, labels)
        pairwise = sum(
            np.square(x[i] - x[j]).sum() / 2 for i, j in product(range(60), repeat=2) if labels[i] == labels[j]
        )
        assert (clusters.sizes * clusters.scatter).sum() == pytest.approx(pairwise, rel=1e-10)

    def test_empty_clusters_are_dropped(self) -> None:
        clusters = Clusters.of(vectors(4), np.array([7, 2, 7, 5]))
        assert clusters.labels.tolist() == [2, 0, 2, 1]
        assert clusters.sizes.tolist() == [1, 1, 2]

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    def test_ratio_equals_the_variance_formula(self, allocation: Allocation) -> None:
        x, labels, batch = vectors(), np.random.default_rng(1).integers(4, size=60), 8.0
        clusters = Clusters.of(x, labels)
        n, sigma = clusters.sizes, np.sqrt(clusters.scatter / clusters.sizes)
        shares = {"equal": np.full(4, 1.0), "proportional": n, "neyman": n * sigma}[allocation]
        draws = batch * shares / shares.sum()
        stratified = (np.square(n / 60 * sigma) / draws).sum()
        assert clusters.variance_ratio(allocation) == pytest.approx(stratified / (clusters.total_scatter / 60 / batch))

    def test_ratio_of_no_scatter_is_one(self) -> None:
        clusters = Clusters.of(np.ones((5, 2)), np.array([0, 0, 1, 1, 1]))
        assert [clusters.variance_ratio(allocation) for allocation in ALLOCATIONS] == [1, 1, 1]


class TestExactMoves:
    @pytest.mark.parametrize("objective", ALLOCATIONS)
    @pytest.mark.parametrize("seed", range(4))
    def test_objective_never_rises_and_is_what_the_partition_has(self, objective: Allocation, seed: int) -> None:
        x = vectors(seed=seed)
        clusters = fit_clusters(x, 6, objective, tolerance=0, seed=seed)
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(clusters.objective))
        n, scatter = clusters.sizes, clusters.scatter
        naive = {"equal": n * scatter, "proportional": scatter, "neyman": np.sqrt(n * scatter)}[objective].sum()
        assert clusters.objective[-1] == pytest.approx(naive, rel=1e-9)
        assert clusters.moved[-1] == 0

    @pytest.mark.parametrize("objective", ALLOCATIONS)
    def test_ends_where_no_single_move_helps(self, objective: Allocation) -> None:
        x = vectors(40)
        clusters = fit_clusters(x, 5, objective, tolerance=0, max_sweeps=200)

        def value(labels: NDArray[np.int64]) -> float:
            c = Clusters.of(x, labels)
            return float(OBJECTIVES[objective](c.sizes, c.squares, np.square(c.sums).sum(axis=1)).sum())

        best = value(clusters.labels)
        for item, target in product(range(40), range(5)):
            moved = clusters.labels.copy()
            moved[item] = target
            assert value(moved) >= best * (1 - 1e-9)

    def test_more_than_a_block_of_items(self) -> None:
        x = mixture(2000, 5, 8, 5.0).astype(np.float32)
        clusters = fit_clusters(x, 5, init="kmeans++", tolerance=0)
        assert clusters.objective[-1] == pytest.approx((clusters.sizes * clusters.scatter).sum(), rel=1e-6)
        assert clusters.explained > 0.9

    def test_duplicates_cost_nothing(self) -> None:
        x = np.repeat(vectors(5), 20, axis=0)
        clusters = fit_clusters(x, 10, init="kmeans++", tolerance=0)
        assert clusters.scatter.sum() < 1e-9 * clusters.total_scatter

    def test_a_cluster_is_never_emptied(self) -> None:
        x = vectors(12)
        assert len(fit_clusters(x, 12, tolerance=0).sizes) == 12

    def test_starts_from_given_labels(self) -> None:
        x = mixture(300, 4, 8, 5.0)
        first = fit_clusters(x, 4, tolerance=0)
        again = fit_clusters(x, 4, init=first.labels, tolerance=0)
        assert again.moved == (0,)
        assert (again.labels == first.labels).all()

    def test_same_seed_same_clusters(self) -> None:
        x = vectors()
        assert (fit_clusters(x, 6, seed=3).labels == fit_clusters(x, 6, seed=3).labels).all()

    @pytest.mark.parametrize(("duplicated", "bound"), [(0, 0.40), (0.5, 0.25), (0.9, 0.10)])
    def test_logistic_toy(self, duplicated: float, bound: float) -> None:
        ratios = [
            fit_clusters(logistic_gradients(duplicated, seed), 10, seed=seed).variance_ratio("equal")
            for seed in range(3)
        ]
        assert max(ratios) <= bound

    def test_gaussian_mixture(self) -> None:
        x = mixture(3000, 10, 20, 3.0)
        assert fit_clusters(x, 20).variance_ratio("equal") <= 0.20

    @pytest.mark.parametrize("seed", range(3))
    def test_random_clusters_gain_nothing(self, seed: int) -> None:
        labels = np.random.default_rng(seed).integers(10, size=2000)
        assert 0.95 < Clusters.of(vectors(2000, 50), labels).variance_ratio("equal") < 1.05

    @pytest.mark.parametrize("duplicated", [0, 0.5, 0.9])
    def test_proportional_never_loses(self, duplicated: float) -> None:
        gradients = logistic_gradients(duplicated, 0)
        for objective, method in product(ALLOCATIONS, ("exact_moves", "assign_update", "kmeans")):
            clusters = fit_clusters(gradients, 10, objective, method)  # type: ignore[arg-type]
            assert clusters.variance_ratio("proportional") <= 1


class TestFarFromTheOrigin:
    """The mean of all vectors is in none of what clusters are judged by; here it is up to 1e8 times the scatter."""

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("offset", [1e4, 1e6, 1e8])
    @pytest.mark.parametrize("method", ["exact_moves", "assign_update", "kmeans"])
    @pytest.mark.parametrize("init", ["random", "kmeans++"])
    def test_clusters_are_those_of_centred_vectors(self, method: str, init: str, offset: float, dtype: type) -> None:
        step = 2.0**-4 if dtype == np.float64 else float(np.spacing(np.float32(2 * offset)))
        centred = step * np.rint(8 * mixture(600, 6, 5, 4.0))  # whole steps, which the sum with the offset can hold
        centred -= step * np.rint(centred.mean(axis=0) / step)
        far = (centred + offset).astype(dtype)
        assert (far.astype(np.float64) - offset == centred).all()
        near, found = (
            fit_clusters(x, 6, method=method, init=init, tolerance=0, seed=2)  # type: ignore[arg-type]
            for x in (centred, far)
        )
        assert len(found.sizes) == len(near.sizes)
        assert found.objective[0] == pytest.approx(near.objective[0], rel=1e-6)
        assert found.objective[-1] == pytest.approx(near.objective[-1], rel=0.01)  # equal but for ties in rounding
        assert min(found.objective) > 0
        assert found.variance_ratio("equal") == pytest.approx(near.variance_ratio("equal"), rel=0.01)

    @pytest.mark.parametrize("objective", ALLOCATIONS)
    def test_no_move_raises_the_objective(self, objective: Allocation) -> None:
        x = (1e5 + 0.1 * mixture(800, 8, 6, 3.0)).astype(np.float32)
        clusters = fit_clusters(x, 8, objective, tolerance=0)
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(clusters.objective))
        n, scatter = clusters.sizes, naive_scatter(x.astype(np.float64), clusters.labels)
        naive = {"equal": n * scatter, "proportional": scatter, "neyman": np.sqrt(n * scatter)}[objective]
        assert clusters.objective[-1] == pytest.approx(np.sum(naive), rel=1e-9)

    def test_statistics(self) -> None:
        x, labels = vectors(), np.random.default_rng(1).integers(5, size=60)
        near, far = Clusters.of(x, labels), Clusters.of(x + 1e8, labels)
        np.testing.assert_allclose(far.scatter, near.scatter, rtol=1e-6)
        np.testing.assert_allclose(far.centers, near.centers + 1e8, rtol=1e-15)
        merged = merge_small(far, x + 1e8, minimum=13)
        assert (merged.labels == merge_small(near, x, minimum=13).labels).all()
        assert len(merged.sizes) < 5

    def test_online(self) -> None:
        x, labels = mixture(200, 4, 3, 5.0), np.arange(200) % 4
        near, far = (OnlineClusters(Clusters.of(some, labels)) for some in (x, x + 1e8))
        for start in range(0, 200, 50):
            some = x[start : start + 50]
            assert (near.update(some) == far.update(some + 1e8)).all()
        np.testing.assert_allclose(far.centers - 1e8, near.centers, atol=1e-6)


class TestBaselines:
    def test_assign_update_keeps_its_best_iterate(self) -> None:
        for seed in range(5):
            x = mixture(500, 10, 10, 2.0, seed)
            clusters = fit_clusters(x, 20, method="assign_update", init="kmeans++", tolerance=0, seed=seed)
            assert (clusters.sizes * clusters.scatter).sum() <= min(clusters.objective) * (1 + 1e-9)

    def test_assign_update_is_no_descent_method(self) -> None:
        rises = 0
        for seed in range(5):
            history = fit_clusters(
                mixture(500, 10, 10, 2.0, seed), 20, method="assign_update", tolerance=0, seed=seed
            ).objective
            rises += sum(after > before for before, after in pairwise(history))
        assert rises > 0

    def test_kmeans_descends_and_finds_clear_clusters(self) -> None:
        clusters = fit_clusters(mixture(500, 5, 10, 20.0), 5, method="kmeans", init="kmeans++", tolerance=0)
        assert list(clusters.objective) == sorted(clusters.objective, reverse=True)
        assert clusters.explained > 0.98

    def test_kmeans_with_equal_shares_can_lose(self) -> None:
        assert fit_clusters(logistic_gradients(0, 0), 10, method="kmeans").variance_ratio("equal") > 1

    def test_empty_clusters_are_refilled(self) -> None:
        start = np.zeros(200, dtype=np.int64)
        assert len(fit_clusters(mixture(200, 4, 8, 5.0), 4, method="kmeans", init=start, tolerance=0).sizes) > 1


class TestTinyClusters:
    def test_join_the_cheapest(self) -> None:
        x = np.array([[0.0], [0.1], [5.0], [5.1], [4.9], [0.2], [4.0]])
        merged = merge_small(Clusters.of(x, np.array([0, 0, 1, 1, 1, 0, 2])), x, minimum=2)
        assert merged.labels.tolist() == [0, 0, 1, 1, 1, 0, 1]

    def test_the_last_cluster_stays(self) -> None:
        x = vectors(3)
        assert merge_small(Clusters.of(x, np.array([0, 1, 2])), x, minimum=10).sizes.tolist() == [3]


class TestOnline:
    def test_follows_moving_clusters(self) -> None:
        rng = np.random.default_rng(0)
        centers = np.array([[10.0, 0], [-10, 0]])
        clusters = Clusters.of(np.repeat(centers, 50, axis=0), np.repeat([0, 1], 50))
        online = OnlineClusters(clusters, decay=0.8)
        for _ in range(100):
            centers += [0.05, 0.02]
            truth = rng.integers(2, size=40)
            labels = online.update(centers[truth] + rng.standard_normal((40, 2)))
            assert (labels == truth).all()
        np.testing.assert_allclose(online.centers, centers, atol=1)
        np.testing.assert_allclose(online.sizes.sum(), 1)

    def test_a_starved_cluster_starts_anew(self) -> None:
        clusters = Clusters.of(np.array([[100.0, 100], [0, 0]]), np.array([0, 1]))
        online = OnlineClusters(clusters, decay=0.5)
        for _ in range(12):
            online.update(np.random.default_rng(0).standard_normal((20, 2)))
        assert np.abs(online.centers).max() < 10


@pytest.mark.parametrize(
    ("x", "count", "init"),
    [
        (np.full((3, 2), np.nan), 2, "random"),
        (np.ones((0, 2)), 2, "random"),
        (np.ones((3, 2)), 0, "random"),
        (np.ones((3, 2)), 2, np.array([0, 1, 2])),
    ],
)
def test_refuses(x: NDArray[np.float64], count: int, init: str) -> None:
    with pytest.raises(ValueError):
        fit_clusters(x, count, init=init)  # type: ignore[arg-type]
