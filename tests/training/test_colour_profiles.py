"""Colours are those that a colour-managed program shows, whatever profile they are written in."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from training.data import colour_profiles
from training.data.image_folders import Quarantine, decode_all
from training.data.images import decode, read_picture

XYZ = {"rXYZ": (0.4361, 0.2225, 0.0139), "gXYZ": (0.3851, 0.7169, 0.0971), "bXYZ": (0.1431, 0.0606, 0.7139)}


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: str = "RGB ", gamma: float = 2.2, primaries: str = "rgb") -> bytes:
    """A profile of a display; ``primaries`` says which of sRGB's are its red, green and blue."""
    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {"wtpt": b"XYZ " + bytes(4) + fixed(0.9642) + fixed(1.0) + fixed(0.8249)}
    if space == "GRAY":
        tags["kTRC"] = curve
    else:
        for name, of in zip("rgb", primaries, strict=True):
            tags[f"{name}XYZ"] = b"XYZ " + bytes(4) + b"".join(map(fixed, XYZ[f"{of}XYZ"]))
            tags[f"{name}TRC"] = curve
    body, table = b"", b""
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", 0, b"test", 0x02100000, b"mntr", space.encode(), b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + fixed(0.9642) + fixed(1.0) + fixed(0.8249) + bytes(48)
    whole = head + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def ramp(mode: str = "RGB") -> Image.Image:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    return Image.fromarray(
        np.stack([*np.meshgrid(levels, levels[::4]), np.full((13, 52), 90)], -1).astype(np.uint8)
    ).convert(mode)


def shown(image: Image.Image, content: bytes) -> NDArray[np.int64]:
    """What LittleCMS makes of it."""
    converted = ImageCms.profileToProfile(image, BytesIO(content), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    return np.asarray(converted).astype(int)


def seen(path: Path) -> NDArray[np.int64]:
    return np.asarray(decode(path)).astype(int)


SWAPPED, WIDE = profile(primaries="grb"), profile(gamma=1.4)


@pytest.mark.parametrize("content", [SWAPPED, WIDE], ids=["swapped primaries", "gamma 1.4"])
@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("tiff", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 100})]
)
def test_profiles_are_followed_in_every_format(
    tmp_path: Path, content: bytes, suffix: str, options: dict[str, object]
) -> None:
    path = tmp_path / f"x.{suffix}"
    ramp().save(path, icc_profile=content, **options)
    with Image.open(path) as stored:
        expected = shown(stored, content)
    assert np.abs(seen(path) - np.asarray(ramp()).astype(int)).max() > 20
    assert np.array_equal(seen(path), expected)
    assert read_picture(path).notes == ("colour profile converted to sRGB",)


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_palette_and_grey_follow_a_profile_for_rgb(tmp_path: Path, mode: str) -> None:
    ramp(mode).save(tmp_path / "x.png", icc_profile=WIDE)
    assert np.array_equal(seen(tmp_path / "x.png"), shown(ramp(mode).convert("RGB"), WIDE))


def test_transparency_is_laid_on_white_after_the_colours(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 128))
    image.save(tmp_path / "x.png", icc_profile=SWAPPED)
    assert np.abs(seen(tmp_path / "x.png") - [[[0, 255, 0], [127, 255, 127]]]).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_grey_profiles_are_followed(tmp_path: Path, bits: int, transparent: bool) -> None:
    grey, content = profile("GRAY", 1.0), np.arange(0, 256, 5, dtype=np.uint8)[None]
    image = Image.fromarray(content if bits == 8 else (content * np.uint16(257)))
    options = {"transparency": 0} if transparent else {}
    image.save(tmp_path / "x.png", icc_profile=grey, **options)
    expected = shown(Image.fromarray(content), grey)
    expected[0, 0] = 255 if transparent else 0
    assert np.abs(expected - content[..., None]).max() > 20
    assert np.array_equal(seen(tmp_path / "x.png"), expected)


def test_cmyk_goes_through_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No small profile of a printing press is at hand, so that the pixels reach the transform is what is shown."""

    def inverted(image: Image.Image, transform: object) -> Image.Image:
        assert (image.mode, transform) == ("CMYK", "press")
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(colour_profiles, "_transform", lambda content: ("CMYK", "press"))
    monkeypatch.setattr(colour_profiles.ImageCms, "applyTransform", inverted)
    ramp("CMYK").save(tmp_path / "x.jpg", icc_profile=b"a profile")
    assert (seen(tmp_path / "x.jpg") == (1, 2, 3)).all()


def test_srgb_under_any_name_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colour_profiles.ImageCms, "applyTransform", colour_profiles.ImageCms.applyTransform)
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ramp().save(tmp_path / "x.png", icc_profile=content)
    decode(tmp_path / "x.png")
    monkeypatch.delattr(colour_profiles.ImageCms, "applyTransform")
    assert np.array_equal(seen(tmp_path / "x.png"), np.asarray(ramp()))
    assert read_picture(tmp_path / "x.png").notes == ()


@pytest.mark.parametrize(
    ("mode", "content"),
    [
        ("RGB", b"no profile"),
        ("RGB", SWAPPED[:200]),
        ("RGB", SWAPPED[:140] + bytes(len(SWAPPED) - 140)),
        ("RGB", profile("GRAY")),
        ("CMYK", SWAPPED),
        ("RGB", bytes(17 << 20)),
    ],
    ids=["none", "cut", "zeros", "grey for colours", "colours for ink", "huge"],
)
def test_profiles_that_cannot_be_used_are_noted(tmp_path: Path, mode: str, content: bytes) -> None:
    path = tmp_path / "x.tiff"
    ramp(mode).save(path, icc_profile=content)
    quarantine = Quarantine()
    [(_, image)] = decode_all([path], quarantine)
    assert np.array_equal(np.asarray(image), np.asarray(ramp(mode).convert("RGB")))
    notes = [note for _, note in quarantine.notes if "profile" in note]
    assert len(notes) == 1
    assert notes[0].endswith(" ignored")
    assert "\n" not in notes[0]


def test_no_profile_stays_with_pixels_that_are_srgb(tmp_path: Path) -> None:
    ramp().save(tmp_path / "x.png", icc_profile=SWAPPED)
    image = decode(tmp_path / "x.png")
    image.save(tmp_path / "again.png")
    assert np.array_equal(seen(tmp_path / "again.png"), np.asarray(image))
