from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_tools import CURVE, DIM, MODEL, create, files_of, furnish, item, refused, small_index, vectors

import index
from index import changes, items, searcher
from index import gallery as galleries
from index.approximate_index import ApproximateIndex
from index.errors import GalleryError
from index.filters import Condition
from index.gallery import Gallery
from index.items import Item
from index.manifest import SegmentPart
from index.verification import verify

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(index.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    with create(tmp_path / "g") as created:
        yield created


def test_search_among_allowed_ids_only(gallery: Gallery) -> None:
    ids = gallery.add([item(f"{n}.jpg") for n in range(6)], rows := vectors(0, 6))
    allowed = ids[[1, 4]]
    for hits, scores in zip(gallery.search(rows, 5, allowed), rows @ rows[[1, 4]].T, strict=True):
        assert [hit.id for hit in hits] == allowed[np.argsort(-scores)].tolist()
    assert gallery.search(rows[:1], 5, np.empty(0, np.int64)) == [[]]


def test_unchanged_files_are_recognised(gallery: Gallery) -> None:
    gallery.add([item("a.jpg", size=10, mtime_ns=20), item("ü.jpg", size=1, mtime_ns=2)], vectors(0, 2))
    assert gallery.unchanged({"a.jpg": (10, 20), "b.jpg": (10, 20), "\udcff.jpg": (10, 20)}) == {"a.jpg"}
    assert gallery.unchanged({"a.jpg": (11, 20), "ü.jpg": (1, 2)}) == {"ü.jpg"}
    assert gallery.unchanged({"a.jpg": (10, 21)}) == set()


@pytest.mark.parametrize(
    "path", ["ü/日本.jpg", "a'b\"c.jpg", "new\nline.jpg", "/absolute.jpg", "😀.jpg", "back\\slash"]
)
def test_paths_of_all_kinds_are_found_again(gallery: Gallery, path: str) -> None:
    (key,) = gallery.add([item(path)], vectors(0, 1)).tolist()
    assert gallery.ids_of([path, "\udcff.jpg", ""]).tolist() == [key]
    assert [(hit.id, hit.item.path) for hit in gallery.search(vectors(0, 1), 1)[0]] == [(key, path)]
    assert gallery.remove([path]) == 1


@pytest.mark.parametrize("text", ["\\u0000", "a\\\\u0000", "\\", "\1"])
def test_what_only_looks_like_a_nul_is_kept(gallery: Gallery, text: str) -> None:
    gallery.add([item("a", caption=text, metadata={text: [text]})], vectors(0, 1))
    assert [one for _, one in gallery.items()] == [item("a", caption=text, metadata={text: [text]})]
    assert gallery.ids_where([Condition("caption", "=", text)]).tolist() == [1]


def test_items_with_a_nul_of_earlier_galleries_are_read_and_merged(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = item("a", caption="a\0b", metadata={"x": "c\0d"})
    with monkeypatch.context() as patch:
        patch.setattr(items, "_NUL", re.compile("(?!)"))
        gallery.add([item("a", caption="a", metadata=old.metadata)], vectors(0, 1))
    gallery.add([item("b")], vectors(1, 1))
    gallery.compact()
    assert [one.metadata for _, one in gallery.items()] == [old.metadata, {}]
    assert not verify(gallery.directory).problems


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ([], []),
        (["/a"], ["/a", "/a/1", "/a/b/2"]),
        (["/a/b/", "/a-b"], ["/a-b", "/a/b/2"]),
        (["/é", "/a/1"], ["/a/1", "/é/日"]),
        (["/", "/a"], ["/a", "/a-b", "/a/1", "/a/b/2", "/a0", "/é/日"]),
        (["a", "\udcff", "/a/*", "/%", "/A"], []),
    ],
)
def test_items_below_folders(gallery: Gallery, folders: list[str], found: list[str]) -> None:
    paths = ["/a/1", "/a", "/é/日", "/a-b", "/a0", "/a/b/2", "/a/gone"]
    gallery.add([item(path) for path in paths[:4]], vectors(0, 4))
    gallery.add([item(path) for path in paths[4:]], vectors(1, 3))
    gallery.remove(["/a/gone"])
    ids = gallery.snapshot.ids_below(folders)
    assert ids.tolist() == sorted(ids.tolist())
    assert sorted(one.path for _, one in gallery.items(ids)) == found


