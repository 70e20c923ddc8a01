from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from served import Place, jpeg, pixels, serving

from training.errors import InputError
from vse_app import decoding, thumbnails
from vse_app.decoding import Turns
from vse_app.limits import Busy
from vse_app.search_service import SearchService
from vse_app.thumbnails import Thumbnails
from vse_app.uploads import read_upload

WAIT = 30


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and sides of the pictures that are decoded for thumbnails."""
    of: list[tuple[str, int]] = []
    decode = thumbnails.decode

    def counted(path: Path, side: int) -> Image.Image:
        of.append((path.name, side))
        return decode(path, side)

    monkeypatch.setattr(thumbnails, "decode", counted)
    return of


def test_a_thumbnail_is_drawn_once(place: Place, drawn: list[tuple[str, int]]) -> None:
    kept = Thumbnails()
    first = {(path, side): kept.read(path, side) for path in place.pictures[:3] for side in (16, 320)}
    assert len(drawn) == 6
    for (path, side), content in first.items():
        assert kept.read(path, side) == content
        with Image.open(BytesIO(content)) as image:
            assert max(image.size) == min(side, 40)
    assert len(drawn) == 6


@pytest.mark.parametrize("change", ["rewritten", "replaced", "as old and as long"])
def test_another_file_under_the_name_is_not_what_was_kept(change: str, tmp_path: Path) -> None:
    path, kept = tmp_path / "a.bmp", Thumbnails()
    pixels(1).save(path)
    before, status = kept.read(path, 64), path.stat()
    if change == "replaced":
        pixels(2).save(tmp_path / "b.bmp")
        (tmp_path / "b.bmp").replace(path)
    else:
        pixels(2).save(path)
    if change == "as old and as long":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert kept.read(path, 64) == Thumbnails().read(path, 64) != before
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        kept.read(path, 64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 60)), max_size=60))
def test_what_is_kept_is_what_was_drawn_and_takes_no_more_room(steps: list[tuple[int, int]]) -> None:
    """Against a dictionary: whatever is found is what was last kept under the key, and the newest always is."""
    kept, latest = Thumbnails(most_bytes=100), dict[Any, bytes]()
    for number, (key, length) in enumerate(steps):
        named: Any = (str(key), 0, 0, 0, 0, 0)
        latest[named] = bytes([number]) * length
        kept._keep(named, latest[named])
        found = {of: os.pread(kept._file.fileno(), size, start) for of, (start, size) in kept._kept.items()}
        assert named in found
        assert all(content == latest[of] for of, content in found.items())
        assert os.fstat(kept._file.fileno()).st_size <= 100


def test_a_disk_without_room_is_no_reason_not_to_answer(
    place: Place, drawn: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    kept = Thumbnails()
    assert kept.read(place.pictures[0], 64) == kept.read(place.pictures[0], 64)
    assert len(drawn) == 2


def test_nothing_is_left_of_the_file(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    kept = Thumbnails()
    kept.read(place.pictures[0], 64)
    assert not list((tmp_path / "scratch").iterdir())


def test_so_many_at_once_so_many_waiting_and_not_for_ever() -> None:
    turns, go, lock = Turns(2, 3, WAIT), Event(), Lock()
    inside = most = 0

    def work() -> str:
        nonlocal inside, most
        try:
            with turns.turn():
                with lock:
                    inside += 1
                    most = max(most, inside)
                assert go.wait(WAIT)
                with lock:
                    inside -= 1
        except Busy:
            return "busy"
        return "done"

    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(work) for _ in range(20)]
        while sum(future.done() for future in asked) < 15:
            pass
        go.set()
        assert sorted(future.result(WAIT) for future in asked) == ["busy"] * 15 + ["done"] * 5
    assert most == 2
    turns._patience = 0.0
    with turns.turn(), turns.turn(), pytest.raises(Busy, match="too long"), turns.turn():
        pass
    with pytest.raises(ZeroDivisionError), turns.turn():
        raise ZeroDivisionError
    assert (turns._running, turns._waiting) == (0, 0)


def doors(place: Place, service: SearchService) -> dict[str, Callable[[], Any]]:
    """Every way in which the server decodes a picture."""
    from vse_app.api import Api
    from vse_app.web import why
    from vse_app.web.robustness_tab import RobustnessTab

    api = Api(service)
    tab = RobustnessTab.__new__(RobustnessTab)
    tab._api, tab._target = api, None
    record = {"id": 1, "name": "a.png", "caption": "red disc"}
    return {
        "an upload": lambda: read_upload(jpeg(1)),
        "a thumbnail": lambda: api.thumbnails.read(place.pictures[0], 64),
        "why": lambda: why._html(api, record, "red disc"),
        "an attack": lambda: tab._prepare(1, None),
    }


def test_all_doors_wait_for_the_same_turns(
    place: Place, service: SearchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setattr(decoding.decoding, "_patience", 0.0)
    asked = doors(place, service)
    with decoding.decoding.turn(), decoding.decoding.turn():
        for ask in asked.values():
            with pytest.raises(Busy):
                ask()
    for name in ("an upload", "a thumbnail", "an attack"):
        assert asked[name]()


def test_the_api_says_when_too_many_pictures_are_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.decoding, "_patience", 0.0)
    with serving(place) as (client, _):
        kept = client.get("/items/1/image", params={"side": 64})
        with decoding.decoding.turn(), decoding.decoding.turn():
            busy = client.get("/items/1/image", params={"side": 65})
            assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
            assert client.post("/search", files={"image": jpeg(1)}).status_code == 503
            assert client.get("/items/1/image", params={"side": 64}).content == kept.content
        assert client.get("/items/1/image", params={"side": 65}).status_code == 200
