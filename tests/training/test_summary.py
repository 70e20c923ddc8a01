"""Figures from ranks: intervals against scipy and by how often they cover, and what changed nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from training.robustness import summary
from training.robustness.summary import Interval, epsilon50, percent, recall, share, success


def of_counts(hits: int, count: int) -> Interval:
    part = np.zeros(count, dtype=np.int64)
    part[:hits] = 1
    return share(part, np.ones(count, dtype=np.int64))


@pytest.mark.parametrize("count", [1, 2, 7, 25, 200])
def test_interval_is_that_of_clopper_and_pearson(count: int) -> None:
    found = [of_counts(hits, count) for hits in range(count + 1)]
    for hits, (value, low, high) in enumerate(found):
        exact = stats.binomtest(hits, count).proportion_ci(0.95, "exact")
        assert value == percent(hits, count)
        assert (low / 100, high / 100) == pytest.approx(exact, abs=1e-9)
        assert low <= value <= high
        assert high - low > 1
    for before, after in pairwise(found):
        assert before.low < after.low
        assert before.high < after.high


def test_nothing_and_all_are_not_certain() -> None:
    zero, one = np.full((200, 1), 7), np.zeros((25, 1), dtype=np.int64)
    assert recall(zero, 1) == pytest.approx((0, 0, 1.83), abs=0.005)
    assert recall(one, 1) == pytest.approx((100, 86.28, 100), abs=0.005)
    assert success(one, one + 5, 1) == pytest.approx((100, 86.28, 100), abs=0.005)
    assert np.isnan(success(one + 5, one, 1)).all()


@pytest.mark.parametrize("truth", [0.1, 0.5, 1, 2, 4, 10, 50, 99])
def test_intervals_cover_the_truth(truth: float) -> None:
    """Of 2,000 samples of 200 pictures at least 93 in 100, whatever the truth, which lies in 95 by design."""
    hits = np.random.default_rng(0).binomial(200, truth / 100, 2000)
    intervals = {int(count): of_counts(int(count), 200) for count in np.unique(hits)}
    covered = np.mean([intervals[int(count)].low <= truth <= intervals[int(count)].high for count in hits])
    assert covered >= 0.93


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("captions", [(5, 5), (1, 9)])
@pytest.mark.parametrize("truth", [2, 20])
def test_captions_of_a_picture_may_be_as_alike_as_they_like(
    truth: float, captions: tuple[int, int], alike: float
) -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        whole = rng.integers(captions[0], captions[1] + 1, 60)
        together = rng.random(60) < truth / 100
        part = np.where(rng.random(60) < alike, whole * together, rng.binomial(whole, truth / 100))
        _, low, high = share(part, whole)
        covered.append(low <= truth <= high)
    assert np.mean(covered) >= 0.93


def test_rows_that_differ_in_size_count_as_fewer() -> None:
    even = share(np.array([1, 0, 1, 0]), np.array([5, 5, 5, 5]))
    assert even[1:] == of_counts(0, 4)[1:2] + of_counts(1, 4)[2:]  # 0.4 of 4, to the wider side
    uneven = share(np.array([1, 0, 1, 0]), np.array([17, 1, 1, 1]))
    assert uneven.value == even.value
    assert uneven.high > even.high


@pytest.mark.parametrize("count", [1, 5, 6, 17, 40])
def test_interval_of_the_median_covers_it(count: int) -> None:
    rng = np.random.default_rng(2)
    found = [epsilon50(rng.exponential(size=count)) for _ in range(800)]
    assert np.mean([low <= np.log(2) <= high for _, low, high in found]) >= 0.93
    assert all(low < value < high for value, low, high in found) or count == 6
    assert all((low, high) == (0, np.inf) for _, low, high in found) == (count < 6)


def test_interval_of_the_median_is_the_sign_tests() -> None:
    for count in (6, 7, 20, 33, 100):
        radii = np.random.default_rng(3).exponential(size=count)
        assert epsilon50(radii)[1:] == tuple(stats.quantile_test(radii, p=0.5).confidence_interval(0.95))
    beyond = epsilon50(np.array([1.0, 2, 3, *[np.inf] * 9]))
    assert (beyond.value, beyond.high) == (np.inf, np.inf)


def pictures(changed: list[int], ranks: NDArray[np.int64]) -> dict[str, object]:
    radii = (0.0, 0.1, 0.2, 0.3)[: len(changed)]
    counts = np.array([changed, changed])
    return {**summary.curve(radii, ranks, ranks, counts, "query-image")}


def test_area_leaves_out_what_changed_nothing() -> None:
    ranks = np.array([[[0], [0]], [[0], [0]], [[3], [3]]])
    assert pictures([0, 2, 2], ranks)["area"] == pytest.approx(0.75)
    assert pictures([0, 0, 2], ranks)["area"] == pytest.approx(0.5)
    assert pictures([0, 0, 0], ranks)["area"] == 0


def test_levels_that_changed_nothing_are_found() -> None:
    ranks = np.zeros((3, 2, 1), dtype=np.int64)
    assert summary.unchanged(pictures([0, 0, 2], ranks)) == ["ε = 0.1"]
    text = summary.text_edits(ranks[:2], ["a", "b"], [["x", "x"], ["y", "z"]], editable=1)
    assert (text["changed"], summary.unchanged(text)) == (1, [])
    assert summary.unchanged(summary.text_edits(ranks[:2], ["a"], [["x", "x"]], editable=0)) == ["edits"]
    parts = [{"clean": {"0": [[0], [0]]}, "fog": {"1": [[0], [0]], "3": [[4], [4]]}}] * 2
    found = summary.corruptions(parts, [{"fog": {"1": 0, "3": 2}}, {"fog": {"1": 0, "3": 1}}], list("abcd"))
    assert found["changed"] == {"fog": {"1": 0, "3": 3}}
    assert (found["mean_r1"], found["relative"]) == (0, 0)
    assert summary.unchanged(found) == ["fog 1"]
    none = summary.corruptions(parts, [{"fog": {"1": 0, "3": 0}}] * 2, list("abcd"))
    assert (none["mean_r1"], none["relative"]) == (None, None)


@pytest.mark.parametrize("found", [{"curve": [{"epsilon": 0.0}, {"epsilon": 0.1}]}, {"r1": {}}, {"clean": {}}])
def test_older_records_say_nothing_of_it(found: dict[str, object]) -> None:
    assert summary.unchanged(found) == []