def test_a_path_of_digits_is_not_an_id(gallery: Gallery) -> None:
    gallery.add([item("2"), item("1")], vectors(0, 2))
    assert gallery.remove(["1"]) == 1
    assert [one.path for _, one in gallery.items()] == ["2"]
    assert gallery.remove([10**30, -(10**30), 0, 7]) == 0


def test_info_and_model(gallery: Gallery) -> None:
    gallery.add([item("a.jpg"), item("b.jpg")], vectors(0, 2))
    gallery.remove(["a.jpg"])
    files = [gallery.directory / name for name in files_of(gallery.directory) if name != "gallery.json"]
    assert gallery.info() == {
        "items": 1,
        "dim": DIM,
        "metric": "cosine",
        "model": MODEL,
        "search": "exact, not tuned",
        "segments": 1,
        "removed": 1,
        "bytes": sum(file.stat().st_size for file in files),
    }
    gallery.check_model(MODEL["checksum"])
    with refused("not from this model"):
        gallery.check_model("xyz")


@pytest.mark.parametrize(
    ("items", "count", "message"),
    [
        ([item("a"), item("b"), item("a")], 3, "^a: occurs twice"),
        ([item("a"), item("b")], 1, "1 vectors for 2 items"),
        ([item("new"), item("b", metadata={"x": {1, 2}})], 2, "^b: metadata is not JSON"),
        ([item("new"), item("b", metadata={"x": float("nan")})], 2, "^b: metadata is not JSON"),
        ([item("new"), item("\udcff")], 2, r"\\udcff.*not Unicode"),
        ([item("new"), item("b", caption="\udcff")], 2, r"\\udcff.*not Unicode"),
        ([item("new"), item("b", metadata={"x": "\udcff"})], 2, r"\\udcff.*not Unicode"),
        ([item("new"), item("")], 2, "no plain path"),
        ([item("new"), item("a/../b")], 2, "no plain path"),
        ([item("new"), item("a\\..\\b")], 2, "no plain path"),
        ([item("new"), item("a\0b")], 2, "no plain path"),
        ([item("new"), item("b", caption="a\0b")], 2, "^b: .*NUL"),
        ([item("new"), item("b", sha256="\0")], 2, "^b: .*NUL"),
        ([item("new"), item("b", metadata={"x": ["a", {"y": "\\\0"}]})], 2, "^b: .*NUL"),
        ([item("new"), item("b", metadata={"\0": 1})], 2, "^b: .*NUL"),
        ([item("new"), item("b", size=1 << 70)], 2, "too large"),
    ],
)
def test_add_refuses_and_stays_as_it_was(gallery: Gallery, items: list[Item], count: int, message: str) -> None:
    gallery.add([item("old")], vectors(0, 1))
    before = files_of(gallery.directory)
    with refused(message):
        gallery.add(items, vectors(1, count))
    assert files_of(gallery.directory) == before
    gallery.add([item("next")], vectors(2, 1))
    assert [one.path for _, one in gallery.items()] == ["old", "next"]


def test_metadata_nested_too_deep_is_refused(gallery: Gallery) -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with refused("^a: metadata"):
        gallery.add([item("a", metadata={"x": deep})], vectors(0, 1))


def test_vectors_that_do_not_fit_are_refused(gallery: Gallery) -> None:
    with refused(r"^b\.jpg: .*not finite"):
        gallery.add([item("a.jpg"), item("b.jpg")], np.array([[1] * DIM, [np.nan] * DIM], np.float32))
    with refused(r"\(1, 9\) where \(N, 8\)"):
        gallery.add([item("a.jpg")], vectors(0, 1, DIM + 1))
    assert len(gallery) == 0
    gallery.add([item("a")], vectors(0, 1))
    for tuned in (False, True):
        if tuned:
            gallery.install_index(small_index(gallery), CURVE)
        with refused(r"\(1, 9\) where \(N, 8\)"):
            gallery.search(vectors(0, 1, DIM + 1), 1)
        with refused("query 0: .*not finite"):
            gallery.search(np.full((1, DIM), np.nan, np.float32), 1)
        with refused("k is 0"):
            gallery.search(vectors(0, 1), 0)
        for wrong in (0, 0.5, 3, 1e18):
            with refused("query 1: its vector has length .* where cosine needs 1"):
                gallery.search(vectors(0, 2) * np.array([[1], [wrong]], np.float32), 1)


