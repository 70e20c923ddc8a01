"""Vectors, the items behind them and the model they came from, kept together in one directory."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError
from index.files import replacing
from index.items import JSON, Item, ItemTable
from index.vector_index import METRICS, VectorIndex, as_rows

_FORMAT = 1
_MANIFEST = "gallery.json"


@dataclass(frozen=True)
class Hit:
    """One search result.

    Attributes:
        id: The item's id; a path added again gets a new one.
        item: What was found.
        score: Similarity to the query, higher is better.
    """

    id: int
    item: Item
    score: float


class Gallery:
    """A searchable collection of items and their vectors that survives crashes and full disks.

    A gallery is a directory: ``gallery.json`` (format, dimensions, metric, model), ``items.sqlite`` and
    ``segments/*.npy``, one immutable float32 ``(N, D)`` file per :meth:`add`. A segment is on disk before
    the transaction that names it, so a crash leaves at worst a file that nothing names and that the next
    :meth:`add` overwrites. The vectors are searched in memory.

    One process may write; any number may read meanwhile, each seeing the state at which it opened.
    Several threads may search at once, but none while another adds or removes.
    """

    def __init__(self, directory: str | os.PathLike[str], *, writable: bool = False) -> None:
        self.directory = Path(directory)
        self._manifest = _Manifest.read(self.directory)
        self._index: VectorIndex = METRICS[self._manifest.metric](self._manifest.dim)
        self._writable = writable
        with ExitStack() as resources:
            if writable:
                resources.enter_context(_writing(self.directory))
            self._items = ItemTable(self.directory / "items.sqlite", writable=writable)
            resources.enter_context(closing(self._items))
            self._load_vectors()
            self._resources = resources.pop_all()

    @classmethod
    def create(cls, directory: str | os.PathLike[str], *, dim: int, metric: str, model: Mapping[str, str]) -> Self:
        """Make an empty gallery and open it for writing.

        Args:
            directory: Where; made if it is missing.
            dim: Dimensions of the vectors.
            metric: A key of :data:`index.vector_index.METRICS`; ``cosine`` expects unit vectors.
            model: What the vectors come from, e.g. its ``name`` and ``checksum``.

        Raises:
            GalleryError: If there is a gallery already, or ``dim`` or ``metric`` makes no sense.
        """
        directory = Path(directory)
        if dim < 1 or metric not in METRICS:
            raise GalleryError(f"{directory}: dim {dim}, metric {metric!r}; choose from {', '.join(METRICS)}")
        (directory / "segments").mkdir(parents=True, exist_ok=True)
        with _writing(directory):
            if (directory / _MANIFEST).exists():
                raise GalleryError(f"{directory}: is a gallery already; open it or choose another directory")
            ItemTable.create(directory / "items.sqlite")
            # The manifest makes it a gallery, so it comes last.
            _Manifest(dim, metric, dict(model)).write(directory)
        return cls(directory, writable=True)

    @staticmethod
    def exists(directory: str | os.PathLike[str]) -> bool:
        """Whether there is a gallery in the directory, damaged or not."""
        return (Path(directory) / _MANIFEST).exists()

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, writable: bool = False) -> Self:
        """Open a gallery for searching or, one process at a time, for writing too.

        Raises:
            GalleryError: If there is none, it is damaged, or another process is writing to it.
        """
        return cls(directory, writable=writable)

    def close(self) -> None:
        """Release the files and, for a writer, let others write."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of items."""
        return len(self._index)

    def add(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Add items, replacing those with the same paths; on disk when this returns, or not at all.

        Args:
            items: What the vectors stand for, ``(N,)``, each path once.
            vectors: float32 ``(N, D)``; unit vectors for ``cosine``.

        Returns:
            The items' ids, int64 ``(N,)``; an id is never given twice.

        Raises:
            GalleryError: If a vector or item cannot be stored, naming its path, or the disk is full.
        """
        paths = [item.path for item in items]
        if len(vectors) != len(paths):
            raise GalleryError(f"{self.directory}: {len(vectors)} vectors for {len(paths)} items; give one each")
        rows = as_rows(vectors, self._manifest.dim, paths.__getitem__)
        if len(set(paths)) < len(paths):
            twice = next(path for n, path in enumerate(paths) if path in paths[:n])
            raise GalleryError(f"{twice}: occurs twice among the items to add; give each path once")
        if not paths:
            return np.empty(0, np.int64)
        with self._change():
            replaced = self._items.ids_of(paths)
            # Named after its first id, a segment never takes the place of one that a reader may still open.
            segment = self._items.next_id()
            ids = np.arange(segment, segment + len(items))
            with replacing(self._segment(segment)) as file:
                np.save(file, rows, allow_pickle=False)
            self._items.insert(items, ids, segment)
        if len(replaced):
            self._index.remove(replaced)
        self._index.add(ids, rows)
        return ids

    def remove(self, keys: Iterable[str | int]) -> int:
        """Remove items by path or id; returns how many were there.

        Raises:
            GalleryError: If the gallery is open for reading, or the disk is full.
        """
        keys = list(keys)
        with self._change():
            by_path = self._items.ids_of([key for key in keys if isinstance(key, str)])
            ids = np.append(by_path, np.array([key for key in keys if not isinstance(key, str)], np.int64))
            self._items.delete(ids)
        return self._index.remove(ids)

    def has_unchanged(self, path: str, size: int, mtime_ns: int) -> bool:
        """Whether the file is here as it is now, so that it need not be encoded again.

        Args:
            path: The file's path, as in :attr:`Item.path`.
            size: Its size in bytes.
            mtime_ns: Its time of last change, in nanoseconds since the epoch.
        """
        return self._items.has_unchanged(path, size, mtime_ns)

    def search(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None
    ) -> list[list[Hit]]:
        """Find the ``k`` best items for each query, best first.

        Args:
            vectors: Queries, float32 ``(Q, D)``; unit vectors for ``cosine``.
            k: Hits per query, at least 1; there are fewer only if the gallery or ``allowed`` is smaller.
            allowed: int64 ``(M,)``; only items of these ids may be found. None allows all.

        Raises:
            GalleryError: If ``k`` is below 1, a query is not finite, or its dimensions are not the gallery's.
        """
        scores, ids = self._index.search(vectors, min(k, max(1, len(self))), allowed)
        items = dict(self._items.select(np.unique(ids)))
        return [
            [Hit(key, items[key], score) for key, score in zip(*row, strict=True) if key >= 0]
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def items(self) -> Iterator[tuple[int, Item]]:
        """Every id and its item, in the order they were added."""
        return self._items.select()

    def info(self) -> dict[str, JSON]:
        """Items, dimensions, metric, model, number of segments, and bytes on disk."""
        segments = list((self.directory / "segments").glob("*.npy"))
        files = [*segments, *self.directory.glob("items.sqlite*")]
        return {
            "items": len(self),
            **asdict(self._manifest),
            "segments": len(segments),
            "bytes": sum(file.stat().st_size for file in files),
        }

    @property
    def model(self) -> dict[str, str]:
        """What the vectors come from: ``name`` and ``checksum`` of the model."""
        return dict(self._manifest.model)

    def check_model(self, checksum: str) -> None:
        """Refuse a model whose vectors cannot be compared with those here, wherever it lies.

        Raises:
            GalleryError: If the gallery was made with other weights.
        """
        if checksum != self.model.get("checksum"):
            raise GalleryError(
                f"{self.directory}: its vectors come from {self.model.get('name')!r} as it was then, not from "
                "this model; use that one, or build a new gallery with this one"
            )

    def _segment(self, segment: int) -> Path:
        return self.directory / "segments" / f"{segment:09d}.npy"

    def _load_vectors(self) -> None:
        places = self._items.locations()
        vectors = np.empty((len(places), self._manifest.dim), np.float32)
        for start, stop in pairwise(np.flatnonzero(np.diff(places[:, 1], prepend=-1, append=-1))):
            segment = self._segment(places[start, 1])
            _read_rows(segment, places[start:stop, 2], vectors[start:stop])
        self._index.add(places[:, 0], vectors)

    @contextmanager
    def _change(self) -> Iterator[None]:
        if not self._writable:
            raise GalleryError(f"{self.directory}: is open for reading; open it with writable=True")
        try:
            with self._items.transaction():
                yield
        except (OSError, sqlite3.OperationalError) as error:
            raise GalleryError(f"{self.directory}: unchanged, {error}; make room and try again") from error


@dataclass(frozen=True)
class _Manifest:
    """What is fixed when a gallery is made."""

    dim: int
    metric: str
    model: dict[str, str]

    def write(self, directory: Path) -> None:
        with replacing(directory / _MANIFEST) as file:
            file.write(json.dumps({"format": _FORMAT, **asdict(self)}, indent=2).encode())

    @classmethod
    def read(cls, directory: Path) -> Self:
        path = directory / _MANIFEST
        try:
            stored = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise GalleryError(f"{path}: not found, so this is no gallery; create one or check the path") from error
        except ValueError as error:
            raise GalleryError(f"{path}: {error}; restore it or build the gallery again") from error
        match stored:
            case {"format": version} if version != _FORMAT:
                raise GalleryError(f"{path}: format {version}, but this version reads {_FORMAT}; update it")
            case {"dim": int(dim), "metric": str(metric), "model": dict(model)} if dim > 0 and metric in METRICS:
                return cls(dim, metric, model)
        raise GalleryError(f"{path}: fields are missing or wrong; restore it or build the gallery again")


def _writing(directory: Path) -> IO[bytes]:
    """A held lock; closing it, or the end of the process, lets others write."""
    lock = (directory / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise GalleryError(f"{directory}: another writer has this gallery open; wait for it to close") from error
    return lock


def _read_rows(segment: Path, rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Copy ascending rows of a segment into ``out``, float32 ``(len(rows), D)``."""
    try:
        stored = np.load(segment, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise GalleryError(f"{segment}: {error}; restore it or build the gallery again") from error
    dim = out.shape[1]
    if stored.dtype != np.float32 or stored.shape[1:] != (dim,) or not 0 <= rows[0] <= rows[-1] < len(stored):
        raise GalleryError(
            f"{segment}: holds {stored.dtype} {stored.shape}, not float32 ({rows[-1] + 1} or more, {dim}); "
            "restore it or build the gallery again"
        )
    # The rows are known to be there; without a mode numpy would copy everything once more.
    np.take(stored, rows, axis=0, out=out, mode="clip")
    if not np.isfinite(out).all():
        raise GalleryError(f"{segment}: holds vectors that are not finite; restore it or build the gallery again")
