"""Pictures that strangers send, and what they say of them: what is let in, and what is kept of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from index.gallery import Gallery
from training.data.images import decode_bytes
from training.errors import InputError
from training.files import recover, replacing, sync
from vse_app.decoding import decoding

MAX_BYTES = 20_000_000
"""Largest file that is accepted."""
MAX_PIXELS = 40_000_000
"""Largest picture; a 40-megapixel one takes 120 MB while it is looked at, or 600 MB if it is transparent."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What browsers can show; each format less is a parser less that strangers can reach."""
SIDE = 1600
"""Longer pictures are shrunk to this when kept: far more than any image tower looks at."""
MOST_NESTED = 32
"""Levels of metadata; SQLite, which reads it for every condition, stops at 1000."""
UPLOADS = "uploads"
"""Folder of a gallery for the pictures of :func:`keep_upload`."""
_KEPT = re.compile(r"[0-9a-f]{24}\.jpg")


def read_upload(data: bytes, name: str = "picture") -> Image.Image:
    """Decode a picture somebody sent to upright RGB, without its metadata, at most :data:`SIDE` pixels long.

    Raises:
        InputError: If it is larger than the limits, no picture of the accepted formats, or broken.
        Busy: If too many others are being read.
    """
    if len(data) > MAX_BYTES:
        raise InputError(too_large(name, len(data)))
    with decoding.turn():
        image = decode_bytes(data, name, MAX_PIXELS, FORMATS, SIDE)
        image.info.clear()  # what is saved next would carry EXIF, comments and colour profiles along
        return image


def too_large(name: str, size: int) -> str:
    """That a file has too many bytes."""
    return f"{name}: {math.ceil(size / 1e5) / 10:g} MB; send at most {MAX_BYTES / 1e6:g} MB"


def read_metadata(text: str) -> dict[str, Any]:
    """Read what somebody sent about a picture.

    Raises:
        InputError: If it is no JSON object, too deep, or nothing that could be sent back.
    """
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # what cannot be sent is not kept either
    except (ValueError, RecursionError) as error:
        raise InputError(f'metadata: is no JSON ({error}); send an object such as {{"year": 2019}}') from error
    if not isinstance(record, dict):
        raise InputError('metadata: send a JSON object such as {"year": 2019}')
    level: list[Any] = [record]
    for _ in range(MOST_NESTED):
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [part for value in inner for part in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise InputError(f"metadata: is nested too deeply; use at most {MOST_NESTED} levels")
    return record


def keep_upload(image: Image.Image, folder: Path) -> Path:
    """Write a picture from :func:`read_upload` under a name made from its pixels; the same picture is kept once.

    Raises:
        OSError: If the disk is full.
    """
    encoded = to_jpeg(image, quality=95)
    path = folder / f"{hashlib.sha256(encoded).hexdigest()[:24]}.jpg"
    if path.exists():
        sync(folder)  # whoever wrote it may have been killed before this
    else:
        with replacing(path) as temporary:
            temporary.write_bytes(encoded)
    return path


def current_upload(path: Path, folder: Path) -> Path:
    """Where a picture of :func:`keep_upload` is, also if its gallery was moved or copied and does not know yet."""
    here = folder / path.name
    return here if _KEPT.fullmatch(path.name) and path.parent.name == folder.name and here.exists() else path


def tidy_uploads(gallery: Gallery) -> None:
    """Delete pictures that a killed server kept and did not add, and let items know where theirs were moved to.

    Args:
        gallery: Open for writing.

    Raises:
        GalleryError: If the disk is full.
    """
    folder = (gallery.directory / UPLOADS).resolve()
    recover(folder)
    orphans = {path for path in folder.glob("*.jpg") if _KEPT.fullmatch(path.name)}
    moved: dict[Path, int] = {}
    if orphans:
        for key, known in gallery.snapshot.paths():
            path = current_upload(Path(known), folder)
            orphans.discard(path)
            if str(path) != known:
                moved[path] = key
    if moved:
        now = {key: str(path) for path, key in moved.items()}
        items = gallery.items(np.array(sorted(now), np.int64))
        gallery.update({key: replace(item, path=now[key]) for key, item in items})
    for path in orphans:
        path.unlink(missing_ok=True)


def to_jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """The file of a picture, pixels alone."""
    file = BytesIO()
    # Pillow writes the comment of the file that a picture was read from unless there is another.
    image.save(file, "JPEG", quality=quality, optimize=False, comment=b"", exif=b"", icc_profile=None)
    return file.getvalue()
