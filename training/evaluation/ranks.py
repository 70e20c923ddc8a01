"""Exact retrieval ranks, both directions from a single pass over blocks of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from training.errors import InputError

Similarity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Ties: TypeAlias = Literal["pessimistic", "expected", "optimistic"]

# The own scores are computed first, in small products. From about 200 columns on, BLAS takes the path it
# takes for the large products, so that both give the same bits and the pass need not be repeated.
_OWN_CAPTIONS = 512
_UINT8_MAX = 255


@dataclass(frozen=True)
class RetrievalRanks:
    """Zero-based ranks of both directions.

    Attributes:
        i2t: ``(I,)`` rank of each image's best own caption among the captions of other images. int64, or
            float64 where ``ties="expected"``.
        t2i: ``(C,)`` rank of each caption's image among all images; same dtype as ``i2t``.
        i2t_tied: bool ``(I,)``; the best own caption shares its score with another image's caption.
        t2i_tied: bool ``(C,)``; the own image shares its score with another image.
    """

    i2t: NDArray[np.int64] | NDArray[np.float64]
    t2i: NDArray[np.int64] | NDArray[np.float64]
    i2t_tied: NDArray[np.bool_]
    t2i_tied: NDArray[np.bool_]

    @property
    def ties(self) -> int:
        """Number of queries, of both directions, whose rank depends on how ties are broken."""
        return int(self.i2t_tied.sum() + self.t2i_tied.sum())


@torch.no_grad()
def retrieval_ranks(
    images: Tensor | NDArray[np.floating],
    captions: Tensor | NDArray[np.floating],
    owner: ArrayLike,
    similarity: Similarity = torch.inner,
    ties: Ties = "pessimistic",
    block: int = 250,
) -> RetrievalRanks:
    """Rank every own caption and every own image, exactly, without holding or sorting all scores.

    A rank counts the competitors that score higher than the query's (best) own item. Equal scores count
    fully (``pessimistic``, so a collapsed model has R@1 = 0), by half (``expected``, the mid-rank) or not
    at all (``optimistic``). Own captions never count against their image.

    Args:
        images: ``(I, D)`` embeddings of the unique images; half precision is computed as float32.
        captions: ``(C, D)`` embeddings of the captions, on the same device.
        owner: int64 ``(C,)``; caption ``c`` describes image ``owner[c]``.
        similarity: Scores ``(b, C)`` of a block of images ``(b, D)`` and captions ``(C, D)``, repeatable;
            inner products, unless given, are cosines where rows have unit norm.
        ties: How equal scores are counted.
        block: Images per block; ``block * C`` scores are in memory at a time.

    Returns:
        The ranks and which queries are tied.

    Raises:
        InputError: If shapes disagree, an embedding or a score is not finite, or an image has no caption.
    """
    images, captions = checked_embeddings("image", images), checked_embeddings("caption", captions)
    if images.shape[1] != captions.shape[1]:
        raise InputError(
            f"image embeddings have {images.shape[1]} dimensions and caption embeddings {captions.shape[1]}; "
            "embed both with one model"
        )
    dtype = torch.promote_types(images.dtype, captions.dtype)
    images, captions = images.to(dtype), captions.to(dtype)
    ownership = Ownership.of(owner, len(images), len(captions))
    # A product of another shape may round differently; one shape keeps equal pairs equal in every bit.
    # So the last block is moved back instead of being shorter, and overlaps the one before it.
    block = min(block, len(images))
    firsts = [*range(0, len(images) - block, block), len(images) - block]

    def score(some_images: Tensor, some_captions: Tensor) -> NDArray[np.floating]:
        return similarity(some_images, some_captions).to(dtype).cpu().numpy()

    def blocks() -> Iterable[tuple[int, NDArray[np.floating]]]:
        done = 0
        for first in firsts:
            yield done, score(images[first : first + block], captions)[done - first :]
            done = first + block

    own = _own_scores(images, captions, ownership, score)
    for _ in range(2):
        ranks, seen = _count(blocks(), own, ownership, ties)
        if np.array_equal(seen, own):
            return ranks
        own = seen
    raise RuntimeError("the similarity gives other scores when it is repeated")


def ranks_from_scores(
    scores: Tensor | NDArray[np.floating], owner: ArrayLike, ties: Ties = "pessimistic"
) -> RetrievalRanks:
    """Ranks from a full score matrix ``(I, C)``; everything else as in :func:`retrieval_ranks`.

    Raises:
        InputError: If a score is not finite, shapes disagree, or an image has no caption.
    """
    matrix = _floating(scores).cpu().numpy()
    if matrix.ndim != 2:
        raise InputError(f"scores have shape {matrix.shape}; give one row per image, one column per caption")
    ownership = Ownership.of(owner, *matrix.shape)
    own = matrix[ownership.owner, np.arange(matrix.shape[1])]
    return _count([(0, matrix)], own, ownership, ties)[0]


class Ownership(NamedTuple):
    """Who describes whom: ``order[starts[i] : starts[i + 1]]`` are the captions of image ``i``.

    Attributes:
        owner: int64 ``(C,)``; caption ``c`` describes image ``owner[c]``.
        order: int64 ``(C,)``; the captions sorted by their image.
        starts: int64 ``(I + 1,)``; where each image's captions begin in ``order``.
    """

    owner: NDArray[np.int64]
    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, owner: ArrayLike, images: int, captions: int) -> Ownership:
        """Check and index the owner of every caption.

        Raises:
            InputError: Unless there is one image index per caption and a caption for every image.
        """
        owners = np.asarray(owner)
        if owners.shape != (captions,) or not np.issubdtype(owners.dtype, np.integer) or not captions:
            raise InputError(
                f"owner has shape {owners.shape} and dtype {owners.dtype} for {captions} captions; "
                "give one image index per caption"
            )
        if outside := np.flatnonzero((owners < 0) | (owners >= images)).tolist():
            raise InputError(
                f"caption {outside[0]} belongs to image {owners[outside[0]]} of {images}; "
                "owners are indices of image rows"
            )
        counts = np.bincount(owners, minlength=images)
        if alone := np.flatnonzero(counts == 0).tolist():
            raise InputError(f"image {alone[0]} has no caption ({len(alone)} such images); leave it out")
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(owners.astype(np.int64), np.argsort(owners, kind="stable"), starts)


def _floating(values: Tensor | NDArray[np.floating]) -> Tensor:
    tensor = torch.as_tensor(values).detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def checked_embeddings(kind: str, values: Tensor | NDArray[np.floating]) -> Tensor:
    """Embeddings ``(N, D)`` as a float32 or float64 tensor without gradient.

    Raises:
        InputError: If they are not a matrix, or a row is not finite.
    """
    embeddings = _floating(values)
    if embeddings.ndim != 2:
        raise InputError(f"{kind} embeddings have shape {tuple(embeddings.shape)}; give one row per {kind}")
    bad = torch.nonzero(~torch.isfinite(embeddings.sum(dim=1)))
    if len(bad):
        raise InputError(
            f"{kind} embedding {int(bad[0])} is not finite ({len(bad)} such rows); the model has diverged"
        )
    return embeddings


def _own_scores(
    images: Tensor,
    captions: Tensor,
    ownership: Ownership,
    score: Callable[[Tensor, Tensor], NDArray[np.floating]],
) -> NDArray[np.floating]:
    """Score ``(C,)`` of each caption with its own image."""
    owner, order, _ = ownership
    own: NDArray[np.floating] = torch.empty(len(order), dtype=captions.dtype).numpy()
    width = min(_OWN_CAPTIONS, len(order))
    for start in range(0, len(order), width):
        some = order[min(start, len(order) - width) :][:width]
        first, last = owner[some[0]], owner[some[-1]]
        scores = score(images[first : last + 1], captions[torch.from_numpy(some)])
        own[some] = scores[owner[some] - first, np.arange(width)]
    return own


def _count(
    blocks: Iterable[tuple[int, NDArray[np.floating]]],
    own: NDArray[np.floating],
    ownership: Ownership,
    ties: Ties,
) -> tuple[RetrievalRanks, NDArray[np.floating]]:
    """Count the competitors above and level with each query's own item.

    Args:
        blocks: Consecutive blocks ``(index of the first image, scores (b, C))``.
        own: ``(C,)`` score of each caption with its own image.
        ownership: Who describes whom.
        ties: How equal scores are counted.

    Returns:
        The ranks, and the own scores ``(C,)`` found in the blocks. Only if these equal ``own`` in every
        bit are the ranks exact.
    """
    owner, order, starts = ownership
    seen = np.empty_like(own)
    i2t_above, i2t_level = np.empty((2, len(starts) - 1), dtype=np.int64)
    t2i_above, t2i_least = np.zeros((2, len(own)), dtype=np.int64)
    mask = np.empty(len(own), dtype=np.bool_)
    for start, scores in blocks:
        stop = start + len(scores)
        mine = order[starts[start] : starts[stop]]
        seen[mine] = scores[owner[mine] - start, mine]
        offsets = starts[start:stop] - starts[start]
        best = np.maximum.reduceat(seen[mine], offsets)
        own_at_best = np.add.reduceat(seen[mine] == best[owner[mine] - start], offsets, dtype=np.int64)
        for strip in range(0, len(scores), _UINT8_MAX):
            # Sums of at most 255 masks fit a byte; wider sums cost four times as much.
            above, least = np.zeros((2, len(own)), dtype=np.uint8)
            for i, row in enumerate(scores[strip : strip + _UINT8_MAX], strip):
                if not np.isfinite(row, out=mask).all():
                    raise InputError(
                        f"the score of image {start + i} and caption {int(mask.argmin())} is not finite; "
                        "the model has diverged"
                    )
                above += np.greater(row, own, out=mask).view(np.uint8)
                least += np.greater_equal(row, own, out=mask).view(np.uint8)
                higher = np.count_nonzero(np.greater(row, best[i], out=mask))
                equal = np.count_nonzero(np.greater_equal(row, best[i], out=mask)) - higher
                i2t_above[start + i], i2t_level[start + i] = higher, equal - own_at_best[i]
            t2i_above += above
            t2i_least += least
    t2i_level = t2i_least - t2i_above - 1  # the own image is level with itself
    ranks = RetrievalRanks(
        _break_ties(i2t_above, i2t_level, ties),
        _break_ties(t2i_above, t2i_level, ties),
        i2t_level > 0,
        t2i_level > 0,
    )
    return ranks, seen


def _break_ties(
    above: NDArray[np.int64], level: NDArray[np.int64], ties: Ties
) -> NDArray[np.int64] | NDArray[np.float64]:
    if ties == "pessimistic":
        return above + level
    if ties == "optimistic":
        return above
    return above + level / 2
