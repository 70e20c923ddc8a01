"""Readers while a writer replaces and deletes what they read."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_tools import CURVE, create, furnish, item, refused, small_index, vectors

from index import changes, searcher, segment, snapshot, verification
from index.approximate_index import ApproximateIndex
from index.gallery import Gallery
from index.manifest import Manifest
from index.segment import Segment
from index.snapshot import Snapshot
from index.verification import verify


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Gallery]:
    """Four segments; the items' numbers are their ids less one."""
    with create(tmp_path / "g") as gallery:
        for n in range(4):
            gallery.add([item(f"{n}-{m}", metadata={"n": n}) for m in range(5)], vectors(n, 5))
        yield gallery


def everything(gallery: Gallery) -> list[Any]:
    ids = gallery.snapshot.ids()
    return [
        list(gallery.items()),
        gallery.vectors(ids).tolist(),
        gallery.search(vectors(9, 2), 7),
        gallery.unchanged({"1-1": (1, 2), "3-4": (1, 2)}),
        [key for keys, _ in gallery.snapshot.blocks() for key in keys.tolist()],
        gallery.ids_of(["2-2"]).tolist(),
    ]


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("tuned", [False, True])
def test_an_old_state_stays_whole_after_its_files_are_deleted(writer: Gallery, searched: bool, tuned: bool) -> None:
    if tuned:
        writer.install_index(small_index(writer), CURVE)
    with Gallery.open(writer.directory) as reference:
        expected = everything(reference)
    with Gallery.open(writer.directory) as reader:
        if searched:
            reader.search(vectors(9, 1), 1)
        writer.remove(["1-1", "0-0"])
        writer.add([item("3-4", caption="new")], vectors(7, 1))
        writer.compact()
        if tuned:
            writer.install_index(small_index(writer, "HNSW8"), CURVE)
        assert len(list((writer.directory / "segments").iterdir())) == 1
        found = everything(reader)
        assert found == expected
        assert reader.refresh()
        assert everything(reader) == everything(writer) != expected
        assert isinstance(reader._searching().index, ApproximateIndex) == tuned
        assert not reader.refresh()


