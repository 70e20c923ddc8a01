"""Plain colours with two captions each and a run that tells them apart a little, for the verbs that take a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vse_app.cli import main


def draw(folder: Path, count: int) -> str:
    """Write so many pictures; the data's name."""
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(count):
        pixels = np.clip(rng.integers(256, size=3) + rng.normal(0, 9, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines += [f"{number}.png,word{number} shape{number % 4}", f"{number}.png,side{number % 5} word{number}"]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return f"folder:{folder}"


def train(data: str, out: Path) -> Path:
    """Train for eight epochs on all pictures."""
    main(
        f"train --data {data} --out {out} --train-split all --val-split all --model.image.size 16 --model.dim 16 "
        "--model.text.word-dim 8 --model.text.min-count 1 --optim.epochs 8 --optim.batch-size 16 --optim.lr 5e-3 "
        "--loss.name infonce".split()
    )
    return out
