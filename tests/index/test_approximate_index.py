"""Every kind of index that tuning may choose, with filters and removals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from gallery_tools import CURVE, create, item, refused, vectors
from numpy.typing import NDArray

from index import searcher
from index.approximate_index import ApproximateIndex
from index.filters import Condition
from index.gallery import Gallery

DIM = 16
COUNT = 1500
KINDS: dict[str, dict[str, int]] = {
    "IVF16,Flat": {"nprobe": 4},
    "IVF16,SQ8": {"nprobe": 4},
    "IVF16,PQ8x4fsr,RFlat": {"nprobe": 4, "k_factor": 4},
    "IVF16,PQ8x4fsr,Refine(SQ8)": {"nprobe": 4, "k_factor": 4},
    "IVF16,RaBitQ,Refine(SQ8)": {"nprobe": 4, "k_factor": 4},
    "RaBitQ,Refine(SQ8)": {"k_factor": 10},
    "HNSW32": {"efSearch": 32},
    "HNSW32,SQ8": {"efSearch": 32},
}


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    return vectors(1, COUNT, DIM)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, rows: NDArray[np.float32]) -> tuple[str, Any]:
    built = faiss.index_factory(DIM, request.param, faiss.METRIC_INNER_PRODUCT)
    built.train(rows)
    return request.param, built


@pytest.fixture
def index(kind: tuple[str, Any], rows: NDArray[np.float32]) -> ApproximateIndex:
    name, built = kind
    index = ApproximateIndex(built, KINDS[name])
    index.refill(COUNT // 2, lambda: [(np.arange(1, COUNT // 2 + 1) * 3, rows[: COUNT // 2])])
    index.add(np.arange(COUNT // 2 + 1, COUNT + 1) * 3, rows[COUNT // 2 :])
    return index


def recall(found: NDArray[np.int64], rows: NDArray[np.float32], queries: NDArray[np.float32], ids: Any) -> float:
    best = ids[np.argsort(-(queries @ rows.T), axis=1)[:, : found.shape[1]]]
    return float(np.mean([np.isin(one, all_).mean() for one, all_ in zip(best, found, strict=True)]))


def test_removed_and_forbidden_ids_are_never_found(index: ApproximateIndex, rows: NDArray[np.float32]) -> None:
    ids = np.arange(1, COUNT + 1) * 3
    random = np.random.default_rng(0)
    gone = random.choice(ids, COUNT // 5, replace=False)
    assert (len(index), index.last_id, index.removed) == (COUNT, COUNT * 3, 0)
    assert index.remove(np.append(gone, [1, 4, 99999])) == COUNT // 5
    assert index.remove(gone) == 0
    assert (len(index), index.last_id, index.removed) == (COUNT * 4 // 5, COUNT * 3, COUNT // 5)
    live = np.setdiff1d(ids, gone)
    np.testing.assert_array_equal(index.live_ids(), live)
    queries = rows[:60] + 0.05 * vectors(2, 60, DIM)
    hits = index.search(queries, 10)
    assert np.isin(hits.ids, live).all()
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    assert all(len(set(one)) == 10 for one in hits.ids.tolist())
    assert recall(hits.ids, rows[live // 3 - 1], queries, live) > 0.5
    half = random.choice(ids, COUNT // 2, replace=False)
    found = index.search(queries, 10, half).ids
    assert np.isin(found[found >= 0], np.intersect1d(live, half)).all()
    assert (found >= 0).mean() > 0.95
    assert (index.search(queries, 3, gone).ids == -1).all()
    assert (index.search(queries, 3, np.array([1, 2])).ids == -1).all()


def test_survives_saving_and_refilling(index: ApproximateIndex, rows: NDArray[np.float32], tmp_path: Path) -> None:
    index.save(tmp_path)
    loaded = ApproximateIndex.load(tmp_path, DIM)
    assert loaded.parameters == index.parameters
    queries = vectors(3, 20, DIM)
    for before, after in zip(index.search(queries, 5), loaded.search(queries, 5), strict=True):
        np.testing.assert_array_equal(before, after)
    with refused("another kind"):
        ApproximateIndex.load(tmp_path, DIM + 1)
    index.refill(2, lambda: [(np.array([7, 9]), rows[:2])])
    assert index.search(rows[:1], 1).ids.tolist() == [[7]]
    index.refill(0, list)
    assert (len(index), index.last_id) == (0, 0)
    assert index.search(rows[:1], 2).ids.tolist() == [[-1, -1]]
    index.save(tmp_path)
    assert len(ApproximateIndex.load(tmp_path, DIM)) == 0


@pytest.mark.parametrize("kept", [slice(None, None, 5), slice(1, 30), slice(0, 0)], ids=["fifth", "few", "none"])
def test_compacting_leaves_what_filling_anew_would(
    kept: slice, index: ApproximateIndex, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(1, COUNT + 1) * 3
    live, new = ids[kept], ids[-1] + np.arange(1, 301)
    anew = ApproximateIndex(faiss.clone_index(index.faiss), index.parameters)
    anew.refill(len(live), lambda: [(live, rows[kept])])
    index.remove(np.setdiff1d(ids, live))
    if not isinstance(index._base, faiss.IndexHNSW):
        monkeypatch.setattr(index, "refill", lambda *given: pytest.fail("was filled anew"))
    index.compact(lambda: [(live, rows[kept])])
    assert (len(index), index.removed) == (len(live), 0)
    np.testing.assert_array_equal(index.live_ids(), live)
    queries = vectors(3, 40, DIM)
    for added in (new[:0], new[:100], new[100:]):  # which fill up what the removed have left
        for one in (index, anew):
            one.add(added, vectors(len(added), len(added), DIM))
        for ours, theirs in zip(index.search(queries, 10), anew.search(queries, 10), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_only_new_ids_and_sound_vectors_are_taken(index: ApproximateIndex) -> None:
    row = vectors(4, 1, DIM)
    for ids in ([COUNT * 3], [3], [-1], [10**6, 10**6], [10**6 + 1, 10**6]):
        with refused("new id, ascending"):
            index.add(np.array(ids), np.repeat(row, len(ids), axis=0))
    with refused("id 1000000: .*not finite"):
        index.add(np.array([10**6]), row * np.float32(np.nan))
    with refused("k is 0"):
        index.search(row, 0)
    with refused(r"\(1, 15\)"):
        index.search(row[:, :15], 1)
    assert len(index) == COUNT


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, rows: NDArray[np.float32]) -> Path:
    directory = tmp_path_factory.mktemp("tuned") / "g"
    with create(directory, dim=DIM) as gallery:
        gallery.add([item(f"{n}", metadata={"n": n}) for n in range(COUNT)], rows)
    return directory


def test_a_gallery_always_returns_k_hits_and_never_a_removed_one(
    kind: tuple[str, Any], directory: Path, rows: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, built = kind
    queries = vectors(5, 30, DIM)
    with Gallery.open(directory, writable=True) as gallery:
        index = ApproximateIndex(built, dict.fromkeys(KINDS[name], 1))  # searched as narrowly as can be
        index.refill(len(gallery), gallery.snapshot.blocks)
        gallery.install_index(index, CURVE)
        gone = gallery.snapshot.ids()[::5]
        live = np.setdiff1d(gallery.snapshot.ids(), gone)
    with Gallery.open(directory) as reader:
        assert isinstance(reader._searching().index, ApproximateIndex)
        for exact_among, share in ((0, 1.0), (0, 0.3), (0, 0.004), (10_000, 0.004)):
            monkeypatch.setattr(searcher, "EXACT_AMONG", exact_among)
            allowed = np.random.default_rng(1).choice(live, int(share * len(live)), replace=False)
            found = reader.nearest(queries, 4, allowed)
            assert np.isin(found.ids, allowed).all()
            assert all(len(set(one)) == 4 for one in found.ids.tolist())
            if share < 0.01:
                order = np.sort(allowed)
                assert recall(found.ids, reader.vectors(order), queries, order) == 1
        assert (reader.nearest(queries, 4, gone[:2]).ids[:, 2:] == -1).all()
        (found,) = reader.nearest(queries[:1], COUNT + 9).ids  # far more than one list or a short walk comes across
        assert np.sort(found[:COUNT]).tolist() == reader.snapshot.ids().tolist()
        assert (found[COUNT:] == -1).all()


def test_a_gallery_with_a_fifth_removed(
    kind: tuple[str, Any], rows: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searcher, "EXACT_AMONG", 0)
    name, built = kind
    queries = vectors(5, 30, DIM)
    with create(tmp_path / "g", dim=DIM) as gallery:
        ids = gallery.add([item(f"{n}", metadata={"n": n}) for n in range(COUNT)], rows)
        index = ApproximateIndex(built, KINDS[name])
        index.refill(len(gallery), gallery.snapshot.blocks)
        gallery.install_index(index, CURVE)
        gallery.remove(ids[::5].tolist())
        live = np.setdiff1d(ids, ids[::5])
        with Gallery.open(tmp_path / "g") as reader:
            for one in (gallery, reader):
                found = one.nearest(queries, 10).ids
                assert np.isin(found, live).all()
                assert recall(found, rows[live - 1], queries, live) > 0.5
                few = one.ids_where([Condition.parse("n<20")])
                narrow = one.nearest(queries, 10, few)
                np.testing.assert_array_equal(np.isin(narrow.ids, few), True)
                assert recall(narrow.ids, rows[few - 1], queries, few) == 1
                assert {hit.id for hits in one.search(queries, 10) for hit in hits} <= set(live.tolist())
            gallery.compact()
            assert gallery._searching().index.removed == 0  # type: ignore[union-attr]
            assert np.isin(gallery.nearest(queries, 10).ids, live).all()
            assert reader.refresh()
            np.testing.assert_array_equal(reader.nearest(queries, 10).ids, gallery.nearest(queries, 10).ids)
