"""Bytes that flip, ends that get lost, files that vanish."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_tools import cook, create, files_of, furnish, item, outcome, refused, vectors

from index import changes, searcher
from index.filters import Condition
from index.gallery import Gallery
from index.verification import verify

FILES = [
    "calibration/000000006/calibration.json",
    "gallery.json",
    "index/000000005/curve.json",
    "index/000000005/ids.npy",
    "index/000000005/index.faiss",
    "index/000000005/parameters.json",
    "segments/000000001/ids.npy",
    "segments/000000001/items.sqlite",
    "segments/000000001/removed-000000003.npy",
    "segments/000000001/vectors.npy",
    "segments/000000002/ids.npy",
    "segments/000000002/items.sqlite",
    "segments/000000002/removed-000000004.npy",
    "segments/000000002/vectors.npy",
]
FLIPS = 14


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("damage") / "g"
    furnish(directory, "IVF2,RaBitQ,Refine(SQ8)")
    return directory


@pytest.fixture
def whole(furnished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(furnished, tmp_path / "g"))


def use(directory: Path, writable: bool = False) -> None:
    """Everything that a reader does."""
    with Gallery.open(directory, writable=writable) as gallery:
        gallery.search(vectors(0, 2), 5)
        gallery.search(vectors(0, 2), 5, gallery.snapshot.ids()[:3])
        list(gallery.items())
        gallery.vectors(gallery.snapshot.ids())
        gallery.ids_where([Condition("n", ">", 3), Condition("tags", "=", "x")])
        gallery.ids_of(["5.jpg"])
        gallery.unchanged({"5.jpg": (1, 2)})
        gallery.info()
        gallery.calibration_folder()
        if writable:
            gallery.add([item("new.jpg"), item("1.jpg")], vectors(9, 2))
            gallery.remove(["21.jpg", "2.jpg"])
            gallery.compact()


def test_a_whole_gallery_has_these_files_and_no_problems(whole: Path) -> None:
    assert files_of(whole) == FILES
    report = verify(whole)
    assert (report.problems, report.leftovers, report.files) == ([], [], len(FILES))
    use(whole, writable=True)
    assert not verify(whole).problems


def positions(length: int, name: str) -> list[int]:
    """Some of each part: SQLite has most of its structure at the start of pages, numpy and FAISS at the very start."""
    choose = random.Random(name)
    some = [0, 6, 9, 60, 100, length - 1, *(page + choose.randrange(12) for page in range(0, length, 4096))]
    some += [choose.randrange(length) for _ in range(FLIPS)]
    return sorted({place for place in some if place < length})


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(name: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searcher, "EXACT_AMONG", 0)
    path = whole / name
    content = path.read_bytes()
    choose = random.Random(name)
    for place in positions(len(content), name):
        flipped = bytearray(content)
        flipped[place] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        problems = verify(whole).problems
        assert [problem for problem in problems if problem.startswith(f"{path}: ")], (place, problems)
        assert all(len(problem.splitlines()) == 1 for problem in problems)
        message = outcome(lambda: use(whole))
        assert message or name not in ("gallery.json", "index/000000005/index.faiss")
    path.write_bytes(content)
    assert not verify(whole).problems


@pytest.mark.parametrize("name", [name for name in FILES if "segments/000000002" in name or "index" in name])
def test_a_writer_meets_flipped_bits_with_one_line(name: str, furnished: Path, tmp_path: Path) -> None:
    content = (furnished / name).read_bytes()
    choose = random.Random(name)
    for place in positions(len(content), name)[::4]:
        whole = Path(shutil.copytree(furnished, tmp_path / f"{place}"))
        flipped = bytearray(content)
        flipped[place] ^= 1 << choose.randrange(8)
        (whole / name).write_bytes(flipped)
        outcome(lambda: use(whole, writable=True))  # noqa: B023 (called at once)


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [shorter, half, empty, longer, directory, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_other_lengths_are_refused(damage: Callable[[Path], None], name: str, whole: Path) -> None:
    damage(whole / name)
    for writable in (False, True, False):  # the failed attempt must not have kept the lock or mended anything
        with refused(f"^{whole / name}: .*; "):
            Gallery.open(whole, writable=writable)
    assert [problem for problem in verify(whole).problems if problem.startswith(f"{whole / name}: ")]


def test_missing_folders_are_named(whole: Path) -> None:
    for name in ("segments/000000002", "segments", "index/000000005", "calibration"):
        (whole / name).rename(whole / "aside")
        with refused(f"^{whole / name}"):
            Gallery.open(whole)
        assert [problem for problem in verify(whole).problems if problem.startswith(f"{whole / name}")]
        (whole / "aside").rename(whole / name)
    assert not verify(whole).problems


def test_a_reader_that_meets_damage_on_refreshing_does_not_go_on_with_the_old_state(whole: Path) -> None:
    with Gallery.open(whole) as reader:
        reader.search(vectors(0, 1), 3)
        with Gallery.open(whole, writable=True) as writer:
            writer.remove([hit.item.path for hit in writer.search(vectors(0, 1), 3)[0]])
            writer.compact()
        (path,) = (whole / "index").glob("*/index.faiss")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with refused(f"^{path}: "):
            reader.refresh()
        with refused(f"^{path}: "):
            reader.search(vectors(0, 1), 3)
        content[-1] ^= 1
        path.write_bytes(content)
        assert len(reader.search(vectors(0, 1), 30)[0]) == 19


FLIP_FAISS = """
import sys
from pathlib import Path
import numpy as np
from index.approximate_index import ApproximateIndex
from index.errors import GalleryError
content = bytearray(Path(sys.argv[1], "index.faiss").read_bytes())
for place in map(int, sys.argv[2:]):
    print(place, flush=True)
    flipped = bytearray(content)
    flipped[place] ^= 16
    Path(sys.argv[1], "index.faiss").write_bytes(flipped)
    try:
        ApproximateIndex.load(Path(sys.argv[1]), 8)
    except GalleryError as error:
        assert "\\n" not in str(error)
