"""R@K, medR, meanR and rSum over whole test sets and contiguous folds, as the field reports them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from training.data.corpus import Corpus
from training.errors import InputError
from training.evaluation.ranks import (
    Competition,
    Ownership,
    RetrievalRanks,
    Similarity,
    Ties,
    checked_embeddings,
    retrieval_ranks,
)


@dataclass(frozen=True)
class DirectionMetrics:
    """Retrieval in one direction.

    Attributes:
        r1: R@1, percent of queries whose own item ranks first.
        r5: R@5, percent.
        r10: R@10, percent.
        medr: Median rank, rounded down, counted from one.
        meanr: Mean rank, counted from one.

    Where ties are ``expected``, recalls and the mean rank are exact means over all orders of equal scores, and medR
    is the median of the ranks of all queries in all these orders.
    """

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float

    @classmethod
    def of(cls, ranks: NDArray[np.int64] | NDArray[np.float64]) -> DirectionMetrics:
        """The metrics of zero-based ranks ``(Q,)``."""
        r1, r5, r10 = (100 * float(np.mean(ranks < k)) for k in (1, 5, 10))
        return cls(r1, r5, r10, medr=math.floor(np.median(ranks)) + 1, meanr=float(np.mean(ranks)) + 1)

    @classmethod
    def expected(cls, of: Competition) -> DirectionMetrics:
        """The metrics over all orders of equal scores."""
        r1, r5, r10 = (100 * float(of.chance(k).mean()) for k in (1, 5, 10))
        meanr = float(of.ranks("expected").mean()) + 1
        return cls(r1, r5, r10, medr=_expected_median(of) + 1, meanr=meanr)

    @classmethod
    def mean(cls, folds: Sequence[DirectionMetrics]) -> DirectionMetrics:
        """Every metric averaged over the folds."""
        return cls(**{name: float(np.mean([getattr(fold, name) for fold in folds])) for name in asdict(folds[0])})


@dataclass(frozen=True)
class RetrievalMetrics:
    """Retrieval in both directions on one test set.

    Attributes:
        images: Images in the whole test set.
        captions: Captions in the whole test set.
        i2t: Image queries, captions retrieved.
        t2i: Caption queries, images retrieved.
        rsum: Sum of the six recalls, at most 600; with folds the mean of the folds' sums.
        ties: Queries of both directions whose rank depends on how ties are broken, over all folds.
        folds: Number of folds averaged over; None where all images compete.
    """

    images: int
    captions: int
    i2t: DirectionMetrics
    t2i: DirectionMetrics
    rsum: float
    ties: int
    folds: int | None = None

    def to_json(self, data: str, split: str) -> dict[str, Any]:
        """The object that ``vse evaluate --json`` writes; ``folds`` only where folds were used."""
        record = {"data": data, "split": split, **asdict(self)}
        if self.folds is None:
            del record["folds"]
        return record


@dataclass(frozen=True)
class WorstQuery:
    """A query whose own item ranks low.

    Attributes:
        id: Identifier of the query: of a caption in t2i, of an image in i2t.
        image: Name of the image.
        captions: The query caption in t2i; the image's own captions in i2t.
        rank: Zero-based rank of the (best) own item.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    rank: float


def evaluate_ranks(ranks: RetrievalRanks) -> RetrievalMetrics:
    """R@1, R@5, R@10, medR and meanR of both directions, and rSum."""
    if ranks.tie_breaking == "expected":
        i2t, t2i = DirectionMetrics.expected(ranks.images), DirectionMetrics.expected(ranks.captions)
    else:
        i2t, t2i = DirectionMetrics.of(ranks.i2t), DirectionMetrics.of(ranks.t2i)
    rsum = i2t.r1 + i2t.r5 + i2t.r10 + t2i.r1 + t2i.r5 + t2i.r10
    return RetrievalMetrics(len(ranks.i2t), len(ranks.t2i), i2t, t2i, rsum, ranks.ties)


