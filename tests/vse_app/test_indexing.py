"""What becomes of pictures that are added, changed, moved or broken, and of what is known of them."""

from __future__ import annotations

import errno
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from index import changes
from index.errors import GalleryError
from training.data import image_folders, images
from training.data.images import read_file
from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from vse_app import indexing
from vse_app.indexing import AddReport, Facts
from vse_app.search_engine import SearchEngine

FACTS = Facts("a red disc", {"year": 2019})
HALF = "\ud83d"


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    config = ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8), dim=8)
    return DualEncoder(config, WordTokenizer(["red"], min_count=1, source="test"))


def paint(path: Path, seed: int) -> Path:
    """Pictures of all seeds have files of one size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path, "BMP")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate("abc"):
        paint(tmp_path / "pics" / f"{name}.bmp", n)
    return tmp_path / "pics"


@pytest.fixture
def engine(model: DualEncoder, tmp_path: Path) -> Iterator[SearchEngine]:
    from index.gallery import Gallery

    made = Gallery.create(tmp_path / "g", dim=8, metric="cosine", model={"name": "m", "checksum": model.fingerprint()})
    with SearchEngine(made, model) as engine:
        yield engine


def known(engine: SearchEngine) -> dict[str, tuple[int, str | None, dict[str, object]]]:
    return {Path(item.path).name: (key, item.caption, item.metadata) for key, item in engine.gallery.items()}


def check(engine: SearchEngine) -> None:
    """Vector, checksum, size and time of every item are those of its file."""
    for key, item in engine.gallery.items():
        content = read_file(Path(item.path))
        assert (item.sha256, item.size, item.mtime_ns) == (content.sha256, len(content.data), content.mtime_ns)
        expected = engine.model.encode_images([content.decode().image]).numpy()
        assert engine.gallery.vectors(np.array([key])) == pytest.approx(expected, abs=1e-5)


def counts(report: AddReport) -> dict[str, int]:
    return {key: value for key, value in vars(report).items() if isinstance(value, int) and value}


def later(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def touch(folder: Path) -> None:
    later(folder / "a.bmp")


def rename(folder: Path) -> None:
    (folder / "a.bmp").rename(folder / "z.bmp")


def move(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "a.bmp").rename(folder / "deep" / "a.bmp")


def move_over_another(folder: Path) -> None:
    (folder / "a.bmp").replace(folder / "b.bmp")


def take_its_name(folder: Path) -> None:
    (folder / "a.bmp").rename(folder / "z.bmp")
    paint(folder / "a.bmp", 9)
    later(folder / "a.bmp")


def swap(folder: Path) -> None:
    (folder / "a.bmp").rename(folder / "x")
    (folder / "b.bmp").rename(folder / "a.bmp")
    (folder / "x").rename(folder / "b.bmp")
    later(folder / "a.bmp")
    later(folder / "b.bmp")


def rename_in_a_ring(folder: Path) -> None:
    (folder / "c.bmp").rename(folder / "d.bmp")
    (folder / "b.bmp").rename(folder / "c.bmp")
    (folder / "a.bmp").rename(folder / "b.bmp")
    later(folder / "b.bmp")
    later(folder / "c.bmp")


@pytest.mark.parametrize(
    ("happen", "name", "expected"),
    [
        (touch, "a.bmp", {"unchanged": 3}),
        (rename, "z.bmp", {"moved": 1, "unchanged": 2}),
        (move, "a.bmp", {"moved": 1, "unchanged": 2}),
        (move_over_another, "b.bmp", {"moved": 1, "unchanged": 1}),
        (take_its_name, "z.bmp", {"moved": 1, "added": 1, "unchanged": 2}),
        (swap, "b.bmp", {"moved": 2, "unchanged": 1}),
        (rename_in_a_ring, "b.bmp", {"moved": 3}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_picture_keeps_its_id_and_facts_wherever_its_content_goes(
    engine: SearchEngine,
    folder: Path,
    happen: Callable[[Path], None],
    name: str,
    expected: dict[str, int],
    dry_run: bool,
) -> None:
    facts = {folder / f"{letter}.bmp": Facts(letter, {"of": letter}) for letter in "abc"}
    engine.add([folder], facts | {folder / "a.bmp": FACTS})
    before = known(engine)
    own = before["a.bmp"]
    content = {letter: read_file(folder / f"{letter}.bmp").sha256 for letter in "abc"}
    happen(folder)
    report = engine.add([folder], dry_run=dry_run)
    assert counts(report) == expected
    if dry_run:
        assert known(engine) == before
        return
    assert known(engine)[name] == own == (1, FACTS.caption, FACTS.metadata)
    ids = {item.sha256: key for key, item in engine.gallery.items()}
    assert all(ids.get(sha256, n) == n for n, sha256 in enumerate(content.values(), 1))
    check(engine)
    assert counts(engine.add([folder])) == {"unchanged": len(known(engine))}


def test_an_edited_picture_keeps_its_facts_and_says_so(engine: SearchEngine, folder: Path) -> None:
    engine.add([folder], {folder / "a.bmp": FACTS})
    paint(folder / "a.bmp", 9)
    later(folder / "a.bmp")
    report = engine.add([folder])
    assert counts(report) == {"updated": 1, "unchanged": 2}
    assert report.quarantine.notes == [(folder / "a.bmp", "has changed; its caption and fields are kept")]
    assert known(engine)["a.bmp"][1:] == (FACTS.caption, FACTS.metadata)
    check(engine)


@pytest.mark.parametrize("happen", [lambda folder: None, touch, take_its_name])
def test_facts_that_are_given_replace_those_that_are_known(
    engine: SearchEngine, folder: Path, happen: Callable[[Path], None]
) -> None:
    engine.add([folder], {folder / "a.bmp": FACTS})
    happen(folder)
    engine.add([folder], {folder / "a.bmp": Facts(None, {"n": 1})})
    assert known(engine)["a.bmp"][1:] == (None, {"n": 1})


def test_a_copy_is_another_picture(engine: SearchEngine, folder: Path) -> None:
    engine.add([folder], {folder / "a.bmp": FACTS})
    shutil.copy2(folder / "a.bmp", folder / "copy.bmp")
    assert counts(engine.add([folder])) == {"added": 1, "unchanged": 3}
    assert known(engine)["copy.bmp"][1:] == (None, {})


def test_force_sees_what_size_and_time_do_not(engine: SearchEngine, folder: Path) -> None:
    engine.add([folder], {folder / "a.bmp": FACTS})
    time = (folder / "a.bmp").stat().st_mtime_ns
    paint(folder / "a.bmp", 9)
    os.utime(folder / "a.bmp", ns=(time, time))
    assert counts(engine.add([folder])) == {"unchanged": 3}
    assert counts(engine.add([folder], force=True)) == {"updated": 1, "unchanged": 2}
    assert known(engine)["a.bmp"][1:] == (FACTS.caption, FACTS.metadata)
    check(engine)
    state = engine.gallery.snapshot.manifest
    assert counts(engine.add([folder], force=True)) == {"unchanged": 3}
    assert engine.gallery.snapshot.manifest == state


def test_a_picture_replaced_while_it_is_added_is_what_was_read_or_left(
    engine: SearchEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = images._decode

    def replaced(data: bytes, name: str, *rest: object) -> object:
        decoded = decode(data, name, *rest)
        paint(Path(name), 50 + len(Path(name).name))
        later(Path(name))
        return decoded

    monkeypatch.setattr(images, "_decode", replaced)
    contents = {path.name: read_file(path).sha256 for path in folder.iterdir()}
    engine.add([folder])
    assert {Path(item.path).name: item.sha256 for _, item in engine.gallery.items()} == contents
    monkeypatch.undo()
    assert counts(engine.add([folder])) == {"updated": 3}
    check(engine)


@pytest.mark.parametrize("grows", [False, True])
def test_a_file_that_changes_while_it_is_read_is_left_for_the_next_run(
    engine: SearchEngine, folder: Path, monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    read = Path.read_bytes

    def meddled(path: Path) -> bytes:
        content = read(path)
        if path.name == "b.bmp":
            path.write_bytes(content + b"x" if grows else content[::-1])
            later(path)
        return content

    monkeypatch.setattr(Path, "read_bytes", meddled)
    report = engine.add([folder])
    assert counts(report) == {"added": 2}
    assert report.quarantine.refused == [
        (folder / "b.bmp", "changed while it was read; try again when it is complete")
    ]
    monkeypatch.undo()
    paint(folder / "b.bmp", 1)
    assert counts(engine.add([folder])) == {"added": 1, "unchanged": 2}
    check(engine)


def dangling(folder: Path) -> Path:
    (folder / "b.bmp").unlink()
    (folder / "b.bmp").symlink_to(folder / "nowhere.bmp")
    return folder / "b.bmp"


def looping(folder: Path) -> Path:
    (folder / "b.bmp").unlink()
    (folder / "b.bmp").symlink_to("b.bmp")
    return folder / "b.bmp"


def looping_together(folder: Path) -> Path:
    (folder / "b.bmp").unlink()
    (folder / "b.bmp").symlink_to("other")
    (folder / "other").symlink_to("b.bmp")
    return folder / "b.bmp"


def not_unicode(folder: Path) -> Path:
    return paint(folder / os.fsdecode(b"caf\xe9.bmp"), 3)


def leads_elsewhere(folder: Path) -> Path:
    return paint(folder / "x\\..\\y.bmp", 3)


def queue(folder: Path) -> Path:
    os.mkfifo(folder / "queue.bmp")
    return folder / "queue.bmp"


def empty(folder: Path) -> Path:
    (folder / "empty.bmp").touch()
    return folder / "empty.bmp"


FAULTS: dict[Callable[[Path], Path], str] = {
    dangling: "a link to a missing file; mend or remove it",
    looping: "Too many levels of symbolic links",
    looping_together: "Too many levels of symbolic links",
    not_unicode: "its name is not Unicode; rename it",
    leads_elsewhere: "no plain path",
    queue: "not a file; name a picture",
    empty: "empty file; replace or remove it",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("walked", [True, False])
def test_one_bad_file_is_named_and_the_others_are_added(
    engine: SearchEngine, folder: Path, fault: Callable[[Path], Path], walked: bool
) -> None:
    bad = fault(folder)
    report = engine.add([folder] if walked else sorted(folder.glob("*.bmp")))
    [(path, reason)] = report.quarantine.refused
    assert path == bad
    assert FAULTS[fault] in reason
    assert "\n" not in reason
    assert counts(report) == {"added": len(known(engine))}
    assert set(known(engine)) == {"a.bmp", "b.bmp", "c.bmp"} - {bad.name}
    assert not report.in_vain


@pytest.mark.parametrize("where", ["folder below", "folder named", "file"])
def test_errors_of_the_system_are_of_one_file_or_folder(
    engine: SearchEngine, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Raised here, as whoever runs the tests may be allowed to read everything."""
    paint(folder / "below" / "d.bmp", 3)
    denied = {"folder below": folder / "below", "folder named": folder, "file": folder / "b.bmp"}[where]
    scan, read = os.scandir, Path.read_bytes

    def check_first(path: object) -> None:
        if Path(str(path)) == denied:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: check_first(path) or scan(path))
    monkeypatch.setattr(Path, "read_bytes", lambda path: check_first(path) or read(path))
    if where == "folder named":
        with pytest.raises(InputError, match="pics: Permission denied; check the folder's permissions"):
            engine.add([folder])
        return
    report = engine.add([folder])
    assert report.quarantine.refused == [(denied, "Permission denied; make it readable or leave it out")]
    assert report.added == 3


