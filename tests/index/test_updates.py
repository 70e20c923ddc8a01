"""What is known of items changes; their ids and vectors stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gallery_tools import create, furnish, item, refused, vectors

from index.filters import Condition
from index.gallery import Gallery
from index.verification import verify


def test_ids_and_vectors_stay_and_readers_follow(tmp_path: Path) -> None:
    with create(tmp_path / "g") as gallery:
        ids = gallery.add([item(f"{n}.jpg", caption="a cat") for n in range(4)], vectors(0, 4)).tolist()
        before = gallery.vectors(np.array(ids))
        reader = Gallery.open(tmp_path / "g")
        moved = {ids[1]: item("2.jpg", caption="moved", size=7), ids[2]: item("1.jpg", metadata={"year": 2019})}
        gallery.update(moved)
        assert dict(gallery.items(np.array(ids[1:3]))) == moved
        assert np.array_equal(gallery.vectors(np.array(ids)), before)
        assert gallery.ids_where([Condition("year", "=", 2019)]).tolist() == [ids[2]]
        assert gallery.ids_of_sizes([7]).tolist() == [ids[1]]
        assert [of.caption for _, of in reader.items()] == ["a cat"] * 4  # until it is refreshed
        assert reader.refresh()
        assert dict(reader.items(np.array(ids[1:3]))) == moved
        reader.close()
    assert not verify(tmp_path / "g").problems
    assert not verify(tmp_path / "g").leftovers


def test_paths_of_removed_items_are_free_again(tmp_path: Path) -> None:
    with create(tmp_path / "g") as gallery:
        first, second, third = gallery.add([item(f"{n}.jpg") for n in "abc"], vectors(0, 3)).tolist()
        gallery.remove(["a.jpg"])
        gallery.update({second: item("a.jpg")})  # in the same segment
        gallery.update({second: item("c.jpg", size=3)})  # of an item that is there, which goes
        assert [(key, of.path) for key, of in gallery.items()] == [(second, "c.jpg")]
        assert first < second < third
        gallery.compact()
        assert [(key, of.path, of.size) for key, of in gallery.items()] == [(second, "c.jpg", 3)]
    assert not verify(tmp_path / "g").problems


def test_tuned_galleries_are_searched_as_before(tmp_path: Path) -> None:
    furnish(tmp_path / "g")
    with Gallery.open(tmp_path / "g", writable=True) as gallery:
        query = vectors(1, 1)
        before = [(hit.id, hit.score) for hit in gallery.search(query, 5)[0]]
        gallery.update({key: replace(of, caption="another") for key, of in gallery.items()})
        assert [(hit.id, hit.score) for hit in gallery.search(query, 5)[0]] == before
        assert {hit.item.caption for hit in gallery.search(query, 5)[0]} == {"another"}
    with Gallery.open(tmp_path / "g") as gallery:
        assert [(hit.id, hit.score) for hit in gallery.search(query, 5)[0]] == before
    assert not verify(tmp_path / "g").problems


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({1: item("same"), 2: item("same")}, "a path occurs twice"),
        ({1: item("x"), 99: item("y")}, "has no item 99"),
        ({1: item("x", caption="\ud83d")}, "half a character"),
        ({1: item("caf\udce9.png")}, "not Unicode; rename it"),
        ({1: item("x", metadata={"n": float("nan")})}, "not JSON"),
        ({1: item("../x")}, "no plain path"),
        ({1: item("1.jpg"), 2: item("x", caption="\ud83d")}, "half a character"),
    ],
)
def test_what_cannot_be_kept_changes_nothing(tmp_path: Path, changed: dict[int, object], reason: str) -> None:
    with create(tmp_path / "g") as gallery:
        gallery.add([item(f"{n}.jpg") for n in range(3)], vectors(0, 3))
        before = list(gallery.items())
        with refused(reason):
            gallery.update(changed)
        assert list(gallery.items()) == before
    assert not verify(tmp_path / "g").leftovers
