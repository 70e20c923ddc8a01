from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_tools import create, item
from numpy.typing import NDArray

from index import tuning
from index.approximate_index import ApproximateIndex
from index.errors import GalleryError
from index.gallery import Gallery
from index.tuning import OperatingPoint, candidates, tune

COUNT, DIM, K = 3000, 16, 5


def clustered(seed: int, count: int) -> NDArray[np.float32]:
    """Unit vectors around 30 centres that are the same for every seed."""
    centres = np.random.default_rng(99).standard_normal((30, DIM))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, 30, count)] + 0.4 * random.standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gallery]:
    monkeypatch.setattr(tuning, "EXACT_UP_TO", 1000)
    with create(tmp_path / "g", dim=DIM) as gallery:
        gallery.add([item(f"{n}") for n in range(COUNT)], clustered(0, COUNT))
        yield gallery


def speeds(monkeypatch: pytest.MonkeyPatch, *fast: str) -> None:
    """Make some types fast and all others slow, so that no clock decides a test."""
    measure = tuning._Tuner._sweep

    def sweep(self: Any, factory: str, *args: Any) -> Iterator[OperatingPoint]:
        for n, point in enumerate(measure(self, factory, *args)):
            rate = 1e9 - n if any(part in factory for part in fast) else 1e-3
            yield OperatingPoint(**{**vars(point), "queries_per_second": rate})

    monkeypatch.setattr(tuning._Tuner, "_sweep", sweep)
    monkeypatch.setattr(tuning, "_speed", lambda search, queries: (1.0, 1.0))


def true_recall(gallery: Gallery, queries: NDArray[np.float32]) -> float:
    vectors = gallery.vectors(gallery.snapshot.ids())
    truth = 1 + np.argsort(-(queries @ vectors.T), axis=1)[:, :K]
    found = gallery.nearest(queries, K).ids
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(truth.tolist(), found.tolist(), strict=True)]))


@pytest.mark.parametrize("fast", ["PQ8x4fsr,RFlat", "PQ8x4fsr,Refine(SQ8)", "IVF128,RaBitQ", "IVF128,Flat", "HNSW32"])
def test_what_is_chosen_keeps_its_promise(gallery: Gallery, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, fast)
    found = tune(gallery, clustered(1, 400), source="made up", target_recall=0.9, k=K)
    assert fast in found.chosen.index
    assert found.chosen.recall >= 0.9
    queries = clustered(2, 400)
    assert true_recall(gallery, queries) == pytest.approx(found.held_out_recall, abs=0.05)
    assert found.chosen.recall == pytest.approx(found.held_out_recall, abs=0.05)
    kept = [hit.item.path for hit in gallery.search(queries[:1], K)[0]]
    with Gallery.open(gallery.directory) as reader:
        assert isinstance(reader._searching().index, ApproximateIndex)
        assert [hit.item.path for hit in reader.search(queries[:1], K)[0]] == kept
        curve = reader.curve() or {}
    assert (curve["chosen"], curve["queries_from"], curve["items"]) == (str(found.chosen), "made up", COUNT)
    assert len(curve["points"]) == len(found.points)  # type: ignore[arg-type]


def test_the_fastest_that_reaches_the_target_is_chosen(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, "IVF128,Flat")
    found = tune(gallery, clustered(1, 400), source="", target_recall=0.985, k=K, dry_run=True)
    rivals = [of for of in found.points if of.recall - 2 * of.error >= 0.985 or of.recall == 1]
    assert found.chosen == max(rivals, key=lambda of: of.queries_per_second)
    too_fast = [of for of in found.points if of.queries_per_second > found.chosen.queries_per_second]
    assert too_fast, "the target decided nothing"
    assert all(of.recall - 2 * of.error < 0.985 for of in too_fast)


def test_memory_is_a_limit(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, "RFlat", "IVF128,Flat", "HNSW32")  # all of them larger than the vectors themselves
    limit = int(0.9 * 4 * DIM * COUNT)
    found = tune(gallery, clustered(1, 400), source="", target_recall=0.6, memory=limit, k=K)
    assert found.chosen.bytes <= limit
    part = gallery.snapshot.manifest.index
    assert part
    folder = gallery.directory / part.name
    written = sum((folder / name).stat().st_size for name in ("index.faiss", "ids.npy"))
    assert written == pytest.approx(found.chosen.bytes, rel=0.02)


