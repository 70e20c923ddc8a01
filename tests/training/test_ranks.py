"""Ranks against sorting and double loops, on scores that are exact in floating point."""

from __future__ import annotations

import operator
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.errors import InputError
from training.evaluation.ranks import RetrievalRanks, Ties, ranks_from_scores, retrieval_ranks
from training.models.similarity import order_scores

HAND_MADE = np.array(
    [
        # captions 0, 1 describe image 0, and so on
        [0.9, 0.2, 0.8, 0.1, 0.0, 0.3, 0.4, 0.5],  # best own first
        [0.7, 0.1, 0.6, 0.2, 0.9, 0.8, 0.0, 0.3],  # 0.6 below 0.9, 0.8, 0.7
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],  # all level
        [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.2, 0.6],  # 0.6 below 0.7, level with 0.6
    ]
)
HAND_OWNER = np.arange(8) // 2


def integers(rng: np.random.Generator, *shape: int, high: int = 4) -> NDArray[np.float32]:
    """Small integers: sums are exact in any order, and ties are frequent."""
    return rng.integers(-high, high + 1, shape).astype(np.float32)


def ragged_owner(rng: np.random.Generator, images: int) -> NDArray[np.int64]:
    """One to nine captions per image, in random order."""
    return rng.permutation(np.repeat(np.arange(images), rng.integers(1, 10, images)))