def evaluate(
    images: Tensor | NDArray[np.floating],
    captions: Tensor | NDArray[np.floating],
    owner: ArrayLike,
    similarity: Similarity = torch.inner,
    folds: int | None = None,
    ties: Ties = "pessimistic",
) -> RetrievalMetrics:
    """Evaluate retrieval among all images, or averaged over contiguous folds of them.

    ``folds=5`` on the 5,000 COCO test images is the "1K" protocol: five folds of 1,000 images in data-set
    order with their own captions, every metric averaged (so medR may have a fraction).

    Args:
        images: ``(I, D)`` embeddings of the unique images, in data-set order.
        captions: ``(C, D)`` embeddings of the captions, in any order.
        owner: int64 ``(C,)``; caption ``c`` describes image ``owner[c]``.
        similarity: As in :func:`~training.evaluation.ranks.retrieval_ranks`.
        folds: Number of folds; None lets all images compete.
        ties: How equal scores are counted.

    Raises:
        InputError: If ``folds`` does not divide the number of images, or the embeddings cannot be ranked.
    """
    if folds is None:
        return evaluate_ranks(retrieval_ranks(images, captions, owner, similarity, ties))
    if folds < 1 or len(images) % folds:
        raise InputError(f"{folds} folds do not divide {len(images)} images; choose a divisor or leave folds out")
    images, captions = checked_embeddings("image", images), checked_embeddings("caption", captions)
    owners = Ownership.of(owner, len(images), len(captions)).owner
    size = len(images) // folds
    parts = []
    for start in range(0, len(images), size):
        kept = np.flatnonzero((owners >= start) & (owners < start + size))
        some = captions[torch.from_numpy(kept)]
        parts.append(evaluate(images[start : start + size], some, owners[kept] - start, similarity, ties=ties))
    return RetrievalMetrics(
        images=len(images),
        captions=len(captions),
        i2t=DirectionMetrics.mean([part.i2t for part in parts]),
        t2i=DirectionMetrics.mean([part.t2i for part in parts]),
        rsum=float(np.mean([part.rsum for part in parts])),
        ties=sum(part.ties for part in parts),
        folds=folds,
    )


def worst_queries(ranks: RetrievalRanks, corpus: Corpus, n: int = 10) -> dict[str, list[WorstQuery]]:
    """The ``n`` queries of each direction whose own item ranks lowest, worst first.

    Args:
        ranks: Ranks of the whole corpus (not of a fold).
        corpus: The corpus that was ranked.
        n: Queries per direction.

    Returns:
        ``{"i2t": [...], "t2i": [...]}``.

    Raises:
        ValueError: If the ranks are of another corpus.
    """
    if (len(ranks.i2t), len(ranks.t2i)) != (len(corpus.image_ids), len(corpus.captions)):
        raise ValueError("the ranks are of another corpus")

    def image_name(image: int) -> str:
        return corpus.images[image].name if corpus.images else corpus.image_ids[image]

    def worst(of: NDArray[np.int64] | NDArray[np.float64]) -> list[tuple[int, float]]:
        return [(int(query), of[query].item()) for query in np.argsort(-of, kind="stable")[:n]]

    return {
        "i2t": [
            WorstQuery(
                corpus.image_ids[image],
                image_name(image),
                tuple(corpus.captions[c] for c in np.flatnonzero(corpus.owner == image).tolist()),
                rank,
            )
            for image, rank in worst(ranks.i2t)
        ],
        "t2i": [
            WorstQuery(
                corpus.caption_ids[caption],
                image_name(int(corpus.owner[caption])),
                (corpus.captions[caption],),
                rank,
            )
            for caption, rank in worst(ranks.t2i)
        ],
    }


def _expected_median(of: Competition) -> int:
    """The zero-based median, rounded down, of the ranks of all queries in all orders of equal scores."""

    def smallest(share: float) -> int:
        """The smallest rank that at least this share of the queries reach."""
        low, high = 0, int((of.above + of.level).max())
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if of.chance(middle + 1).mean() >= share else (middle + 1, high)
        return low

    # As in a sample of even size, the middle of the two ranks between which half of the queries lie.
    return (smallest(0.5 - 1e-9) + smallest(0.5 + 1e-9)) // 2
