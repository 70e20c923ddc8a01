"""Training on perturbed pictures: the inner maximisation, and the two losses that it can serve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.config import AdversarialConfig, parse_epsilon
from training.data.batches import Batch
from training.errors import InputError
from training.losses import Loss, LossOutput
from training.models.dual_encoder import DualEncoder
from training.models.image_tower import PixelBackbone
from training.models.tower import evaluating
from training.robustness.attacks import Objective, Value, pgd
from training.robustness.balls import Ball
from training.robustness.norms import LINF


class AdversarialTraining:
    """Losses on pictures that PGD has perturbed against the model as it is now.

    ``fare`` needs no captions: the perturbed picture is to be embedded where the model that fine-tuning began with
    embeds the clean one (Schlarmann et al., *Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings*,
    2024). The text tower stays as it is, and so do the embeddings of every caption.

    ``supervised`` is the run's own loss on perturbed pictures, as adversarial training is for classifiers (Madry et
    al., 2018). The perturbation widens the violation that max-of-hinges looks at: the hardest caption of the batch
    over the picture's own. Where all captions describe one picture there is none, and the picture stays clean.

    The towers are in evaluation mode throughout. Dropout would give the attack a gradient of another network, and
    statistics of perturbed batches would replace those of clean pictures.

    Args:
        config: What to do.
        model: The model being trained, with an image tower that sees pixels and is not frozen.
        loss: The run's loss.
        embed_texts: Embeddings ``(B, D)`` of the captions of a batch, with gradients.
        anchors: ``fare``: embeddings ``(I, D)`` of all clean training pictures by the model at the beginning.
        seed: With the step, decides where the attack starts.

    Raises:
        InputError: For a frozen or blind image tower.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        model: DualEncoder,
        loss: Loss,
        embed_texts: Callable[[Batch], Tensor],
        anchors: Tensor | None,
        seed: int,
    ) -> None:
        tower = model.image_tower
        if tower.config.frozen:
            raise InputError("adversarial training of a frozen image tower: add --model.image.frozen False")
        if not isinstance(tower.backbone, PixelBackbone):
            raise InputError("adversarial training needs pictures; this model takes precomputed features")
        self.config, self.model, self.loss, self.embed_texts, self.seed = config, model, loss, embed_texts, seed
        self.anchors = anchors
        self.ball = Ball(LINF, parse_epsilon(config.epsilon))

    def __call__(self, batch: Batch, step: int) -> LossOutput:
        """The loss of one batch at perturbed pictures, differentiable, with the statistics of the run's own loss.

        Args:
            batch: Pictures as pixels.
            step: Number of the training step.
        """
        with evaluating(self.model):
            clean, ids = batch.images.values.float() / 255, batch.image_ids
            captions = self.embed_texts(batch).float()
            anchors = None if self.anchors is None else self.anchors[ids.cpu()].to(ids.device)
            points = clean
            if anchors is not None or bool((ids != ids[0]).any()):
                objective = self._violation(captions.detach(), ids) if anchors is None else self._distance(anchors)
                seed = self.seed * 1_000_003 + step
                points = pgd(objective, clean, self.ball, self.config.steps, step_size=1 / 2, seed=seed).points
            images = self.model.image_tower(points)
            if anchors is None:
                return self.loss(images, captions, ids)
            with torch.no_grad():
                statistics = self.loss(images.detach(), captions.detach(), ids).statistics
            return LossOutput((images - anchors).square().sum(1).mean(), statistics)

    def _distance(self, anchors: Tensor) -> Objective:
        """Squared distance ``(b,)`` from where the clean picture belongs."""

        def objective(points: Tensor, rows: Tensor) -> Value:
            apart = (self.model.image_tower(points) - anchors[rows]).square().sum(1)
            return Value(apart, torch.zeros_like(rows, dtype=torch.bool))

        return objective

    def _violation(self, captions: Tensor, image_ids: Tensor) -> Objective:
        """Score of the batch's hardest caption of another picture, minus that of the pair's own, ``(b,)``."""
        other = image_ids[:, None] != image_ids

        def objective(points: Tensor, rows: Tensor) -> Value:
            scores = self.model.similarity.scores(self.model.image_tower(points), captions)  # (b, B)
            hardest = scores.masked_fill(~other[rows], -torch.inf).amax(1)
            own = scores.gather(1, rows[:, None])[:, 0]
            return Value(hardest - own, torch.zeros_like(rows, dtype=torch.bool))

        return objective
