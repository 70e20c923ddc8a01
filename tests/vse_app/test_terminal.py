"""What the command line does with bad arguments, odd names, other encodings, faults, and moved or missing files."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import Ended, Vse
from served import Place, encoded, pixels

from index.errors import GalleryError
from training.errors import InputError, printable
from vse_app import search_verb
from vse_app.cli import main


def refused(ended: Ended, *told: str) -> None:
    """Status 2 and one line that says what is needed."""
    assert (ended.status, ended.out) == (2, "")
    assert re.fullmatch(r"vse: [^\n\x1b]+\n", ended.err), ended.err
    assert all(text in ended.err for text in told), ended.err


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x\x1b[31m\nvse: all fine", r"x\x1b[31m\nvse: all fine"),
        ("a\rb\x07\x9b1m", r"a\rb\x07\x9b1m"),
        ("rtl\u202egnp.exe", r"rtl\u202egnp.exe"),
        ("caf\udce9.png", r"caf\udce9.png"),
        ("line\u2028break", r"line\u2028break"),
        ("emoji 👩\u200d👩\u200d👧, café, كلب, दौड़ता", "emoji 👩\u200d👩\u200d👧, café, كلب, दौड़ता"),
    ],
)
def test_names_are_shown_in_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    for kind in (InputError, GalleryError):
        assert str(kind(f"{name}: no")) == f"{shown}: no"


def test_odd_names_in_reports_forge_no_line(vse: Vse, place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "bad\x1b[31m\nvse: all fine.png").write_bytes(b"no picture")
    (folder / "good\n1 added\x1b[0m.png").write_bytes(encoded(pixels(99)))
    added = vse("index", place.gallery, "add", folder)
    found = vse("search", place.gallery, "--image", folder / "good\n1 added\x1b[0m.png", "-k", 1)
    removed = vse("index", place.gallery, "remove", folder / "bad\x1b[31m\nvse: all fine.png")
    for ended in (added, found, removed):
        assert ended.status == 0
        assert "\x1b" not in ended.out + ended.err
        assert not re.search(r"^(vse: all fine|1 added)", ended.out + ended.err, re.M)
    assert r"good\n1 added\x1b[0m.png" in found.out


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_no_encoding_of_the_output_ends_a_verb(
    encoding: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UTF-8 cannot write a name that is none, Latin-1 and ASCII no quotation mark."""
    (tmp_path / "photos" / "caf\udce9.png").write_bytes(encoded(pixels(98)))
    (tmp_path / "facts.jsonl").write_text(json.dumps({"image": "photos/photo01.png", "caption": "“🐶” café"}) + "\n")
    (tmp_path / "queries.txt").write_text("“🐶” café\n", encoding="utf-8")

    def written(*arguments: object) -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            main([str(argument) for argument in arguments])
        stream.seek(0)
        return stream.read()

    added = written("index", place.gallery, "add", tmp_path / "photos", "--facts", tmp_path / "facts.jsonl", "--json")
    assert "caf\udce9.png" in " ".join(one["path"] for one in json.loads(added)["refused"])
    assert written("search", place.gallery, "--queries", tmp_path / "queries.txt")
    found = json.loads(written("search", place.gallery, "red", "-k", 30, "--json"))
    assert "“🐶” café" in {one["caption"] for one in found}


