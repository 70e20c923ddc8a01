"""Contrastive losses with a learnt temperature: InfoNCE (CLIP) and the sigmoid loss (SigLIP)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.errors import InputError
from training.losses.base import Loss, LossOutput, find_negatives, same_image
from training.models.similarity import COSINE, Similarity

# CLIP's bound: logits are at most 100 times the scores.
MIN_TEMPERATURE = 0.01


class _TemperedLoss(Loss):
    """A loss on scores divided by a temperature.

    Args:
        similarity: How embeddings are compared.
        temperature: The initial temperature, in units of the score.
        learnable: Whether ``log_temperature`` is trained; it needs its own parameter group without weight
            decay.

    Raises:
        InputError: If the temperature is below 0.01.
    """

    def __init__(self, similarity: Similarity, temperature: float, learnable: bool) -> None:
        super().__init__(similarity)
        if not temperature >= MIN_TEMPERATURE:
            raise InputError(f"temperature: {temperature} is below {MIN_TEMPERATURE}; 0.07 is usual")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learnable)

    def _scale(self) -> Tensor:
        # The parameter itself is clamped: a clamp in the graph would stop its gradient, and hold it there.
        with torch.no_grad():
            self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
        return (-self.log_temperature).exp()


class InfoNCE(_TemperedLoss):
    """Symmetric cross-entropy of picking the match among the batch.

    ``-1/2B Σ_b [log softmax_j(S_bj / t)_b + log softmax_i(S_ib / t)_b]`` over the match and its negatives
    (Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021, fig. 3).
    Other captions of the same image are left out of the softmax. The temperature t never falls below 0.01.

    Requirements:
        Large batches: the bound on mutual information, and the gradient, improve with the number of
        negatives.

    Relations to its neighbours:
        As t falls it turns into the difference of hardest negative and positive, that is
        :class:`~training.losses.hinge.MaxOfHinges` without a margin. :class:`SigmoidLoss` needs no softmax
        over the batch.

    Example:
        >>> import torch
        >>> loss = InfoNCE(temperature=1.0)
        >>> value = loss(torch.zeros(4, 2), torch.zeros(4, 2), torch.arange(4)).value
        >>> print(f"{value.item():.4f} = log 4")
        1.3863 = log 4
    """

    def __init__(self, similarity: Similarity = COSINE, temperature: float = 0.07, learnable: bool = True) -> None:
        super().__init__(similarity, temperature, learnable)

    def compute(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput:
        """See the class."""
        scores = self.similarity.scores(images, captions)  # (B, B)
        rows, columns = same_image(image_ids)
        others = rows[rows != columns], columns[rows != columns]
        logits = (scores * self._scale()).index_put(others, scores.new_tensor(-math.inf))
        matches = torch.arange(len(images), device=images.device)
        over_captions = functional.cross_entropy(logits, matches)
        over_images = functional.cross_entropy(logits.T, matches)
        negatives = find_negatives([scores], image_ids)
        return LossOutput((over_captions + over_images) / 2, negatives.statistics(margin=0))

    def anchor_costs(self, positive: Tensor, negatives: Tensor) -> Tensor:
        """Cross-entropy of picking the match among the pool, halved."""
        scores = torch.cat([positive[:, None], negatives], dim=1)  # (B, 1 + M)
        absent = scores == -math.inf
        logits = (scores.masked_fill(absent, 0) * self._scale()).masked_fill(absent, -math.inf)
        return (logits.logsumexp(dim=1) - logits[:, 0]) / 2


class SigmoidLoss(_TemperedLoss):
    """Every pair of the batch classified by itself: match or not.

    ``-1/B Σ_ij log sigmoid(z_ij (S_ij / t + b))`` with z = 1 for matches and -1 otherwise (Zhai et al.,
    *Sigmoid Loss for Language Image Pre-Training*, 2023, algorithm 1). Other captions of the same image are
    left out. The temperature t never falls below 0.01; the bias b starts at -10, since almost no pair
    matches.

    Requirements:
        None on the batch: its pairs do not compete.

    Relations to its neighbours:
        :class:`InfoNCE` compares scores within a row or column; this loss compares each with a fixed
        threshold, so its scores can be read as log-odds.

    Example:
        >>> import torch
        >>> loss = SigmoidLoss()
        >>> value = loss(torch.eye(2), torch.eye(2), torch.arange(2)).value
        >>> print(f"{value.item():.4f}")
        0.6932
    """

    def __init__(self, similarity: Similarity = COSINE, temperature: float = 0.1, learnable: bool = True) -> None:
        super().__init__(similarity, temperature, learnable)
        self.bias = nn.Parameter(torch.tensor(-10.0), requires_grad=learnable)

    def compute(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput:
        """See the class."""
        scores = self.similarity.scores(images, captions)  # (B, B)
        logits = scores * self._scale() + self.bias
        # -log sigmoid(z) is softplus(-z).
        mismatches = functional.softplus(logits).index_put(same_image(image_ids), scores.new_zeros(()))
        matches = functional.softplus(-logits.diagonal())
        negatives = find_negatives([scores], image_ids)
        value = (matches.sum() + mismatches.sum()) / len(images)
        return LossOutput(value, negatives.statistics(margin=0))

    def anchor_costs(self, positive: Tensor, negatives: Tensor) -> Tensor:
        """The match as a match and the pool as mismatches, halved: a mismatch is met from either side."""
        scale, absent = self._scale(), negatives == -math.inf
        mismatches = functional.softplus(negatives.masked_fill(absent, 0) * scale + self.bias).masked_fill(absent, 0)
        return (functional.softplus(-positive * scale - self.bias) + mismatches.sum(dim=1)) / 2
