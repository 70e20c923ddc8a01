"""Draw the scenes of the built-in data set: textured shapes with soft shadows on a gentle backdrop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

PICTURE_SIZE = 128
"""Side of a picture in pixels."""

DRAWING_VERSION = 1
"""Part of every scene's fingerprint: raise it whenever a change below alters pixels."""

COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "orange": (240, 132, 32),
    "yellow": (246, 200, 36),
    "green": (46, 158, 82),
    "blue": (42, 104, 208),
    "purple": (128, 62, 176),
    "pink": (242, 128, 176),
    "black": (48, 50, 58),
}
BACKGROUNDS: dict[str, Colour] = {
    "cream": (250, 240, 216),
    "grey": (214, 217, 222),
    "pale blue": (205, 227, 246),
    "pale green": (209, 238, 212),
    "lavender": (226, 215, 246),
}
SIZES = {"small": 15.0, "large": 25.0}
"""Radius in pixels of the circle that a shape roughly fills."""

TEXTURES = ("plain", "striped", "dotted")

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        shape: A key of ``SHAPES``.
        colour: A key of ``COLOURS``.
        size: A key of ``SIZES``.
        texture: One of ``TEXTURES``.
        x: Centre from the left edge, as a fraction of the picture's side.
        y: Centre from the top edge, as a fraction of the picture's side.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float


def _arc(start: float, stop: float, radius: float = 1.0, centre_x: float = 0.0) -> NDArray[np.float64]:
    """Points ``(72, 2)`` on an arc between two angles in radians."""
    angle = np.linspace(start, stop, 72)
    return np.stack([centre_x + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _star() -> NDArray[np.float64]:
    angle = -math.pi / 2 + np.arange(10) * math.pi / 5
    radius = np.where(np.arange(10) % 2, 0.48, 1.12)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.08], axis=1)


def _cross() -> NDArray[np.float64]:
    arm = 0.34
    corner: NDArray[np.float64] = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turned = corner[:, ::-1] * np.array([-1, 1])
    return np.concatenate([corner, turned, -corner, -turned])


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * math.pi, 96)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([np.sin(t) ** 3, (y - 2) / 16], axis=1)


def _crescent() -> NDArray[np.float64]:
    bite, radius, centre_x = 0.46, 0.76, 0.12
    tip = (1 + bite**2 - radius**2) / (2 * bite)
    outer, inner = math.acos(tip), math.acos((tip - bite) / radius)
    return np.concatenate(
        [
            _arc(outer, 2 * math.pi - outer, centre_x=centre_x),
            _arc(2 * math.pi - inner, inner, radius, centre_x + bite),
        ]
    )


_CIRCLE = _arc(0, 2 * math.pi)

SHAPES: dict[str, tuple[NDArray[np.float64], ...]] = {
    "disc": (_CIRCLE,),
    "square": (0.86 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),),
    "triangle": (np.array([[0, -0.98], [1.08, 0.82], [-1.08, 0.82]]),),
    "star": (_star(),),
    "ring": (_CIRCLE, 0.46 * _CIRCLE),
    "cross": (_cross(),),
    "heart": (_heart(),),
    "crescent": (_crescent(),),
}
"""Outline of each shape, and its hole if it has one: ``(P, 2)``, y downwards, about one unit in radius."""


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    """``colour`` with ``share`` of it replaced by ``other``."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


@cache
def _backdrop(background: str) -> Image.Image:
    """A tint, lit from the upper middle: RGB, ``PICTURE_SIZE`` square."""
    y, x = np.mgrid[0 : 1 : PICTURE_SIZE * 1j, 0 : 1 : PICTURE_SIZE * 1j]
    light = 1 - 0.13 * np.clip(np.hypot(x - 0.5, y - 0.3) - 0.1, 0, None)
    pixels = light[..., None] * np.array(BACKGROUNDS[background])  # (H, W, 3)
    return Image.fromarray(pixels.round().astype(np.uint8))


@cache
def _sprite(shape: str, colour: str, size: str, texture: str) -> Image.Image:
    """An anti-aliased shape: RGBA, square, its centre in the middle."""
    radius = SIZES[size] * _SUPERSAMPLING
    side = 2 * round(1.25 * SIZES[size]) * _SUPERSAMPLING
    base = COLOURS[colour]
    ink = _mix(base, (255, 255, 255), 0.82)
    fill = Image.new("RGB", (side, side), base)
    mask = Image.new("L", (side, side))
    pen, stencil = ImageDraw.Draw(fill), ImageDraw.Draw(mask)

    # Wide enough to survive halving the picture, fine enough to repeat on a small shape.
    period = (5 + 0.16 * SIZES[size]) * _SUPERSAMPLING
    steps = np.arange(-side, side, period) + side / 2
    if texture == "striped":
        for offset in steps:
            pen.line([(offset, 0), (offset + side, side)], fill=ink, width=round(0.32 * period))
            pen.line([(offset - side, 0), (offset, side)], fill=ink, width=round(0.32 * period))
    elif texture == "dotted":
        for row, y in enumerate(steps):
            for x in steps + (row % 2) * period / 2:
                pen.circle((x, y), 0.26 * period, fill=ink)

    rim = _mix(base, (0, 0, 0), 0.28)
    for edge, value in zip(SHAPES[shape], (255, 0), strict=False):
        points = [(float(x), float(y)) for x, y in edge * radius + side / 2]
        stencil.polygon(points, fill=value)
        pen.line([*points, *points[:2]], fill=rim, width=round(2.2 * _SUPERSAMPLING), joint="curve")

    sheen = Image.linear_gradient("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize(fill.size)
    fill.paste((255, 255, 255), mask=sheen.point([value // 6 for value in range(256)]))
    fill.putalpha(mask)
    return fill.reduce(_SUPERSAMPLING)


def draw(objects: Sequence[SceneObject], background: str) -> Image.Image:
    """Draw objects over a background.

    Args:
        objects: What to draw, in any order; they should not overlap.
        background: A key of ``BACKGROUNDS``.

    Returns:
        An RGB picture, ``PICTURE_SIZE`` square.
    """
    picture = _backdrop(background).copy()
    shadow = Image.new("L", picture.size)
    placed = []
    for item in objects:
        sprite = _sprite(item.shape, item.colour, item.size, item.texture)
        left = round(item.x * PICTURE_SIZE) - sprite.width // 2
        top = round(item.y * PICTURE_SIZE) - sprite.height // 2
        placed.append((sprite, left, top))
        shadow.paste(96, (left + 2, top + 3), sprite.getchannel("A"))
    picture.paste((40, 40, 70), mask=shadow.filter(ImageFilter.GaussianBlur(2.5)))
    for sprite, left, top in placed:
        picture.paste(sprite, (left, top), sprite)
    return picture