def test_create_refuses_an_existing_gallery_and_nonsense(gallery: Gallery, tmp_path: Path) -> None:
    gallery.close()
    with refused("is a gallery already"):
        create(gallery.directory)
    with refused("cosine, order"):
        create(tmp_path / "other", "euclid")
    for dim in (0, -1, 1 << 40):
        with refused("dim"):
            create(tmp_path / "other", dim=dim)
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").touch()
    with refused(f"^{tmp_path / 'file' / 'g'}: "):
        create(tmp_path / "file" / "g")


@pytest.mark.parametrize("name", ["segments", "index", "calibration"])
def test_nothing_of_others_is_deleted(name: str, tmp_path: Path) -> None:
    """A directory may hold folders that happen to be called like ours."""
    theirs = tmp_path / "g" / name / "precious.txt"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    with refused(f"{name} of its own"):
        create(tmp_path / "g")
    assert theirs.exists()
    theirs.parent.rename(tmp_path / "aside")
    create(tmp_path / "g").close()
    (tmp_path / "aside").rename(theirs.parent)
    Gallery.open(tmp_path / "g", writable=True).close()
    assert theirs.exists()


def test_second_writer_is_refused_until_the_first_closes(gallery: Gallery) -> None:
    with refused(f"{gallery.directory}: another writer"):
        Gallery.open(gallery.directory, writable=True)
    script = f"from index.gallery import Gallery; Gallery.open({str(gallery.directory)!r}, writable=True)"
    other = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert "another writer" in other.stderr
    gallery.close()
    Gallery.open(gallery.directory, writable=True).close()


def test_readers_see_the_state_at_which_they_opened(gallery: Gallery) -> None:
    first = gallery.add([item("a"), item("b")], rows := vectors(0, 2))
    with Gallery.open(gallery.directory) as reader:
        gallery.add([item("a", caption="new"), item("c")], vectors(1, 2))
        gallery.remove(["b"])
        gallery.compact()
        assert {hit.id for hit in reader.search(rows[:1], 9)[0]} == set(first.tolist())
        assert [one for _, one in reader.items()] == [item("a"), item("b")]
        for change in (
            lambda: reader.remove(["a"]),
            lambda: reader.add([item("d")], vectors(2, 1)),
            reader.compact,
            lambda: reader.install_index(None, CURVE),
            lambda: reader.install_calibration(lambda folder: None),
        ):
            with refused("open for reading"):
                change()
    with Gallery.open(gallery.directory) as reader:
        assert [one for _, one in reader.items()] == [item("a", caption="new"), item("c")]


def test_a_reader_who_may_not_write_here_still_reads() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        with create(Path(folder)) as gallery:
            ids = gallery.add([item("a")], vectors(0, 1))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                else:
                    os.chmod(folder, 0o555)
                with Gallery.open(folder) as reader:
                    status = 0 if list(reader.items()) == [(ids[0], item("a"))] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.chmod(folder, 0o755)


def test_a_tuned_index_outlives_its_last_item(gallery: Gallery) -> None:
    gallery.add([item(f"{n}") for n in range(3)], vectors(0, 3))
    gallery.install_index(small_index(gallery), CURVE)
    gallery.remove(["0", "1", "2"])
    gallery.compact()
    assert gallery.search(vectors(0, 1), 3) == [[]]
    for _ in range(2):
        ids = gallery.add([item("new")], vectors(3, 1))
        assert isinstance(gallery._searching().index, ApproximateIndex)
        assert [hit.id for hit in gallery.search(vectors(3, 1), 3)[0]] == ids.tolist()
        gallery.close()
        gallery = Gallery.open(gallery.directory, writable=True)
    gallery.close()


