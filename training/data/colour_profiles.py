"""Colours of pictures that carry an ICC profile, brought to sRGB."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 1 << 24
"""Larger profiles are ignored; those of printing presses take some megabytes."""

_SAME = 1
"""A profile that moves no colour by more levels than this is sRGB under another name."""
_MODES = {
    "RGB": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"),
    "GRAY": ("1", "L", "LA"),
    "CMYK": ("CMYK",),
}
"""Modes of Pillow by the colour space of the profile that fits them. Grey pictures often carry one for RGB."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture in sRGB, perceptual intent.

    Args:
        image: 8 bits per channel, any mode.
        profile: The ICC profile of its colours.

    Returns:
        RGB, or RGBA where the picture has transparency; None where the profile says sRGB already.

    Raises:
        ValueError: If the profile is none, is damaged, too large, or of another kind of pixels.
    """
    if len(profile) > MAX_PROFILE:
        raise ValueError(f"a profile of {len(profile):,} bytes")
    space, transform = _transform(profile)
    if image.mode not in _MODES.get(space, ()):
        raise ValueError(f"a profile for {space}, not for {image.mode}")
    if transform is None:
        return None
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image.convert({"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space])
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The profile's colour space, and its way to sRGB; None where that changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space not in _MODES:
            return space, None
        mode = "L" if space == "GRAY" else space
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"a damaged profile ({error})") from error
    if space == "CMYK":
        return space, transform
    levels = np.arange(256, dtype=np.uint8)
    probe = Image.fromarray(
        levels[:, None] if mode == "L" else np.stack(np.meshgrid(*3 * [levels[::15]]), -1).reshape(-1, 18, 3)
    )
    seen = ImageCms.applyTransform(probe, transform)
    moved = np.abs(np.asarray(probe.convert("RGB")).astype(int) - np.asarray(seen)).max()
    return space, None if moved <= _SAME else transform
