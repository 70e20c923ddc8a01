"""What every loss has in common: its interface, its statistics, and the search for negatives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from training.models.similarity import COSINE, Similarity

Reduction = Literal["sum", "mean"]


class Statistics(NamedTuple):
    """What a batch's scores look like: detached scalars, for the log and the collapse detector.

    An *anchor* is an image looking for its caption or a caption looking for its image; a batch has 2B.

    Attributes:
        positive: Mean score of the B matching pairs.
        hardest: Mean score of the anchors' hardest negatives.
        active: Fraction of anchors whose hardest negative comes within the margin of the positive (for
            losses without a margin: outscores it).
        spread: Standard deviation of the scores of all negatives.
    """

    positive: Tensor
    hardest: Tensor
    active: Tensor
    spread: Tensor

    def floats(self) -> dict[str, float]:
        """The four numbers by name, in a single transfer from the device."""
        return dict(zip(self._fields, torch.stack(self).tolist(), strict=True))


class LossOutput(NamedTuple):
    """A differentiable scalar and the statistics of the batch it came from."""

    value: Tensor
    statistics: Statistics


class NegativePool(NamedTuple):
    """Pairs that serve as negatives only, drawn apart from the batch.

    Attributes:
        images: Image embeddings ``(M, D)``.
        captions: Caption embeddings ``(M, D)``; row ``m`` of both matches.
        image_ids: int64 ``(M,)``.
    """

    images: Tensor
    captions: Tensor
    image_ids: Tensor


class Loss(nn.Module, ABC):
    """A loss on a batch of matching (image, caption) pairs.

    Call it with image embeddings ``(B, D)``, caption embeddings ``(B, D)`` and int64 image ids ``(B,)``; row
    ``b`` of both matches. Rows with the same image id describe one picture, so neither is a negative of the
    other, in both directions. The result is a :class:`LossOutput`.

    In a batch the loss of one pair depends on the others: it is no sum over the data set, and a batch that
    was not drawn uniformly changes what is minimised. Against a pool of negatives drawn apart from the
    batch it is such a sum, whatever the batch; see :meth:`pair_costs` and :meth:`weighted`.

    Reduced-precision embeddings are raised to float32 and autocast is off inside: a bfloat16 score near 1
    has steps of 0.004, too coarse to tell which negative is hardest.

    Attributes:
        margin: What makes an anchor active, in units of the score; 0 for losses without a margin.
        reduction: ``sum`` or ``mean`` over the batch.

    Args:
        similarity: How embeddings are compared; the model's own.

    Raises:
        ValueError: If the three arguments of a call disagree in shape.
    """

    if TYPE_CHECKING:  # nn.Module declares a call that returns Any

        def __call__(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput: ...  # noqa: D102

    margin: float = 0.0
    reduction: Reduction = "mean"

    def __init__(self, similarity: Similarity = COSINE) -> None:
        super().__init__()
        self.similarity = similarity

    def forward(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput:
        """Check, raise to float32 at least, and compute. See the class."""
        if images.shape != captions.shape or image_ids.shape != images.shape[:1]:
            shapes = [tuple(tensor.shape) for tensor in (images, captions, image_ids)]
            raise ValueError(f"expected (B, D), (B, D) and (B,); got {shapes}")
        dtype = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            return self.compute(images.to(dtype), captions.to(dtype), image_ids)

    @abstractmethod
    def compute(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput:
        """The loss itself, on float32 or float64 embeddings."""

    @abstractmethod
    def anchor_costs(self, positive: Tensor, negatives: Tensor) -> Tensor:
        """The loss of single anchors, half that of a pair where a pair's is a mean over both directions.

        Args:
            positive: Score of each anchor's match, ``(B,)``.
            negatives: Its scores with the pool, ``(B, M)``; ``-inf`` for what is no negative.

        Returns:
            ``(B,)``.
        """

    def pair_costs(
        self, images: Tensor, captions: Tensor, image_ids: Tensor, pool: NegativePool
    ) -> tuple[Tensor, Statistics]:
        """The loss of each pair against a pool of negatives, ``(B,)``: a function of that pair alone.

        Args:
            images: ``(B, D)``.
            captions: ``(B, D)``.
            image_ids: int64 ``(B,)``; members of the pool with the same id are no negatives.
            pool: The negatives of all pairs.
        """
        dtype = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            images, captions, others = images.to(dtype), captions.to(dtype), pool.captions.to(dtype)
            excluded = image_ids[:, None] == pool.image_ids  # (B, M)
            over_captions = self.similarity.scores(images, others).masked_fill(excluded, -math.inf)
            over_images = self.similarity.scores(pool.images.to(dtype), captions).T.masked_fill(excluded, -math.inf)
            positive = self.similarity.pairs(images, captions)  # (B,)
            costs = self.anchor_costs(positive, over_captions) + self.anchor_costs(positive, over_images)
        with torch.no_grad():
            caption_score, caption = over_captions.max(dim=1)
            image_score, image = over_images.max(dim=1)
            spread = over_captions[~excluded].std(correction=0).nan_to_num()
            found = Negatives(positive, caption, caption_score, image, image_score, spread)
        return costs, found.statistics(self.margin)

    def weighted(
        self, images: Tensor, captions: Tensor, image_ids: Tensor, pool: NegativePool, weights: Tensor
    ) -> LossOutput:
        """Loss of a batch that was not drawn uniformly: :meth:`pair_costs` times ``weights`` ``(B,)``, reduced.

        With the weights of a sampler the gradient's mean is B (``sum``) or 1 (``mean``) times that of the
        mean cost over the data set, against this pool.
        """
        costs, statistics = self.pair_costs(images, captions, image_ids, pool)
        total = (costs * weights.to(costs)).sum()
        return LossOutput(total / len(images) if self.reduction == "mean" else total, statistics)

    def advance(self, step: int) -> None:
        """Tell the loss the global step that comes next; only those with a schedule listen."""


def same_image(image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of a score matrix that are no negatives, the diagonal among them.

    Found by sorting: these are few, and a comparison of all with all costs as much as the rest of the loss.

    Args:
        image_ids: int64 ``(B,)``.

    Returns:
        Rows and columns, int64 ``(E,)`` each.
    """
    ordered, order = image_ids.sort()
    first = torch.searchsorted(ordered, image_ids)
    sizes = torch.searchsorted(ordered, image_ids, right=True) - first
    rows = torch.arange(len(image_ids), device=image_ids.device).repeat_interleave(sizes)  # (E,)
    within = torch.arange(len(rows), device=image_ids.device) - (sizes.cumsum(0) - sizes)[rows]
    return rows, order[first[rows] + within]