def test_the_tuned_index_is_written_again_only_when_it_is_behind(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(galleries, "REFILL_AT", (4, 0.1))
    gallery.add([item(f"{n}") for n in range(10)], vectors(0, 10))
    gallery.install_index(small_index(gallery), CURVE)
    first = gallery.snapshot.manifest.index
    gallery.add([item(f"new{n}") for n in range(4)], vectors(1, 4))
    assert gallery.snapshot.manifest.index == first
    gallery.remove([f"{n}" for n in range(5)])
    gallery.add([item("last")], vectors(2, 1))
    assert gallery.snapshot.manifest.index != first
    assert gallery.curve() == CURVE
    ids = np.load(gallery.directory / gallery.snapshot.manifest.index.name / "ids.npy")
    assert ids.tolist() == gallery.snapshot.ids().tolist()


def test_an_added_item_is_acknowledged_though_merging_fails(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MERGE_AT", 2)
    gallery.add([item("a")], vectors(0, 1))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(changes, "merge_segments", full)
        assert gallery.add([item("b")], vectors(1, 1)).tolist() == [2]
    assert [one.path for _, one in gallery.items()] == ["a", "b"]
    assert len(gallery.snapshot.segments) == 2
    gallery.add([item("c"), item("d")], vectors(2, 2))
    assert len(gallery.snapshot.segments) == 1


def test_segments_stay_few(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MERGE_AT", 4)
    monkeypatch.setattr(changes, "MERGED_BYTES", 40 * 4 * DIM)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for n in range(70):
        gallery.add([item(f"{n}")], vectors(n, 1))
        rows = [part.rows for part in gallery.snapshot.manifest.segments]
        assert max(rows) <= 40
        assert len(rows) <= 4 * 3 + n // 10
    gallery.remove([f"{n}" for n in range(0, 70, 2)])
    gallery.compact()
    rows = [part.rows for part in gallery.snapshot.manifest.segments]
    assert rows == [35]
    assert not verify(gallery.directory).problems


def test_additions_write_little_more_than_themselves(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MERGED_BYTES", 4096 * 4 * DIM)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    gallery.add([item(f"old {n}") for n in range(3000)], vectors(0, 3000))
    written: list[SegmentPart] = []
    for name in ("write_segment", "merge_segments"):
        real = getattr(changes, name)
        monkeypatch.setattr(changes, name, lambda *given, real=real: written.append(part := real(*given)) or part)
    for n in range(64):
        gallery.add([item(f"{n} {m}") for m in range(1 + n % 2)], vectors(n, 1 + n % 2))
    assert sum(part.rows for part in written) <= 4 * 96  # a copy for each class up to 96 rows
    assert max(part.rows for part in written) <= 96


@pytest.mark.parametrize("factory", [None, "IVF2,Flat", "HNSW8"])
def test_threads_may_search_at_once(factory: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searcher, "EXACT_AMONG", 0)
    furnish(tmp_path / "g", factory or "IVF2,Flat")
    if factory is None:
        with Gallery.open(tmp_path / "g", writable=True) as writer:
            writer.install_index(None, CURVE)
    with Gallery.open(tmp_path / "g") as reader:
        queries = vectors(5, 20)
        allowed = reader.snapshot.ids()[::3]
    with Gallery.open(tmp_path / "g") as alone:
        expected = [alone.search(queries[n : n + 1], 5, allowed if n % 2 else None) for n in range(20)]
    failures: list[object] = []
    with Gallery.open(tmp_path / "g") as shared:  # its first search loads the vectors

        def search(start: int) -> None:
            try:
                for n in [*range(start, 20), *range(start)] * 4:
                    if shared.search(queries[n : n + 1], 5, allowed if n % 2 else None) != expected[n]:
                        failures.append(n)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=search, args=(start,)) for start in (0, 7, 13)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_errors_are_one_kind() -> None:
    assert issubclass(GalleryError, ValueError)
