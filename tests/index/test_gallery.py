from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

import index
from index.errors import GalleryError
from index.gallery import Gallery
from index.items import Item

DIM = 4
MODEL = {"name": "small", "checksum": "abc"}


def item(path: str, **facts: Any) -> Item:
    return Item(path, **{"caption": None, "size": 1, "mtime_ns": 2, "sha256": "00", **facts})


def vectors(seed: int, count: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).random((count, DIM), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def naive_score(metric: str, query: NDArray[Any], vector: NDArray[Any]) -> float:
    if metric == "cosine":
        return float(query @ vector)
    return -float(np.linalg.norm(np.maximum(0, query - vector)))


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    with Gallery.create(tmp_path / "g", dim=DIM, metric="cosine", model=MODEL) as created:
        yield created


class GalleryAgainstDictionary(RuleBasedStateMachine):
    paths = st.lists(st.sampled_from([f"{n}.jpg" for n in range(8)]), unique=True, max_size=5)

    @initialize(metric=st.sampled_from(["cosine", "order"]))
    def create(self, metric: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.metric = metric
        self.gallery = Gallery.create(self.folder.name, dim=DIM, metric=metric, model=MODEL)
        self.expected: dict[str, tuple[int, Item, NDArray[np.float32]]] = {}
        self.given_ids: set[int] = set()

    @rule(paths=paths)
    def add(self, paths: list[str]) -> None:
        seed = len(self.given_ids)  # no vector twice: which of those that tie for the last place are found is open
        items = [item(path, caption=f"{seed}", size=seed, metadata={"seed": [seed, None]}) for path in paths]
        rows = vectors(seed, len(paths))
        ids = self.gallery.add(items, rows).tolist()
        assert len(set(ids)) == len(paths)
        assert not self.given_ids & set(ids)
        self.given_ids |= set(ids)
        self.expected |= dict(zip(paths, zip(ids, items, rows, strict=True), strict=True))

    @rule(paths=paths)
    def remove_paths(self, paths: list[str]) -> None:
        gone = self.expected.keys() & set(paths)
        assert self.gallery.remove(paths) == len(gone)
        for path in gone:
            del self.expected[path]

    @rule(data=st.data())
    def remove_id(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.given_ids, 999]))
        gone = [path for path, (held, *_) in self.expected.items() if held == key]
        assert self.gallery.remove([key]) == len(gone)
        for path in gone:
            del self.expected[path]

    @rule(writable=st.booleans())
    def reopen(self, writable: bool) -> None:
        self.gallery.close()
        if not writable:
            with Gallery.open(self.folder.name) as reader:
                self.compare(reader)
        self.gallery = Gallery.open(self.folder.name, writable=True)

    @invariant()
    def agrees(self) -> None:
        self.compare(self.gallery)

    def compare(self, gallery: Gallery) -> None:
        held = sorted(self.expected.values(), key=lambda entry: entry[0])
        assert len(gallery) == len(held)
        assert list(gallery.items()) == [(key, one) for key, one, _ in held]
        query = vectors(1, 1)
        (hits,) = gallery.search(query, 3)
        scores = np.array([naive_score(self.metric, query[0], row) for *_, row in held])
        best = np.argsort(-scores, kind="stable")[:3]
        assert [(hit.id, hit.item) for hit in hits] == [held[n][:2] for n in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-6)

    def teardown(self) -> None:
        self.gallery.close()
        self.folder.cleanup()


TestGalleryAgainstDictionary = GalleryAgainstDictionary.TestCase
TestGalleryAgainstDictionary.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


def test_search_among_allowed_ids_only(gallery: Gallery) -> None:
    ids = gallery.add([item(f"{n}.jpg") for n in range(6)], rows := vectors(0, 6))
    allowed = ids[[1, 4]]
    for hits, scores in zip(gallery.search(rows, 5, allowed), rows @ rows[[1, 4]].T, strict=True):
        assert [hit.id for hit in hits] == allowed[np.argsort(-scores)].tolist()
    assert gallery.search(rows[:1], 5, np.empty(0, np.int64)) == [[]]


def test_unchanged_files_are_recognised(gallery: Gallery) -> None:
    gallery.add([item("a.jpg", size=10, mtime_ns=20)], vectors(0, 1))
    assert gallery.has_unchanged("a.jpg", 10, 20)
    assert not gallery.has_unchanged("a.jpg", 11, 20)
    assert not gallery.has_unchanged("a.jpg", 10, 21)
    assert not gallery.has_unchanged("b.jpg", 10, 20)
    assert not gallery.has_unchanged("\udcff.jpg", 10, 20)


