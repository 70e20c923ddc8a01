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


class Competition(NamedTuple):
    """What is known of the ranks of one direction before ties are broken; int64 ``(Q,)`` each.

    Attributes:
        above: Competitors that score higher than the best own item.
        level: Competitors that score as high.
        own: Own items that score as high, at least one.
    """

    above: NDArray[np.int64]
    level: NDArray[np.int64]
    own: NDArray[np.int64]

    def ranks(self, ties: Ties) -> NDArray[np.int64] | NDArray[np.float64]:
        """Zero-based ranks ``(Q,)``; ``expected`` ones are means over all orders of what is level, float64."""
        if ties == "pessimistic":
            return self.above + self.level
        if ties == "optimistic":
            return self.above
        return self.above + self.level / (self.own + 1)

    def chance(self, k: int) -> NDArray[np.float64]:
        """Probability ``(Q,)`` that an own item is among the first ``k`` when what is level comes in random order.

        With m own items and L competitors level, the first ``j = k - above`` of them are all competitors with
        the hypergeometric probability ``C(L, j) / C(L + m, j)``, which is ``Π (L - j + i) / (L + i)`` over
        i from 1 to m.
        """
        places = np.maximum(k - self.above, 0)
        missed = np.ones(len(places))
        for i in range(1, int(self.own.max(initial=0)) + 1):
            factor = np.maximum(self.level - places + i, 0) / (self.level + i)
            missed *= np.where(i <= self.own, factor, 1)
        return 1 - missed


@dataclass(frozen=True)
class RetrievalRanks:
    """Zero-based ranks of both directions.

    Attributes:
        images: What each image's best own caption competes with: the captions of other images.
        captions: What each caption's image competes with: all other images.
        tie_breaking: How equal scores are counted.
    """

    images: Competition
    captions: Competition
    tie_breaking: Ties = "pessimistic"

    @property
    def i2t(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """``(I,)`` rank of each image's best own caption; int64, or float64 means where ties are ``expected``."""
        return self.images.ranks(self.tie_breaking)

    @property
    def t2i(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """``(C,)`` rank of each caption's image; same dtype as ``i2t``."""
        return self.captions.ranks(self.tie_breaking)

    @property
    def i2t_tied(self) -> NDArray[np.bool_]:
        """``(I,)``; the best own caption shares its score with another image's caption."""
        return self.images.level > 0

    @property
    def t2i_tied(self) -> NDArray[np.bool_]:
        """``(C,)``; the own image shares its score with another image."""
        return self.captions.level > 0

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
    fully (``pessimistic``, so a collapsed model has R@1 = 0), not at all (``optimistic``), or as often as they
    come before the first own item in a random order (``expected``). Own captions never count against their image.

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
    # Products round by shape and place, so that copies could be told apart: each is scored once.
    first_image, first_caption = _first_copies(images), _first_copies(captions)
    kept = np.flatnonzero(first_image == np.arange(len(images)))
    members = np.argsort(first_image, kind="stable")  # copies side by side, in the order of the kept ones
    repeats = np.bincount(first_image)[kept]
    copied = bool((first_caption != np.arange(len(captions))).any())
    distinct = images if len(kept) == len(images) else images[torch.from_numpy(kept)]
    # The last block is moved back instead of being shorter, for the same shape, and overlaps the one before it.
    block = min(block, len(kept))
    firsts = [*range(0, len(kept) - block, block), len(kept) - block]

    def score(some_images: Tensor, some_captions: Tensor) -> NDArray[np.floating]:
        return similarity(some_images, some_captions).to(dtype).cpu().numpy()

    def blocks() -> Iterable[tuple[NDArray[np.int64], NDArray[np.floating]]]:
        done = passed = 0
        for first in firsts:
            scores = score(distinct[first : first + block], captions)[done - first :]
            if copied:
                scores = scores[:, first_caption]
            rows = np.repeat(np.arange(len(scores)), repeats[done : first + block])
            for start in range(0, len(rows), block):
                some = rows[start : start + block]
                yield members[passed + start :][: len(some)], scores[some]
            done, passed = first + block, passed + len(rows)

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
    return _count([(np.arange(len(matrix)), matrix)], own, ownership, ties)[0]


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
    bad = torch.nonzero(~torch.isfinite(embeddings).all(dim=1))
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


def _first_copies(rows: Tensor) -> NDArray[np.int64]:
    """For each of the rows ``(N, D)`` the index of the first that equals it, int64 ``(N,)``."""
    if not rows.shape[1]:
        return np.zeros(len(rows), dtype=np.int64)
    number = torch.unique(rows, dim=0, return_inverse=True)[1].cpu().numpy()
    first: NDArray[np.int64] = np.unique(number, return_index=True)[1][number]
    return first


def _count(
    blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.floating]]],
    own: NDArray[np.floating],
    ownership: Ownership,
    ties: Ties,
) -> tuple[RetrievalRanks, NDArray[np.floating]]:
    """Count the competitors above and level with each query's own item.

    Args:
        blocks: Each image once, in blocks ``(indices of images (b,), scores (b, C))``.
        own: ``(C,)`` score of each caption with its own image.
        ownership: Who describes whom.
        ties: How equal scores are counted.

    Returns:
        The ranks, and the own scores ``(C,)`` found in the blocks. Only if these equal ``own`` in every
        bit are the ranks exact.
    """
    _, order, starts = ownership
    seen = np.empty_like(own)
    i2t_above, i2t_level, i2t_own = np.empty((3, len(starts) - 1), dtype=np.int64)
    t2i_above, t2i_least = np.zeros((2, len(own)), dtype=np.int64)
    mask = np.empty(len(own), dtype=np.bool_)
    for images, scores in blocks:
        mine = np.concatenate([order[starts[image] : starts[image + 1]] for image in images])
        held = starts[images + 1] - starts[images]
        row_of, offsets = np.repeat(np.arange(len(images)), held), held.cumsum() - held
        seen[mine] = scores[row_of, mine]
        best = np.maximum.reduceat(seen[mine], offsets)
        i2t_own[images] = np.add.reduceat(seen[mine] == best[row_of], offsets, dtype=np.int64)
        for strip in range(0, len(scores), _UINT8_MAX):
            # Sums of at most 255 masks fit a byte; wider sums cost four times as much.
            above, least = np.zeros((2, len(own)), dtype=np.uint8)
            for i, row in enumerate(scores[strip : strip + _UINT8_MAX], strip):
                if not np.isfinite(row, out=mask).all():
                    raise InputError(
                        f"the score of image {images[i]} and caption {int(mask.argmin())} is not finite; "
                        "the model has diverged"
                    )
                above += np.greater(row, own, out=mask).view(np.uint8)
                least += np.greater_equal(row, own, out=mask).view(np.uint8)
                higher = np.count_nonzero(np.greater(row, best[i], out=mask))
                equal = np.count_nonzero(np.greater_equal(row, best[i], out=mask)) - higher
                i2t_above[images[i]], i2t_level[images[i]] = higher, equal - i2t_own[images[i]]
            t2i_above += above
            t2i_least += least
    t2i_level = t2i_least - t2i_above - 1  # the own image is level with itself
    competition = (
        Competition(i2t_above, i2t_level, i2t_own),
        Competition(t2i_above, t2i_level, np.ones_like(t2i_level)),
    )
    return RetrievalRanks(*competition, ties), seen
