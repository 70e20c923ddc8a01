"""The view of a picture that an image tower takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from training.errors import InputError

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_CROP_AREA = (0.6, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_AUGMENTATIONS = ("none", "crop", "crop+flip")


@dataclass(frozen=True)
class ImageTransform:
    """Cuts an RGB image to a square uint8 tensor. Normalisation is the image tower's business.

    Evaluation resizes the shorter side to ``resize`` and takes the central ``size`` x ``size`` pixels.
    Augmentation takes a random crop (60-100 % of the area, aspect ratio 3:4 to 4:3) resized to ``size``,
    and with ``"crop+flip"`` mirrors every second one.

    Attributes:
        size: Side of the result in pixels.
        resize: Shorter side before the central crop, at least ``size``.
        interpolation: Resampling filter, ``"bicubic"`` or ``"bilinear"``.
        augment: What a seeded call does: ``"none"``, ``"crop"`` or ``"crop+flip"``.

    Raises:
        InputError: On an unknown name, or unless 0 < ``size`` <= ``resize``.
    """

    size: int
    resize: int
    interpolation: str = "bicubic"
    augment: str = "none"

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise InputError(f"image size {self.size}: must be positive and at most resize={self.resize}")
        for kind, name, known in (
            ("interpolation", self.interpolation, _RESAMPLING),
            ("augmentation", self.augment, _AUGMENTATIONS),
        ):
            if name not in known:
                raise InputError(f"image {kind} {name!r} is unknown; choose from {', '.join(known)}")

    def __call__(self, image: Image.Image, generator_seed: int | None) -> torch.Tensor:
        """Transforms one image.

        Args:
            image: RGB, any size from 1x1.
            generator_seed: Non-negative; the augmentation depends on nothing else. None gives the
                evaluation view whatever ``augment`` says.

        Returns:
            uint8 tensor ``(3, size, size)``.
        """
        box, mirrored = _central_box(image.width, image.height, self.resize, self.size), False
        if self.augment != "none" and generator_seed is not None:
            generator = np.random.default_rng(generator_seed)
            box = _random_box(image.width, image.height, generator)
            mirrored = self.augment == "crop+flip" and generator.random() < 0.5
        # One resampling straight from the box: resizing a 10000x1 image first would take gigabytes.
        view = image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box=box)
        if mirrored:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()  # (3, size, size)


def _central_box(width: int, height: int, resize: int, size: int) -> tuple[float, float, float, float]:
    """The part of the original seen by torchvision's ``Resize(resize)`` and ``CenterCrop(size)``."""
    shorter = min(width, height)

    def span(side: int) -> tuple[float, float]:
        resized = resize * side // shorter
        start = round((resized - size) / 2)
        return start * side / resized, min((start + size) * side / resized, side)

    (left, right), (top, bottom) = span(width), span(height)
    return left, top, right, bottom


def _random_box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """The box of a random resized crop, by torchvision's procedure: ten tries, then a central box."""
    for _ in range(10):
        area = width * height * generator.uniform(*_CROP_AREA)
        ratio = math.exp(generator.uniform(*_CROP_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(width - w + 1))
            top = int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _CROP_RATIO[1]))
    h = min(height, round(width / _CROP_RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
