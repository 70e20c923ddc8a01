"""Random lives of galleries against a dictionary."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gallery_tools import CURVE, DIM, create, item, refused, small_index, vectors
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from index import changes, searcher
from index import gallery as galleries
from index.approximate_index import ApproximateIndex
from index.filters import Condition
from index.gallery import Gallery
from index.items import Item
from index.verification import verify

PATHS = [f"{n}.jpg" for n in range(12)]


class Held(NamedTuple):
    item: Item
    vector: NDArray[np.float32]


def naive_scores(metric: str, query: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    if metric == "cosine":
        return rows.astype(float) @ query.astype(float)
    return -np.linalg.norm(np.maximum(0, query.astype(float) - rows), axis=1)


class GalleryAgainstDictionary(RuleBasedStateMachine):
    paths = st.lists(st.sampled_from(PATHS), unique=True, max_size=9)

    @initialize(
        metric=st.sampled_from(["cosine", "cosine", "order"]),
        merge_at=st.sampled_from([2, 3, 8]),
        rows=st.sampled_from([4, 16, 1 << 20]),
        refill=st.sampled_from([(1, 0.1), (5, 0.5), (10_000, 0.1)]),
        exact_among=st.sampled_from([0, 4, 10_000]),
    )
    def begin(self, metric: str, merge_at: int, rows: int, refill: tuple[int, float], exact_among: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(changes, "MERGE_AT", merge_at)
        self.patch.setattr(changes, "MERGED_BYTES", rows * 4 * DIM)
        self.patch.setattr(galleries, "REFILL_AT", refill)
        self.patch.setattr(searcher, "EXACT_AMONG", exact_among)
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name) / "g"
        self.metric = metric
        self.gallery = create(self.directory, metric)
        self.reader = Gallery.open(self.directory)
        self.held: dict[int, Held] = {}
        self.seen_by_reader: dict[int, Held] = {}
        self.last_id = 0
        self.tuned = False

    @rule(paths=paths)
    def add(self, paths: list[str]) -> None:
        seed = self.last_id + 2  # no vector twice: which of those that tie for the last place are found is open
        items = [
            item(path, caption=f"{seed}", size=seed, mtime_ns=n, metadata={"seed": [seed, None], "n": n})
            for n, path in enumerate(paths)
        ]
        rows = vectors(seed, len(paths))
        ids = self.gallery.add(items, rows).tolist()
        assert all(later > earlier for earlier, later in zip([self.last_id, *ids], ids, strict=False))
        self.forget({key for key, old in self.held.items() if old.item.path in paths})
        self.held |= {key: Held(*entry) for key, *entry in zip(ids, items, rows, strict=True)}
        self.last_id = max([self.last_id, *ids])

    @rule(paths=paths)
    def remove_by_path(self, paths: list[str]) -> None:
        gone = {key for key, old in self.held.items() if old.item.path in paths}
        assert self.gallery.remove(paths) == len(gone)
        self.forget(gone)

    @rule(data=st.data())
    def remove_by_id(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.integers(-1, self.last_id + 1), max_size=6))
        gone = self.held.keys() & set(keys)
        assert self.gallery.remove(keys) == len(gone)
        self.forget(gone)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        """Items take paths of each other, of others, and of what was removed."""
        keys = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, max_size=5))
        paths = data.draw(st.permutations(PATHS))
        items = {
            key: item(path, caption=f"again {key}", size=key, metadata={"seed": [key, None], "n": n})
            for n, (key, path) in enumerate(zip(keys, paths, strict=False))
        }
        self.gallery.update(items)
        taken = {of.path for of in items.values()}
        self.forget({key for key, old in self.held.items() if key not in items and old.item.path in taken})
        self.held |= {key: Held(of, self.held[key].vector) for key, of in items.items()}

    @rule()
    def remove_all_but_the_last(self) -> None:
        gone = set(sorted(self.held)[:-1])
        assert self.gallery.remove(gone) == len(gone)
        self.forget(gone)

    @rule()
    def compact(self) -> None:
        self.gallery.compact()
        assert all(segment.removed is None for segment in self.gallery.snapshot.manifest.segments)

    @precondition(lambda self: self.metric == "cosine")
    @rule(factory=st.sampled_from(["IVF2,Flat", "IVF3,Flat", "HNSW8", None]))
    def tune(self, factory: str | None) -> None:
        self.gallery.install_index(small_index(self.gallery, factory) if factory else None, CURVE)
        self.tuned = factory is not None

    @rule(writable=st.booleans())
    def reopen(self, writable: bool) -> None:
        if writable:
            self.gallery.close()
            self.gallery = Gallery.open(self.directory, writable=True)
        else:
            self.reader.close()
            self.reader = Gallery.open(self.directory)
            self.seen_by_reader = dict(self.held)

    @rule()
    def refresh(self) -> None:
        changed = {id(old.vector) for old in self.held.values()} != {
            id(old.vector) for old in self.seen_by_reader.values()
        }
        assert self.reader.refresh() or not changed
        self.seen_by_reader = dict(self.held)

    @rule(least=st.integers(0, 8), operator=st.sampled_from(["<", ">=", "=", "!="]), k=st.integers(1, 4))
    def search_filtered(self, least: int, operator: str, k: int) -> None:
        for gallery, held in ((self.gallery, self.held), (self.reader, self.seen_by_reader)):
            holds = {
                "<": lambda n: n < least,
                ">=": lambda n: n >= least,
                "=": lambda n: n == least,
                "!=": lambda n: n != least,
            }[operator]
            expected = {key: old for key, old in held.items() if holds(old.item.metadata["n"])}
            allowed = gallery.ids_where([Condition("n", operator, least)])
            assert allowed.tolist() == sorted(expected)
            foreign = np.append(allowed, [self.last_id + 5, 0, -1])  # ids that are nowhere change nothing
            self.compare_search(gallery, expected, k, foreign)

    @invariant()
    def both_agree(self) -> None:
        self.compare(self.gallery, self.held)
        self.compare(self.reader, self.seen_by_reader)
        if self.tuned:
            assert isinstance(self.gallery._searching().index, ApproximateIndex)

    def forget(self, keys: set[int]) -> None:
        self.held = {key: old for key, old in self.held.items() if key not in keys}

    def compare(self, gallery: Gallery, held: dict[int, Held]) -> None:
        assert len(gallery) == len(held)
        assert list(gallery.items()) == [(key, held[key].item) for key in sorted(held)]
        files = dict.fromkeys(PATHS, (1, 1))
        files |= {old.item.path: (old.item.size, old.item.mtime_ns) for old in held.values() if old.item.size % 2}
        assert gallery.unchanged(files) == {old.item.path for old in held.values() if old.item.size % 2}
        shuffled = np.random.default_rng(len(held)).permutation(sorted(held)).astype(np.int64)
        expected = np.array([held[key].vector for key in shuffled.tolist()]).reshape(-1, DIM)
        np.testing.assert_array_equal(gallery.vectors(shuffled), expected)
        with refused("has no item"):
            gallery.vectors(np.append(shuffled, self.last_id + 1))
        assert gallery.ids_of(PATHS[:6]).tolist() == sorted(
            key for key, old in held.items() if old.item.path in PATHS[:6]
        )
        self.compare_search(gallery, held, 3, None)

    def compare_search(self, gallery: Gallery, held: dict[int, Held], k: int, allowed: NDArray[Any] | None) -> None:
        query = vectors(1, 1)
        (hits,) = gallery.search(query, k, allowed)
        keys = sorted(held)
        scores = naive_scores(self.metric, query[0], np.array([held[key].vector for key in keys]).reshape(-1, DIM))
        best = np.argsort(-scores, kind="stable")[:k]
        assert [(hit.id, hit.item) for hit in hits] == [(keys[n], held[keys[n]].item) for n in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-6)

    def teardown(self) -> None:
        self.gallery.close()
        self.reader.close()
        report = verify(self.directory)
        assert not report.problems
        assert not report.leftovers
        self.patch.undo()
        self.folder.cleanup()


TestGalleryAgainstDictionary = GalleryAgainstDictionary.TestCase
TestGalleryAgainstDictionary.settings = settings(max_examples=40, stateful_step_count=14, deadline=None)
