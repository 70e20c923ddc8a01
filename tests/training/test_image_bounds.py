"""Small files that would keep their decoder busy: each is refused from its structure, and its honest twin is read."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from training.data.image_bounds import check_structure
from training.data.images import decode, decode_bytes
from training.errors import InputError

SMALL = Image.new("RGB", (16, 16), (200, 30, 60))


def encoded(kind: str, image: Image.Image = SMALL, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(tags: int, each: int, size: int) -> bytes:
    """A directory of ``tags`` tags of ``each`` bytes, all at the beginning of ``size`` bytes."""
    entries = b"".join(struct.pack("<HHII", 1000 + n, 7, each, 8) for n in range(tags))
    return (b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4)).ljust(size, b"\0")


def segment(code: int, content: bytes = b"") -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


def in_jpeg(inserted: bytes) -> bytes:
    whole = encoded("JPEG")
    return whole[:2] + inserted + whole[2:]


def in_png(inserted: bytes) -> bytes:
    whole = encoded("PNG")
    return whole[:33] + inserted + whole[33:]


def in_gif(inserted: bytes) -> bytes:
    whole = encoded("GIF", SMALL.convert("P"))
    start = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:start] + inserted + whole[start:]


def scans(count: int) -> bytes:
    whole = encoded("JPEG", Image.new("L", (64, 64)), progressive=True)
    start = whole.rfind(b"\xff\xda")
    own = whole.count(b"\xff\xda")
    return whole[:start] + whole[start:-2] * (count - own + 1) + whole[-2:]


def exif(tags: int, each: int, size: int) -> bytes:
    content = tiff(tags, each, size)
    parts = [content[start : start + 65_000] for start in range(0, size, 65_000)]
    return b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)


BLOCK = b"\xff" + bytes(255)
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans of a JPEG": (lambda: scans(101), "101 scans, limit 100"),
    "segments of a JPEG": (lambda: in_jpeg(segment(0xFE) * 20_000), "segments, limit"),
    "markers of a JPEG without content": (lambda: in_jpeg(b"\xff\xf0" * 20_000), "segments, limit"),
    "filling bytes of a JPEG": (lambda: in_jpeg(b"\xff" * 20_000), "segments, limit"),
    "EXIF of a JPEG": (lambda: in_jpeg(exif(500, 60_000, 60_100)), "bytes of tags"),
    "EXIF of a JPEG in several segments": (lambda: in_jpeg(exif(500, 200_000, 200_100)), "bytes of tags"),
    "headers of EXIF": (lambda: in_jpeg(segment(0xE1, b"Exif\0\0" * 10_000)), "bytes of headers"),
    "directory of several pictures": (
        lambda: in_jpeg(segment(0xE2, b"MPF\0" + tiff(500, 60_000, 60_100))),
        "bytes of tags",
    ),
    "chunks of a PNG": (lambda: in_png(chunk(b"abCd") * 20_000), "chunks, limit"),
    "texts of a PNG": (lambda: in_png(chunk(b"tEXt", b"a\0b") * 20_000), "chunks, limit"),
    "empty pixel chunks of a PNG": (lambda: in_png(chunk(b"IDAT") * 20_000), "chunks, limit"),
    "compressed text of a PNG": (
        lambda: in_png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(30_000_000)))),
        "too large",
    ),
    "compressed profile of a PNG": (
        lambda: in_png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(30_000_000)))),
        "too large",
    ),
    "comment of a GIF": (lambda: in_gif(b"!\xfe" + BLOCK * 400 + b"\0"), "bytes of comments"),
    "comments of a GIF": (lambda: in_gif(b"!\xfe\0" * 30_000), "bytes of comments|blocks, limit"),
    # Pillow reads on after it, and so meets a comment where others see pixels.
    "comments of a GIF behind an empty count of repeats": (
        lambda: in_gif(b"!\xff\x0bNETSCAPE2.0\0," + bytes(10) + b"\x24" + bytes(34) + b"!\xfe" + BLOCK * 400 + b"\0"),
        "bytes of comments",
    ),
    "blocks of a GIF": (lambda: in_gif(b"!\x01\0" * 30_000), "blocks, limit"),
    "comments before the second frame of a GIF": (
        lambda: in_gif(b"")[:-1] + b"!\xfe" + BLOCK * 400 + b"\0" + in_gif(b"")[781:],
        "bytes of comments",
    ),
    "tags of a TIFF": (lambda: tiff(500, 60_000, 60_100), "bytes of tags"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    make, reason = BOMBS[kind]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    with pytest.raises(InputError, match=reason) as caught:
        decode(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"sent: .*({reason})"):
        decode_bytes(path.read_bytes(), "sent", 10**6, ("JPEG", "PNG", "GIF", "TIFF"))


def test_no_bomb_reaches_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> Iterator[None]:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(Image, "open", reached)
    for make, reason in BOMBS.values():
        if reason != "too large":  # those Pillow refuses itself
            with pytest.raises(InputError, match=reason):
                decode_bytes(make(), "sent", 10**6, ("JPEG", "PNG", "GIF", "TIFF"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: scans(100),
        lambda: in_jpeg(segment(0xE2, bytes(60_000)) * 300),  # a profile of 18 MB
        lambda: in_jpeg(exif(60, 900, 60_000)),
        lambda: encoded("JPEG") + b"\xff\xda" * 5_000,  # a film behind the picture, as phones append it
        lambda: in_jpeg(segment(0xE1, b"\xff\xda" * 5_000)),  # a preview before it
        lambda: in_png(chunk(b"tEXt", b"a\0" + bytes(b"b" * 500_000))),
        lambda: encoded("PNG") + bytes(500_000),
        lambda: in_gif(b"!\xfe" + BLOCK * 200 + b"\0"),
        lambda: encoded("GIF", SMALL.convert("P"), save_all=True, append_images=[Image.new("P", (16, 16), 5)] * 50),
        lambda: encoded("TIFF", save_all=True, append_images=[SMALL] * 50),
    ],
)
def test_what_honest_programs_write_is_read(make: Callable[[], bytes]) -> None:
    assert decode_bytes(make(), "sent", 10**6, ("JPEG", "PNG", "GIF", "TIFF")).width in (16, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF"])
def test_damage_anywhere_passes_or_is_a_bomb(kind: str) -> None:
    """The structure of a file that lies is followed to its end, not beyond."""
    generator = random.Random(0)
    whole = encoded(kind)
    for _ in range(300):
        data = bytearray(whole[: generator.randrange(2, len(whole) + 1)])
        for _ in range(generator.randrange(4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with suppress(Image.DecompressionBombError):
            check_structure(bytes(data))
