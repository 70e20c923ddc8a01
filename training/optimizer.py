"""What moves the weights: groups of parameters, and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.config import OptimConfig
from training.losses import Loss
from training.models.dual_encoder import DualEncoder


def build_optimizer(config: OptimConfig, model: DualEncoder, loss: Loss) -> Optimizer:
    """Adam or AdamW over all that can be trained, a learned temperature included.

    Pretrained backbones have a learning rate of their own. Only matrices decay: no bias, gain or temperature does.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in (*model.named_parameters(), *loss.named_parameters(prefix="loss")):
        if parameter.requires_grad:
            side = model.config.image if name.startswith("image") else model.config.text
            pretrained = ".backbone." in name and ":" in side.encoder
            groups.setdefault((pretrained, parameter.ndim > 1), []).append(parameter)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(
        [
            {
                "params": parameters,
                "peak_lr": config.backbone_lr if pretrained else config.lr,
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (pretrained, matrix), parameters in groups.items()
        ],
        lr=config.lr,
    )


def set_learning_rate(optimizer: Optimizer, config: OptimConfig, step: int, steps_per_epoch: int) -> None:
    """Give each group its peak rate times the schedule's share at a step, counted from 0.

    ::

        warm-up   (step + 1) / warmup_steps
        step      0.1 ** (epoch // decay_epochs)
        cosine    ½ (1 + cos π t), t from 0 after the warm-up to 1 at the end of training
        constant  1
    """
    share = _share(config, step, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def _share(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return float(0.1 ** (step // steps_per_epoch // config.decay_epochs))
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, config.epochs * steps_per_epoch - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
