from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from served import COUNT, Place, pixels

from index.filters import Condition
from index.gallery import Gallery
from index.items import Item
from index.vector_index import SearchHits
from training.errors import InputError
from vse_app import limits, search_engine
from vse_app.queries import Options, Query, parse_conditions
from vse_app.search_engine import Facts, SearchEngine
from vse_app.search_service import SearchService
from vse_app.text_cache import TextCache

JUNK: list[Any] = [[], {}, "x" * 100_000, b"x", True, 10**5000, -1, float("nan"), float("inf"), [0] * 1_000_000]
"""What JSON and Python can send where a number is meant."""


def refused(error: pytest.ExceptionInfo[InputError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "asked",
    [
        {"text": "a" * (limits.TEXT + 1)},
        {"text": "a" * 2_000_000},
        {"text": 5},
        {"text": ["a"] * 1_000_000},
        {"like": "a" * (limits.PATH + 1)},
        {"like": 0},
        {"like": 1.5},
        {"like": 1e30},
        {"like": limits.IDS},
        *({"like": junk} for junk in JUNK),
        *({"text": "a", "image": Path("a.png"), "weight": junk} for junk in JUNK),
    ],
)
def test_queries_beyond_the_limits(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        Query(**asked)
    refused(error)


@pytest.mark.parametrize(
    "asked",
    [
        {"k": 0},
        {"k": 2.5},
        {"k": None},
        {"collapse_at": 0.49},
        {"collapse_at": 1.01},
        {"collapse_at": 0},
        {"where": (Condition("a", "=", 1),) * (limits.CONDITIONS + 1)},
        *({"k": junk} for junk in JUNK if junk != 10**5000),
        *({"collapse_at": junk} for junk in JUNK),
    ],
)
def test_options_beyond_the_limits(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        Options(**asked)
    refused(error)


@pytest.mark.parametrize(
    "texts",
    [
        ["a" * limits.CONDITION + "=1"],
        ["a" + " " * 1_000_000 + "b"],
        ["a=1"] * (limits.CONDITIONS + 1),
        [5],
        [None],
        [["a=1"]],
    ],
)
def test_conditions_beyond_the_limits(texts: list[Any]) -> None:
    with pytest.raises(InputError) as error:
        parse_conditions(texts)
    refused(error)


def test_what_is_within_the_limits_is_answered(service: SearchService) -> None:
    options = Options(limits.RESULTS, parse_conditions(["year>1"] * limits.CONDITIONS), limits.LEAST_ALIKE)
    found = service.search(Query(text="a " * (limits.TEXT // 2)), options)
    assert sum(1 + result.alike for result in found) == COUNT
    assert service.search(Query(like=np.int64(3)), Options(np.int64(2)))  # type: ignore[arg-type]


def test_a_server_gives_so_many_results_and_takes_so_long_a_caption(service: SearchService) -> None:
    for k in (limits.RESULTS + 1, 10**5000):
        with pytest.raises(InputError, match="ask for 1 to 200"):
            service.submit(Query(text="red"), Options(k))
    with pytest.raises(InputError, match="caption of"):
        service.add([pixels(1)], Facts("a" * (limits.TEXT + 1)))
    assert not service.uploads.exists()


def test_an_engine_gives_more_but_not_without_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with SearchEngine.open(place.gallery) as engine:
        assert len(engine.search([Query(text="red")], 10**20)[0]) == COUNT
        monkeypatch.setattr(limits, "MOST_RESULTS", COUNT - 1)
        assert len(engine.search([Query(text="red")], COUNT - 1)[0]) == COUNT - 1
        with pytest.raises(InputError, match="at most 23 results"):
            engine.search([Query(text="red")], COUNT)


@pytest.fixture
def copies(place: Place) -> Place:
    """The gallery with two hundred copies of a picture, nearer to it than anything else."""
    with Gallery.open(place.gallery, writable=True) as gallery:
        vector = gallery.vectors(np.array([5]))
        items = [Item(f"/copies/{n}.png", None, 1, 1, "0" * 64, {}) for n in range(200)]
        gallery.add(items, np.repeat(vector, 200, axis=0))
    return place


def test_copies_are_looked_for_down_to_a_depth(copies: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    nearest = Gallery.nearest

    def counted(gallery: Gallery, vectors: NDArray[np.float32], k: int, *allowed: Any) -> SearchHits:
        asked.append(k)
        return nearest(gallery, vectors, k, *allowed)

    monkeypatch.setattr(Gallery, "nearest", counted)
    with SearchEngine.open(copies.gallery) as engine:
        (found,) = engine.search([Query(like=5)], 4, collapse_at=0.9999)
        assert (len(found), found[0].alike) == (4, 199)
        assert asked[-1] > 200
        assert len(found[0].duplicates) == limits.DUPLICATES
        monkeypatch.setattr(limits, "DEPTH", 100)
        asked.clear()
        (found,) = engine.search([Query(like=5)], 4, collapse_at=0.9999)
        assert (len(found), found[0].alike) == (1, 98)
        assert max(asked) == 100


def test_many_queries_are_searched_a_few_at_a_time(copies: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [Query(text="red disc"), Query(like=5), Query(text="blue ring"), Query(like=7), Query(text="star")]
    with SearchEngine.open(copies.gallery) as engine:
        together = engine.search(queries, 6, collapse_at=0.95)
        monkeypatch.setattr(search_engine, "_HITS", 2 * len(engine.gallery))
        apart = engine.search(queries, 6, collapse_at=0.95)
    assert [[hit.id for hit in row] for row in apart] == [[hit.id for hit in row] for row in together]


def test_the_cache_of_texts_is_bounded_in_bytes_and_forgets_the_oldest() -> None:
    asked: list[str] = []

    def encode(texts: Any) -> NDArray[np.float32]:
        asked.extend(texts)
        return np.array([[len(text)] * 100 for text in texts], np.float32)

    cache = TextCache(encode, most_bytes=10 * 700)
    texts = ["x" * 1_000_000 + "\ud800" + str(n) for n in range(12)]
    for text in texts:
        assert cache([text])[0, 0] == len(text)
    assert len(cache._known) == 10
    assert all(len(key) == 32 and row.base is None for key, row in cache._known.items())
    asked.clear()
    cache(texts[2:])
    assert not asked
    cache([texts[0]])
    assert asked == [texts[0]]
    cache.close()
