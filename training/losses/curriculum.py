"""From the sum of hinges to the hardest one: the trainer's default loss."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from training.errors import InputError
from training.losses.base import Loss, LossOutput, Reduction
from training.losses.hinge import MaxOfHinges, SumOfHinges
from training.models.similarity import COSINE, Similarity

logger = logging.getLogger(__name__)


class Curriculum(Loss):
    """Sum of hinges at first, the hardest hinge in the end.

    ``(1 - α) SH / (B - 1) + α MH``, where α rises linearly from 0 to 1 over the warm-up. SH has B - 1 times
    as many hinges as MH; divided by that it is each anchor's mean hinge, on the scale of the largest (both
    are ``2Ba`` when all scores are equal), so α alone sets the balance at every batch size. The mean never
    exceeds the largest: the ramp only ever makes the task harder.

    Call :meth:`advance` before each step. α is a function of the global step and of the step of the last
    fall-back, and the latter is in ``state_dict()``: a resumed run continues exactly.

    Requirements:
        As of :class:`SumOfHinges` during the warm-up and of :class:`MaxOfHinges` after it.

    Relations to its neighbours:
        VSE∞ (Chen et al., 2021) switches from the mean of hinges to MH at the end of one epoch; the ramp
        spares that jump. When :class:`~training.losses.collapse.CollapseDetector` reports, call
        :meth:`fall_back`.

    Args:
        warmup_steps: Steps until the loss is MH alone.
        similarity: How embeddings are compared.
        margin: The margin of both losses, in units of the score.
        reduction: ``sum`` or ``mean`` over the batch; see :class:`~training.losses.hinge.HingeLoss`.
        start: Step at which the ramp begins. ``-warmup_steps`` begins with MH alone, so that all this class
            adds to MH is :meth:`fall_back`.

    Raises:
        InputError: If the warm-up is shorter than one step, or as of ``HingeLoss``.

    Example:
        >>> import torch
        >>> loss = Curriculum(warmup_steps=100)
        >>> loss.advance(25)
        >>> loss.alpha
        0.25
        >>> float(loss(torch.eye(3), torch.eye(3), torch.arange(3)).value)
        0.0
    """

    def __init__(
        self,
        warmup_steps: int,
        similarity: Similarity = COSINE,
        margin: float = 0.2,
        reduction: Reduction = "sum",
        start: int = 0,
    ) -> None:
        super().__init__(similarity)
        if warmup_steps < 1:
            raise InputError(f"warmup_steps: {warmup_steps} is below 1; without a warm-up use max of hinges")
        self.warmup_steps, self.margin, self.reduction = warmup_steps, margin, reduction
        self.sum_of_hinges = SumOfHinges(similarity, margin, reduction)
        self.max_of_hinges = MaxOfHinges(similarity, margin, reduction)
        self._step = 0
        self._ramp_start = start

    @property
    def alpha(self) -> float:
        """Weight of the hardest hinge at the current step, from 0 to 1."""
        return min(1.0, max(0.0, (self._step - self._ramp_start) / self.warmup_steps))

    def advance(self, step: int) -> None:
        """Set the global step that comes next."""
        self._step = step

    def fall_back(self) -> None:
        """Restart the ramp at the current step, and say so in the log."""
        self._ramp_start = self._step
        logger.warning(
            "step %d: back to the sum of hinges; the hardest negatives return over %d steps",
            self._step,
            self.warmup_steps,
        )

    def compute(self, images: Tensor, captions: Tensor, image_ids: Tensor) -> LossOutput:
        """See the class."""
        alpha = self.alpha
        if alpha == 1:
            return self.max_of_hinges.compute(images, captions, image_ids)
        summed = self.sum_of_hinges.compute(images, captions, image_ids)
        mean = summed.value / max(1, len(images) - 1)
        if alpha == 0:
            return LossOutput(mean, summed.statistics)
        hardest = self.max_of_hinges.compute(images, captions, image_ids).value
        return LossOutput((1 - alpha) * mean + alpha * hardest, summed.statistics)

    def anchor_costs(self, positive: Tensor, negatives: Tensor) -> Tensor:
        """The mean hinge over the pool and the hardest one, in the balance of the current step."""
        alpha = self.alpha
        hardest = self.max_of_hinges.anchor_costs(positive, negatives)
        if alpha == 1:
            return hardest
        present = negatives.isfinite().sum(dim=1).clamp(min=1)
        mean = self.sum_of_hinges.anchor_costs(positive, negatives) / present
        return (1 - alpha) * mean + alpha * hardest

    def get_extra_state(self) -> Tensor:
        """The step at which the current ramp began, as int64, for ``state_dict()``."""
        return torch.tensor(self._ramp_start)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up what :meth:`get_extra_state` gave."""
        self._ramp_start = int(state)
