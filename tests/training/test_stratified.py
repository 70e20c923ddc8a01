from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from training.data.batches import ShuffledBatches
from training.sampling.clustering import Allocation, Clusters
from training.sampling.stratified import (
    ImportanceBatches,
    StratifiedBatches,
    WeightedBatches,
    allocate,
    systematic_counts,
)

ALLOCATIONS: list[Allocation] = ["equal", "proportional", "neyman"]


def mean_counts(expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact mean of the rounded counts over all orders of the clusters and all offsets."""
    total = np.zeros(len(expected))
    orders = list(itertools.permutations(range(len(expected))))
    for order in orders:
        ends = expected[list(order)].cumsum() % 1
        cuts = np.unique(np.concatenate([[0.0, 1.0], ends]))  # between these the counts do not change
        for low, high in itertools.pairwise(cuts):
            if high - low < 1e-6:  # two ends that are equal up to rounding
                continue
            counts = systematic_counts(expected, (low + high) / 2, np.array(order))
            assert counts.sum() == round(expected.sum())
            assert (np.abs(counts - expected) < 1).all()
            total += (high - low) * counts
    return total / len(orders)


class TestUnbiasedness:
    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @pytest.mark.parametrize("mix", [0.0, 0.2, 0.5, 1.0])
    @pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 2], [0, 0, -1, 1, 1, -1, 2]])
    def test_by_enumeration(self, allocation: Allocation, mix: float, labels: list[int]) -> None:
        """Every order, every offset, and every item of a stratum alike: the mean is the mean gradient."""
        gradients = np.random.default_rng(0).standard_normal((len(labels), 3))
        batches = StratifiedBatches(np.array(labels), 4, allocation, np.array([0.1, 2.0, 0.0]), mix)
        strata = [batches._members[start:][:size] for start, size in zip(batches._starts, batches._sizes, strict=True)]
        estimate = np.zeros(3)
        for members, count in zip(strata, mean_counts(batches.expected), strict=True):
            estimate += count * (batches.weights[members, None] * gradients[members]).mean(axis=0)
        np.testing.assert_allclose(estimate / 4, gradients.mean(axis=0), atol=1e-5)

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    def test_items_of_a_cluster_are_drawn_alike(self, allocation: Allocation) -> None:
        labels = np.array([0] * 5 + [1] * 3)
        drawn: Counter[int] = Counter()
        batches = StratifiedBatches(labels, 3, allocation, np.array([1.0, 0.2]), mix=0.2)
        for epoch in range(4000):
            for draw in batches.epoch(epoch):
                drawn.update(draw.indices.tolist())
        expected = 4000 * len(batches) * 3 / (len(labels) * batches.weights)
        for item in range(8):
            assert abs(drawn[item] - expected[item]) < 5 * math.sqrt(expected[item])

    def test_importance_by_enumeration(self) -> None:
        gradients = np.random.default_rng(0).standard_normal((7, 3))
        scores = np.linalg.norm(gradients, axis=1)
        batches = ImportanceBatches(scores, 4, mix=0.3)
        probabilities = np.diff(batches._cumulative, prepend=0)
        estimate = (probabilities[:, None] * batches.weights[:, None] * gradients).sum(axis=0)
        np.testing.assert_allclose(estimate, gradients.mean(axis=0), atol=1e-12)

    @pytest.mark.parametrize("mix", [0.1, 0.5])
    def test_no_weight_exceeds_the_inverse_of_the_mix(self, mix: float) -> None:
        labels = np.array([0] * 1000 + [1])
        assert StratifiedBatches(labels, 4, "equal", mix=mix).weights.max() <= 1 / mix
        assert ImportanceBatches(np.eye(1, 50)[0], 4, mix=mix).weights.max() <= 1 / mix


class TestVariance:
    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    def test_formula_equals_monte_carlo(self, allocation: Allocation) -> None:
        rng = np.random.default_rng(0)
        labels = rng.integers(4, size=400)
        gradients = rng.standard_normal((400, 5)) * (1 + labels[:, None]) + 3 * np.eye(4, 5)[labels]
        clusters = Clusters.of(gradients, labels)
        deviations = np.sqrt(clusters.scatter / clusters.sizes)
        estimates = []
        batches = StratifiedBatches(labels, 40, allocation, deviations, mix=0.0)
        for epoch in range(4000):  # one batch of each: batches of an epoch are drawn without replacement
            draw = next(batches.epoch(epoch))
            estimates.append((draw.weights[:, None] * gradients[draw.indices]).mean(axis=0))
        # within a batch, too: the finite-population correction of each stratum
        expected, n = batches.expected, clusters.sizes
        variance = (np.square(n / 400 * deviations) / expected * (n - expected) / (n - 1)).sum()
        assert np.var(estimates, axis=0).sum() == pytest.approx(variance, rel=0.03)
        uniform = clusters.total_scatter / 400 / 40
        with_replacement = (np.square(n / 400 * deviations) / expected).sum()
        assert with_replacement / uniform == pytest.approx(clusters.variance_ratio(allocation), rel=0.02)


class TestAllocate:
    SIZES = np.array([100.0, 10, 1, 50])
    DEVIATIONS = np.array([0.0, 5.0, 3.0, 1.0])

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @pytest.mark.parametrize("batch", [2.0, 4.0, 6.4, 100.0])
    def test_sums_to_the_batch(self, allocation: Allocation, batch: float) -> None:
        expected = allocate(self.SIZES, self.DEVIATIONS, batch, allocation)
        assert expected.sum() == pytest.approx(batch)
        assert (expected > 0).all()

    def test_neyman_follows_size_times_deviation(self) -> None:
        least = np.array([1, 1, 20 / 161, 1])  # the third has less than one draw when shares are proportional
        rest = np.array([0, 50, 3, 50]) / 103
        expected = allocate(self.SIZES, self.DEVIATIONS, 20, "neyman")
        np.testing.assert_allclose(expected, least + (20 - least.sum()) * rest)

    def test_the_mix_is_proportional(self) -> None:
        pure, mixed = (allocate(self.SIZES, self.DEVIATIONS, 20, "neyman", mix) for mix in (0, 0.3))
        np.testing.assert_allclose(mixed, 0.7 * pure + 0.3 * 20 * self.SIZES / self.SIZES.sum())

    def test_neyman_without_scatter_is_proportional(self) -> None:
        np.testing.assert_array_equal(
            allocate(self.SIZES, np.zeros(4), 10, "neyman"), allocate(self.SIZES, np.zeros(4), 10, "proportional")
        )

    @given(
        st.lists(st.tuples(st.integers(1, 500), st.floats(0, 10)), min_size=1, max_size=30),
        st.floats(1, 300),
    )
    @settings(max_examples=200, deadline=None)
    def test_neyman_for_any_clusters(self, clusters: list[tuple[int, float]], batch: float) -> None:
        sizes, deviations = (np.array(column, dtype=float) for column in zip(*clusters, strict=True))
        expected = allocate(sizes, deviations, batch, "neyman")
        assert expected.sum() == pytest.approx(batch)
        assert (expected > 0).all()


def kinds(count: int = 103, batch: int = 10, **shared: int) -> list[WeightedBatches]:
    rng = np.random.default_rng(0)
    labels, deviations = rng.integers(-1, 6, size=count), rng.random(6)
    stratified = [StratifiedBatches(labels, batch, kind, deviations, **shared) for kind in ALLOCATIONS]
    return [*stratified, ImportanceBatches(rng.random(count), batch, **shared)]


@pytest.mark.parametrize("number", range(4))
class TestEpochs:
    def test_length_is_exact_and_that_of_a_shuffle(self, number: int) -> None:
        for count, batch in [(103, 10), (100, 10), (101, 10), (5, 10), (102, 10)]:
            batches = kinds(count, batch)[number]
            draws = list(batches.epoch(0))
            assert len(draws) == len(batches) == len(ShuffledBatches(count, batch, 0))
            assert {len(draw.indices) for draw in draws} == {batch}

    def test_same_seed_same_batches_and_other_epochs_differ(self, number: int) -> None:
        def indices(seed: int, epoch: int) -> list[list[int]]:
            return [draw.indices.tolist() for draw in kinds(seed=seed)[number].epoch(epoch)]

        assert indices(1, 2) == indices(1, 2)
        assert indices(1, 2) != indices(1, 3)
        assert indices(1, 2) != indices(2, 2)

    @pytest.mark.parametrize("start", [1, 5, 10])
    def test_resumes_anywhere(self, number: int, start: int) -> None:
        whole = list(kinds()[number].epoch(4))
        rest = list(kinds()[number].epoch(4, start))
        assert [d.indices.tolist() for d in rest] == [d.indices.tolist() for d in whole[start:]]

    def test_every_index_is_reached(self, number: int) -> None:
        seen = {int(i) for epoch in range(60) for draw in kinds()[number].epoch(epoch) for i in draw.indices}
        assert seen == set(range(103))


class TestStrata:
    def test_one_cluster_is_a_plain_shuffle(self) -> None:
        batches = StratifiedBatches(np.zeros(100, dtype=np.int64), 10, mix=0.0)
        draws = list(batches.epoch(0))
        assert sorted(np.concatenate([draw.indices for draw in draws]).tolist()) == list(range(100))
        assert (batches.weights == 1).all()

    def test_proportional_visits_each_item_about_once(self) -> None:
        labels = np.repeat([0, 1, 2], [50, 30, 20])
        draws = list(StratifiedBatches(labels, 10, mix=0.0).epoch(0))
        assert sorted(np.concatenate([draw.indices for draw in draws]).tolist()) == list(range(100))
        assert all(np.bincount(draw.strata).tolist() == [5, 3, 2] for draw in draws)

    def test_strata_name_where_items_come_from(self) -> None:
        labels = np.repeat([0, 1, 2], 20)
        for draw in StratifiedBatches(labels, 10, mix=0.3).epoch(0):
            assert (labels[draw.indices] == draw.strata).all()

    def test_unseen_items_form_a_cluster(self) -> None:
        labels = np.array([0] * 10 + [-1] * 10)
        draws = list(StratifiedBatches(labels, 4, "neyman", np.array([1.0]), mix=0.0).epoch(0))
        assert all(np.bincount(draw.strata).tolist() == [2, 2] for draw in draws)

    def test_tiny_clusters_in_large_batches(self) -> None:
        labels = np.array([0] * 50 + [1])
        for draw in StratifiedBatches(labels, 16, "equal", mix=0.0).epoch(0):
            assert (draw.indices == 50).sum() == 8


class TestRanks:
    @pytest.mark.parametrize("number", range(4))
    def test_shares_make_up_the_whole(self, number: int) -> None:
        whole = list(kinds()[number].epoch(1))
        shares = [list(kinds(rank=rank, world_size=2)[number].epoch(1)) for rank in range(2)]
        for position, draw in enumerate(whole):
            first, second = (share[position].indices.tolist() for share in shares)
            assert [first, second] == [draw.indices[0::2].tolist(), draw.indices[1::2].tolist()]

    def test_two_processes(self, tmp_path: Path) -> None:
        mp.spawn(_share, args=(tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
        gathered = torch.load(tmp_path / "gathered.pt", weights_only=True)
        whole = [draw.indices.tolist() for draw in uniform().epoch(0)]
        for batch, shares in zip(whole, gathered.tolist(), strict=True):
            assert sorted(shares[0] + shares[1]) == sorted(batch)
            assert not set(shares[0]) & set(shares[1])


def uniform(rank: int = 0, world_size: int = 1) -> StratifiedBatches:
    labels = np.repeat(np.arange(5), 20)
    return StratifiedBatches(labels, 10, mix=0.0, rank=rank, world_size=world_size)


def _share(rank: int, directory: Path) -> None:
    """One of two processes: half an epoch, a restart, the other half; both sides gathered."""
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=2)
    first = [draw.indices for _, draw in zip(range(4), uniform(rank, 2).epoch(0), strict=False)]
    rest = [draw.indices for draw in uniform(rank, 2).epoch(0, start=4)]
    own = torch.from_numpy(np.stack(first + rest))  # (steps, B / 2)
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    if rank == 0:
        torch.save(torch.stack(both, dim=1), directory / "gathered.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "make",
    [
        lambda: StratifiedBatches(np.zeros(4, dtype=np.int64), 4, mix=1.5),
        lambda: StratifiedBatches(np.zeros(4, dtype=np.int64), 4, "neyman"),
        lambda: StratifiedBatches(np.zeros(4, dtype=np.int64), 3, world_size=2),
        lambda: StratifiedBatches(np.zeros(4, dtype=np.int64), 4, rank=2, world_size=2),
        lambda: ImportanceBatches(np.array([1.0, -1.0]), 2),
        lambda: ImportanceBatches(np.array([1.0, 0.0]), 2, mix=0.0),
    ],
)
def test_refuses(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]
