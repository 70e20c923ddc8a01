from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as reference

from training.data.image_folders import Quarantine, decode_all, find_images
from training.data.image_transform import ImageTransform, _random_box
from training.data.images import ImageFile, decode, decode_bytes, raster_formats
from training.errors import InputError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(int)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        decode(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def notes_on(path: Path) -> list[str]:
    quarantine = Quarantine()
    assert len(list(decode_all([path], quarantine))) == 1
    return [note for _, note in quarantine.notes]


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (3000, 1), (1, 3000)])
def test_every_mode_and_shape_becomes_rgb_of_the_same_size(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    noise(*size).convert(mode).save(tmp_path / "x.png")
    image = decode(tmp_path / "x.png")
    assert image.mode == "RGB"
    assert image.size == size


def test_rgb_pixels_are_kept(tmp_path: Path) -> None:
    noise(9, 4).save(tmp_path / "x.png")
    assert np.array_equal(pixels(decode(tmp_path / "x.png")), pixels(noise(9, 4)))
    assert notes_on(tmp_path / "x.png") == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(6, 4).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as raw:
        expected = ImageOps.exif_transpose(raw)
    assert np.array_equal(pixels(decode(tmp_path / "x.png")), pixels(expected))
    assert notes_on(tmp_path / "x.png") == ([] if orientation == 1 else ["rotated as its EXIF says"])


def test_a_portrait_jpeg_of_a_phone_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 20).save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg").size == (20, 40)


