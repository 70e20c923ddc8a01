"""Images of the digits 0 to 9, drawn with PIL's own font in random place, size, angle, stroke and noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE, SCALE = 28, 2  # drawn at twice the size, for smooth edges
SIZES, ANGLE, SHIFT, STROKE, NOISE = (18, 26), 20.0, 3.0, 1.5, 0.1


def draw_digits(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images ``(count, 1, 28, 28)``, from 0 to 1 but for the noise, and their labels."""
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size * SCALE) for size in range(*SIZES)]
    labels = rng.integers(10, size=count)
    images = np.empty((count, 1, SIDE, SIDE), dtype=np.float32)
    for image, label in zip(images, labels, strict=True):
        canvas = Image.new("L", (SIDE * SCALE, SIDE * SCALE))
        middle = SIDE * SCALE / 2
        stroke = round(rng.uniform(0, STROKE) * SCALE) / 2
        font = fonts[rng.integers(len(fonts))]
        ImageDraw.Draw(canvas).text((middle, middle), str(label), 255, font, anchor="mm", stroke_width=int(stroke))
        shift = tuple(rng.uniform(-SHIFT, SHIFT, size=2) * SCALE)
        canvas = canvas.rotate(rng.uniform(-ANGLE, ANGLE), Image.Resampling.BILINEAR, translate=shift)
        image[0] = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
    images += NOISE * rng.standard_normal(images.shape, dtype=np.float32)
    return images, labels