def by_sorting(scores: NDArray[np.floating], owner: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Ranks by a full sort per query; right only without ties."""
    i2t, t2i = [], []
    for image, row in enumerate(scores):
        ranked = np.argsort(-row).tolist()
        i2t.append(min(ranked.index(caption) for caption in np.flatnonzero(owner == image)))
    for caption, column in enumerate(scores.T):
        t2i.append(np.argsort(-column).tolist().index(owner[caption]))
    return i2t, t2i


def by_double_loop(
    scores: NDArray[np.floating], owner: NDArray[np.int64], ties: Ties
) -> tuple[list[float], list[float]]:
    def rank(own: list[float], others: list[float]) -> float:
        above, level = (sum(compare(s, max(own)) for s in others) for compare in (operator.gt, operator.eq))
        return above + {"pessimistic": level, "expected": level / (own.count(max(own)) + 1), "optimistic": 0}[ties]

    images, captions = range(scores.shape[0]), range(scores.shape[1])
    i2t = [
        rank([scores[i, c] for c in captions if owner[c] == i], [scores[i, c] for c in captions if owner[c] != i])
        for i in images
    ]
    t2i = [rank([scores[owner[c], c]], [scores[i, c] for i in images if i != owner[c]]) for c in captions]
    return i2t, t2i


def assert_same(one: RetrievalRanks, other: RetrievalRanks) -> None:
    for field in ("i2t", "t2i", "i2t_tied", "t2i_tied"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_ranks_equal_a_full_sort_with_five_captions_per_image() -> None:
    rng = np.random.default_rng(0)
    images, captions = rng.normal(size=(120, 32)), rng.normal(size=(600, 32))
    owner = np.arange(600) // 5
    captions += 0.5 * images[owner]
    ranks = retrieval_ranks(images, captions, owner)
    i2t, t2i = by_sorting(images @ captions.T, owner)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i
    assert ranks.ties == 0


def test_ranks_equal_a_full_sort_with_one_to_nine_captions_in_any_order() -> None:
    rng = np.random.default_rng(1)
    owner = ragged_owner(rng, 300)  # more captions than one window of own scores
    images, captions = rng.normal(size=(300, 16)), rng.normal(size=(len(owner), 16))
    captions += 0.5 * images[owner]
    ranks = retrieval_ranks(images, captions, owner, block=64)
    i2t, t2i = by_sorting(images @ captions.T, owner)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i


@pytest.mark.parametrize(
    ("ties", "i2t", "t2i"),
    [
        ("pessimistic", [0, 3, 6, 2], [0, 2, 1, 2, 2, 2, 2, 0]),
        ("expected", [0, 3, 2, 1.5], [0, 1.5, 1, 2, 2, 2, 2, 0]),
        ("optimistic", [0, 3, 0, 1], [0, 1, 1, 2, 2, 2, 2, 0]),
    ],
)
def test_hand_made_matrix(ties: Ties, i2t: list[float], t2i: list[float]) -> None:
    ranks = ranks_from_scores(HAND_MADE, HAND_OWNER, ties)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i
    assert ranks.i2t_tied.tolist() == [False, False, True, True]
    assert np.flatnonzero(ranks.t2i_tied).tolist() == [1]
    assert ranks.ties == 3


@pytest.mark.parametrize("ties", get_args(Ties))
def test_tied_scores_equal_a_double_loop(ties: Ties) -> None:
    rng = np.random.default_rng(2)
    owner = ragged_owner(rng, 40)
    images, captions = integers(rng, 40, 3), integers(rng, len(owner), 3)
    ranks = retrieval_ranks(images, captions, owner, ties=ties, block=7)
    i2t, t2i = by_double_loop(images @ captions.T, owner, ties)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i
    assert ranks.ties > 100
    assert_same(ranks, ranks_from_scores(images @ captions.T, owner, ties))


@pytest.mark.parametrize("block", [1, 7, 60, 250, 300, 10_000])
def test_block_size_changes_nothing(block: int) -> None:
    rng = np.random.default_rng(3)
    owner = ragged_owner(rng, 300)
    images, captions = integers(rng, 300, 12), integers(rng, len(owner), 12)
    whole = ranks_from_scores(images @ captions.T, owner)  # more rows than a byte counts
    assert_same(whole, retrieval_ranks(images, captions, owner, block=block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 250])
@pytest.mark.parametrize("images", [1, 2, 3, 40])
def test_copies_are_tied_whatever_the_shape_of_the_product(images: int, block: int, dtype: torch.dtype) -> None:
    """Rounding differs between products of few and of many rows, and at their edges; copies must not show it."""
    generator = torch.Generator().manual_seed(images)
    for dimensions in (3, 8, 17, 64, 300):
        pictures = torch.randn(images, dimensions, generator=generator, dtype=dtype)
        captions = torch.randn(3 * images, dimensions, generator=generator, dtype=dtype)
        order = torch.randperm(2 * images, generator=generator)
        owner = order.argsort().repeat_interleave(3).numpy()  # each picture and its captions twice, pictures shuffled
        twice = torch.cat([captions.view(images, 3, -1)] * 2).flatten(0, 1)
        ranks = retrieval_ranks(pictures.repeat(2, 1)[order], twice, owner, block=block)
        once = retrieval_ranks(pictures, captions, np.arange(3 * images) // 3, block=block)
        assert ranks.i2t_tied.all()
        assert ranks.t2i_tied.all()
        np.testing.assert_array_equal(ranks.images.above, 2 * once.images.above[order % images])
        np.testing.assert_array_equal(ranks.captions.above, 2 * np.tile(once.captions.above, 2))


@pytest.mark.parametrize("dimensions", [100, 1024])
def test_a_collapsed_model_never_looks_good(dimensions: int) -> None:
    one = torch.nn.functional.normalize(torch.randn(1, dimensions, generator=torch.Generator().manual_seed(0)))
    images, captions = one.repeat(257, 1), one.repeat(5 * 257, 1)
    owner = np.arange(5 * 257) // 5
    pessimistic = retrieval_ranks(images, captions, owner, block=64)
    assert set(pessimistic.i2t) == {5 * 256}
    assert set(pessimistic.t2i) == {256}
    assert pessimistic.ties == 6 * 257
    optimistic = retrieval_ranks(images, captions, owner, ties="optimistic", block=64)
    assert not optimistic.i2t.any()
    assert not optimistic.t2i.any()
    expected = retrieval_ranks(images, captions, owner, ties="expected", block=64)
    assert set(expected.t2i) == {128}


def test_permuting_images_and_captions_permutes_the_ranks() -> None:
    rng = np.random.default_rng(4)
    owner = ragged_owner(rng, 50)
    images, captions = integers(rng, 50, 5), integers(rng, len(owner), 5)
    image_order, caption_order = rng.permutation(50), rng.permutation(len(owner))
    ranks = retrieval_ranks(images, captions, owner)
    moved = retrieval_ranks(
        images[image_order], captions[caption_order], np.argsort(image_order)[owner[caption_order]]
    )
    np.testing.assert_array_equal(moved.i2t, ranks.i2t[image_order])
    np.testing.assert_array_equal(moved.t2i, ranks.t2i[caption_order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_ranks_the_values_it_holds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    images, captions = torch.randn(40, 8, generator=generator), torch.randn(200, 8, generator=generator)
    images, captions = images.to(dtype), captions.to(dtype)
    owner = np.arange(200) // 5
    i2t, t2i = by_sorting((images.double() @ captions.double().T).numpy(), owner)
    ranks = retrieval_ranks(images, captions, owner)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i


def test_ranks_under_order_similarity() -> None:
    rng = np.random.default_rng(7)
    owner = ragged_owner(rng, 30)
    images, captions = integers(rng, 30, 6), integers(rng, len(owner), 6)
    ranks = retrieval_ranks(images, captions, owner, order_scores, block=8)
    scores = -np.sqrt((np.maximum(0, captions[None] - images[:, None]) ** 2).sum(axis=2))
    i2t, t2i = by_double_loop(scores, owner, "pessimistic")
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i


def test_scores_that_round_with_their_shape_are_counted_again() -> None:
    rng = np.random.default_rng(8)
    owner = np.arange(600) // 5
    images, captions = integers(rng, 120, 3), integers(rng, 600, 3)
    shapes = set()

    def rounding(some_images: Tensor, some_captions: Tensor) -> Tensor:
        shapes.add((len(some_images), len(some_captions)))
        slack = 0.25 if len(some_captions) < 600 else 0.0
        return torch.inner(some_images, some_captions) + slack

    assert_same(
        retrieval_ranks(images, captions, owner, rounding, block=50),
        ranks_from_scores(images @ captions.T, owner),
    )
    assert {shape for shape in shapes if shape[1] == 600} == {(50, 600)}


def test_a_similarity_that_does_not_repeat_is_refused() -> None:
    generator = torch.Generator().manual_seed(9)

    def noisy(images: Tensor, captions: Tensor) -> Tensor:
        return torch.rand(len(images), len(captions), generator=generator)

    with pytest.raises(RuntimeError, match="repeated"):
        retrieval_ranks(torch.ones(4, 2), torch.ones(8, 2), HAND_OWNER, noisy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_row_that_is_not_finite_is_named(bad: float) -> None:
    images, captions = torch.ones(4, 3), torch.ones(8, 3)
    captions[5, 1] = captions[6, 0] = bad
    with pytest.raises(InputError, match="caption embedding 5 is not finite"):
        retrieval_ranks(images, captions, HAND_OWNER)
    scores = HAND_MADE.copy()
    scores[2, 3] = bad
    with pytest.raises(InputError, match="image 2 and caption 3 is not finite"):
        ranks_from_scores(scores, HAND_OWNER)


@pytest.mark.parametrize(("kind", "dtype"), [("images", torch.float32), ("captions", torch.float64)])
def test_rows_whose_sum_overflows_are_ranked(kind: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(10)
    images, captions = (torch.from_numpy(rng.random((n, 16))) for n in (20, 60))
    owner = np.arange(60) // 3
    expected = retrieval_ranks(images, captions, owner)
    large = torch.finfo(dtype).max / 4  # each entry is finite, the sum of a row is not
    ranks = retrieval_ranks(
        (images * large if kind == "images" else images * 1e-3).to(dtype),
        (captions * large if kind == "captions" else captions * 1e-3).to(dtype),
        owner,
    )
    np.testing.assert_array_equal(ranks.i2t, expected.i2t)
    np.testing.assert_array_equal(ranks.t2i, expected.t2i)


def test_scores_that_overflow_are_refused() -> None:
    large = torch.full((4, 1), 3e38)
    with pytest.raises(InputError, match="image 0 and caption 0 is not finite"):
        retrieval_ranks(large, large, np.arange(4))


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ([0, 0, 1, 1, 2, 2, 3], "one image index per caption"),
        ([0, 0, 1, 1, 2, 2, 3, 4], "caption 7 belongs to image 4 of 4"),
        ([0, 0, 1, 1, 3, 3, 3, 3], "image 2 has no caption"),
    ],
)
def test_ownership_is_checked(owner: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        retrieval_ranks(np.ones((4, 2)), np.ones((8, 2)), owner)


def test_embeddings_of_two_models_are_refused() -> None:
    with pytest.raises(InputError, match="2 dimensions and caption embeddings 3"):
        retrieval_ranks(np.ones((4, 2)), np.ones((8, 3)), HAND_OWNER)
