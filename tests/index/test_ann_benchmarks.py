from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_tools import DIM, create, unit

from index.ann_benchmarks import read_ann_benchmarks
from index.errors import GalleryError
from index.exchange import import_vectors, source_shape
from index.gallery import Gallery

h5py = pytest.importorskip("h5py")


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    with create(tmp_path / "g") as created:
        yield created


def save_benchmark(path: Path, distance: str = "angular", **changed: Any) -> Path:
    rows, queries = 3 * unit(0, 40), 2 * unit(1, 8)
    neighbors = np.argsort(-(queries @ rows.T), axis=1)[:, :5]
    with h5py.File(path, "w") as file:
        file.attrs.update({"distance": distance, "type": "dense", "dimension": DIM})
        sets = {"train": rows, "test": queries, "neighbors": neighbors.astype(np.int32)} | changed
        for name, values in sets.items():
            if isinstance(values, np.ndarray):
                file.create_dataset(name, data=values)
            elif values is not None:
                file[name] = values
    return path


def test_ann_benchmarks_files_come_in_with_queries(gallery: Gallery, tmp_path: Path, small_batches: None) -> None:
    path = save_benchmark(tmp_path / "coco-6-angular.hdf5")
    data = read_ann_benchmarks(path)
    assert (data.rows, data.dim, data.distance) == (40, DIM, "angular")
    blocks = list(data.blocks(16))
    assert [len(block) for block in blocks] == [16, 16, 8]
    np.testing.assert_array_equal(np.concatenate(blocks), 3 * unit(0, 40))
    assert source_shape(path) == (40, DIM)
    report = import_vectors(gallery, path)
    assert (report.added, report.normalised, report.skipped_rows) == (40, 40, 0)
    queries = data.queries / np.linalg.norm(data.queries, axis=1, keepdims=True)
    hits = gallery.search(queries, 5)
    assert [[hit.item.path for hit in row] for row in hits] == [
        [f"coco-6-angular/{row}" for row in nearest] for nearest in data.neighbors.tolist()
    ]


def huge(path: Path) -> None:
    save_benchmark(path)
    with h5py.File(path, "a") as file:
        del file["train"]
        file.create_dataset("train", (10**10, DIM), np.float32)


def elsewhere(path: Path) -> None:
    np.zeros((40, DIM), np.float32).tofile(path.with_suffix(".raw"))
    save_benchmark(path, train=None)
    with h5py.File(path, "a") as file:
        raw = [(str(path.with_suffix(".raw")), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("train", (40, DIM), np.float32, external=raw)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: save_benchmark(path, "euclidean"), "euclidean distance"),
        (lambda path: save_benchmark(path, train=unit(0, 40, 7), test=unit(0, 8, 7)), "have 7 dimensions"),
        (lambda path: save_benchmark(path, test=unit(0, 8, 7)), "do not fit"),
        (lambda path: save_benchmark(path, neighbors=np.full((8, 5), 40)), "no rows of train"),
        (lambda path: save_benchmark(path, train=np.zeros((40, DIM), np.int8)), "train is int8"),
        (lambda path: save_benchmark(path, test=None), "has no test"),
        (
            lambda path: save_benchmark(path, train=h5py.ExternalLink("other.hdf5", "/train")),
            "has no train of its own",
        ),
        (huge, "more than the file holds"),
        (elsewhere, "has no train of its own"),
        (lambda path: path.write_bytes(b"no HDF5"), "layout of ann-benchmarks"),
        (lambda path: None, "No such file"),
    ],
)
def test_ann_benchmarks_files_that_are_refused(
    gallery: Gallery, tmp_path: Path, write: Callable[[Path], object], reason: str
) -> None:
    write(tmp_path / "a.hdf5")
    with pytest.raises(GalleryError, match=reason) as caught:
        import_vectors(gallery, tmp_path / "a.hdf5")
    assert "\n" not in str(caught.value)
    assert not len(gallery)


def test_h5py_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(GalleryError, match=r"h5py.*pip install 'vse-app\[exchange\]'"):
        read_ann_benchmarks(tmp_path / "a.hdf5")
