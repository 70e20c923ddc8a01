from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index.errors import GalleryError
from index.vector_index import METRICS, OrderIndex, search_blocks

DIM = 5
KINDS = pytest.mark.parametrize("metric", METRICS)


def similarity(metric: str, query: NDArray[Any], vector: NDArray[Any]) -> float:
    """One pair at a time, in float64."""
    pairs = list(zip(query.astype(float), vector.astype(float), strict=True))
    if metric == "cosine":
        return math.fsum(q * v for q, v in pairs)
    return -math.sqrt(sum(max(0.0, q - v) ** 2 for q, v in pairs))


def naive_search(metric: str, stored: dict[int, NDArray[Any]], query: NDArray[Any], k: int) -> list[tuple[float, int]]:
    scored = [(similarity(metric, query, vector), key) for key, vector in stored.items()]
    return sorted(scored, key=lambda hit: (-hit[0], hit[1]))[:k]


def random_vectors(seed: int, count: int, dim: int = DIM) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


@KINDS
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations_matches_a_dictionary(metric: str, data: st.DataObject) -> None:
    index = METRICS[metric](DIM)
    stored: dict[int, NDArray[np.float32]] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            drawn = data.draw(st.lists(st.integers(0, 2**40), unique=True))
            new = [key for key in drawn if key not in stored]
            vectors = random_vectors(data.draw(st.integers(0, 1000)), len(new))
            index.add(np.array(new, np.int64), vectors)
            stored.update(zip(new, vectors, strict=True))
        else:
            gone = data.draw(st.lists(st.sampled_from([*stored, 7]), unique=True))
            assert index.remove(np.array(gone, np.int64)) == len(stored.keys() & set(gone))
            stored = {key: vector for key, vector in stored.items() if key not in gone}
        assert len(index) == len(stored)
        allowed = data.draw(st.none() | st.lists(st.sampled_from([*stored, 7])))
        visible = {key: stored[key] for key in stored if allowed is None or key in allowed}
        k = data.draw(st.integers(1, 12))
        queries = random_vectors(data.draw(st.integers(0, 1000)), 2)
        hits = index.search(queries, k, None if allowed is None else np.array(allowed, np.int64))
        assert [field.dtype for field in hits] == [np.float32, np.int64]
        assert hits.scores.shape == hits.ids.shape == (2, k)
        for query, scores, ids in zip(queries, *hits, strict=True):
            expected = naive_search(metric, visible, query, k)
            # Random vectors may come twice; among such ties the exact index keeps any.
            np.testing.assert_allclose(scores[: len(expected)], [score for score, _ in expected], atol=1e-6)
            found = ids[: len(expected)].tolist()
            assert len(set(found)) == len(found)
            found_scores = [similarity(metric, query, visible[key]) for key in found]
            np.testing.assert_allclose(found_scores, scores[: len(expected)], atol=1e-6)
            assert (scores[len(expected) :] == -np.inf).all()
            assert (ids[len(expected) :] == -1).all()


@KINDS
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("share", [None, 0.5, 0.01, 0.0])
def test_allowed_ids_match_brute_force_past_faiss_batch_thresholds(
    metric: str, queries: int, share: float | None
) -> None:
    vectors, rng = random_vectors(0, 3000, 32), np.random.default_rng(1)
    ids = rng.permutation(10**9 + 7 * np.arange(3000))
    index = METRICS[metric](32)
    index.add(ids, vectors)
    allowed = None if share is None else rng.permutation(ids)[: int(share * 3000)]
    scores, found = index.search(query := random_vectors(2, queries, 32), 120, allowed)
    if metric == "cosine":
        all_scores = query @ vectors.T
    else:
        all_scores = -np.linalg.norm(np.maximum(0, query[:, None] - vectors), axis=2)
    if allowed is not None:
        all_scores[:, ~np.isin(ids, allowed)] = -np.inf
    expected = -np.sort(-all_scores, axis=1)[:, :120]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    for found_row, expected_row, all_row in zip(found, expected, all_scores, strict=True):
        real = np.isfinite(expected_row)
        by_id = dict(zip(ids.tolist(), all_row.tolist(), strict=True))
        np.testing.assert_allclose([by_id[key] for key in found_row[real]], expected_row[real], atol=1e-6)
        assert len(set(found_row[real])) == real.sum()
        assert (found_row[~real] == -1).all()


def test_order_scan_across_blocks_matches_one_pass() -> None:
    vectors = random_vectors(0, 700, 1024)  # 256 rows a block
    index = OrderIndex(1024)
    index.add(np.arange(700), vectors)
    query = random_vectors(1, 1, 1024)
    scores, ids = index.search(query, 700)
    expected = -np.linalg.norm(np.maximum(0, query - vectors), axis=1)
    np.testing.assert_allclose(scores[0], np.sort(expected)[::-1], rtol=1e-5)
    np.testing.assert_allclose(scores[0], expected[ids[0]], rtol=1e-5)


