"""Hinge losses on hard negatives: the sum over all of them, or the hardest alone (VSE++)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.errors import InputError
from training.losses.base import Loss, LossOutput, Reduction, find_negatives, same_image
from training.models.similarity import COSINE, Similarity

# Rows of the score matrix that the search for the hardest negatives holds at once.
BLOCK_ROWS = 512


class HingeLoss(Loss):
    """A loss that asks each positive to outscore negatives by a margin.

    Args:
        similarity: How embeddings are compared.
        margin: The margin ``a``, in units of the score.
        reduction: ``sum`` over the batch, as VSE++ was trained, or ``mean``, the sum divided by B. Under
            gradient clipping the two differ: ``sum`` clipped at 2 is ``mean`` clipped at ``2 / B``.

    Raises:
        InputError: If the margin is not positive or the reduction unknown.
    """

    def __init__(self, similarity: Similarity = COSINE, margin: float = 0.2, reduction: Reduction = "sum") -> None:
        super().__init__(similarity)
        if not margin > 0:
            raise InputError(f"margin: {margin} is not positive; 0.2 suits cosine, 0.05 order similarity")
        if reduction not in ("sum", "mean"):
            raise InputError(f"reduction: {reduction!r} is unknown; use sum or mean")
        self.margin = margin
        self.reduction = reduction

    def _reduce(self, costs: Tensor, batch_size: int) -> Tensor:
        total = costs.sum()
        return total / batch_size if self.reduction == "mean" else total


class SumOfHinges(HingeLoss):
    """Sum of hinges over all negatives (SH, "VSE0").

    ``Σ_b Σ_j [a + S_bj - S_bb]₊ + Σ_b Σ_i [a + S_ib - S_bb]₊`` over the negatives j of image b and i of
    caption b (Kiros et al., *Unifying Visual-Semantic Embeddings with Multimodal Neural Language Models*,
    2014; the baseline of Faghri et al., 2018, section 3.2).

    Requirements:
        Memory for several ``(B, B)`` matrices. Any batch; where there is no negative, the loss is 0.

    Relations to its neighbours:
        :class:`MaxOfHinges` keeps only the largest hinge of each anchor. When all scores are equal this loss
        is ``2B(B - 1)a``; its gradient averages over many negatives and leads away from there, which is why
        :class:`~training.losses.curriculum.Curriculum` begins with it.

    Example:
        >>> import torch
        >>> loss = SumOfHinges(margin=0.2)
        >>> float(loss(torch.eye(3), torch.eye(3), torch.arange(3)).value)
        0.0
    """

    def compute(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput:
        """See the class."""
        scores = self.similarity.scores(images, captions)  # (B, B)
        positive = scores.diagonal()  # (B,)
        over_captions = (self.margin + scores - positive[:, None]).relu()
        over_images = (self.margin + scores - positive).relu()
        costs = (over_captions + over_images).index_put(same_image(image_ids), scores.new_zeros(()))
        negatives = find_negatives([scores], image_ids)
        return LossOutput(self._reduce(costs, len(images)), negatives.statistics(self.margin))

    def anchor_costs(self, positive: Tensor, negatives: Tensor) -> Tensor:
        """Sum of the hinges over the pool: on the scale of a batch as large as that."""
        return (self.margin + negatives - positive[:, None]).relu().sum(dim=1)


class MaxOfHinges(HingeLoss):
    """Hinge on the hardest negative of each anchor (MH, VSE++).

    ``Σ_b [a + max_j S_bj - S_bb]₊ + Σ_b [a + max_i S_ib - S_bb]₊`` (Faghri et al., *VSE++: Improving
    Visual-Semantic Embeddings with Hard Negatives*, 2018, section 3.2).

    Only 3B scores carry a gradient. The hardest negatives are found without a graph, a block of rows at a
    time, and those 3B scores alone are differentiated: loss and gradient are those of the full score
    matrix, at one product of embedding matrices instead of three, and no (B, B) matrix is kept.

    Requirements:
        Same-image rows must share an id: a second caption of the same image is almost surely the hardest
        "negative". Larger batches hold harder negatives.

    Relations to its neighbours:
        :class:`SumOfHinges` uses all negatives. When all scores are equal this loss is ``2Ba``, a plateau
        that untrained encoders can be drawn to; :class:`~training.losses.collapse.CollapseDetector` notices
        and :class:`~training.losses.curriculum.Curriculum` avoids it.

    Example:
        >>> import torch
        >>> loss = MaxOfHinges(margin=0.25)
        >>> float(loss(torch.ones(3, 4) / 2, torch.ones(3, 4) / 2, torch.arange(3)).value)
        1.5
    """

    def compute(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput:
        """See the class."""
        blocks = (self.similarity.scores(rows, captions) for rows in torch.split(images, BLOCK_ROWS))
        negatives = find_negatives(blocks, image_ids)
        anchors = torch.arange(len(images), device=images.device)
        rows = torch.cat([anchors, anchors, negatives.image])
        columns = torch.cat([anchors, negatives.caption, anchors])
        known = torch.cat([negatives.positive, negatives.caption_score, negatives.image_score])
        scores = self.similarity.entries(known, images, captions, rows, columns)  # (3B,)
        positive, caption, image = scores.chunk(3)
        costs = (self.margin + caption - positive).relu() + (self.margin + image - positive).relu()
        # Without a negative for the image there is none for the caption: both searches exclude the same pairs.
        costs = costs.where(negatives.caption_score != -math.inf, 0)
        return LossOutput(self._reduce(costs, len(images)), negatives.statistics(self.margin))

    def anchor_costs(self, positive: Tensor, negatives: Tensor) -> Tensor:
        """Hinge on the hardest of the pool."""
        return (self.margin + negatives.max(dim=1).values - positive).relu()