def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "x.png", exif=b"Exif\0\0garbage, not TIFF")
    assert np.array_equal(pixels(decode(tmp_path / "x.png")), pixels(noise(8, 8)))
    assert notes_on(tmp_path / "x.png") == ["unreadable EXIF ignored"]


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert np.abs(pixels(decode(tmp_path / "x.jpg")) - (200, 30, 60)).max() <= 6
    assert notes_on(tmp_path / "x.jpg") == ["CMYK converted to RGB"]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 255, 0))
    rgba.save(tmp_path / "rgba.png")
    half = Image.new("LA", (1, 1), (0, 128))
    half.save(tmp_path / "half.png")
    for name in ("palette.png", "rgba.png"):
        assert pixels(decode(tmp_path / name)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
        assert notes_on(tmp_path / name) == ["transparency laid on white"]
    assert pixels(decode(tmp_path / "half.png")).tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("suffix", ["png", "pgm", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 100 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    assert pixels(decode(tmp_path / f"x.{suffix}"))[0].tolist() == [[v] * 3 for v in (0, 1, 100, 255)]
    assert notes_on(tmp_path / f"x.{suffix}") == ["16-bit grey scaled to 8 bits"]


def png_with_key(channels: int, key: bytes, rows: NDArray[np.uint16]) -> bytes:
    """A 16-bit PNG, grey or RGB, one of whose colours is transparent."""
    scanlines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, 0 if channels == 1 else 2, 0, 0, 0)
    parts = [b"IHDR" + header, b"tRNS" + key, b"IDAT" + zlib.compress(scanlines), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("level", [0, 300, 40_000, 65_535])
def test_the_transparent_colour_of_16_bits_is_laid_on_white(tmp_path: Path, channels: int, level: int) -> None:
    rows = np.array([[20_000, level, 50_000]], np.uint16).repeat(channels).reshape(1, 3, channels)
    (tmp_path / "x.png").write_bytes(png_with_key(channels, struct.pack(">H", level) * channels, rows))
    assert [int(value) for value in pixels(decode(tmp_path / "x.png"))[0, 1]] == [255] * 3
    assert [int(value) for value in pixels(decode(tmp_path / "x.png"))[0, 0]] == [78] * 3
    assert "transparency laid on white" in notes_on(tmp_path / "x.png")


@pytest.mark.parametrize("value", [np.float32(0.5), np.int32(70000), np.int32(-1)])
def test_pixels_without_a_defined_range_are_refused(tmp_path: Path, value: np.generic) -> None:
    Image.fromarray(np.full((2, 2), value)).save(tmp_path / "x.tiff")
    assert "no defined brightness" in refusal(tmp_path / "x.tiff")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_of_several_frames_is_used(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(pixels(decode(tmp_path / f"x.{suffix}")), pixels(frames[0]))
    assert notes_on(tmp_path / f"x.{suffix}") == ["several frames: the first is used"]


def test_a_phone_jpeg_with_a_second_picture_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (4, 4))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second])
    assert pixels(decode(tmp_path / "x.jpg")).tolist() == pixels(first).tolist()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tiff", "gif", "webp"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refusal(path)


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture\n")
    (tmp_path / "empty.jpg").touch()
    # Pillow would hand PostScript to Ghostscript.
    noise(4, 4).save(tmp_path / "drawing.eps")
    assert "not a readable picture" in refusal(tmp_path / "text.jpg")
    assert "empty file" in refusal(tmp_path / "empty.jpg")
    assert "not a readable picture" in refusal(tmp_path / "drawing.eps")
    assert "not a file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "missing.jpg")


@pytest.mark.parametrize("address", ["http://example.com/x.jpg", "https://example.com/a//b.png", "s3://bucket/x.png"])
def test_addresses_are_told_from_files(address: str) -> None:
    for read in (decode, lambda path: find_images([path])):
        with pytest.raises(InputError, match=f"{address.replace('a//b', 'a/b')}: an address, not a file; save"):
            read(Path(address))


@pytest.mark.parametrize("pillow_checks", [True, False])
def test_decompression_bombs_are_refused_by_their_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pillow_checks: bool
) -> None:
    if not pillow_checks:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 50_000))
    message = refusal(tmp_path / "bomb.png")
    assert "too large to decode safely" in message
    assert "3000000000" in message or "60000x50000" in message
    (tmp_path / "small.png").write_bytes(png_header(6, 5))
    assert "cannot be decoded" in refusal(tmp_path / "small.png")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Says what ``import pillow_heif`` gives; None is that it is not installed."""

    def install(module: object) -> None:
        monkeypatch.setitem(sys.modules, "pillow_heif", module)
        raster_formats.cache_clear()

    yield install
    raster_formats.cache_clear()


def test_heic_without_its_decoder_says_what_is_lacking(tmp_path: Path, installed: Callable[[object], None]) -> None:
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (tmp_path / "called.jpg").write_bytes(data)
    installed(None)
    assert "a HEIC picture; pip install 'vse-app[heic]' to read it" in refusal(tmp_path / "called.jpg")
    with pytest.raises(InputError, match="sent: not a readable picture"):  # who sends it cannot install anything here
        decode_bytes(data, "sent", 10**6, ("JPEG", "PNG"))


def test_heic_is_let_in_with_its_decoder(installed: Callable[[object], None]) -> None:
    registered: list[None] = []
    installed(SimpleNamespace(register_heif_opener=lambda: registered.append(None)))
    raster_formats()
    assert registered == [None]


def test_nothing_of_pillow_reaches_the_terminal(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "large.png")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 270, 2, 900, 900)  # a text beyond the end
    noise(8, 8).save(tmp_path / "exif.jpg", exif=exif)
    noise(8, 8).convert("P").save(tmp_path / "palette.png", transparency=bytes(256))
    (tmp_path / "frames.png").write_bytes(png_header(6, 5).replace(b"IDAT", b"acTL", 1))
    program = (
        "import sys; from pathlib import Path; from PIL import Image; Image.MAX_IMAGE_PIXELS = 40\n"
        "from training.data.image_folders import Quarantine, decode_all, find_images\n"
        "print(len(list(decode_all(find_images([Path(sys.argv[1])]).files, Quarantine()))))"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert answer.stdout == "3\n"
    assert answer.stderr == ""


def test_fingerprints_are_of_the_content_alone(tmp_path: Path) -> None:
    path, copy, other = tmp_path / "a.bmp", tmp_path / "b" / "copy.bmp", tmp_path / "c" / "a.bmp"
    for where, seed in ((path, 0), (copy, 0), (other, 1)):
        where.parent.mkdir(exist_ok=True)
        noise(4, 4, seed).save(where)
        os.utime(where, ns=(0, 0))  # as an archive unpacks: same size and time whatever is in them
    before = ImageFile(path).fingerprint
    assert ImageFile(path).name == str(path)
    assert np.array_equal(pixels(ImageFile(path).load()), pixels(noise(4, 4)))
    os.utime(path)
    assert ImageFile(path).fingerprint == ImageFile(copy).fingerprint == before
    assert ImageFile(other).fingerprint != before
    other.replace(path)
    assert ImageFile(path).fingerprint != before
    with pytest.raises(InputError, match=r"c/a\.bmp: No such file"):
        _ = ImageFile(other).fingerprint


@pytest.mark.parametrize(
    ("suffix", "mode"), [("jpg", "RGB"), ("jpg", "L"), ("png", "RGBA"), ("png", "P"), ("webp", "RGB")]
)
@pytest.mark.parametrize("size", [(640, 400), (400, 640), (30, 20)])
def test_a_side_shrinks_and_changes_little(tmp_path: Path, suffix: str, mode: str, size: tuple[int, int]) -> None:
    path = tmp_path / f"x.{suffix}"
    smooth = noise(8, 5).resize(size, Image.Resampling.BICUBIC)
    smooth.convert(mode).save(path)
    whole, small = decode(path), decode(path, side=64)
    assert max(small.size) == min(64, max(size))
    whole.thumbnail((64, 64))
    assert small.size == whole.size
    assert np.abs(pixels(small) - pixels(whole)).mean() < 2


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(800, 640).save(tmp_path / "x.jpg")
    loaded: list[tuple[int, int]] = []
    load = JpegImageFile.load

    def record(self: JpegImageFile) -> object:
        loaded.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", record)
    decode(tmp_path / "x.jpg", side=100)
    assert max(loaded) == (400, 320)


def test_folders_are_walked_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.webp", "notes.txt", ".hidden.png", ".git/d.png", "z.eps", "raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    expected = [tmp_path / "a.png", tmp_path / "b.JPG", tmp_path / "sub" / "c.webp"]
    assert find_images([tmp_path]).files == expected
    named = tmp_path / "raw"
    assert find_images([named, tmp_path, tmp_path / "a.png"]).files == [named, *expected]
    with pytest.raises(InputError, match="missing: no such file or folder"):
        find_images([tmp_path / "missing"])


def test_bad_files_end_in_quarantine_and_the_rest_is_decoded(tmp_path: Path) -> None:
    noise(4, 4).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("no")
    noise(4, 4).convert("CMYK").save(tmp_path / "print.jpg")
    quarantine = Quarantine()
    decoded = [path.name for path, _ in decode_all(find_images([tmp_path]).files, quarantine)]
    assert decoded == ["good.png", "print.jpg"]
    lines = quarantine.report().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"refused  {tmp_path / 'bad.jpg'}: not a readable picture")
    assert lines[1] == f"note     {tmp_path / 'print.jpg'}: CMYK converted to RGB"
    loaded = json.loads(json.dumps(quarantine.to_json()))
    assert [entry["path"] for entry in loaded["refused"]] == [str(tmp_path / "bad.jpg")]
    assert loaded["notes"] == [{"path": str(tmp_path / "print.jpg"), "reason": "CMYK converted to RGB"}]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("extent", [(40, 40), (57, 40), (40, 91), (20, 33), (32, 32), (301, 64)])
@pytest.mark.parametrize("resize", [32, 36])
def test_evaluation_view_equals_resize_and_center_crop(
    interpolation: str, extent: tuple[int, int], resize: int
) -> None:
    # Half the contrast: which direction Pillow resamples first depends on the shapes, and shows where the
    # first pass saturates.
    image = noise(*extent).point(lambda value: 64 + value // 2)
    mode = InterpolationMode(interpolation)
    expected = v2.functional.pil_to_tensor(reference.center_crop(reference.resize(image, [resize], mode), [32, 32]))
    view = ImageTransform(32, resize, interpolation)(image, None)
    assert view.dtype == torch.uint8
    assert view.is_contiguous()
    assert (view.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("extent", [(1, 1), (20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("seed", [None, 3])
def test_extreme_shapes_are_transformed(extent: tuple[int, int], seed: int | None) -> None:
    view = ImageTransform(16, 18, augment="crop+flip")(Image.new("RGB", extent, (9, 8, 7)), seed)
    assert torch.equal(view, torch.tensor([9, 8, 7], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16))


def test_augmentation_depends_on_the_seed_alone() -> None:
    transform, image = ImageTransform(16, 16, augment="crop+flip"), noise(30, 20)
    first = transform(image, 5)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(transform(image, 5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({transform(image, seed).numpy().tobytes() for seed in range(10)}) == 10
    plain = ImageTransform(16, 16)
    assert torch.equal(plain(image, 5), plain(image, None))
    assert torch.equal(transform(image, None), plain(image, None))


def test_flip_mirrors_the_crop_of_the_same_seed_half_of_the_time() -> None:
    image = noise(30, 20)
    flipped = 0
    for seed in range(60):
        crop = ImageTransform(16, 16, augment="crop")(image, seed)
        view = ImageTransform(16, 16, augment="crop+flip")(image, seed)
        mirrored = torch.equal(view, crop.flip(-1))
        assert mirrored or torch.equal(view, crop)
        flipped += mirrored
    assert 15 <= flipped <= 45


def test_random_boxes_follow_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    image, generator = noise(300, 200), np.random.default_rng(0)
    ours = np.array([_random_box(300, 200, generator) for _ in range(2000)])
    assert ours.min() >= 0
    assert ours[:, 2].max() <= 300
    assert ours[:, 3].max() <= 200
    top, left, height, width = np.array(
        [v2.RandomResizedCrop.get_params(image, [0.6, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    ).T
    theirs = np.stack([left, top, left + width, top + height], axis=1)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 3
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": 32, "resize": 16}, "resize=16"),
        ({"size": 0, "resize": 16}, "positive"),
        ({"size": 8, "resize": 8, "interpolation": "cubic"}, "bicubic, bilinear"),
        ({"size": 8, "resize": 8, "augment": "flip"}, "none, crop, crop[+]flip"),
    ],
)
def test_impossible_transforms_are_refused(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        ImageTransform(**arguments)
