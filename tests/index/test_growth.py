"""What a small operation takes may not grow with the gallery: bytes and steps are counted, at two sizes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gallery_tools import create, item, small_index, vectors

from index import searcher
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
