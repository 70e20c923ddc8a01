"""What a gallery is given is checked before anything is written, as strictly as what it reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gallery_tools import DIM, create, files_of, item, refused, vectors

from index.gallery import Gallery
from index.verification import verify

Act = Callable[[Gallery], object]


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    gallery = create(tmp_path / "g")
    gallery.add([item(f"{n}.jpg") for n in range(3)], vectors(0, 3))
    return gallery


def with_fact(**facts: Any) -> Act:
    return lambda gallery: gallery.add([item("ok.jpg"), replace(item("odd.jpg"), **facts)], vectors(1, 2))


def with_vectors(given: Any) -> Act:
    return lambda gallery: gallery.add([item("a"), item("b")], given)


LONG = vectors(1, 2) * np.float32([[1], [25]])
REFUSED: dict[str, tuple[Act, str]] = {
    "path": (with_fact(path=7), "7: its path is 7"),
    "caption": (with_fact(caption=7), "odd.jpg': its caption is 7"),
    "size": (with_fact(size=1.5), "odd.jpg': its size is 1.5"),
    "time": (with_fact(mtime_ns="now"), "odd.jpg': its mtime_ns is 'now'"),
    "checksum": (with_fact(sha256=None), "odd.jpg': its sha256 is None"),
    "metadata list": (with_fact(metadata=[1]), r"odd.jpg': its metadata is \[1\]"),
    "metadata text": (with_fact(metadata="{}"), "odd.jpg': its metadata is '{}'"),
    "metadata value": (with_fact(metadata={"a": {1}}), "odd.jpg: metadata is not JSON"),
    "zero vector": (with_vectors(vectors(1, 2) * np.float32([[1], [0]])), "b: its vector has length 0 .*leave it out"),
    "long vector": (with_vectors(LONG), "b: its vector has length 25 .*divide it"),
    "text": (with_vectors([["a"] * DIM] * 2), "no real numbers"),
    "complex": (with_vectors(vectors(1, 2).astype(complex)), "no real numbers"),
    "bool": (with_vectors(np.ones((2, DIM), bool)), "no real numbers"),
    "dates": (with_vectors(np.zeros((2, DIM), "datetime64[s]")), "no real numbers"),
    "ragged": (with_vectors([[1.0], [1.0, 2.0]]), "no array of numbers"),
    "too large for float32": (with_vectors(np.full((2, DIM), 1e300)), "a: its vector is not finite"),
    "a single number": (with_vectors(1.0), "shape"),
    "remove a fraction": (lambda gallery: gallery.remove([1, 1.5]), "1.5 is neither a path nor an id"),  # type: ignore[list-item]
    "remove True": (lambda gallery: gallery.remove([True]), "True is neither a path nor an id"),
    "remove nothing": (lambda gallery: gallery.remove([None]), "None is neither a path nor an id"),  # type: ignore[list-item]
    "k fraction": (lambda gallery: gallery.nearest(vectors(0, 1), 1.5), "k is 1.5"),  # type: ignore[arg-type]
    "k text": (lambda gallery: gallery.search(vectors(0, 1), "3"), "k is '3'"),  # type: ignore[arg-type]
    "k True": (lambda gallery: gallery.search(vectors(0, 1), True), "k is True"),
    "ids fraction": (lambda gallery: gallery.vectors(np.array([1.5])), "whole numbers"),  # type: ignore[arg-type]
    "allowed fraction": (lambda gallery: gallery.nearest(vectors(0, 1), 1, np.array([1.5])), "whole numbers"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_would_accept_is_refused_and_nothing_changes(name: str, gallery: Gallery) -> None:
    act, message = REFUSED[name]
    before = gallery.snapshot.manifest, files_of(gallery.directory)
    with refused(message):
        act(gallery)
    assert (gallery.snapshot.manifest, files_of(gallery.directory)) == before
    report = verify(gallery.directory)
    assert not report.problems
    assert not report.leftovers
    assert gallery.add([item("next")], vectors(2, 1)).tolist() == [4]


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 1.5},
        {"dim": True},
        {"dim": "8"},
        {"metric": 3},
        {"metric": ["cosine"]},
        {"model": {"checksum": 3}},
        {"model": {1: "name"}},
        {"model": {"name": None}},
        {"model": "name"},
        {"model": 7},
    ],
    ids=str,
)
def test_a_gallery_is_not_made_of_what_cannot_be_read_again(changes: dict[str, Any], tmp_path: Path) -> None:
    right = {"dim": DIM, "metric": "cosine", "model": {"name": "m", "checksum": "c"}}
    with refused():
        Gallery.create(tmp_path / "g", **{**right, **changes})
    assert not (tmp_path / "g").exists()
    Gallery.create(tmp_path / "g", **right).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [4, 10**7, 2**40, 10**20])
def test_more_hits_than_items_cost_nothing(k: int, gallery: Gallery) -> None:
    found = gallery.nearest(vectors(0, 2), k)
    assert found.ids.shape == found.scores.shape == (2, 3)
    assert [len(row) for row in gallery.search(vectors(0, 2), k)] == [3, 3]


def test_a_single_path_is_one_path(gallery: Gallery) -> None:
    assert gallery.remove("1.jpg") == 1
    assert gallery.remove([np.int64(1)]) == 1


def test_lengths_that_rounding_explains_are_accepted(gallery: Gallery) -> None:
    for dtype in (np.float16, np.float64):
        gallery.add([item(str(dtype))], vectors(3, 1).astype(dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "act",
    [
        lambda gallery: gallery.add([item("a")], vectors(1, 1)),
        lambda gallery: gallery.remove([1]),
        lambda gallery: gallery.compact(),
        lambda gallery: gallery.refresh(),
        lambda gallery: gallery.search(vectors(1, 1), 1),
        lambda gallery: list(gallery.items()),
        lambda gallery: gallery.vectors(np.array([1])),
    ],
)
def test_a_closed_gallery_says_so(act: Act, gallery: Gallery) -> None:
    gallery.close()
    with refused("is closed; open"):
        act(gallery)


def interleaved(directory: Path) -> tuple[Gallery, Gallery]:
    """Two writers, the second of which came in after the lock had been deleted."""
    first = Gallery.open(directory, writable=True)
    (directory / "lock").unlink()
    return first, Gallery.open(directory, writable=True)


@pytest.mark.parametrize(
    "act",
    [
        lambda gallery: gallery.add([item("mine")], vectors(5, 1)),
        lambda gallery: gallery.remove([1]),
        lambda gallery: gallery.compact(),
    ],
)
def test_a_writer_whose_lock_was_deleted_changes_nothing(act: Act, gallery: Gallery) -> None:
    gallery.remove([2])
    gallery.close()
    first, second = interleaved(gallery.directory)
    second.add([item("theirs")], vectors(4, 1))
    with refused("lock: was deleted"):
        act(first)
    second.add([item("more")], vectors(6, 1))
    with refused("lock: was deleted"):
        act(first)
    first.close()
    assert {one.path for _, one in second.items()} == {"0.jpg", "2.jpg", "theirs", "more"}
    second.close()
    assert not verify(gallery.directory).problems
    with Gallery.open(gallery.directory, writable=True) as again:
        act(again)


def test_no_state_is_undone_by_one_that_was_made_from_an_earlier_one(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.close()
    first, second = interleaved(gallery.directory)
    monkeypatch.setattr(first, "_check_lock", lambda: None)  # as where there are no locks
    commit = first._commit

    def late(state: Any) -> None:
        second.add([item("theirs")], vectors(4, 1))
        commit(state)

    monkeypatch.setattr(first, "_commit", late)
    with refused("another program has changed the gallery meanwhile"):
        first.remove([1])
    assert "theirs" in {one.path for _, one in second.items()}
    assert not verify(gallery.directory).problems


def test_a_reader_sees_every_change_whatever_the_clock_of_the_file_system(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Gallery.open(gallery.directory)
    reader.refresh()
    fstat = os.fstat

    def coarse(descriptor: int) -> Any:
        return SimpleNamespace(st_ino=1, st_mtime_ns=2, st_size=fstat(descriptor).st_size)

    for number in range(12):
        gallery.add([item(f"{number % 3}.jpg", size=number)], vectors(number, 1))
        with monkeypatch.context() as patch:
            patch.setattr("index.manifest.os.fstat", coarse)
            assert reader.refresh(), number
            assert not reader.refresh(), number
        assert reader.snapshot.manifest == gallery.snapshot.manifest