def test_refreshing_reads_only_what_changed(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read: list[tuple[str, int]] = []

    class Watched(Segment):
        def __init__(self, directory: Path, part: Any, dim: int) -> None:
            opened.append(part.name)
            super().__init__(directory, part, dim)

        def _read(self, start: int, count: int) -> Any:
            read.append((self.part.name, count))
            return super()._read(start, count)

    monkeypatch.setattr(snapshot, "Segment", Watched)
    with Gallery.open(writer.directory) as reader:
        reader.search(vectors(9, 1), 1)
        assert [count for _, count in read] == [5, 5, 5, 5]
        kept = reader.snapshot.segments
        writer.remove(["1-1"])
        writer.add([item("new")], vectors(5, 1))
        opened.clear()
        read.clear()
        assert reader.refresh()
        assert opened == ["segments/000000002", "segments/000000006"]
        assert read == [("segments/000000006", 1)]
        assert [one is other for one, other in zip(kept, reader.snapshot.segments, strict=False)] == [
            True,
            False,
            True,
            True,
        ]
        for thread in threading.enumerate():
            if thread.name == "closing":
                thread.join()
        with pytest.raises(ValueError, match="closed"):
            kept[1]._file.fileno()
        writer.compact()
        read.clear()
        reader.refresh()
        assert read == []  # its vectors are in memory already
        assert everything(reader) == everything(writer)


def test_opening_is_tried_again_when_a_writer_was_faster(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Manifest.read
    for times in (1, 3):
        with monkeypatch.context() as patch:
            # The writer reads the file, too; it gets what is there.
            patch.setattr(snapshot.Manifest, "read", staticmethod(faster(writer, times, real)))
            with Gallery.open(writer.directory) as reader:
                patch.undo()
                assert everything(reader) == everything(writer)


def faster(writer: Gallery, times: int, real: Callable[[Path], Manifest]) -> Callable[[Path], Manifest]:
    busy = False

    def read(directory: Path) -> Manifest:
        nonlocal times, busy
        state = real(directory)
        if times and not busy:
            times, busy = times - 1, True
            writer.remove([int(writer.snapshot.ids()[0])])
            writer.compact()
            busy = False
        return state

    return read


@pytest.mark.parametrize("name", ["check_part", "map_array", "ItemFile"])
def test_a_writer_may_be_faster_at_any_moment(name: str, writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(segment, name)
    for moment in range(1, 5):
        calls, busy = 0, False

        def late(*arguments: Any, moment: int = moment) -> Any:
            nonlocal calls, busy
            result = real(*arguments)
            calls += not busy
            if calls == moment and not busy:
                busy = True
                writer.remove([int(writer.snapshot.ids()[0])])
                writer.compact()
                calls, busy = moment + 1, False
            return result

        with monkeypatch.context() as patch:
            patch.setattr(segment, name, late)
            with Gallery.open(writer.directory) as reader:
                patch.undo()
                assert len(reader) in (len(writer), len(writer) + 1)
                everything(reader)
        for n in range(3):
            writer.add([item(f"{moment} {n}", metadata={"n": n})], vectors(10 * moment + n, 1))


def test_refreshing_is_tried_again_when_a_writer_was_faster(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gallery.open(writer.directory) as reader:
        reader.search(vectors(9, 1), 1)
        writer.add([item("new")], vectors(5, 1))
        with monkeypatch.context() as patch:
            patch.setattr(snapshot.Manifest, "read", staticmethod(faster(writer, 3, Manifest.read)))
            assert reader.refresh()
        assert everything(reader) == everything(writer)


def test_verifying_is_tried_again_when_a_writer_was_faster(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verification.Manifest, "read", staticmethod(faster(writer, 2, Manifest.read)))
        assert not verify(writer.directory).problems


def test_a_state_that_is_really_damaged_is_not_tried_forever(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(writer.directory / "segments/000000002")
    reads = []
    real = Manifest.read
    monkeypatch.setattr(snapshot.Manifest, "read", staticmethod(lambda path: reads.append(path) or real(path)))
    with refused("segments/000000002: "):
        Gallery.open(writer.directory)
    assert len(reads) == 2


def test_blocks_and_vectors_cross_segments(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "BLOCK_BYTES", 2 * 4 * writer.dim)
    monkeypatch.setattr(snapshot, "BLOCK_BYTES", 2 * 4 * writer.dim)
    writer.remove([3, 4, 8, 20])
    rows = np.vstack([vectors(n, 5) for n in range(4)])
    ids = np.setdiff1d(np.arange(1, 21), [3, 4, 8, 20])
    np.testing.assert_array_equal(writer.snapshot.ids(), ids)
    for among in (None, ids[:0], ids[:3], ids[1::2], ids):
        for after in (0, 4, 11, 99) if among is None else (0,):
            expected = ids[ids > after] if among is None else among
            blocks = list(writer.snapshot.blocks(after, among))
            assert all(len(keys) <= 2 for keys, _ in blocks)
            found = np.concatenate([keys for keys, _ in blocks] or [ids[:0]])
            np.testing.assert_array_equal(found, expected)
            for keys, block in blocks:
                np.testing.assert_array_equal(block, rows[keys - 1])
    asked = np.array([19, 1, 19, 7, 2])
    np.testing.assert_array_equal(writer.vectors(asked), rows[asked - 1])
    for missing in (3, 20, 21, 0, -1):
        with refused(f"has no item {missing};"):
            writer.vectors(np.array([19, missing]))
    assert [key for key, _ in writer.items(np.array([19, 3, 1, -1, 19, 99]))] == [1, 19]


def test_leftovers_are_shown_to_readers_and_deleted_by_the_next_writer(tmp_path: Path) -> None:
    furnish(tmp_path / "g")
    left = [
        "segments/000000099/vectors.npy",
        "index/000000077/index.faiss",
        "segments/000000001/removed-000000050.npy",
    ]
    for name in left:
        (tmp_path / "g" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "g" / name).touch()
    (tmp_path / "g" / "gallery.json.tmp").touch()
    names = {"gallery.json.tmp", "segments/000000099", "index/000000077", left[2]}
    for _ in range(2):
        Gallery.open(tmp_path / "g").close()
        assert {path.relative_to(tmp_path / "g").as_posix() for path in verify(tmp_path / "g").leftovers} == names
    Gallery.open(tmp_path / "g", writable=True).close()
    assert not verify(tmp_path / "g").leftovers
    assert not any((tmp_path / "g" / name).exists() for name in names)


def test_a_writer_goes_on_from_what_is_on_disk(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a change was interrupted, the next one starts from the current state, so no id is given twice."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(changes, "delete_former", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.add([item("interrupted")], vectors(5, 1))
    assert writer.add([item("next")], vectors(6, 1)).tolist() == [22]
    assert [one.path for _, one in writer.items(np.array([21, 22]))] == ["interrupted", "next"]


def test_no_state_becomes_current_that_cannot_be_opened(writer: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    before = writer.snapshot.manifest

    def torn(path: Path, array: Any) -> None:
        path.write_bytes(b"torn")

    with monkeypatch.context() as patch:
        patch.setattr(segment, "save_array", torn)
        with refused():
            writer.add([item("new")], vectors(5, 1))
    assert Manifest.read(writer.directory) == before
    assert not verify(writer.directory).leftovers
    assert writer.add([item("new")], vectors(5, 1)).tolist() == [21]


def test_an_index_is_not_needed_for_few_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path / "g")
    monkeypatch.setattr(ApproximateIndex, "search", lambda *arguments: pytest.fail("searched"))
    with Gallery.open(tmp_path / "g") as reader:
        assert len(reader.search(vectors(0, 1), 5, reader.snapshot.ids()[:6])[0]) == 5
        monkeypatch.setattr(searcher, "EXACT_AMONG", 0)
        with pytest.raises(pytest.fail.Exception):
            reader.search(vectors(0, 1), 5, reader.snapshot.ids()[:6])


def test_a_snapshot_can_be_opened_by_its_manifest(writer: Gallery) -> None:
    state = writer.snapshot.manifest
    with Gallery.open(writer.directory) as reader:
        one = Snapshot.open(writer.directory, state)
        assert [key for key, _ in one.items()] == [key for key, _ in reader.items()]
        one.close()
    writer.remove([1])
    writer.compact()
    with refused("segments/000000001"):
        Snapshot.open(writer.directory, state)