def test_a_path_of_digits_is_not_an_id(gallery: Gallery) -> None:
    gallery.add([item("2"), item("1")], vectors(0, 2))
    assert gallery.remove(["1"]) == 1
    assert [one.path for _, one in gallery.items()] == ["2"]


def test_info_and_model(gallery: Gallery) -> None:
    gallery.add([item("a.jpg"), item("b.jpg")], vectors(0, 2))
    info = gallery.info()
    files = [gallery.directory / "segments/000000001.npy", *gallery.directory.glob("items.sqlite*")]
    assert info == {
        "items": 2,
        "dim": DIM,
        "metric": "cosine",
        "model": MODEL,
        "segments": 1,
        "bytes": sum(file.stat().st_size for file in files),
    }
    gallery.check_model(MODEL["checksum"])
    with pytest.raises(GalleryError, match="not from this model"):
        gallery.check_model("xyz")


@pytest.mark.parametrize(
    ("items", "count", "message"),
    [
        ([item("a"), item("a")], 2, "^a: occurs twice"),
        ([item("a"), item("b")], 1, "1 vectors for 2 items"),
        ([item("new"), item("b", metadata={"x": {1, 2}})], 2, "^b: metadata is not JSON"),
        ([item("new"), item("b", metadata={"x": float("nan")})], 2, "^b: metadata is not JSON"),
        ([item("new"), item("\udcff")], 2, r"\\udcff.*not Unicode"),
    ],
)
def test_add_refuses_and_stays_as_it_was(gallery: Gallery, items: list[Item], count: int, message: str) -> None:
    gallery.add([item("old")], vectors(0, 1))
    with pytest.raises(GalleryError, match=message):
        gallery.add(items, vectors(1, count))
    gallery.add([item("next")], vectors(2, 1))
    assert [one.path for _, one in gallery.items()] == ["old", "next"]


def test_a_vector_that_is_not_finite_is_named_by_its_path(gallery: Gallery) -> None:
    with pytest.raises(GalleryError, match=r"^b\.jpg: .*not finite"):
        gallery.add([item("a.jpg"), item("b.jpg")], np.array([[1] * DIM, [np.nan] * DIM], np.float32))
    assert len(gallery) == 0


def test_create_refuses_an_existing_gallery_and_nonsense(gallery: Gallery, tmp_path: Path) -> None:
    gallery.close()
    with pytest.raises(GalleryError, match="is a gallery already"):
        Gallery.create(gallery.directory, dim=DIM, metric="cosine", model=MODEL)
    with pytest.raises(GalleryError, match="cosine, order"):
        Gallery.create(tmp_path / "other", dim=DIM, metric="euclid", model=MODEL)
    assert not (tmp_path / "other").exists()


def test_second_writer_is_refused_until_the_first_closes(gallery: Gallery) -> None:
    with pytest.raises(GalleryError, match=f"{gallery.directory}: another writer"):
        Gallery.open(gallery.directory, writable=True)
    gallery.close()
    Gallery.open(gallery.directory, writable=True).close()


