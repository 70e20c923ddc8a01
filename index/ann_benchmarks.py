"""Reading the HDF5 files of ann-benchmarks: vectors, queries, and the queries' true neighbours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError

_MOST_COMPRESSED = 1100
"""Deflate makes nothing smaller than about a thousandth."""


@dataclass(frozen=True)
class AnnBenchmark:
    """A file in the layout of ann-benchmarks (Aumüller et al. 2020, "ANN-Benchmarks"); its vectors stay on disk.

    Attributes:
        path: Where.
        distance: What the neighbours are the nearest by, e.g. ``angular`` or ``euclidean``.
        rows: Number of vectors.
        dim: Dimensions of a vector.
        queries: float32 ``(Q, dim)``, as they are in the file: not necessarily unit vectors.
        neighbors: int64 ``(Q, K)``, rows of the true nearest vectors, nearest first.
    """

    path: Path
    distance: str
    rows: int
    dim: int
    queries: NDArray[np.float32]
    neighbors: NDArray[np.int64]

    def blocks(self, rows: int = 10_000) -> Iterator[NDArray[Any]]:
        """The vectors in order, floating point ``(rows, dim)`` each and the last one shorter.

        Raises:
            GalleryError: If the file is damaged.
        """
        with _opened(self.path) as file:
            train = _dataset(file, "train", "f")
            for start in range(0, self.rows, rows):
                block: NDArray[Any] = train[start : start + rows]
                yield block


def read_ann_benchmarks(path: str | os.PathLike[str]) -> AnnBenchmark:
    """Open a file such as ``coco-t2i-512-angular.hdf5`` and read all but its vectors.

    Raises:
        GalleryError: If h5py is missing, or the file is damaged or in another layout.
    """
    path = Path(path)
    with _opened(path) as file:
        train, test, neighbors = _dataset(file, "train", "f"), _dataset(file, "test", "f"), _dataset(file, "neighbors")
        rows, dim = train.shape
        if test.shape[1] != dim or len(neighbors) != len(test):
            raise ValueError(f"train {train.shape}, test {test.shape} and neighbors {neighbors.shape} do not fit")
        nearest = neighbors[:].astype(np.int64)
        if nearest.size and not 0 <= nearest.min() <= nearest.max() < rows:
            raise ValueError("neighbors are no rows of train")
        distance = file.attrs.get("distance", "")
        distance = distance.decode() if isinstance(distance, bytes) else str(distance)
        return AnnBenchmark(path, distance, rows, dim, test[:].astype(np.float32), nearest)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise GalleryError(f"{path}: h5py is needed to read it; pip install 'vse-app[exchange]'") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).strip("'\"").split())
        raise GalleryError(f"{path}: {reason}; give a file in the layout of ann-benchmarks") from error


def _dataset(file: Any, name: str, kinds: str = "iu") -> Any:
    """A dataset that lies in the file itself, whole; others could name any file or promise any size."""
    import h5py

    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise ValueError(f"has no {name} of its own")
    if dataset.ndim != 2 or dataset.dtype.kind not in kinds or not dataset.shape[1]:
        raise ValueError(f"{name} is {dataset.dtype} {dataset.shape}, not rows of numbers as expected")
    filtered = dataset.id.get_create_plist().get_nfilters() > 0
    if dataset.id.get_storage_size() * (_MOST_COMPRESSED if filtered else 1) < dataset.nbytes:
        raise ValueError(f"{name} promises {dataset.shape[0]:,} rows, more than the file holds")
    return dataset
