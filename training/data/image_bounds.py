"""How much work a picture file makes for its decoder, told from its structure before any of it is decoded.

Pillow bounds pixels and compressed texts. What it does not bound is counted here: small files can have a decoder go
over all pixels again and again, join a text block by block, or copy the same bytes thousands of times.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

MAX_SCANS = 100
"""Scans of a progressive JPEG, each of which goes over all pixels. Encoders write about ten; libtiff's limit, too."""
MAX_PIECES = 10_000
"""Segments of a JPEG, chunks of a PNG or blocks of a GIF, which Pillow reads one by one, beyond one per 128 bytes."""
MAX_COMMENTS = 1 << 16
"""Bytes of comments in a GIF, to which Pillow adds block after block."""
SHARED = 1 << 20
"""Bytes by which the tags of a TIFF or of EXIF may exceed what is there; Pillow copies each, and they may overlap."""

_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # of a JPEG; FF 00 and FF D0 to FF D7 belong to a scan
_WITHOUT_LENGTH = {0x01, 0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)}
_SCAN, _END, _APP1, _APP2 = 0xDA, 0xD9, 0xE1, 0xE2
_EXIF_HEADERS = re.compile(rb"(?:Exif\0\0)*")
_GIF_BLOCK = re.compile(rb"[!,;]")
_TIFF = re.compile(rb"II[*+]\0|II\0\*|MM\0[*+]|MM\*\0")
_TAG_BYTES = np.zeros(1 << 16)  # per value, by type; Pillow passes over other types
_TAG_BYTES[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16]] = [1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 8]


def check_structure(data: bytes) -> None:
    """Refuses a file that would keep its decoder busy; what is no picture passes.

    Args:
        data: The file's content.

    Raises:
        Image.DecompressionBombError: If there is too much of anything.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8") and len(data) > 13:
        _check_gif(data)
    elif _TIFF.match(data):
        _check_tags(data)


def check_exif(exif: bytes) -> None:
    """Refuses EXIF that would keep its reader busy.

    Args:
        exif: With or without the header that it has in a JPEG.

    Raises:
        Image.DecompressionBombError: If there is too much of anything.
    """
    found = _EXIF_HEADERS.match(exif)
    start = found.end() if found else 0
    _bound("bytes of headers", start, 600)  # cut off one by one
    _check_tags(exif[start:])


def _check_tags(data: bytes) -> None:
    """Tags of a TIFF or of EXIF, which may all have the same bytes for their values."""
    if not _TIFF.match(data):
        return
    order, big = "<" if data.startswith(b"II") else ">", b"+" in data[:4]
    count, long = (f"{order}u8", f"{order}u8") if big else (f"{order}u2", f"{order}u4")
    start = _number(data, 8 if big else 4, long)
    stated = _number(data, start, count)
    first = min(start + np.dtype(count).itemsize, len(data))
    entry = np.dtype([("tag", f"{order}u2"), ("type", f"{order}u2"), ("count", long), ("value", long)])
    tags = np.frombuffer(data, entry, min(stated, (len(data) - first) // entry.itemsize), first)
    taken = _TAG_BYTES[tags["type"]] * tags["count"]
    taken = taken[np.cumsum(taken > len(data)) == 0]  # Pillow stops at the first that is cut off
    _bound("bytes of tags", int(taken.sum()), len(data) + SHARED)


def _number(data: bytes, start: int, kind: str) -> int:
    size = np.dtype(kind).itemsize
    return int(np.frombuffer(data[start : start + size].ljust(size, b"\0"), kind)[0])


def _check_jpeg(data: bytes) -> None:
    exif, most = [], MAX_PIECES + len(data) // 128
    position, pieces, scans = 2, 0, 0
    while not scans and (found := _MARKER.search(data, position)):
        code, start = found[1][0], found.end()
        pieces += start - position - 1  # filling bytes are read one by one, too
        _bound("segments", pieces, most)
        position = start if code in _WITHOUT_LENGTH else start + max(2, int.from_bytes(data[start : start + 2]))
        scans += code == _SCAN
        if code == _APP1 and data.startswith(b"Exif\0\0", start + 2):
            exif.append(data[start + 8 : position])
        if code == _APP2 and data.startswith(b"MPF\0", start + 2):
            _check_tags(data[start + 6 : position])
    check_exif(b"".join(exif))
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return  # more may be previews, or chance in what is appended
    while (found := _MARKER.search(data, position)) and found[1][0] != _END:
        code, start = found[1][0], found.end()
        position = start if code in _WITHOUT_LENGTH else start + max(2, int.from_bytes(data[start : start + 2]))
        scans += code == _SCAN
        _bound("scans", scans, MAX_SCANS)


def _check_png(data: bytes) -> None:
    position, pieces, most = 8, 0, MAX_PIECES + len(data) // 128
    while position < len(data) and data[position + 4 : position + 8] != b"IEND":
        position += 12 + int.from_bytes(data[position : position + 4])
        pieces += 1
        _bound("chunks", pieces, most)


def _check_gif(data: bytes) -> None:
    """Looks as far as the second frame, as does Pillow, to see whether there is one."""
    position, pieces, most = 13 + _colours(data[10]), 0, MAX_PIECES + len(data) // 128
    comments, frames = 0, 0
    while (found := _GIF_BLOCK.search(data, position)) and found[0] != b";" and frames < 2:
        start = found.start()
        if found[0] == b",":
            frames += 1
            position = start + 11 + _colours(data[start + 9] if start + 9 < len(data) else 0)
        else:
            position = start + 2
            if data.startswith(b"\x0bNETSCAPE2.0", position):  # what follows is read even if it says that nothing does
                position += 13 + (data[position + 12] if position + 12 < len(data) else 0)
        while position < len(data) and data[position]:
            position += 1 + data[position]
            pieces += 1
        position, pieces = position + 1, pieces + 1
        _bound("blocks", pieces, most)
        comments += position - start if data.startswith(b"\xfe", start + 1) else 0
        _bound("bytes of comments", comments, MAX_COMMENTS)


def _colours(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _bound(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise Image.DecompressionBombError(f"{count:,} {what}, limit {limit:,}")