class Negatives(NamedTuple):
    """The hardest negative of every anchor in a batch; carries no gradient.

    Attributes:
        positive: Score of each matching pair, ``(B,)``.
        caption: int64 ``(B,)``; the best-scoring wrong caption of image ``b`` (0 if it has none).
        caption_score: Its score, ``(B,)``; ``-inf`` if there is none.
        image: int64 ``(B,)``; the best-scoring wrong image of caption ``b`` (0 if it has none).
        image_score: Its score, ``(B,)``; ``-inf`` if there is none.
        spread: Standard deviation of the scores of all negatives, a scalar; 0 if there are none.
    """

    positive: Tensor
    caption: Tensor
    caption_score: Tensor
    image: Tensor
    image_score: Tensor
    spread: Tensor

    def statistics(self, margin: float) -> Statistics:
        """Summarise the batch; ``margin`` is what makes an anchor active."""
        hardest = torch.cat([self.caption_score, self.image_score])  # (2B,)
        exists = hardest != -math.inf
        anchors = exists.sum().clamp(min=1)
        return Statistics(
            positive=self.positive.mean(),
            hardest=hardest.where(exists, 0).sum() / anchors,
            active=(hardest + margin > self.positive.repeat(2)).sum() / anchors,
            spread=self.spread,
        )


@torch.no_grad()
def find_negatives(score_blocks: Iterable[Tensor], image_ids: Tensor) -> Negatives:
    """Find every anchor's hardest negative, reading the score matrix one block of rows at a time.

    Args:
        score_blocks: Consecutive blocks of rows of the ``(B, B)`` scores, images by captions. A generator
            keeps one block in memory.
        image_ids: int64 ``(B,)``; equal ids are no negatives of each other.

    Returns:
        The hardest negatives; among ties, the first.
    """
    excluded_rows, excluded_columns = same_image(image_ids)
    positive, captions, caption_scores, images, image_scores, moments = [], [], [], [], [], []
    start, done, centre = 0, 0, None
    for block in score_blocks:
        # A collapse brings all scores close to any one of them: the squares of deviations from that one do
        # not cancel when the spread matters most.
        centre = block[0, 0] if centre is None else centre
        inside = slice(done, done := int(torch.searchsorted(excluded_rows, start + len(block))))  # they are sorted
        excluded = excluded_rows[inside] - start, excluded_columns[inside]
        deviations = (block - centre).index_put_(excluded, torch.zeros_like(centre)).flatten()
        moments.append(torch.stack([deviations.sum(), deviations.dot(deviations)]))
        scores = block.index_put(excluded, torch.full_like(centre, -math.inf))
        positive.append(block.diagonal(start))
        over_captions, over_images = scores.max(dim=1), scores.max(dim=0)
        captions.append(over_captions.indices)
        caption_scores.append(over_captions.values)
        images.append(over_images.indices + start)
        image_scores.append(over_images.values)
        start += len(block)
    mean, mean_square = torch.stack(moments).sum(dim=0) / max(1, start**2 - len(excluded_rows))
    image_score, winner = torch.stack(image_scores).max(dim=0)  # (B,)
    return Negatives(
        positive=torch.cat(positive),
        caption=torch.cat(captions),
        caption_score=torch.cat(caption_scores),
        image=torch.stack(images).gather(0, winner[None])[0],
        image_score=image_score,
        spread=(mean_square - mean.square()).clamp(min=0).sqrt(),
    )
