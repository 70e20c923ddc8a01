"""A small trained model and its pictures, for the tests of the audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from training.config import Config, LossConfig, OptimConfig
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
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


def train(data: str, out: Path, **changes: object) -> Path:
    """A run that ranks nearly every picture of ``data`` first."""
    config = Config(
        data=data,
        out=str(out),
        train_split="all",
        val_split="all",
        model=ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=16, min_count=1), dim=32),
        loss=LossConfig(name="infonce"),
        optim=OptimConfig(lr=3e-3, epochs=24, batch_size=24, schedule="constant"),
    )
    Trainer(replace(config, **changes)).fit()  # type: ignore[arg-type]
    return out