def test_a_file_that_vanishes_after_it_was_found_is_named(
    engine: SearchEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = image_folders.find_images([folder])
    (folder / "b.bmp").unlink()
    report = engine.add(listing)
    assert report.quarantine.refused == [(folder / "b.bmp", "no such file; check the path")]
    assert report.added == 2


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"no picture"), lambda path: later(path)])
def test_a_known_picture_that_cannot_be_read_any_more_stays_and_is_named(
    engine: SearchEngine, folder: Path, spoil: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add([folder], {folder / "b.bmp": FACTS})
    before = known(engine)
    spoil(folder / "b.bmp")
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == "b.bmp" and read(path).startswith(b"BM"):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    for _ in range(2):  # named each time
        report = engine.add([folder])
        [(path, reason)] = report.quarantine.refused
        assert path == folder / "b.bmp"
        assert reason.endswith("; the gallery keeps what it knew before")
        assert counts(report) == {"unchanged": 2}
        assert known(engine) == before


BAD_FACTS = [
    Facts(HALF),
    Facts("a", {"x": HALF}),
    Facts("a", {HALF: 1}),
    Facts("a", {"x": float("nan")}),
    Facts("a\0b"),
]


@pytest.mark.parametrize("bad", BAD_FACTS, ids=repr)
@pytest.mark.parametrize("before", [False, True])
def test_facts_that_cannot_be_kept_stop_one_picture(
    engine: SearchEngine, folder: Path, bad: Facts, before: bool
) -> None:
    if before:
        engine.add([folder])
    facts = {folder / "a.bmp": FACTS, folder / "b.bmp": bad}
    report = engine.add([folder], facts)
    [(path, reason)] = report.quarantine.refused
    assert path == folder / "b.bmp"
    assert "rename" not in reason
    assert known(engine)["a.bmp"][1:] == (FACTS.caption, FACTS.metadata)
    assert ("b.bmp" in known(engine)) == before
    assert counts(report) == ({"reworded": 1, "unchanged": 1} if before else {"added": 2})


def test_facts_of_other_pictures_are_told(engine: SearchEngine, folder: Path) -> None:
    report = engine.add([folder], {folder / "a.bmp": FACTS, folder / "aa.bmp": FACTS})
    assert report.left_out == [
        f"facts of 1 that are not among these pictures, as {folder / 'aa.bmp'}; check their names"
    ]


def test_one_picture_of_full_size_is_held_at_a_time(
    engine: SearchEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(40):
        paint(folder / f"{n}.bmp", n)
    monkeypatch.setattr(indexing, "BATCH", 16)
    alive: list[int] = []
    seen: list[weakref.ref[Image.Image]] = []
    read = indexing.read_picture

    def counted(path: Path) -> images.Picture:
        alive.append(sum(one() is not None for one in seen))
        picture = read(path)
        seen.append(weakref.ref(picture.image))
        return picture

    monkeypatch.setattr(indexing, "read_picture", counted)
    assert engine.add([folder]).added == 43
    assert max(alive) <= 2
    check(engine)


def test_folders_of_storage_and_desktop_systems_and_links_are_left_out_and_told(
    engine: SearchEngine, folder: Path
) -> None:
    names = [
        "@eaDir",
        "#recycle",
        "@Recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        ".Trash-1000",
    ]
    for n, name in enumerate(names):
        paint(folder / "deep" / name / "x.bmp", 10 + n)
    (folder / "linked").symlink_to(folder / "deep", target_is_directory=True)
    report = engine.add([folder])
    assert report.added == 3
    system, links = report.left_out
    assert system.startswith("6 system folders left out: ")
    assert all(f"{name} 1" in system for name in names[:-1])
    assert links == f"1 linked folder left out, as {folder / 'linked'}; name what is wanted"
    assert engine.add([folder / "deep" / "@eaDir"]).added == 1  # since it is named


def test_types_that_cannot_be_read_are_counted(engine: SearchEngine, folder: Path) -> None:
    for name in ("1.HEIC", "2.heic", "3.cr2", "4.jxl", "5.mp4", "notes.txt", "captions.csv", ".hidden.heic"):
        (folder / name).write_bytes(b"x")
    images.raster_formats.cache_clear()
    report = engine.add([folder])
    [line] = report.left_out
    assert line.startswith("5 files of types that cannot be read: .heic 2, .cr2 1, .jxl 1, .mp4 1; ")
    assert line.endswith("pip install 'vse-app[heic]' reads .heic")
    assert report.added == 3


def test_a_disk_that_fills_up_says_how_many_pictures_are_in(
    engine: SearchEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BATCH", 1)
    added = changes.added

    def full(snapshot: Any, *arguments: Any) -> Any:
        if snapshot.manifest.items == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return added(snapshot, *arguments)

    monkeypatch.setattr(changes, "added", full)
    for room, told in ((0, "unchanged, "), (2, "2 of 3 pictures were added, the others were not, ")):
        with pytest.raises(GalleryError) as refusal:
            engine.add([folder])
        line = f"{engine.gallery.directory}: {told}[Errno 28] No space left on device; make room and "
        assert str(refusal.value).startswith(line)
        assert len(engine.gallery) == room
    monkeypatch.undo()
    assert engine.add([folder]).added == 1
