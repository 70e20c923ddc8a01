from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from index import querybank
from index.errors import GalleryError
from index.querybank import QueryBank, choose_beta, rescore


def unit_vectors(seed: int, count: int, dim: int = 6) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def naive_dynamic_inverted_softmax(
    bank: NDArray[np.float32], queries: NDArray[np.float32], gallery: NDArray[np.float32], beta: float, dynamic: bool
) -> list[list[float]]:
    """The paper's equations with exponentials, one number at a time."""

    def dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    def first(query: NDArray[np.float32]) -> int:
        return max(range(len(gallery)), key=lambda item: dot(query, gallery[item]))

    activation_set = {first(query) for query in bank}
    sums = [sum(math.exp(beta * dot(query, item)) for query in bank) for item in gallery]
    rows = []
    for query in queries:
        corrected = [math.exp(beta * dot(query, item)) / total for item, total in zip(gallery, sums, strict=True)]
        mend = not dynamic or first(query) in activation_set
        rows.append(corrected if mend else [dot(query, item) for item in gallery])
    return rows


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(querybank, "_BLOCK_ELEMENTS", 36)  # 3 rows of the gallery at a time


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dynamic", [False, True])
def test_ranks_like_the_papers_equations(dynamic: bool) -> None:
    bank, queries, gallery = unit_vectors(0, 12), unit_vectors(1, 40), unit_vectors(2, 23)
    query_bank = QueryBank(bank, 9.0)
    activated = query_bank.activated(gallery)
    assert 1 < activated.sum() < 12
    scores = queries @ gallery.T
    ours = rescore(scores, query_bank.hubness(gallery), activated if dynamic else None)
    theirs = naive_dynamic_inverted_softmax(bank, queries, gallery, 9.0, dynamic)
    np.testing.assert_array_equal(np.argsort(-ours), np.argsort(-np.array(theirs)))
    assert ours.dtype == np.float32
    untouched = (ours == scores).all(axis=1)
    assert (0 < untouched.sum() < 40) if dynamic else not untouched.any()


@pytest.mark.usefixtures("small_blocks")
def test_hubness_is_a_log_sum_of_exponentials() -> None:
    bank, gallery = unit_vectors(0, 12), unit_vectors(2, 23)
    exact = np.exp(9 * gallery.astype(float) @ bank.T.astype(float)).sum(axis=1)
    np.testing.assert_allclose(QueryBank(bank, 9.0).hubness(gallery), np.log(exact) / 9, rtol=1e-5, atol=1e-6)


def test_hubness_of_extreme_betas() -> None:
    bank, gallery = unit_vectors(0, 12), unit_vectors(2, 23)
    scores = gallery @ bank.T
    np.testing.assert_allclose(QueryBank(bank, 1e5).hubness(gallery), scores.max(axis=1), atol=1e-4)
    flat = QueryBank(bank, 1e-3).hubness(gallery)
    np.testing.assert_allclose(flat - flat.mean(), scores.mean(axis=1) - scores.mean(), atol=1e-3)


@pytest.mark.parametrize("block", [1, 2, 4, 100])
def test_activated_items_come_first_for_a_bank_query_and_ties_go_to_the_first(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(querybank, "_BLOCK_ELEMENTS", block)
    gallery = np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 3]]
    bank = np.array([[0, 1, 0, 0], [0, 0, 0.1, 0.9]], np.float32)
    np.testing.assert_array_equal(QueryBank(bank, 1.0).activated(gallery), [False, True, False, False, True])


def test_candidates_in_any_order_with_gaps() -> None:
    scores = np.array([[0.5, 0.9, -np.inf], [0.8, 0.2, 0.1]], np.float32)
    hubness = np.array([[0.1, 0.6, 0.0], [0.5, 0.1, 0.2]], np.float32)
    activated = np.array([[False, True, False], [False, True, True]])
    np.testing.assert_allclose(rescore(scores, hubness), [[0.4, 0.3, -np.inf], [0.3, 0.1, -0.1]], rtol=1e-5)
    np.testing.assert_allclose(rescore(scores, hubness, activated), [[0.4, 0.3, -np.inf], [0.8, 0.2, 0.1]], rtol=1e-5)


def hub_world() -> tuple[NDArray[np.float32], ...]:
    """Queries near their own of 8 items, all of them still nearer to a ninth, the hub."""
    random = np.random.default_rng(0)
    items = np.eye(9, dtype=np.float32)
    owner = random.integers(0, 8, 120)
    queries = 0.4 * items[owner] + 0.6 * items[8] + random.normal(0, 0.01, (120, 9)).astype(np.float32)
    return queries[:60], queries[60:], items, owner[60:]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_hub_is_found_out(dynamic: bool) -> None:
    bank, queries, gallery, owner = hub_world()
    beta = choose_beta(bank, queries, gallery, owner, dynamic=dynamic)
    assert beta is not None
    query_bank = QueryBank(bank, beta)
    activated = query_bank.activated(gallery) if dynamic else None
    scores = queries @ gallery.T
    assert set(scores.argmax(axis=1)) == {8}
    np.testing.assert_array_equal(rescore(scores, query_bank.hubness(gallery), activated).argmax(axis=1), owner)


@pytest.mark.parametrize(("dynamic", "best"), [(False, 0.1), (True, 1.0)])
def test_beta_is_the_best_of_the_grid(dynamic: bool, best: float) -> None:
    random = np.random.default_rng(37)
    gallery, owner = unit_vectors(37, 30), random.integers(0, 30, 160)
    queries = gallery[owner] + gallery[3] + random.normal(0, 0.3, (160, 6)).astype(np.float32)
    bank, queries, owner = queries[:20], queries[80:], owner[80:]
    betas = (0.1, 1.0, 5.0, 300.0)
    found = []
    for beta in betas:
        ranked = np.argsort(-np.array(naive_dynamic_inverted_softmax(bank, queries, gallery, beta, dynamic)))
        found.append(int((ranked[:, 0] == owner).sum()))
    assert betas[np.argmax(found)] == best
    assert choose_beta(bank, queries, gallery, owner, dynamic=dynamic, betas=betas) == best


def test_of_equally_good_betas_the_first_is_taken() -> None:
    for betas in ((20.0, 40.0), (40.0, 20.0)):
        assert choose_beta(*hub_world(), betas=betas) == betas[0]


def test_no_beta_where_it_cannot_help() -> None:
    gallery = np.eye(9, dtype=np.float32)
    assert choose_beta(gallery, gallery, gallery, np.arange(9)) is None


def test_ties_for_the_first_place_are_misses() -> None:
    bank, queries, gallery, owner = hub_world()
    assert choose_beta(bank, queries, np.ones_like(gallery), owner) is None
    assert choose_beta(bank, queries, np.vstack([gallery, gallery]), owner) is None


def test_bad_input_is_refused() -> None:
    bank = unit_vectors(0, 3)
    for vectors, beta in ((bank, 0.0), (bank, math.inf), (bank, math.nan), (bank[:0], 1.0), (bank[0], 1.0)):
        with pytest.raises(GalleryError, match=r"query bank: [^\n]*$"):
            QueryBank(vectors, beta)
    with pytest.raises(GalleryError):
        QueryBank(bank * np.float32(np.nan), 1.0)
    for function in (QueryBank(bank, 1.0).hubness, QueryBank(bank, 1.0).activated):
        with pytest.raises(GalleryError, match="rebuild"):
            function(unit_vectors(0, 3, dim=5))
        assert function(bank[:0]).shape == (0,)