def test_readers_see_the_state_at_which_they_opened(gallery: Gallery) -> None:
    first = gallery.add([item("a"), item("b")], rows := vectors(0, 2))
    with Gallery.open(gallery.directory) as reader:
        gallery.add([item("a", caption="new"), item("c")], vectors(1, 2))
        gallery.remove(["b"])
        assert {hit.id for hit in reader.search(rows[:1], 9)[0]} == set(first.tolist())
        assert [one for _, one in reader.items()] == [item("a"), item("b")]
        with pytest.raises(GalleryError, match="open for reading"):
            reader.remove(["a"])
    with Gallery.open(gallery.directory) as reader:
        assert [one for _, one in reader.items()] == [item("a", caption="new"), item("c")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as another user")
def test_a_reader_who_may_not_write_here_still_reads() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        with Gallery.create(folder, dim=DIM, metric="cosine", model=MODEL) as gallery:
            ids = gallery.add([item("a")], vectors(0, 1))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(65534)
                with Gallery.open(folder) as reader:
                    status = 0 if list(reader.items()) == [(ids[0], item("a"))] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("failing", ["write", "fsync", "rename", "items"])
def test_a_full_disk_leaves_the_last_state(gallery: Gallery, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = gallery.add([item("a")], rows := vectors(0, 1))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(np, "save", full)
        elif failing == "fsync":
            patch.setattr(os, "fsync", full)
        elif failing == "rename":
            patch.setattr(Path, "replace", full)
        else:
            gallery._items._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(GalleryError, match=r"No space left|disk is full"):
            gallery.add([item("a"), item("b", caption="long" * 5000)], vectors(1, 2))
    assert not list(gallery.directory.rglob("*.tmp"))
    for _ in range(2):
        assert list(gallery.items()) == [(kept[0], item("a"))]
        assert gallery.search(rows, 5)[0][0].score == pytest.approx(1)
        gallery.close()
        gallery = Gallery.open(gallery.directory, writable=True)
    gallery.add([item("b")], vectors(1, 1))
    assert len(gallery) == 2
    gallery.close()


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_other_shape(path: Path) -> None:
    np.save(path, np.ones((2, DIM + 1), np.float32))


def damage_by_fewer_rows(path: Path) -> None:
    np.save(path, np.ones((1, DIM), np.float32))


def damage_by_nan(path: Path) -> None:
    np.save(path, np.full((2, DIM), np.nan, np.float32))


def damage_by_pickle(path: Path) -> None:
    np.save(path, np.array([None, None]), allow_pickle=True)


def damage_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def damage_by_garbage(path: Path) -> None:
    path.write_bytes(b"\xff garbage " * 500)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(
            ("segments/000000001.npy", damage)
            for damage in (
                Path.unlink,
                damage_by_truncation,
                damage_by_other_shape,
                damage_by_fewer_rows,
                damage_by_nan,
                damage_by_pickle,
                damage_by_emptying,
                damage_by_garbage,
            )
        ),
        *(("items.sqlite", damage) for damage in (Path.unlink, damage_by_emptying, damage_by_garbage)),
        *(("gallery.json", damage) for damage in (Path.unlink, damage_by_truncation, damage_by_garbage)),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
def test_damage_is_reported_with_the_file(gallery: Gallery, name: str, damage: Any, writable: bool) -> None:
    gallery.add([item("a"), item("b")], vectors(0, 2))
    gallery.close()
    damage(gallery.directory / name)
    for _ in range(2):  # the failed attempt must not have kept the lock or mended anything silently
        with pytest.raises(GalleryError, match=f"^{gallery.directory / name}: .*; ") as refusal:
            Gallery.open(gallery.directory, writable=writable)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"dim": 0}, "fields"),
        ({"dim": "4"}, "fields"),
        ({"metric": "euclid"}, "fields"),
        ({"model": None}, "fields"),
    ],
)
def test_a_foreign_manifest_is_refused(gallery: Gallery, change: dict[str, Any], message: str) -> None:
    path = gallery.directory / "gallery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(GalleryError, match=rf"gallery\.json: .*{message}"):
        Gallery.open(gallery.directory)


WRITER = """
import sys
import numpy as np
from index.gallery import Gallery
from index.items import Item
with Gallery.open(sys.argv[1], writable=True) as gallery:
    start = len(gallery)
    for n in range(start, start + 10_000):
        items = [Item(f"{n}/{m}", None, n, m, "", {}) for m in range(3)]
        ids = gallery.add(items, np.random.default_rng(n).random((3, 4), np.float32))
        print(n, *ids, flush=True)
        if n % 5 == 0:
            gallery.remove([f"{n}/2"])
            print("removed", f"{n}/2", flush=True)
"""


def test_killed_writers_lose_nothing_they_acknowledged(gallery: Gallery) -> None:
    gallery.close()
    environment = {**os.environ, "PYTHONPATH": str(Path(index.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    rng = np.random.default_rng(0)
    acknowledged: dict[int, str] = {}
    removed: set[str] = set()
    for _ in range(10):
        command = [sys.executable, "-c", WRITER, str(gallery.directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as writer:
            assert writer.stdout
            lines = [writer.stdout.readline()]
            try:
                writer.wait(rng.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        assert writer.returncode == -signal.SIGKILL
        for line in lines:
            match line.split():
                case ["removed", path]:
                    removed.add(path)
                case [n, *ids]:
                    acknowledged |= {int(key): f"{n}/{m}" for m, key in enumerate(ids)}
        with Gallery.open(gallery.directory) as reader:
            held = dict(reader.items())
            assert len(held) == len(reader)
            for key, path in acknowledged.items():
                if key in held:
                    assert held[key].path == path
                    assert path not in removed
                else:
                    # A removal may be on disk though the writer was killed before it could say so.
                    assert path.endswith("/2")
            for key, one in held.items():
                seed, place = map(int, one.path.split("/"))
                row = np.random.default_rng(seed).random((3, 4), np.float32)[place]
                (hits,) = reader.search(row[None], 1, np.array([key]))
                assert hits[0].score == pytest.approx(float(row @ row))
    assert acknowledged
