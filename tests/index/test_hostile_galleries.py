"""Galleries that somebody made up, checksums and all: what leads elsewhere, and what makes no sense."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gallery_tools import assert_refused, cook, create, item, read_manifest, refused, vectors, write_manifest

from index.gallery import Gallery
from index.verification import verify

INDEX = "index/000000005"
SEGMENT = "segments/000000001"


def test_the_cook_can_cook(made: Path) -> None:
    cook(made)
    assert not verify(made).problems


NAMES = [
    "../canary",
    "segments/../../canary",
    "/etc",
    "segments/1",
    "segments/000000001/",
    "segments/000000001\n",
    "segments/００００００００１",
    "segments/999999999",
    "index/000000001",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_part_names_lead_nowhere_else(name: str, made: Path) -> None:
    cook(made, lambda content: content["segments"][0].update(name=name))
    assert_refused(made, r"gallery\.json: ")


@pytest.mark.parametrize(
    "name", ["../../canary/precious.txt", "/etc/passwd", "a/b.npy", "..", "x.py", "vectors.npy\n"]
)
def test_file_names_lead_nowhere_else(name: str, made: Path) -> None:
    cook(made, lambda content: content["segments"][0]["files"].update({name: {"bytes": 12, "sha256": "0" * 64}}))
    assert_refused(made, r"gallery\.json: ")
    cook(made, lambda content: content["segments"][0].update(removed=name))
    assert_refused(made, r"gallery\.json: ")


NUMBERS = [-1, True, 1.0, 10**400, 1 << 63, "4", None, [], {}, float("nan"), 0]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: repr(number)[:9])
@pytest.mark.parametrize("field", ["dim", "next_id", "next_part", "items", "rows", "live", "bytes", "format"])
def test_numbers_make_sense(field: str, number: Any, made: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        if field == "bytes":
            content["segments"][0]["files"]["ids.npy"]["bytes"] = number
        elif field in ("rows", "live"):
            content["segments"][0][field] = number
        else:
            content[field] = number

    cook(made, change)
    assert_refused(made, rf"{made}.*; ")


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 1 << 20},
        {"dim": 9},
        {"next_id": 5},
        {"next_part": 3},
        {"metric": "euclid"},
        {"metric": 3},
        {"model": None},
        {"model": {"name": 3}},
        {"model": []},
        {"segments": {}},
        {"segments": None},
        {"segments": [3]},
        {"segments": [{}]},
        {"index": 3},
        {"index": {"name": "segments/000000001", "files": {}}},
        {"calibration": {"name": "index/000000005", "files": {}}},
        {"extra": 1},
        {"format": 3},
        {"format": 1},
    ],
    ids=repr,
)
def test_fields_make_sense(change: dict[str, Any], made: Path) -> None:
    write_manifest(made, read_manifest(made) | change)
    assert_refused(made, rf"{made}.*; ")


def test_segments_are_disjoint(made: Path) -> None:
    content = read_manifest(made)
    write_manifest(made, content | {"segments": content["segments"][:1] * 2, "items": 26})
    assert_refused(made, r"gallery\.json: .*twice")
    shutil.copytree(made / SEGMENT, made / "segments/000000007")
    again = {**content["segments"][0], "name": "segments/000000007"}
    write_manifest(made, content | {"segments": [content["segments"][0], again], "items": 26, "next_part": 9})
    assert_refused(made, "share ids")
    write_manifest(made, content | {"segments": content["segments"][::-1]})
    assert_refused(made, "share ids")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"format"',
        b"{}",
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"format": 2, "dim": ' + b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": 2, "dim": "' + b"x" * 1_000_000 + b'"}',
        b'{"format": 99, "new": "things"}',
    ],
    ids=lambda content: repr(content[:24]),
)
def test_manifests_that_are_none(content: bytes, made: Path) -> None:
    (made / "gallery.json").write_bytes(content)
    assert_refused(made, r"gallery\.json: ")


def test_a_huge_manifest_is_not_read(made: Path) -> None:
    with (made / "gallery.json").open("r+b") as file:
        file.truncate(100_000_000)
    assert_refused(made, r"gallery\.json: .*more than", sparing=True)


@pytest.mark.parametrize("name", ["gallery.json", "segments", SEGMENT, f"{SEGMENT}/ids.npy", "index", INDEX])
def test_links_are_refused(name: str, made: Path) -> None:
    (made / name).rename(made.parent / "elsewhere")
    (made / name).symlink_to(made.parent / "elsewhere")
    assert_refused(made, f"^{made / name}: ")


@pytest.mark.parametrize("kind", ["segments", "index", "calibration"])
def test_links_in_an_empty_gallery_do_not_lead_a_writer_out(kind: str, made: Path) -> None:
    shutil.rmtree(made)
    create(made).close()
    (made / kind).symlink_to(made.parent / "canary")
    with refused(f"^{made / kind}: "):
        Gallery.open(made, writable=True)
    assert (made.parent / "canary/000000001/more.txt").exists()
    (made / kind).unlink()
    (made / kind).mkdir()
    (made / kind / "000000007").symlink_to(made.parent / "canary")
    Gallery.open(made, writable=True).close()
    assert not os.path.lexists(made / kind / "000000007")
    assert (made.parent / "canary/000000001/more.txt").exists()


@pytest.mark.parametrize("target", ["canary/precious.txt", "canary/new.txt"])
def test_temporary_files_that_are_links_are_not_written_through(target: str, made: Path) -> None:
    shutil.rmtree(made)
    made.mkdir()
    (made / "gallery.json.tmp").symlink_to(made.parent / target)
    with create(made) as gallery:
        (made / "gallery.json.tmp").symlink_to(made.parent / target)
        gallery.add([item("a")], vectors(0, 1))
    assert (made.parent / "canary/precious.txt").read_text() == "do not touch"
    assert not (made.parent / "canary/new.txt").exists()
    (made / "gallery.json.tmp").symlink_to(made.parent / target)
    Gallery.open(made, writable=True).close()
    assert not os.path.lexists(made / "gallery.json.tmp")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("../canary/new.txt"), Path.mkdir])
def test_locks_that_are_none(make: Callable[[Path], None], made: Path) -> None:
    (made / "lock").unlink()
    make(made / "lock")
    with refused(f"^{made / 'lock'}: "):
        Gallery.open(made, writable=True)
    assert not (made.parent / "canary/new.txt").exists()
    Gallery.open(made).close()


def test_pipes_do_not_make_anyone_wait(made: Path) -> None:
    for name in ("gallery.json", f"{SEGMENT}/ids.npy", f"{INDEX}/parameters.json"):
        (made / name).rename(made / "aside")
        os.mkfifo(made / name)
        assert_refused(made, f"^{made / name}: ")
        (made / name).unlink()
        (made / "aside").rename(made / name)
