from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import COUNT, Place, pixels

from index.errors import GalleryError
from index.filters import Condition
from index.gallery import Gallery
from training.errors import InputError
from vse_app import search_service
from vse_app.limits import Busy
from vse_app.queries import Options, Query
from vse_app.search_engine import Facts, Result, SearchEngine
from vse_app.search_service import SearchService

WAIT = 30


class Held:
    """Keeps the thread of a service at work until it is let go, so that what is asked meanwhile piles up."""

    def __init__(self, service: SearchService) -> None:
        self.go = threading.Event()
        started = threading.Event()

        def hold(engine: SearchEngine) -> None:
            started.set()
            assert self.go.wait(WAIT)

        self.done = service.call(hold)
        assert started.wait(WAIT)


def told(results: list[Result]) -> list[tuple[int, float, list[int]]]:
    return [(of.id, of.score, [copy.id for copy in of.duplicates]) for of in results]


def same(found: list[Result], expected: list[Result]) -> bool:
    """Up to what a batch changes in the last digits."""
    scores = [[result.score for result in of] for of in (found, expected)]
    return [(i, d) for i, _, d in told(found)] == [(i, d) for i, _, d in told(expected)] and np.allclose(
        *scores, atol=1e-6
    )


def batches(service: SearchService) -> tuple[float, float]:
    """How many searches there were, and how many batches."""
    values = {sample.name: sample.value for metric in service.latency.batch.collect() for sample in metric.samples}
    return values["vse_batch_queries_sum"], values["vse_batch_queries_count"]


ASKED = [
    (Query(text="red disc"), Options()),
    (Query(text="a star that is blue"), Options(k=3)),
    (Query(image=pixels(5)), Options(k=COUNT)),
    (Query(text="white heart", image=pixels(7), weight=0.3), Options(k=5)),
    (Query(like=9), Options(k=4)),
    (Query(text="ring"), Options(k=6, where=(Condition.parse("year>=2012"), Condition.parse("tags=ring")))),
    (Query(text="ring"), Options(where=(Condition.parse("year=3000"),))),
    (Query(image=pixels(2)), Options(k=5, collapse_at=0.9)),
    (Query(vector=np.eye(8, dtype=np.float32)[3]), Options(k=2)),
]


def test_answers_are_the_engines(place: Place, service: SearchService) -> None:
    with SearchEngine.open(place.gallery) as engine:
        for query, options in ASKED:
            (expected,) = engine.search([query], options.k, where=options.where, collapse_at=options.collapse_at)
            assert told(service.search(query, options)) == told(expected)
            assert told(service.submit(query, options).result(WAIT)) == told(expected)


def test_many_threads_share_passes(place: Place, service: SearchService) -> None:
    with SearchEngine.open(place.gallery) as engine:
        expected = [engine.search([q], o.k, where=o.where, collapse_at=o.collapse_at)[0] for q, o in ASKED]
    wrong: list[Any] = []
    barrier = threading.Barrier(64)

    def ask(n: int) -> None:
        barrier.wait(WAIT)
        for step in range(5):
            query, options = ASKED[(n + step) % len(ASKED)]
            found = service.submit(query, options).result(WAIT)
            if not same(found, expected[(n + step) % len(ASKED)]):
                wrong.append((query, told(found)))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    searches, passes = batches(service)
    assert searches == 64 * 5
    assert passes < searches / 2