def test_out_of_reach_leaves_the_gallery_as_it_was(gallery: Gallery) -> None:
    state = gallery.snapshot.manifest
    with pytest.raises(GalleryError, match=r"surely reaches recall 0\.999.* ask for less or give more memory"):
        tune(gallery, clustered(1, 100), source="", target_recall=0.999, memory=int(0.9 * 4 * DIM * COUNT), k=K)
    with pytest.raises(GalleryError, match="bytes hold no index"):
        tune(gallery, clustered(1, 100), source="", memory=100, k=K)
    assert gallery.snapshot.manifest == state


def test_a_small_gallery_is_searched_exactly(tmp_path: Path) -> None:
    with create(tmp_path / "g", dim=DIM) as gallery:
        gallery.add([item(f"{n}") for n in range(200)], clustered(0, 200))
        found = tune(gallery, clustered(1, 60), source="", k=K)
        assert (str(found.chosen), found.held_out_recall, len(found.points)) == ("exact", 1, 1)
        assert gallery.info()["search"] == "exact"
        assert true_recall(gallery, clustered(2, 20)) == 1


def test_a_dry_run_installs_nothing(gallery: Gallery) -> None:
    state = gallery.snapshot.manifest
    tune(gallery, clustered(1, 60), source="", target_recall=0.5, k=K, dry_run=True)
    assert gallery.snapshot.manifest == state


def test_a_large_gallery_is_compared_on_a_sample(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "COMPARE_ON", 1500)
    speeds(monkeypatch, "PQ8x4fsr,RFlat")
    stages = []
    found = tune(gallery, clustered(1, 400), source="", target_recall=0.9, k=K, progress=lambda *of: stages.append(of))
    assert (found.compared_on, found.items) == (1500, COUNT)
    # The winner is built again on everything, with the lists that so many ask for.
    assert found.chosen.index == candidates(COUNT, DIM)[0][0] != candidates(1500, DIM)[0][0]
    assert {total for stage, _, total in stages if stage.endswith("adding")} == {1500, COUNT}
    assert all(done <= total for _, done, total in stages)
    assert len(gallery._searching().index) == COUNT
    assert true_recall(gallery, clustered(2, 200)) == pytest.approx(found.held_out_recall, abs=0.05)


def test_tuning_again_replaces_and_untuned_parts_stay(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, "HNSW32")
    tune(gallery, clustered(1, 100), source="first", target_recall=0.5, k=K)
    gallery.remove([1, 2, 3])
    more = gallery.add([item("more")], clustered(5, 1))
    assert gallery.nearest(clustered(5, 1), 1).ids.tolist() == [more.tolist()]
    tune(gallery, clustered(1, 100), source="second", target_recall=0.5, k=K)
    assert (gallery.curve() or {})["queries_from"] == "second"
    assert len(list((gallery.directory / "index").iterdir())) == 1
    assert len(gallery._searching().index) == COUNT - 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_recall": 0.0}, "above 0 and at most 1"),
        ({"target_recall": 1.5}, "above 0 and at most 1"),
        ({"k": 0}, "k from 1"),
        ({"queries": clustered(1, 3)}, "3 queries for 3000 items; tuning needs 50"),
        ({"queries": np.ones((60, DIM + 1), np.float32)}, r"vectors of shape \(60, 17\)"),
        ({"queries": np.full((60, DIM), np.nan, np.float32)}, "query 0: its vector is not finite"),
    ],
)
def test_refusals(gallery: Gallery, change: dict[str, Any], message: str) -> None:
    queries = change.pop("queries", clustered(1, 60))
    with pytest.raises(GalleryError, match=message):
        tune(gallery, queries, source="", **change)


def test_order_galleries_are_refused(tmp_path: Path) -> None:
    with create(tmp_path / "g", dim=DIM, metric="order") as gallery, pytest.raises(GalleryError, match="only cosine"):
        tune(gallery, clustered(1, 60), source="")


def test_the_curve_is_plain_json(gallery: Gallery) -> None:
    found = tune(gallery, clustered(1, 60), source="", target_recall=0.5, k=K, dry_run=True)
    assert json.loads(json.dumps(found.to_json("here")))["points"][0]["index"] == "exact"


@pytest.mark.parametrize(("count", "dim"), [(1000, 7), (200_000, 512), (10_000_000, 300)])
def test_candidates_fit_any_size(count: int, dim: int) -> None:
    for factory, row_bytes, grid in candidates(count, dim):
        assert row_bytes > 0
        assert grid
        codes = factory.partition("PQ")[2].partition("x")[0]
        assert not codes or dim % int(codes) == 0
        lists = factory.removeprefix("IVF").partition(",")[0]
        assert not lists.isdigit() or (int(lists) <= count / 8 and all(of["nprobe"] <= int(lists) for of in grid))
