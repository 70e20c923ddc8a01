"""Losses on a batch of matching (image, caption) embeddings, all behind one interface: :class:`Loss`."""

from training.losses.base import Loss, LossOutput, NegativePool, Statistics
from training.losses.collapse import CollapseDetector
from training.losses.contrastive import InfoNCE, SigmoidLoss
from training.losses.curriculum import Curriculum
from training.losses.hinge import MaxOfHinges, SumOfHinges

__all__ = [
    "CollapseDetector",
    "Curriculum",
    "InfoNCE",
    "Loss",
    "LossOutput",
    "MaxOfHinges",
    "NegativePool",
    "SigmoidLoss",
    "Statistics",
    "SumOfHinges",
]
