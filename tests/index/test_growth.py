"""What a small operation takes may not grow with the gallery: bytes and steps are counted, at two sizes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gallery_tools import create, item, small_index, vectors

from index import searcher
from index.filters import Condition
from index.gallery import Gallery

SIZES = (2000, 20_000)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A gallery of each size, its newest 40 items apart."""
    made = []
    for size in SIZES:
        directory = tmp_path_factory.mktemp("growth") / f"{size}"
        with create(directory) as gallery:
            items = [item(f"{n // 100}/{n}.jpg", caption=f"{n}", metadata={"n": n}) for n in range(size)]
            gallery.add(items[:-40], vectors(1, size - 40))
            gallery.add(items[-40:], vectors(2, 40))
        made.append(directory)
    return made


@pytest.fixture
def galleries(directories: list[Path]) -> Iterator[list[Gallery]]:
    opened = [Gallery.open(directory) for directory in directories]
    yield opened
    for gallery in opened:
        gallery.close()


def peak(act: Callable[[], object]) -> int:
    """Most bytes that numpy and Python take at once for it, after it ran once."""
    act()
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("factory", ["IVF2,Flat", "IVF2,PQ4x4fsr,RFlat", "HNSW8"])
def test_few_allowed_ids_take_nothing_from_the_others(
    factory: str, galleries: list[Gallery], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searcher, "EXACT_AMONG", 40)
    query = vectors(3, 1)
    taken = []
    for gallery in galleries:
        gallery._searcher = searcher.Searcher(gallery.snapshot, small_index(gallery, factory))
        allowed = np.arange(5, 1500, 50)
        taken.append(peak(lambda: gallery.nearest(query, 5, allowed)))  # noqa: B023 (called at once)
        exact = gallery.vectors(allowed) @ query[0]
        assert gallery.nearest(query, 5, allowed).ids[0].tolist() == allowed[np.argsort(-exact)[:5]].tolist()
    assert taken[1] <= 2 * taken[0]


def steps(gallery: Gallery, act: Callable[[], object]) -> int:
    """Instructions of SQLite's machine that it takes."""
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1

    for segment in gallery.snapshot.segments:
        segment.items._db.set_progress_handler(count, 1)
    act()
    for segment in gallery.snapshot.segments:
        segment.items._db.set_progress_handler(None, 1)
    return counted


@pytest.mark.parametrize(
    "act",
    [
        lambda gallery: gallery.unchanged({"3/301.jpg": (1, 2), "new.jpg": (1, 2)}),
        lambda gallery: gallery.ids_of(["3/301.jpg", "new.jpg"]),
        lambda gallery: gallery.snapshot.ids_below(["3", "19/1999.jpg"]),
        lambda gallery: gallery.snapshot.item(700),
        lambda gallery: list(gallery.items(np.array([5, 1999]))),
        lambda gallery: gallery.ids_where([Condition.parse("path=3/301.jpg")]),
        lambda gallery: gallery.unknown_fields([Condition.parse("n=5"), Condition.parse("size=5")]),
    ],
    ids=["unchanged", "ids_of", "ids_below", "item", "items", "path=", "unknown_fields"],
)
def test_looking_up_reads_no_other_items(act: Callable[[Gallery], object], galleries: list[Gallery]) -> None:
    small, large = (steps(gallery, lambda: act(gallery)) for gallery in galleries)  # noqa: B023 (called at once)
    assert 0 < large <= 1.5 * small


def test_a_condition_is_looked_up_once(galleries: list[Gallery]) -> None:
    conditions = [Condition.parse("n>=7"), Condition.parse("caption!=5")]
    for gallery in galleries:
        assert steps(gallery, lambda: gallery.ids_where(conditions)) > 0  # noqa: B023
        assert steps(gallery, lambda: gallery.ids_where(conditions)) == 0  # noqa: B023


@pytest.mark.parametrize("share", [0.96, 0.5])
def test_a_filter_asked_again_takes_no_more_than_no_filter(
    share: float, galleries: list[Gallery], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searcher, "EXACT_AMONG", 40)
    query = vectors(3, 1)
    for size, gallery in zip(SIZES, galleries, strict=True):
        gallery._searcher = searcher.Searcher(gallery.snapshot, small_index(gallery))
        allowed = gallery.ids_where([Condition("n", "<", share * size)])
        assert len(allowed) == share * size
        filtered = peak(lambda: gallery.nearest(query, 5, allowed))  # noqa: B023
        assert filtered <= peak(lambda: gallery.nearest(query, 5)) + 1000  # noqa: B023
