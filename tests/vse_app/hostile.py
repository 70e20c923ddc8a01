"""Files and fields that nobody sends by accident."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator

from PIL import Image
from served import encoded, jpeg, pixels

SCRIPT = b"<script>alert(document.domain)</script>"
BOUNDARY = b"limit-of-parts"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colours: int = 2, data: bytes = b"") -> bytes:
    """A PNG file that claims these sizes, whatever is in it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data or b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def resized_jpeg(side: int) -> bytes:
    """A small JPEG file whose header claims a large picture."""
    data = jpeg(1)
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", side, side) + data[start + 4 :]


def damaged() -> Iterator[tuple[str, bytes]]:
    """Pictures of every format, cut off and with bits flipped."""
    chance = random.Random(0)
    for form in FORMATS:
        whole = encoded(pixels(3, (64, 48)), form)
        for place in sorted({1, 2, 4, 8, 12, 20, 30, *(len(whole) * n // 7 for n in range(1, 7)), len(whole) - 1}):
            yield f"cut-{place}.{form.lower()}", whole[:place]
        for n in range(12):
            broken = bytearray(whole)
            for _ in range(1 + n * 2):
                broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
            yield f"flipped-{n}.{form.lower()}", bytes(broken)


def impostors() -> Iterator[tuple[str, bytes]]:
    """What is no picture, too large a one, or more than a picture."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../evil.txt", b"\0" * 1_000_000)
    small = encoded(pixels(1), "GIF")
    frames = [pixels(n, (64, 64)) for n in range(40)]
    entities = "".join(f'<!ENTITY x{n} "{f"&x{n - 1};" * 10}">' for n in range(1, 9))
    yield "svg.jpg", b'<svg xmlns="http://www.w3.org/2000/svg">' + SCRIPT + b"</svg>"
    yield "bomb.svg", f'<!DOCTYPE s [<!ENTITY x0 "lol">{entities}]><svg>&x8;</svg>'.encode()
    yield "file.svg", b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg><text>&x;</text></svg>'
    yield "page.jpg", b"<!DOCTYPE html>" + SCRIPT
    yield "print.jpg", b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\n%%EOF"
    yield "print.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n%%EOF\n"
    yield "archive.jpg", archive.getvalue()
    yield "program.jpg", b"\x7fELF\x02\x01\x01" + bytes(500)
    yield "script.jpg", b"#!/bin/sh\ncat /etc/passwd\n"
    yield "magick.mvg", b"push graphic-context\nimage over 0,0 0,0 'label:@/etc/passwd'\npop graphic-context"
    yield "playlist.jpg", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    yield "empty.jpg", b""
    yield "zeros.jpg", bytes(100_000)
    yield "ones.png", b"\xff" * 100_000
    for form in ("TIFF", "ICO", "PPM", "TGA", "SGI", "PCX", "ICNS", "JPEG2000", "PDF"):
        yield f"other.{form.lower()}.jpg", encoded(pixels(2, (32, 32)), form)
    yield "50000.png", png(50_000, 50_000)
    yield "most.png", png(2**31 - 1, 2**31 - 1)
    yield "too-many.png", png(2**32 - 1, 2**32 - 1)
    yield "no-width.png", png(0, 50)
    yield "60-megapixels.png", encoded(Image.new("1", (7800, 7800)))
    yield "39-megapixels.png", encoded(Image.new("1", (6240, 6240)))
    yield "thin.png", encoded(Image.new("L", (1, 60_000)))
    yield "flat.png", encoded(Image.new("L", (60_000, 1)))
    yield "text-bomb.png", png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(150_000_000), 1)))
    yield "profile-bomb.png", png(1, 1, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(150_000_000), 1)))
    yield "long-data.png", png(9, 9, data=bytes(50_000_000))
    yield "chunks.png", png(8, 8, *[chunk(b"tEXt", b"a\0b")] * 20_000)
    yield "bad-exif.png", png(1, 1, chunk(b"eXIf", b"II*\0" + b"\xff" * 40))
    yield "65500.jpg", resized_jpeg(65_500)
    yield "6000.jpg", resized_jpeg(6000)
    yield "0.jpg", resized_jpeg(0)
    yield "exif-loop.jpg", jpeg(1).replace(b"II*\0\x08\0\0\0", b"II*\0\0\0\0\0").replace(b"MM\0*", b"MM\0*\0")
    yield "wide.gif", small[:6] + b"\xff\xff\xff\xff" + small[10:]
    yield "frame.gif", small.replace(b"\0,\0\0\0\0", b"\0,\xff\x7f\xff\x7f")
    yield "animated.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "animated.webp", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\x3f\0" * 2
    yield "canvas.webp", b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas
    bitmap = encoded(pixels(1), "BMP")
    yield "wide.bmp", bitmap[:18] + struct.pack("<ii", 50_000, 50_000) + bitmap[26:]
    yield "upside.bmp", bitmap[:18] + struct.pack("<ii", 40, -(2**31)) + bitmap[26:]
    yield "offset.bmp", bitmap[:10] + struct.pack("<I", 2**31) + bitmap[14:]
    yield "gif-and-page.gif", small + SCRIPT
    yield "jpeg-and-archive.jpg", jpeg(2) + archive.getvalue()
    yield "gif-and-program.gif", b"GIF89a=1;" + SCRIPT
    yield "bmp-and-program.bmp", b"BM=1;" + SCRIPT


NAMES = [
    b"../../../../etc/passwd",
    b"..\\..\\windows\\win.ini",
    b"C:\\boot.ini",
    b"/etc/passwd",
    b"gallery.json",
    b"nul\0byte.jpg",
    b"..",
    b".",
    b"/",
    b"",
    b"a" * 10_000 + b".jpg",
    "‮gpj.exe".encode(),
    "пример 图片 🖼.jpg".encode(),
    b"\xed\xa0\x80.jpg",
    b"\xff\xfe\xfd.jpg",
    b"x.jpg\r",
    b"<script>alert(1)</script>.jpg",
    b"%2e%2e%2fetc%2fpasswd",
    b"$(cat /etc/passwd).jpg",
    b'a"; name="metadata',
]

CONDITIONS = [
    "1=1; DROP TABLE items",
    "year=1' OR '1'='1",
    "path=x' UNION SELECT sql FROM sqlite_master --",
    'year") OR 1=1 --=1',
    "caption~" + "*" * 400 + "b",
    "caption~" + "*?" * 200 + "b",
    "path~" + "*a" * 200,
    "caption~" + "[" * 400,
    "path~/etc/passwd",
    "path>=/",
    "year=" + "[" * 400,
    "year=" + '{"a":' * 80,
    "year=" + "9" * 480,
    "year=1e999",
    "year=-1e-999",
    "year=NaN",
    ".".join(["a"] * 200) + "=1",
    "$.a=1",
    "a[0]=1",
    "=1",
    "year=",
    "year",
    "",
    " " * 500,
    "a" + " " * 450 + "b",
    "a=b" + " " * 450 + "c",
    "caption=" + "a" * 10_000,
    "caption=\0",
    "\0=1",
    "caption=\u202e\U0001f5bc",
    "caption~\n",
    "metadata.metadata.metadata=1",
    "year<null",
    "load_extension('x')=1",
]

TEXTS = [
    "",
    " ",
    "\0",
    "\x01\x02\x1b[31m\x7f",
    "\u202ered\u200b\ufeff",
    "🖼" * 900,
    "é" * 2000,
    "e" + "\u0301" * 1999,
    "a " * 1000,
    "a" * 2000,
    "a" * 2001,
    "word " * 100_000,
    "x" * 10_000_000,
    "{{7*7}} ${7*7} %s%n",
    "' OR 1=1 --",
    "<|endoftext|><s></s>[CLS][PAD]",
    "\uffff\ufffe",
    "../../etc/passwd",
]

METADATA = [
    "[]",
    "null",
    '"text"',
    "1",
    "{",
    "[" * 20_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '{"a":' * 40 + "1" + "}" * 40,
    '{"a": NaN}',
    '{"a": 1e400}',
    '{"a": ' + "9" * 4000 + "}",
    '{"a": ' + "9" * 9000 + "}",
    r'{"\ud800": "\udfff"}',
    r'{"\u0000": "\u0000"}',
    '{"": {"": {"": 1}}}',
    '{"path": "/etc/passwd", "id": 1, "size": -1}',
    '{"a": 1, "a": 2}',
    '{"__proto__": {"x": 1}, "$ref": "file:///etc/passwd"}',
    '{"a": "' + "x" * 21_000 + '"}',
    "{" + ",".join(f'"k{n}": {n}' for n in range(1500)) + "}",
    "\ufeff{}",
]

PATHS = [
    b"/items/../../etc/passwd/image",
    b"/items/%2e%2e/%2e%2e/etc/passwd",
    b"/items/..%2f..%2fetc%2fpasswd/image",
    b"/items/%2e%2e%2f%2e%2e%2fsecret.txt",
    b"/../secret.txt",
    b"/secret.txt",
    b"//etc/passwd",
    b"///",
    b"//items//1//image",
    b"/items/1%00/image",
    b"/items/%00",
    b"/items/1/image/../../../../secret.txt",
    b"/items/1/image%2f..%2f..",
    b"/items/..\\..\\secret.txt",
    b"/file=/etc/passwd",
    b"/gradio_api/file=/etc/passwd",
    b"/static/../../secret.txt",
    b"/uploads/x.jpg",
    b"/gallery.json",
    b"/openapi.json/..",
    b"/%ff%fe",
    b"/" + b"a" * 100_000,
    b"/items/" + b"1" * 100_000,
    b"/items/1;x=/etc/passwd/image",
    b"/items/1/image/",
    b"/search/../items",
    b"/\xe2\x80\xae",
    b"*",
    b"",
    b"http://evil.test/",
]

IDS = ["0", "-1", str(2**63), str(2**64), "1e9", "1; DROP TABLE items", "1 OR 1=1", "0x10", "١", "NaN", "true",
       "9" * 5000, str(2**53), str(2**53 - 1)]  # fmt: skip


def multipart(*parts: tuple[bytes, bytes | None, bytes]) -> bytes:
    """A form of ``(name, file name, content)``."""
    body = b""
    for name, file, content in parts:
        named = b"" if file is None else b'; filename="%b"' % file
        body += b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (BOUNDARY, name, named, content)
    return body + b"--%b--\r\n" % BOUNDARY
