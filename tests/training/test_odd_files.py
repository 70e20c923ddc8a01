"""Dialects of tables, and arrays as other programs save them: read with the right values, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from training.data.formats import load_corpus
from training.errors import InputError


def pictures(folder: Path, *names: str) -> None:
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (n, 0, 0)).save(folder / name)


def read_or_refusal(spec: str) -> list[str] | str:
    try:
        return list(load_corpus(spec, "all").captions)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (b"image,caption\rp0.jpg,a square\rp1.jpg,another\r", ["a square", "another"]),
        (b'image,caption\np0.jpg,"a square\nin two lines"\np1.jpg,another\n', ["a square\nin two lines", "another"]),
        (b"image,caption\n./p0.jpg,a square\nx/../p1.jpg,another\n", ["a square", "another"]),
        (b'image,caption\np0.jpg,a "square"\np1.jpg,another\n', ['a "square"', "another"]),
        (b"image,caption\np0.jpg,a square\n\n\np1.jpg,another\n\n", ["a square", "another"]),
        (b"image,caption\np0.jpg,a square\np1.jpg,another\n , \n", "line 4: the caption is empty"),
        (b'image,caption\np0.jpg,a square\np1.jpg,"another" one\n', "line 3: ',' expected after '\"'"),
        (b'image,caption\np0.jpg,"a \\"quoted\\" square"\np1.jpg,another\n', "line 2: ',' expected after '\"'"),
        (b"image,caption\np0.jpg,a caf\xe9\np1.jpg,another\n", "line 2 is not UTF-8; save the file as UTF-8"),
        ("image,caption\np0.jpg,a square\n".encode("utf-16"), "line 1 is not UTF-8"),
        (b"\xef\xbb\xbf\xef\xbb\xbfimage,caption\np0.jpg,x\n", "line 1 must name the columns image and caption"),
        (b"sep=,\nimage,caption\np0.jpg,x\n", "line 1 must name the columns image and caption, not 'sep=,'"),
        (b"image;caption\np0.jpg;a square\n", "not 'image;caption'; separate columns by commas"),
        (b"image\tcaption\np0.jpg\ta square\n", r"not 'image\tcaption'; separate columns by commas"),
        (b"image,caption\np0.jpg," + b"long " * 40_000, "line 2: field larger than field limit"),
        (b"image,caption\np0.jpg,a squ\0are\np1.jpg,another\n", "line 2 holds a NUL character"),
    ],
)
def test_dialects_of_tables(tmp_path: Path, table: bytes, expected: list[str] | str) -> None:
    pictures(tmp_path, "p0.jpg", "p1.jpg")
    (tmp_path / "captions.csv").write_bytes(table)
    found = read_or_refusal(f"folder:{tmp_path}")
    if isinstance(expected, list):
        assert found == expected
    else:
        assert isinstance(found, str)
        assert "\n" not in found
        assert found.startswith(f"{tmp_path}/captions.csv: ")
        assert expected in found


def test_two_pictures_may_share_a_sidecar(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "a.png")
    (tmp_path / "a.txt").write_text("one caption for two pictures\n")
    corpus = load_corpus(f"folder:{tmp_path}", "all")
    assert corpus.image_ids == ["a.jpg", "a.png"]
    assert corpus.notes == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda images, captions: captions[1].update(id=0), "caption id '0' occurs twice"),
        (lambda images, captions: images[1].update(id=0), "images[1]: image id '0' occurs twice"),
        (lambda images, captions: captions.pop(), "image '1' has no caption"),
        (lambda images, captions: captions[0].update(caption=None), "annotations[0]: 'caption' is missing"),
        (lambda images, captions: captions[0].update(caption=" "), "caption '0' is empty"),
        (
            lambda images, captions: captions[0].update(image_id=7),
            "annotations[0]: image_id 7 is not among the images",
        ),
        (lambda images, captions: captions[0].update(image_id="0"), ["caption 0", "caption 1"]),
    ],
)
def test_coco_records(tmp_path: Path, change: Callable[[Any, Any], None], told: list[str] | str) -> None:
    pictures(tmp_path, "p0.jpg", "p1.jpg")
    images: list[dict[str, object]] = [{"id": n, "file_name": f"p{n}.jpg"} for n in range(2)]
    captions: list[dict[str, object]] = [{"id": n, "image_id": n, "caption": f"caption {n}"} for n in range(2)]
    change(images, captions)
    (tmp_path / "captions_all.json").write_text(json.dumps({"images": images, "annotations": captions}))
    found = read_or_refusal(f"coco:{tmp_path}")
    assert found == told if isinstance(told, list) else told in found


VALUES = np.arange(48, dtype=np.float32).reshape(8, 6) / 8  # exact in half precision


@pytest.mark.parametrize(
    "stored",
    [
        VALUES,
        VALUES.astype(">f4"),
        VALUES.astype(np.float16),
        VALUES.astype(np.longdouble),
        np.asfortranarray(VALUES.astype(np.float64)),
        np.repeat(VALUES, 5, axis=0),
        np.repeat(VALUES.astype(np.float16), 5, axis=0),
        VALUES * (np.arange(8) != 3)[:, None],
        np.stack([VALUES, -VALUES], axis=1),
    ],
    ids=[
        "plain",
        "big-endian",
        "half",
        "long double",
        "Fortran order",
        "five rows",
        "half, five rows",
        "zero row",
        "regions",
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_arrays_keep_their_values(tmp_path: Path, stored: NDArray[Any], newline: str) -> None:
    np.save(tmp_path / "all_ims.npy", stored)
    (tmp_path / "all_caps.txt").write_text("\ufeff" + newline.join(f"caption\u2028{n}" for n in range(40)), newline="")
    corpus = load_corpus(f"precomputed:{tmp_path}", "all")
    assert corpus.captions == [f"caption\u2028{n}" for n in range(40)]
    assert corpus.features is not None
    assert np.array_equal(corpus.features, stored[:: len(stored) // 8])
    assert corpus.owner.tolist() == [n // 5 for n in range(40)]


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (VALUES.astype(np.int8), "int8 array of shape (8, 6); save floats"),
        (VALUES.astype(np.float16).view("V2"), "|V2 array of shape (8, 6); save floats"),
        (VALUES.astype(complex), "complex128 array of shape (8, 6); save floats"),
        (VALUES.astype(object), "not a whole .npy array"),
        (np.repeat(VALUES, 4, axis=0), "32 rows for 40 captions"),
        (np.repeat(VALUES, 5, axis=0) + np.arange(40, dtype=np.float32)[:, None], "rows 0 to 4 should repeat"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, stored: NDArray[Any], told: str) -> None:
    np.save(tmp_path / "all_ims.npy", stored)
    (tmp_path / "all_caps.txt").write_text("\n".join(f"caption {n}" for n in range(40)))
    found = read_or_refusal(f"precomputed:{tmp_path}")
    assert isinstance(found, str)
    assert found.startswith(f"{tmp_path}/all_ims.npy: ")
    assert told in found


def test_an_archive_or_part_of_an_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all_caps.txt").write_text("\n".join(f"caption {n}" for n in range(40)))
    path = tmp_path / "all_ims.npy"
    with path.open("wb") as file:
        np.savez(file, VALUES)
    assert "all_ims.npy: not a whole .npy array" in read_or_refusal(f"precomputed:{tmp_path}")
    np.save(path, VALUES)
    for size in (0, 60, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        assert "all_ims.npy: not a whole .npy array" in read_or_refusal(f"precomputed:{tmp_path}")
        np.save(path, VALUES)


@pytest.mark.parametrize(
    ("owners", "told"),
    [
        (np.repeat(np.arange(8), 5).astype(np.int32), "all_owners.npy: int32 array of shape (40,) for 40 captions"),
        (np.arange(40) % 8, [n % 8 for n in range(40)]),
        (np.full(40, 8), "belongs to no image"),
        (np.full(40, -1), "belongs to no image"),
    ],
)
def test_owners(tmp_path: Path, owners: NDArray[Any], told: list[int] | str) -> None:
    np.save(tmp_path / "all_ims.npy", VALUES)
    np.save(tmp_path / "all_owners.npy", owners)
    (tmp_path / "all_caps.txt").write_text("\n".join(f"caption {n}" for n in range(40)))
    if isinstance(told, list):
        assert load_corpus(f"precomputed:{tmp_path}", "all").owner.tolist() == told
    else:
        assert told in read_or_refusal(f"precomputed:{tmp_path}")


def test_captions_of_features_are_utf8(tmp_path: Path) -> None:
    np.save(tmp_path / "all_ims.npy", VALUES[:1])
    (tmp_path / "all_caps.txt").write_bytes("one\ntwo\ncafé\nfour\nfive\n".encode("latin-1"))
    assert "all_caps.txt: line 3 is not UTF-8" in read_or_refusal(f"precomputed:{tmp_path}")
