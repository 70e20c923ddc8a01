"""Pictures that lie in a gallery: they move with it, go with their items, and none is left that belongs to none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from power_cut import bad_states, recording
from served import COUNT, Place, pixels, serving

from index import items
from index.gallery import Gallery
from index.verification import verify
from training.data.images import decode
from vse_app.search_engine import Facts, SearchEngine
from vse_app.search_service import SearchService
from vse_app.uploads import keep_upload

MOVES = {"moved": os.rename, "copied": shutil.copytree}


@pytest.fixture(params=["now", "by an earlier version"])
def written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whether the gallery knows its own files by their whole paths; undone where it is moved."""
    with monkeypatch.context() as patch:
        if request.param != "now":
            patch.setattr(items, "_stored", lambda path, gallery: path)
        yield patch


def uploads(gallery: Path) -> set[str]:
    return {path.name for path in (gallery / "uploads").iterdir()}


@pytest.mark.parametrize("how", MOVES)
def test_uploads_move_with_their_gallery(how: str, place: Place, written: pytest.MonkeyPatch) -> None:
    with SearchService(place.gallery) as service:
        first, second = service.add([pixels(100), pixels(101)], Facts("a caption"))
    written.undo()
    moved = place.gallery.with_name("moved")
    MOVES[how](place.gallery, moved)
    shutil.rmtree(place.gallery / "uploads", ignore_errors=True)
    with serving(replace(place, gallery=moved)) as (client, service):
        for key in (first, second):
            assert client.get(f"/items/{key}/image").status_code == 200
        assert service.add([pixels(100)], Facts("a caption")) == [first], "it is not kept twice"
        path = client.get(f"/items/{second}").json()["path"]
        assert Path(path).parent == (moved / "uploads").resolve()
        assert client.delete(f"/items/{second}", headers={"Origin": "http://127.0.0.1:7860"}).status_code == 200
        assert len(uploads(moved)) == 1
        assert service.remove([first]) == 1
    assert uploads(moved) == set()
    assert not verify(moved).problems


def test_pictures_within_a_gallery_are_known_wherever_it_is(place: Place) -> None:
    inside = place.gallery / "photos"
    shutil.copytree(place.pictures[0].parent, inside)
    with SearchEngine.open(place.gallery, writable=True) as engine:
        assert engine.add([inside]).added == COUNT
    moved = place.gallery.rename(place.gallery.with_name("moved"))
    with SearchEngine.open(moved, writable=True) as engine:
        again = engine.add([moved / "photos"])
        assert (again.added, again.unchanged) == (0, COUNT)
        paths = [item.path for _, item in engine.gallery.items()]
        assert all(Path(path).exists() for path in paths)
        one = str((moved / "photos" / place.pictures[3].name).resolve())
        assert engine.gallery.ids_of([one]).tolist() == [COUNT + 4]
        assert engine.gallery.unchanged({one: (Path(one).stat().st_size, Path(one).stat().st_mtime_ns)}) == {one}
        for folder, count in ((moved / "photos", COUNT), (moved, COUNT), (moved.parent, 2 * COUNT), (moved / "x", 0)):
            assert len(engine.gallery.snapshot.ids_below([str(folder.resolve())])) == count
        engine.gallery.compact()
        assert [item.path for _, item in engine.gallery.items()] == paths
        assert engine.gallery.remove([one]) == 1


CHANGES: dict[str, Callable[[Path], object]] = {
    "the next server": lambda gallery: serve_once(gallery),
    "the next writer": lambda gallery: SearchEngine.open(gallery, writable=True).close(),
}


def serve_once(gallery: Path) -> None:
    with SearchService(gallery) as service:
        service.tidy()


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_that_a_killed_server_kept_goes_with_the_next_one(change: str, place: Place) -> None:
    with SearchService(place.gallery) as service:
        (known,) = service.add([pixels(100)], Facts())
        kept = uploads(place.gallery)
        folder = service.uploads
    orphan = keep_upload(pixels(101), folder)  # and then it was killed
    half = folder / f".{orphan.name}.{os.getpid()}.tmp"
    half.write_bytes(b"half")
    foreign = folder / "mine.jpg"
    foreign.touch()
    CHANGES[change](place.gallery)
    assert uploads(place.gallery) == kept | {foreign.name}
    with SearchService(place.gallery) as service:
        assert service.add([pixels(101)], Facts()) == [known + 1]
        assert uploads(place.gallery) == kept | {foreign.name, orphan.name}
        service.tidy()
        service.remove([1])
        assert uploads(place.gallery) == kept | {foreign.name, orphan.name}


@pytest.mark.parametrize("most", [16, pytest.param(None, marks=pytest.mark.soak)])
def test_acknowledged_uploads_have_their_pictures_after_a_power_cut(
    most: int | None, place: Place, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    place.gallery.rename(disk / "gallery")
    told: list[dict[int, int]] = [{}]
    with SearchService(disk / "gallery") as service, recording(disk) as recorder:
        for seeds in ([200], [201, 202], [203]):
            ids = service.add([pixels(seed) for seed in seeds], Facts())
            told.append(told[-1] | dict(zip(ids, seeds, strict=True)))
            recorder.acknowledge()
        gone = next(iter(told[-1]))
        service.remove([gone])
        told.append({key: seed for key, seed in told[-1].items() if key != gone})
        recorder.acknowledge()
        files = {
            seed: Path(item.path).read_bytes()
            for key, seed in told[-1].items()
            for _, item in service.call(lambda engine, key=key: list(engine.gallery.items(np.array([key])))).result()
        }

    def look(directory: Path, acknowledged: int) -> None:
        assert not verify(directory / "gallery").problems
        with Gallery.open(directory / "gallery") as gallery:
            held = {key: Path(item.path) for key, item in gallery.items() if key > COUNT}
        # What was being added or removed just then may be there or not.
        possible = told[max(0, acknowledged)], told[min(acknowledged + 1, len(told) - 1)]
        assert held.keys() in [one.keys() for one in possible]
        for key, path in held.items():
            assert path.parent == (directory / "gallery" / "uploads").resolve()
            seed = next(one[key] for one in told if key in one)
            if seed in files:
                assert path.read_bytes() == files[seed]
            decode(path)

    bad = bad_states(recorder, look, tmp_path, most)
    assert not bad, bad[:3]
