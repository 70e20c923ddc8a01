"""Picture files: read once, decoded safely, and brought to upright 8-bit sRGB."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from training.data.colour_profiles import to_srgb
from training.data.image_bounds import check_exif, check_structure
from training.errors import InputError

DECODER_VERSION = 2
"""Grows whenever :func:`decode` gives other pixels for some file, so that what was computed from pixels can be told
from what would be computed now. 2 converts colour profiles to sRGB."""
MAX_PIXELS = 178_956_970
"""Pictures with more pixels are refused before decoding (Pillow's own limit for decompression bombs)."""
MAX_BYTES = 8 * MAX_PIXELS
"""Larger files are refused before reading: so many pixels take no more, even with 16 bits and transparency."""

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ADDRESS = re.compile("[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_UNREADABLE = "not a readable picture; convert it to JPEG or PNG, or remove it"
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}

# What they tell of a file is refused or noted here; on a terminal they would print lines of Pillow's source.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Picture:
    """A decoded file, and the content that it was decoded from.

    Attributes:
        image: Upright 8-bit RGB.
        notes: Every conversion that changed what is seen.
        sha256: Hex digest of the content.
        size: Its length in bytes.
        mtime_ns: The file's time of last change, in nanoseconds since the epoch.
    """

    image: Image.Image
    notes: tuple[str, ...]
    sha256: str
    size: int
    mtime_ns: int


@cache
def raster_formats() -> tuple[str, ...]:
    """Formats Pillow decodes itself, and HEIC where there is a decoder for it; leaves out video, and PostScript, which
    would start Ghostscript."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return tuple(name for name in Image.OPEN if Image.MIME.get(name, "").startswith("image/"))


def decode(path: Path, side: int | None = None) -> Image.Image:
    """Decodes a picture file to upright 8-bit RGB.

    EXIF rotation is applied, colour profiles are converted to sRGB, transparency is laid on white, CMYK is
    converted, 16-bit grey is scaled to 8 bits, and of several frames the first is taken.

    Args:
        path: The file.
        side: Shrink the picture to at most so many pixels along its longer side. JPEG is then decoded at 1/2, 1/4 or
            1/8, whichever leaves at least twice as many, in a fraction of the time and memory.

    Raises:
        InputError: If the file is missing, empty, truncated, no picture, of a pixel format without a
            defined range, or has more than :data:`MAX_PIXELS` pixels or is otherwise made to keep a decoder busy
            (found without decoding, see :mod:`training.data.image_bounds`).
    """
    return _decode(read_file(path).data, str(path), MAX_PIXELS, raster_formats(), side)[0]


def decode_bytes(
    data: bytes, name: str, max_pixels: int, formats: Sequence[str], side: int | None = None
) -> Image.Image:
    """Decodes a picture that somebody sent, as :func:`decode` does.

    Args:
        data: The file's content.
        name: What errors call it.
        max_pixels: More are refused before decoding.
        formats: Names that Pillow gives to the formats that are let in.
        side: Longest side of the result, see :func:`decode`.

    Raises:
        InputError: If it is no such picture, truncated or too large.
    """
    if not data:
        raise InputError(f"{name}: empty file; choose another one")
    return _decode(data, name, max_pixels, formats, side)[0]


def read_picture(path: Path, side: int | None = None) -> Picture:
    """Decodes a picture file and says which content was decoded; the file is read once.

    Args:
        path: The file.
        side: Longest side of the result, see :func:`decode`.

    Raises:
        InputError: As :func:`decode`, and if the file changed while it was read.
    """
    return read_file(path).decode(side)


@dataclass(frozen=True)
class FileContent:
    """What a file held at one moment.

    Attributes:
        path: The file.
        data: Its content.
        mtime_ns: Its time of last change when it had that content, in nanoseconds since the epoch.
    """

    path: Path
    data: bytes
    mtime_ns: int

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the content."""
        return hashlib.sha256(self.data).hexdigest()

    def decode(self, side: int | None = None) -> Picture:
        """The picture, see :func:`read_picture`."""
        image, notes = _decode(self.data, str(self.path), MAX_PIXELS, raster_formats(), side)
        return Picture(image, tuple(notes), self.sha256, len(self.data), self.mtime_ns)


def read_file(path: Path) -> FileContent:
    """Reads a file of a size that a picture may have.

    Raises:
        InputError: If it is missing, empty, too large or cannot be read, or changed while it was read.
    """
    try:
        before = path.stat()
        usable = stat.S_ISREG(before.st_mode) and before.st_size <= MAX_BYTES
        data = path.read_bytes() if usable else b""
        after = path.stat()
    except FileNotFoundError as error:
        raise missing(path, "file") from error
    except PermissionError as error:
        raise InputError(f"{path}: {error.strerror}; make it readable or leave it out") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check the path") from error
    except ValueError as error:  # no file can have such a name
        raise InputError(f"{str(path)!r}: {error}; check the path") from error
    if not stat.S_ISREG(before.st_mode):
        raise InputError(f"{path}: not a file; name a picture")
    if before.st_size > MAX_BYTES:
        raise InputError(f"{path}: {before.st_size / 1e9:.1f} GB are too large to read; shrink or remove it")
    if not data and not after.st_size:
        raise InputError(f"{path}: empty file; replace or remove it")
    if len(data) != after.st_size or _identity(before) != _identity(after):
        raise InputError(f"{path}: changed while it was read; try again when it is complete")
    return FileContent(path, data, after.st_mtime_ns)


def missing(path: Path, what: str) -> InputError:
    """The error for a path at which there is not what there should be."""
    if path.is_symlink():
        return InputError(f"{path}: a link to a missing file; mend or remove it")
    if _ADDRESS.match(str(path)):
        address = str(path).replace(":/", "://", 1)  # as it was before it was taken for a path
        return InputError(f"{address}: an address, not a file; save the picture and name its file")
    return InputError(f"{path}: no such {what}; check the path")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _decode(
    data: bytes, name: str, max_pixels: int, formats: Sequence[str], side: int | None
) -> tuple[Image.Image, list[str]]:
    """The picture, and a note for every conversion that changes what is seen."""
    try:
        check_structure(data)
        with Image.open(BytesIO(data), formats=tuple(formats)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(f"{width}x{height} pixels, limit {max_pixels}")
            notes = ["several frames: the first is used"] if getattr(image, "is_animated", False) else []
            key = image.info.get("transparency")
            if key is not None and image.tile and image.tile[0][3] == "RGB;16B":
                # Pillow keeps the upper half of each channel, but the transparent colour whole.
                image.info["transparency"] = tuple(value >> 8 for value in key)
            if side is not None and key is None and image.mode in ("L", "RGB", "CMYK"):
                image.thumbnail((side, side))  # before loading, so that less is decoded where the format allows it
            image.load()
            upright = _to_rgb(image, notes)
        if side is not None:
            upright.thumbnail((side, side))
        return upright, notes
    except UnidentifiedImageError as error:
        heic = data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS
        lacking = heic and "HEIF" not in formats and tuple(formats) == raster_formats()
        what = "a HEIC picture; pip install 'vse-app[heic]' to read it" if lacking else _UNREADABLE
        raise InputError(f"{name}: {what}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too large to decode safely ({error}); shrink or remove it") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble on
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be decoded ({reason}); replace or remove it") from error


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile")
    try:
        orientation = _orientation(image)
    except Exception:  # damaged metadata does not make the pixels unusable
        orientation = None
        notes.append("unreadable EXIF ignored")

    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
        notes.append("16-bit grey scaled to 8 bits")
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    if profile:
        image = _without_profile(image, profile, notes)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        notes.append("transparency laid on white")
    image = image.convert("RGB")
    if orientation in _TO_UPRIGHT:
        image = image.transpose(_TO_UPRIGHT[orientation])
        notes.append("rotated as its EXIF says")
    image.info.clear()  # whoever saves the pixels must not pass on a profile or position that is not theirs
    return image


def _orientation(image: Image.Image) -> int | None:
    exif = image.info.get("exif") or b""
    if not exif and (text := image.info.get("Raw profile type exif")):  # as ImageMagick writes it into PNG
        exif = bytes.fromhex("".join(text.split("\n")[3:]))
    check_exif(exif)
    return image.getexif().get(ExifTags.Base.Orientation)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as L, or as LA where one level is transparent; convert() would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} outside 0..65535 have no defined brightness")
    grey = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return grey


def _without_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    try:
        converted = to_srgb(image, profile)
    except ValueError as error:
        notes.append(f"{error} ignored")
        return image
    if converted is None:
        return image
    notes.append("colour profile converted to sRGB")
    return converted


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk; an :class:`~training.data.corpus.ImageSource`."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, read once for each object; survives moving, renaming and touching the file.

        Raises:
            InputError: If the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; check the path") from error

    def load(self) -> Image.Image:
        """Decodes the file, see :func:`decode`."""
        return decode(self.path)