def test_a_bad_query_spoils_no_other(service: SearchService) -> None:
    held = Held(service)
    good = [service.submit(Query(text=text), Options(k=1)) for text in ("red disc", "blue ring")]
    empty = service.submit(Query(text="  "))
    gone = service.submit(Query(like=10_000))
    hubs = service.submit(Query(text="red disc"), Options(correct_hubs=True))
    missing = service.submit(Query(image=Path("nowhere.png")))
    broken: Future[int] = service.call(lambda engine: 1 // 0)
    good.append(service.submit(Query(text="white star"), Options(k=1)))
    held.go.set()
    assert [len(of.result(WAIT)) for of in good] == [1, 1, 1]
    for future, error, message in (
        (empty, InputError, "empty"),
        (gone, GalleryError, "no item 10000"),
        (hubs, GalleryError, "no query bank"),
        (missing, InputError, "no such file"),
        (broken, ZeroDivisionError, "zero"),
    ):
        with pytest.raises(error, match=message):
            future.result(WAIT)  # type: ignore[attr-defined]


def test_conditions_that_python_takes_for_equal_are_kept_apart(place: Place, service: SearchService) -> None:
    with SearchEngine.open(place.gallery, writable=True) as engine:
        engine.add(
            place.pictures[:2],
            {place.pictures[0]: Facts(None, {"flag": True}), place.pictures[1]: Facts(None, {"flag": 1})},
        )
        ids = [engine.gallery.ids_where([Condition("flag", "=", value)]).tolist() for value in (True, 1)]
    assert ids[0] != ids[1]
    held = Held(service)
    futures = [
        service.submit(Query(text="red"), Options(where=(Condition.parse(text),))) for text in ("flag=true", "flag=1")
    ]
    held.go.set()
    assert [[result.id for result in future.result(WAIT)] for future in futures] == ids


def test_too_many_are_refused_at_once(service: SearchService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service._asked, "maxsize", 4)
    held = Held(service)
    waiting = [service.submit(Query(text="red")) for _ in range(4)]
    for ask in (lambda: service.submit(Query(text="red")), lambda: service.call(len)):  # type: ignore[arg-type]
        with pytest.raises(Busy, match="waiting already"):
            ask()
    held.go.set()
    assert all(len(of.result(WAIT)) == 10 for of in waiting)
    assert service.search(Query(text="red"))


def test_changes_by_others_are_seen_by_the_next_search(place: Place, service: SearchService, tmp_path: Path) -> None:
    new = tmp_path / "new.png"
    pixels(99).save(new)
    assert service.search(Query(image=pixels(99)))[0].item.path != str(new)
    with SearchEngine.open_or_create(place.gallery, None) as engine:
        engine.add([new])
        assert service.search(Query(image=pixels(99)))[0].item.path == str(new)
        assert service.latency.pictures._value.get() == COUNT + 1
    with Gallery.open(place.gallery, writable=True) as gallery:
        gallery.remove([str(new), str(place.pictures[3])])
        gallery.compact()
    found = service.search(Query(image=pixels(99)), Options(k=COUNT))
    assert {result.item.path for result in found} == {str(p) for p in place.pictures} - {str(place.pictures[3])}
    assert service.latency.pictures._value.get() == COUNT - 1


def test_a_gallery_that_breaks_is_reported_and_comes_back(place: Place, service: SearchService) -> None:
    manifest = place.gallery / "gallery.json"
    kept = manifest.read_bytes()
    for wreck in (b"{", b"\xff" * 9):
        manifest.write_bytes(wreck)
        with pytest.raises(GalleryError):
            service.submit(Query(text="red")).result(WAIT)
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises((GalleryError, OSError)):
        service.submit(Query(text="red")).result(WAIT)
    manifest.rmdir()
    manifest.write_bytes(kept)
    assert len(service.submit(Query(text="red")).result(WAIT)) == 10


def test_nothing_that_goes_wrong_while_it_follows_ends_the_service(
    service: SearchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "refresh", lambda self: Path("/nowhere").read_bytes())
        with pytest.raises(OSError):
            service.submit(Query(text="red")).result(WAIT)
    assert service.submit(Query(text="red")).result(WAIT)


def test_add_and_remove_while_others_search(place: Place, service: SearchService) -> None:
    stop, wrong = threading.Event(), list[Any]()

    def search() -> None:
        while not stop.is_set():
            try:
                found = service.submit(Query(text="red disc"), Options(k=COUNT)).result(WAIT)
                if len({result.id for result in found}) != COUNT or found != sorted(found, key=lambda r: -r.score):
                    wrong.append(told(found))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    given: list[int] = []
    for n in range(8):
        ids = service.add([pixels(100 + 2 * n), pixels(101 + 2 * n)], Facts(f"batch {n}", {"n": n}))
        found = [service.search(Query(image=pixels(100 + 2 * n + i)), Options(k=1))[0] for i in (0, 1)]
        assert [result.item.metadata for result in found] == [{"n": n}] * 2
        assert [result.id for result in found] == ids
        assert min(ids) > max(given, default=COUNT)
        given += ids
        assert service.remove(ids) == 2
        assert service.remove(ids) == 0
        assert all(result.id not in given for result in service.search(Query(text="x"), Options(k=200)))
    stop.set()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_adding_from_many_threads(service: SearchService) -> None:
    futures: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda n=n: futures.append(service.add([pixels(200 + n)], Facts(str(n)))))  # type: ignore[misc]
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(key for ids in futures for key in ids) == list(range(COUNT + 1, COUNT + 9))
    for n in range(8):
        assert service.search(Query(image=pixels(200 + n)), Options(k=1))[0].item.caption == str(n)


def test_another_writer_is_reported(place: Place, service: SearchService) -> None:
    with Gallery.open(place.gallery, writable=True):
        with pytest.raises(GalleryError, match="another writer"):
            service.remove([1])
        with pytest.raises(GalleryError, match="another writer"):
            service.add([pixels(1)], Facts())
    assert service.remove([1]) == 1


def test_the_end_answers_what_is_waiting(place: Place) -> None:
    service = SearchService(place.gallery)
    held = Held(service)
    waiting = [service.submit(Query(text="red disc")) for _ in range(3 * search_service.TOGETHER)]
    closing = [threading.Thread(target=service.close) for _ in range(2)]
    for thread in closing:
        thread.start()
    assert service.closed.wait(WAIT)
    held.go.set()
    for thread in closing:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in closing)
    assert all(len(of.result(0)) == 10 for of in waiting)
    with pytest.raises(Busy, match="shutting down"):
        service.submit(Query(text="red"))
    service.close()


def test_nobody_waits_forever_for_a_service_that_ends(place: Place) -> None:
    """Whoever asks while it ends gets an answer or a refusal, whichever comes first."""
    service = SearchService(place.gallery)
    futures: list[Future[list[Result]]] = []
    started = threading.Event()

    def ask() -> None:
        while True:
            try:
                futures.append(service.submit(Query(text="red"), Options(k=1)))
            except Busy as error:
                if "shutting down" in str(error):
                    return
            started.set()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(WAIT)
    service.close()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    assert all(len(future.result(1)) == 1 for future in futures)


def test_what_is_cancelled_is_left_out(service: SearchService) -> None:
    held = Held(service)
    first, second = (service.submit(Query(text=text)) for text in ("red", "blue"))
    assert first.cancel()
    held.go.set()
    assert second.result(WAIT)
    assert held.done.result(WAIT) is None


def test_a_moved_model_is_served_from_where_it_is_now(place: Place, tmp_path: Path) -> None:
    place.model.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="--model"):
        SearchService(place.gallery)
    with SearchService(place.gallery, model=tmp_path / "moved") as service:
        assert len(service.search(Query(text="red disc"))) == 10