print("end")
"""


def test_loading_damaged_indexes_without_their_checksum_raises_one_error(whole: Path) -> None:
    """Loading alone is safe; searching is not, which is why a gallery compares the checksum first."""
    folder = whole / "index/000000005"
    places = [str(place) for place in range(0, (folder / "index.faiss").stat().st_size, 11)]
    command = [sys.executable, "-c", FLIP_FAISS, str(folder), *places]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout.split()[-1], result.stderr)


def test_cooked_checksums_do_not_hide_nonsense(whole: Path) -> None:
    """Whoever corrects the checksums after a flip still cannot make vectors that are not finite count."""
    path = whole / "segments/000000001/vectors.npy"
    mapped = np.load(path, mmap_mode="r+")
    mapped[4, 2] = np.nan
    mapped.flush()
    cook(whole)
    assert [problem for problem in verify(whole).problems if "not finite" in problem]
    assert json.loads((whole / "gallery.json").read_bytes())["format"] == 2


SYSTEM = [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE]
CALLS = {
    "lstat": (Path, "lstat"),
    "open": (Path, "open"),
    "read": (os, "pread"),
    "map": (np.lib.format, "open_memmap"),
    "read bytes": (Path, "read_bytes"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", SYSTEM, ids=errno.errorcode.get)
def test_what_the_system_refuses_is_no_damage(
    call: str, number: int, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call it is that fails, nobody is told to throw the gallery away."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def used() -> str | None:
        return outcome(lambda: use(whole))

    real = getattr(*CALLS[call])
    for moment in range(40):
        calls = 0

        def failing(*arguments: Any, moment: int = moment, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return (refuse if calls > moment else real)(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(*CALLS[call], failing)
            message = used()
        if calls <= moment:
            break
        assert message
        assert os.strerror(number) in message
        assert not any(words in message for words in ("restore", "build", "again to make", "make it again"))
        assert number != errno.EMFILE or "ulimit -n" in message
    assert moment
    assert used() is None


def test_too_many_open_files_are_said_to_be_that(whole: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    said: list[str | None] = []
    try:
        while None not in said:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + len(said), hard))
            said.append(outcome(lambda: use(whole, writable=True)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(said) > 5
    for message in said[:-1]:
        assert message
        assert "Too many open files" in message
        assert "ulimit -n" in message
        assert "build" not in message
    use(whole, writable=True)


@pytest.mark.parametrize(
    ("code", "words"),
    [(sqlite3.SQLITE_CORRUPT, "restore it or build"), (sqlite3.SQLITE_IOERR_READ, "try again")],
)
def test_not_every_error_of_sqlite_is_damage(code: int, words: str, whole: Path) -> None:
    class Failing:
        def execute(self, *arguments: Any) -> Any:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = code
            raise error

    with Gallery.open(whole) as gallery:
        table = gallery.snapshot.segments[0].items
        real, table._db = table._db, Failing()  # type: ignore[assignment]
        with refused(f"items.sqlite: disk I/O error; {words}"):
            list(gallery.items())
        table._db = real


def test_a_path_that_two_segments_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(tmp_path / "g") as gallery:
        gallery.add([item("b"), item("a"), item("gone"), item("é")], vectors(1, 4))
        gallery.remove(["gone"])
        assert not verify(gallery.directory).problems
        monkeypatch.setattr(changes, "removed", lambda snapshot, ids, state: state)
        gallery.add([item("c"), item("gone"), item("b")], vectors(2, 3))
        (problem,) = verify(gallery.directory).problems
    assert problem.endswith("items.sqlite: 'b' is there twice; remove it and add it again")
