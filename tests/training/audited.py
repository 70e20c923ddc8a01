"""A small trained model and its pictures, for the tests of the audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from training.config import Config, LossConfig, OptimConfig
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.tower import Tower
from training.trainer import Trainer

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "white": (230, 230, 230)}
PLACES = ("left", "right", "top", "bottom", "everywhere", "middle")


def draw(folder: Path) -> str:
    """24 pictures: a colour somewhere on grey, each with two captions and a little noise."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    lines = ["image,caption"]
    for colour, value in COLOURS.items():
        for place in PLACES:
            pixels = np.full((16, 16, 3), 110.0)
            area = {
                "left": np.s_[:, :6],
                "right": np.s_[:, 10:],
                "top": np.s_[:6],
                "bottom": np.s_[10:],
                "everywhere": np.s_[:],
                "middle": np.s_[4:12, 4:12],
            }[place]
            pixels[area] = value
            pixels += noise.normal(0, 8, pixels.shape)
            name = f"{colour}-{place}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
            lines += [f"{name},{colour} {place}", f"{name},{place} is {colour}"]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"folder:{folder}"


def settings(data: str, out: Path) -> Config:
    """A small model for pictures drawn by :func:`draw`."""
    return Config(
        data=data,
        out=str(out),
        train_split="all",
        val_split="all",
        model=ModelConfig(
            image=ImageTowerConfig(size=16),
            text=TextTowerConfig(word_dim=16, min_count=1, pooling="mean", head="linear"),
            dim=32,
        ),
        loss=LossConfig(name="infonce"),
        optim=OptimConfig(lr=3e-3, epochs=24, batch_size=24, schedule="constant"),
    )


def solve(data: str, out: Path) -> Path:
    """A run that ranks every picture of ``data`` first, alike on every processor.

    The backbones stay random and both heads are solved for. Gradient descent would amplify the last bits of its
    arithmetic, and what an attack does to the model would hang on them.
    """
    trainer = Trainer(settings(data, out))
    model, corpus = trainer.model, trainer.train_corpus
    words = (*COLOURS, *PLACES)
    meant = torch.tensor([[float(word in caption.split()) for word in words] for caption in corpus.captions])
    meant = F.pad(meant, (0, model.config.dim - len(words)))  # (C, D)
    for side, targets in (("image", meant[::2]), ("text", meant)):
        tower = model.image_tower if side == "image" else model.text_tower
        inputs = trainer.pairs.images if side == "image" else trainer.pairs.texts
        values, mask = inputs.fetch(np.arange(len(targets)), None)
        solve_head(tower, values, mask, targets)
    model.save_pretrained(out)
    return out


@torch.no_grad()
def solve_head(tower: Tower, values: Tensor, mask: Tensor | None, targets: Tensor, ridge: float = 1e-2) -> None:
    """Ridge regression of ``targets`` ``(N, D)`` on the features of a random backbone, in float64."""
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of the whole data instead of a moving average
    tower.train().features(values, mask)
    features = tower.eval().features(values, mask).values.double()
    centred = features - features.mean(0)
    gram = centred @ centred.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, (targets - targets.mean(0)).double()).T @ centred
    head = tower.head[-1]  # type: ignore[index]
    head.weight.copy_(weight)
    head.bias.copy_(targets.mean(0) - weight @ features.mean(0))


def train(data: str, out: Path, **changes: object) -> Path:
    """A trained run; what it has learned differs from processor to processor."""
    Trainer(replace(settings(data, out), **changes)).fit()  # type: ignore[arg-type]
    return out
