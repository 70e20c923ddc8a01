"""Inputs that outsiders' bug reports are about, each through the verb that it belongs to: an answer or one line."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from served import Place

from vse_app.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def inputs(odd_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    with tarfile.open(odd_inputs) as archive:
        archive.extractall(folder, filter="data")
    return folder / "inputs"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert status in (0, 2), err  # neither a fault of the program nor anything unexpected
        assert "Traceback" not in err
        assert "\x1b" not in out + err
        if status == 2 and not out:
            assert re.search(r"^vse: [^\n]+\n\Z", err, re.M), err
        return status, out, err

    return run


def kind_of(path: Path) -> str:
    names = os.listdir(path) if path.is_dir() else []
    if path.suffix == ".json":
        return "dedup"
    if any(name.startswith("dataset_") for name in names):
        return "karpathy"
    if any(name.startswith("captions_") for name in names):
        return "coco"
    return "precomputed" if any(name.endswith("_caps.txt") for name in names) else "folder"


def test_data_of_every_kind_are_checked(inputs: Path, run: Run) -> None:
    found = {}
    for path in sorted((inputs / "training").iterdir()):
        if path.name != "images":
            found[path.name] = run("data", "check", f"{kind_of(path)}:{path}")[0]
    assert len(found) > 50
    assert {"p_plain", "p_crlf", "a6_nfd_name", "a1_flickr30k_bar_row"} <= {
        name for name, bad in found.items() if not bad
    }
    assert {
        "a3_deep_json",
        "a2_karpathy_surrogate",
        "a13_karpathy_same_file_twice",
        "p_fp64_overflow",
        "p_object",
    } <= {name for name, bad in found.items() if bad}


def test_every_picture_and_folder_is_indexed_or_named(inputs: Path, run: Run, place: Place) -> None:
    search = inputs / "search"
    folders = [inputs / "training" / "images", *(path for path in search.iterdir() if path.is_dir())]
    assert len(folders) > 5
    for folder in folders:
        status, out, err = run("index", place.gallery, "add", folder)
        left = len(re.findall(r"^(?:refused|note) ", err, re.M))
        assert status == 0 or left, (folder, out, err)
    for odd in sorted((search / "names").iterdir()):
        assert run("search", place.gallery, "--like", odd, "-k", 1)[0] == 0, odd


def test_every_table_of_facts_is_read_or_refused(inputs: Path, run: Run, place: Place) -> None:
    tables = sorted((inputs / "search" / "facts").glob("*.*"))
    tables = [table for table in tables if table.suffix in (".csv", ".jsonl", ".tsv")]
    assert len(tables) > 15
    read = {
        table.name
        for table in tables
        if run("index", place.gallery, "add", place.pictures[0], "--facts", table)[0] == 0
    }
    assert {"u2028.jsonl", "spaces.csv", "capital.csv", "dotted.csv"} <= read


def test_queries_and_links_are_answered_or_refused(inputs: Path, run: Run, place: Place) -> None:
    for queries in (inputs / "search" / "queries").iterdir():
        run("search", place.gallery, "--vector" if queries.suffix == ".npy" else "--queries", queries)
        run("index", place.gallery, "tune", "--queries", queries, "--dry-run")
    for link in (inputs / "search" / "loop").iterdir():
        assert run("search", place.gallery, "--like", link)[0] == 2
        assert run("index", place.gallery, "remove", link)[0] == 0