def test_a_closed_output_is_no_fault(vse: Vse, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, None)
            main(["search", str(place.gallery), "red disc"])


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("loops\nand loops"), ValueError("x"), RecursionError(), UnicodeDecodeError("x", b"", 0, 1, "y")],
)
def test_a_fault_of_the_program_is_one_line_and_keeps_its_trace_on_demand(
    fault: Exception, vse: Vse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(search_verb, "_queries", fail)
    ended = vse("search", tmp_path, "x")
    assert (ended.status, ended.out) == (1, "")
    assert re.fullmatch(rf"vse: {type(fault).__name__}[^\n]*VSE_DEBUG=1 shows where\)\n", ended.err)
    monkeypatch.setenv("VSE_DEBUG", "1")
    with pytest.raises(type(fault)):
        main(["search", str(tmp_path), "x"])


def test_arguments_are_checked_by_the_parser(vse: Vse, place: Place) -> None:
    gallery = place.gallery
    for bad in (
        ("index", "", "info"),
        ("index", gallery, "add", ""),
        ("index", gallery, "remove", ""),
        ("search", gallery, "x", "-k", "ten"),
        ("search", gallery, "x", "-k", "-1"),
        ("search", gallery, "x", "--weight", "nan"),
        ("search", gallery, "--image", ""),
        ("search", gallery, "x", "--no-such-flag"),
        ("index", gallery, "tune", "--target-recall", "7"),
        ("no-such-verb",),
    ):
        refused(vse(*bad), "--help")
    refused(vse("search", gallery, "--image", "http://example.org/x.jpg"), "download it first")


def test_links_in_a_circle_are_names_that_are_not_there(vse: Vse, place: Place, tmp_path: Path) -> None:
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    refused(vse("search", place.gallery, "--like", loop), "loop.png: is not in")
    assert vse("index", place.gallery, "remove", loop).status == 0
    refused(vse("search", place.gallery, "--image", loop), "loop.png")


@pytest.mark.parametrize(
    "vectors",
    [
        np.empty((0, 8), np.float32),
        np.empty((2, 0), np.float32),
        np.array([["a"] * 8]),
        np.array([["2020-01-01"] * 8], "datetime64[D]"),
        np.ones((1, 8), bool),
        np.ones((1, 8), complex),
        np.ones((2, 2, 8), np.float32),
        np.zeros((1, 8), np.float32),
        np.full((1, 8), np.nan, np.float32),
        np.array([[None] * 8], object),
    ],
    ids=lambda vectors: f"{vectors.dtype}{vectors.shape}",
)
@pytest.mark.parametrize("json_wanted", [False, True])
def test_what_holds_no_vectors_is_refused(
    vectors: Any, json_wanted: bool, vse: Vse, place: Place, tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", vectors, allow_pickle=True)
    refused(vse("search", place.gallery, "--vector", tmp_path / "v.npy", *(["--json"] if json_wanted else [])))


def test_scores_of_vectors_are_cosines_whatever_their_length(vse: Vse, place: Place, tmp_path: Path) -> None:
    vector = np.random.default_rng(0).normal(size=8)
    answers = []
    for scale in (1e-30, 1, 1e37):
        np.save(tmp_path / "v.npy", (scale * vector).astype(np.float32))
        answers.append(json.loads(vse("search", place.gallery, "--vector", tmp_path / "v.npy", "--json").out))
    for answer in answers:
        assert [one["id"] for one in answer] == [one["id"] for one in answers[0]]
        assert all(-1.0001 <= one["score"] <= 1.0001 for one in answer)


def test_separators_of_lines_are_part_of_a_query(vse: Vse, place: Place, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("red\u2028disc\nblue\x85ring\r\n\n", encoding="utf-8-sig")
    found = json.loads(vse("search", place.gallery, "--queries", tmp_path / "q.txt", "--json").out)
    assert [one["query"] for one in found] == ["red\u2028disc", "blue\x85ring"]
    (tmp_path / "q.txt").write_bytes("café".encode("latin-1"))
    refused(vse("search", place.gallery, "--queries", tmp_path / "q.txt"), "q.txt")
    refused(vse("index", place.gallery, "tune", "--queries", tmp_path / "q.txt"), "q.txt")


def test_an_unmounted_drive_empties_no_gallery(vse: Vse, place: Place, tmp_path: Path) -> None:
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    refused(vse("index", place.gallery, "remove", "--missing"), "24 of 24", "--yes")
    refused(vse("index", place.gallery, "remove", "--where", "year>=2000"), "24 of 24", "--yes")
    refused(vse("index", place.gallery, "remove", "--where", "yaer!=2019"), "yaer")
    assert "24 removed" in vse("index", place.gallery, "remove", "--missing", "--dry-run").out
    shutil.move(tmp_path / "elsewhere", tmp_path / "photos")
    for picture in place.pictures[:5]:
        picture.unlink()
    assert "5 removed" in vse("index", place.gallery, "remove", "--missing").out
    assert "19 removed" in vse("index", place.gallery, "remove", "--where", "year>=2000", "--yes").out


def test_a_moved_model_is_known_by_its_checksum_and_remembered(vse: Vse, place: Place, tmp_path: Path) -> None:
    shutil.move(place.model, tmp_path / "moved")
    refused(vse("search", place.gallery, "red disc"), "--model")
    found = vse("search", place.gallery, "red disc", "--model", tmp_path / "moved")
    assert found.status == 0
    assert vse("search", place.gallery, "red disc").out == found.out
    shutil.move(tmp_path / "moved", tmp_path / "again")
    assert vse("index", place.gallery, "add", place.pictures[0], "--model", tmp_path / "again").status == 0
    assert vse("search", place.gallery, "red disc").out == found.out
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "again", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    refused(vse("search", place.gallery, "red disc", "--model", other), "its vectors come from")


def test_a_dry_run_of_a_new_gallery_prints_json(vse: Vse, place: Place, tmp_path: Path) -> None:
    new = tmp_path / "new"
    found = json.loads(
        vse("index", new, "add", tmp_path / "photos", "--model", place.model, "--dry-run", "--json").out
    )
    assert (found["added"], found["items"]) == (24, 0)
    np.save(tmp_path / "v.npy", np.ones((3, 4), np.float32))
    found = json.loads(vse("index", new, "import", tmp_path / "v.npy", "--dry-run", "--json").out)
    assert (found["added"], found["items"]) == (3, 0)
    assert not new.exists()


def test_words_that_the_model_lacks_are_said(vse: Vse, place: Place) -> None:
    for text in ("🐶", "كلب", "zebra", "..."):
        assert "knows none of these words" in vse("search", place.gallery, text).err
    assert "knows none" not in vse("search", place.gallery, "red zebra").err
    refused(vse("search", place.gallery, "red disc", "--likely"), "no calibrated cut")


def test_conditions_on_fields_that_nothing_has_are_said(vse: Vse, place: Place) -> None:
    ended = vse("search", place.gallery, "red disc", "--where", "yaer>=2019")
    assert (ended.status, ended.out) == (0, "")
    assert "yaer" in ended.err


def test_bars_are_for_terminals(vse: Vse, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", itertools.count(0, 10).__next__)  # for tqdm, which waits before it shows a bar
    for action in (("add", tmp_path / "photos", "--model", place.model), ("verify",)):
        assert not re.search(r"\r|\d%", vse("index", tmp_path / "new", *action).err)


def test_streams_without_a_file_are_left_alone(vse: Vse, monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    main(["index", str(place.gallery), "info", "--json"])
    assert json.loads(out.getvalue())["items"] == 24
