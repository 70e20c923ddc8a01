"""Picture files: finding them, decoding them safely, and cutting them to the size a model wants."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from training.errors import InputError

MAX_PIXELS = 178_956_970
"""Pictures with more pixels are refused before decoding (Pillow's own limit for decompression bombs)."""

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_CROP_AREA = (0.6, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_AUGMENTATIONS = ("none", "crop", "crop+flip")


@cache
def _raster_formats() -> tuple[str, ...]:
    """Formats Pillow decodes itself; leaves out video, and PostScript, which would start Ghostscript."""
    Image.init()
    return tuple(name for name in Image.OPEN if Image.MIME.get(name, "").startswith("image/"))


def decode(path: Path) -> Image.Image:
    """Decodes a picture file to upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, CMYK is converted, 16-bit grey is scaled to
    8 bits, and of several frames the first is taken.

    Raises:
        InputError: If the file is missing, empty, truncated, no picture, of a pixel format without a
            defined range, or has more than :data:`MAX_PIXELS` pixels (found without decoding).
    """
    return _decode(path)[0]


def decode_bytes(data: bytes, name: str, max_pixels: int, formats: Sequence[str]) -> Image.Image:
    """Decodes a picture that somebody sent, as :func:`decode` does.

    Args:
        data: The file's content.
        name: What errors call it.
        max_pixels: More are refused before decoding.
        formats: Names that Pillow gives to the formats that are let in.

    Raises:
        InputError: If it is no such picture, truncated or too large.
    """
    if not data:
        raise InputError(f"{name}: empty file; choose another one")
    return _open(BytesIO(data), name, max_pixels, formats)[0]


def _decode(path: Path) -> tuple[Image.Image, list[str]]:
    """The picture, and a note for every conversion that changes what is seen."""
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file; check the path")
        if not path.is_file():
            raise InputError(f"{path}: not a file; name a picture")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: empty file; replace or remove it")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check the path") from error
    return _open(path, str(path), MAX_PIXELS, _raster_formats())


def _open(source: Path | BytesIO, name: str, max_pixels: int, formats: Sequence[str]) -> tuple[Image.Image, list[str]]:
    try:
        with Image.open(source, formats=tuple(formats)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(f"{width}x{height} pixels, limit {max_pixels}")
            notes = ["several frames: the first is used"] if getattr(image, "is_animated", False) else []
            image.load()
            return _to_rgb(image, notes), notes
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a readable picture; convert it to JPEG or PNG, or remove it") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too large to decode safely ({error}); shrink or remove it") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble on
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be decoded ({reason}); replace or remove it") from error


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata does not make the pixels unusable
        orientation = None
        notes.append("unreadable EXIF ignored")

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} outside 0..65535 have no defined brightness")
        # convert("L") would clip at 255.
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        notes.append("16-bit grey scaled to 8 bits")
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        notes.append("transparency laid on white")
    image = image.convert("RGB")
    if orientation in _TO_UPRIGHT:
        image = image.transpose(_TO_UPRIGHT[orientation])
        notes.append("rotated as its EXIF says")
    return image


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk; an :class:`~training.data.corpus.ImageSource`."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """File name, size in bytes and time of last change in ns; survives moving the folder.

        Raises:
            InputError: If the file is missing.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; check the path") from error
        return f"{self.path.name}:{status.st_size}:{status.st_mtime_ns}"

    def load(self) -> Image.Image:
        """Decodes the file, see :func:`decode`."""
        return decode(self.path)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Lists picture files in a stable order, each once.

    Files named in ``paths`` are always kept. Folders are walked recursively in alphabetical order for
    files whose suffix belongs to a picture format; hidden files and folders, and links to folders, are
    skipped.

    Raises:
        InputError: If a path is missing or a folder cannot be read.
    """
    formats = _raster_formats()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; check the folder's permissions") from error

    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
        if not path.is_dir():
            found[path] = None
            continue
        for folder, subfolders, files in os.walk(path, onerror=refuse):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                    found[Path(folder, name)] = None
    return list(found)


@dataclass
class Quarantine:
    """What happened to files that could not be used, or only after a conversion.

    Attributes:
        refused: ``(path, reason)`` of files left out.
        notes: ``(path, conversion)`` of files used after a conversion.
    """

    refused: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[tuple[Path, str]] = field(default_factory=list)

    def report(self) -> str:
        """One line per file, refusals first; empty when there is nothing to say."""
        lines = [f"refused  {path}: {reason}" for path, reason in self.refused]
        return "\n".join(lines + [f"note     {path}: {note}" for path, note in self.notes])

    def to_json(self) -> dict[str, list[dict[str, str]]]:
        """The same as plain lists of ``{"path", "reason"}``, ready for ``json.dump``."""
        return {
            kind: [{"path": str(path), "reason": reason} for path, reason in entries]
            for kind, entries in (("refused", self.refused), ("notes", self.notes))
        }


def decode_all(paths: Iterable[Path], quarantine: Quarantine) -> Iterator[tuple[Path, Image.Image]]:
    """Decodes the files that can be decoded, in order; the others end in ``quarantine``."""
    for path in paths:
        try:
            image, notes = _decode(path)
        except InputError as error:
            quarantine.refused.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        quarantine.notes.extend((path, note) for note in notes)
        yield path, image


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
