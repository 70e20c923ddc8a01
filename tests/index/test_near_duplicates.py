from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index.errors import GalleryError
from index.near_duplicates import collapse


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def naive_collapse(vectors: list[list[float]], threshold: float) -> list[int]:
    representatives: list[int] = []
    joined = []
    for position, vector in enumerate(vectors):
        similar = [r for r in representatives if cosine(vectors[r], vector) >= threshold - 1e-6]
        if not similar:
            representatives.append(position)
        joined.append(similar[0] if similar else position)
    return joined


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), max_size=12),
    threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.7, 0.9, 1.0]),
)
def test_matches_loops(rows: list[list[float]], threshold: float) -> None:
    vectors = np.array(rows, np.float32).reshape(-1, 3)
    assert collapse(vectors, threshold).tolist() == naive_collapse(rows, threshold)


def loop(vectors: NDArray[np.float32], threshold: float) -> list[int]:
    """As :func:`naive_collapse`, in float64 and fast enough for some thousands."""
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    representative = np.full(len(unit), -1)
    for position in range(len(unit)):
        if representative[position] < 0:
            representative[position] = position
            free = position + 1 + np.flatnonzero(representative[position + 1 :] < 0)
            representative[free[unit[free] @ unit[position] >= threshold - 1e-6]] = position
    return list(representative.tolist())


def planted(kind: str, count: int = 1500) -> NDArray[np.float32]:
    """Vectors of 48 dimensions among which many look the same."""
    random = np.random.default_rng(1)
    rows = random.standard_normal((count, 48))
    if kind == "copies":
        rows = rows[random.integers(0, count // 5, count)]
    elif kind == "at the threshold":  # each stands at a cosine of 0.9 to one of ten, up to the last bits
        rows = np.linalg.qr(rows[:, :].T @ rows)[0][random.integers(0, 10, count)]
        aside = random.standard_normal(rows.shape)
        aside -= (aside * rows).sum(1, keepdims=True) * rows
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        near = 0.9 - 1e-6 + random.uniform(-1e-7, 1e-7, (count, 1))
        rows[10:] = (near * rows + np.sqrt(1 - near**2) * aside)[10:]
    elif kind == "clusters":
        rows = rows[random.integers(0, 40, count)] + 0.4 * rows
    lengths = np.float32(10) ** random.integers(-30, 30, (count, 1)) if kind == "lengths" else np.float32(1)
    return rows.astype(np.float32) * lengths


@pytest.mark.parametrize("kind", ["copies", "at the threshold", "clusters", "lengths", "nothing"])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_blocks_group_as_a_loop_in_float64_does(kind: str, threshold: float) -> None:
    vectors = planted(kind)
    expected = loop(vectors, threshold)
    assert collapse(vectors, threshold).tolist() == expected
    for most in (1, 7, 600):
        wanted = set(sorted(set(expected))[:most])
        assert collapse(vectors, threshold, most).tolist() == [n if n in wanted else -1 for n in expected]


def test_memory_does_not_grow_with_what_is_grouped() -> None:
    vectors = np.tile(np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32), (1000, 1))
    tracemalloc.start()
    try:
        collapse(vectors, 0.9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < vectors.nbytes  # in float64 and a copy for each representative, it was three times as much


def at(*degrees: float) -> NDArray[np.float32]:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_better_one_stands_for_the_others() -> None:
    vectors = at(0, 90, 2, 91, 45)
    assert collapse(vectors, math.cos(math.radians(5))).tolist() == [0, 1, 0, 1, 4]


def test_a_chain_does_not_pull_in_what_is_far_from_the_first() -> None:
    assert collapse(at(0, 8, 16, 24), math.cos(math.radians(10))).tolist() == [0, 0, 2, 2]


def test_of_two_representatives_within_reach_the_better_one_is_joined() -> None:
    assert collapse(at(0, 12, 9), math.cos(math.radians(10))).tolist() == [0, 1, 0]


def test_copies_reach_a_threshold_of_one_and_nothing_else_does() -> None:
    row = np.random.default_rng(0).standard_normal((50, 300), np.float32)
    row /= np.linalg.norm(row, axis=1, keepdims=True)
    assert collapse(np.vstack([row, 2 * row]), 1).tolist() == [*range(50), *range(50)]


def test_vectors_of_length_zero_stay_alone() -> None:
    assert collapse(np.zeros((3, 4), np.float32), 0.5).tolist() == [0, 1, 2]


def test_bad_input_is_refused() -> None:
    vectors = at(0, 1)
    for bad, threshold in (
        (vectors, math.nan),
        (vectors, 1.1),
        (vectors[0], 0.9),
        (vectors * np.float32(np.nan), 0.9),
    ):
        with pytest.raises(GalleryError, match=r"near duplicates: [^\n]*$"):
            collapse(bad, threshold)