def test_order_similarity_is_zero_below_and_the_shortfall_otherwise() -> None:
    index = OrderIndex(2)
    index.add(np.array([1, 2]), np.array([[3, 4], [0, 0]], np.float32))
    scores, ids = index.search(np.array([[3, 4]], np.float32), 2)
    np.testing.assert_array_equal(ids, [[1, 2]])
    np.testing.assert_allclose(scores, [[0, -5]])


@KINDS
def test_equal_scores_come_lower_id_first(metric: str) -> None:
    index = METRICS[metric](DIM)
    index.add(np.arange(50)[::-1].copy(), np.ones((50, DIM), np.float32))
    ids = index.search(np.ones((1, DIM), np.float32), 50).ids
    np.testing.assert_array_equal(ids, [np.arange(50)])


def test_order_index_keeps_the_lowest_ids_among_ties() -> None:
    index = OrderIndex(DIM)
    index.add(np.arange(50)[::-1].copy(), np.ones((50, DIM), np.float32))
    np.testing.assert_array_equal(index.search(np.ones((1, DIM), np.float32), 3).ids, [[0, 1, 2]])


@KINDS
def test_room_made_in_advance_changes_nothing(metric: str) -> None:
    index, rows = METRICS[metric](DIM, 7), random_vectors(0, 20)
    assert len(index) == index.last_id == 0
    index.add(np.arange(20) * 3, rows)
    assert (index.dim, len(index), index.last_id) == (DIM, 20, 57)
    plain = METRICS[metric](DIM)
    plain.add(np.arange(20) * 3, rows)
    for roomy, usual in zip(index.search(rows, 4), plain.search(rows, 4), strict=True):
        np.testing.assert_array_equal(roomy, usual)


@KINDS
def test_last_id_outlives_the_last_vector(metric: str) -> None:
    index = METRICS[metric](DIM)
    index.add(np.array([9, 4]), random_vectors(0, 2))
    np.testing.assert_array_equal(index.live_ids(), [4, 9])
    assert index.remove(np.array([9, 9, 1])) == 1
    np.testing.assert_array_equal(index.live_ids(), [4])
    assert index.last_id == 9
    index.add(np.array([6]), random_vectors(1, 1))
    assert index.last_id == 9


@pytest.mark.parametrize("sizes", [(1000,), (1, 998, 1), (3, 3, 994)])
@pytest.mark.parametrize("k", [1, 7, 1200])
def test_searching_in_blocks_matches_one_pass(sizes: tuple[int, ...], k: int) -> None:
    rows, query = random_vectors(0, 1000), random_vectors(1, 3)
    ids = np.cumsum(np.random.default_rng(0).integers(1, 9, 1000))
    bounds = np.cumsum([0, *sizes])
    blocks = [(ids[start:stop], rows[start:stop]) for start, stop in pairwise(bounds)]
    scores, found = search_blocks(query, k, blocks)
    expected = query @ rows.T
    order = np.lexsort((np.broadcast_to(ids, expected.shape), -np.round(expected, 5)), axis=1)[:, :k]
    real = min(k, 1000)
    np.testing.assert_allclose(scores[:, :real], np.take_along_axis(expected, order, 1), atol=1e-5)
    if k <= 7:
        np.testing.assert_array_equal(found, ids[order])
    assert (found[:, real:] == -1).all()
    assert (scores[:, real:] == -np.inf).all()


def test_searching_no_blocks_finds_nothing() -> None:
    hits = search_blocks(random_vectors(0, 2), 3, [])
    assert (hits.ids == -1).all()


@KINDS
@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([4, 5], np.ones((2, DIM)), "id 4 "),
        ([6, 6], np.ones((2, DIM)), "id 6 "),
        ([-1], np.ones((1, DIM)), "id -1 "),
        ([5, 6], np.array([[1] * DIM, [1] * (DIM - 1) + [np.nan]]), "id 6: .*not finite"),
        ([5], np.full((1, DIM), np.inf), "id 5: .*not finite"),
        ([5], np.ones((1, DIM + 1)), r"\(1, 6\).*\(N, 5\)"),
        ([5, 6], np.ones((1, DIM)), r"\(2,\) for 1 "),
    ],
)
def test_add_refuses_and_stays_as_it_was(metric: str, ids: list[int], vectors: NDArray[Any], message: str) -> None:
    index = METRICS[metric](DIM)
    index.add(np.array([4]), np.ones((1, DIM), np.float32))
    with pytest.raises(GalleryError, match=message):
        index.add(np.array(ids), vectors)
    np.testing.assert_array_equal(index.search(np.ones((1, DIM), np.float32), 3).ids, [[4, -1, -1]])


@KINDS
def test_search_refuses_bad_queries(metric: str) -> None:
    index = METRICS[metric](DIM)
    with pytest.raises(GalleryError, match=r"query 1: .*not finite"):
        index.search(np.array([[0] * DIM, [np.nan] * DIM], np.float32), 1)
    with pytest.raises(GalleryError, match=r"\(N, 5\)"):
        index.search(np.ones((1, 3), np.float32), 1)
    with pytest.raises(GalleryError, match="k is 0"):
        index.search(np.ones((1, DIM), np.float32), 0)
