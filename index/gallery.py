"""Vectors, the items behind them and the model they came from, kept together in one directory."""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from index import changes
from index.approximate_index import ApproximateIndex
from index.errors import GalleryError, ModelError, remedy
from index.files import locked, make_directory
from index.filters import Condition
from index.items import JSON, Item, check_item
from index.manifest import KINDS, NAME, Manifest, Part
from index.searcher import CURVE, Searcher, index_lag, read_curve
from index.segment import check_part
from index.snapshot import Snapshot
from index.vector_index import SearchHits, as_ids, as_queries, as_rows, check_unit, checked_k, is_among

REFILL_AT = 10_000, 0.1
"""A tuned index is written again once so many items, and this share, are not in its file but added at opening."""


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

    A gallery is a directory of parts that are written once and checksummed: segments of vectors and items,
    a tuned index, a calibration. ``gallery.json`` names the parts of the current state. A change writes new
    parts, waits until they are on disk, and replaces ``gallery.json``; so a crash leaves the state before or
    after it, and at worst files that nothing names, which the next writer deletes.

    One process may write; any number may read meanwhile, each seeing the state at which it opened until it
    calls :meth:`refresh`. Several threads may search at once, but none while another changes or refreshes.

    Vectors are compared one and all, in memory, or looked up in a tuned index (:mod:`index.tuning`).

    Attributes:
        directory: Where.
        snapshot: The current state.
    """

    def __init__(self, directory: str | os.PathLike[str], *, writable: bool = False) -> None:
        self.directory = Path(directory)
        self._writable = writable
        self._searcher: Searcher | None = None
        self._stamp: tuple[int, int, int, bytes] | None = None
        self._closed = False
        with ExitStack() as resources:
            if writable and self.exists(self.directory):
                self._check_lock = resources.enter_context(locked(self.directory))
            self.snapshot = Snapshot.open(self.directory)
            resources.callback(lambda: self.snapshot.close())
            if writable:
                changes.delete_leftovers(self.directory, self.snapshot.manifest)
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
            GalleryError: If there is a gallery already, or ``dim``, ``metric`` or ``model`` makes no sense.
        """
        directory = Path(directory)
        try:
            empty = Manifest(dim, metric, dict(model), secrets.token_hex(8))
        except (ValueError, TypeError) as error:
            raise GalleryError(f"{directory}: {error}") from error
        try:
            make_directory(directory)
            with locked(directory):
                if cls.exists(directory):
                    raise GalleryError(f"{directory}: is a gallery already; open it or choose another directory")
                if taken := [kind for kind in KINDS if (directory / kind).exists()]:
                    raise GalleryError(f"{directory}: has {', '.join(taken)} of its own; choose another directory")
                empty.write(directory, None)
        except OSError as error:
            mend = remedy(error, "choose a directory that can be written")
            raise GalleryError(f"{directory}: {error.strerror}; {mend}") from error
        return cls(directory, writable=True)

    @staticmethod
    def exists(directory: str | os.PathLike[str]) -> bool:
        """Whether there is a gallery in the directory, damaged or not."""
        return Path(directory, NAME).exists()

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, writable: bool = False) -> Self:
        """Open a gallery for searching or, one process at a time, for writing too.

        Raises:
            GalleryError: If there is none, it is damaged, or another process is writing to it.
        """
        return cls(directory, writable=writable)

    def close(self) -> None:
        """Release the files and, for a writer, let others write."""
        self._closed = True
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of items."""
        return self.snapshot.manifest.items

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return self.snapshot.manifest.dim

    @property
    def metric(self) -> str:
        """A key of :data:`index.vector_index.METRICS`."""
        return self.snapshot.manifest.metric

    @property
    def model(self) -> dict[str, str]:
        """What the vectors come from: ``name`` and ``checksum`` of the model."""
        return dict(self.snapshot.manifest.model)

    def check_model(self, checksum: str) -> None:
        """Refuse a model whose vectors cannot be compared with those here, wherever it lies.

        Raises:
            ModelError: If the gallery was made with other weights.
        """
        if checksum != self.model.get("checksum"):
            raise ModelError(
                f"{self.directory}: its vectors come from {self.model.get('name')!r} as it was then, not from "
                "this model; use that one, or build a new gallery with this one"
            )

    def rename_model(self, name: str) -> None:
        """Say where the model is now; its checksum stays.

        Raises:
            GalleryError: If the gallery is open for reading, or the disk is full.
        """
        with self._change():
            self._commit(replace(self.snapshot.manifest, model={**self.model, "name": name}))

    def add(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Add items, replacing those with the same paths; on disk when this returns, or not at all.

        Args:
            items: What the vectors stand for, ``(N,)``, each path once.
            vectors: float32 ``(N, D)``; unit vectors for ``cosine``.

        Returns:
            The items' ids, int64 ``(N,)``, ascending; an id is never given twice.

        Raises:
            GalleryError: If a vector or item cannot be stored, naming its path, or the disk is full.
        """
        paths = [item.path for item in items]
        rows = as_rows(vectors, self.dim, paths.__getitem__)
        if len(rows) != len(paths):
            raise GalleryError(f"{self.directory}: {len(rows)} vectors for {len(paths)} items; give one each")
        if self.metric == "cosine":
            check_unit(rows, paths.__getitem__)
        with self._change():
            if not paths:
                return np.empty(0, np.int64)
            first = self.snapshot.manifest.next_id
            self._commit(changes.added(self.snapshot, items, rows))
        # Past this point the items are there to stay, so what only makes opening faster can wait for better times.
        with suppress(GalleryError), self._change():
            self._commit(changes.merged(self.snapshot))
            self._refill_if_behind()
        return np.arange(first, first + len(paths))

    def update(self, items: Mapping[int, Item]) -> None:
        """Change what is known of items, which keep their ids and vectors; on disk when this returns, or not at all.

        Args:
            items: By id. Others that have one of their paths are removed.

        Raises:
            GalleryError: If an id is not here, a path is there twice, an item cannot be stored, or the disk is full.
        """
        with self._change():
            for item in items.values():
                check_item(item)
            paths = [item.path for item in items.values()]
            if len(set(paths)) < len(paths):
                raise GalleryError(f"{self.directory}: a path occurs twice among the items; give each path once")
            ids = np.array(sorted(items), np.int64)
            if len(missing := ids[~is_among(ids, self.snapshot.ids())]):
                raise GalleryError(f"{self.directory}: has no item {missing[0]}; it may have been removed")
            self._commit(changes.removed(self.snapshot, np.setdiff1d(self.snapshot.ids_of(paths), ids)))
            self._commit(changes.updated(self.snapshot, items))

    def remove(self, keys: Iterable[str | int]) -> int:
        """Remove items by path or id; returns how many were there.

        Raises:
            GalleryError: If a key is neither, the gallery is open for reading, or the disk is full.
        """
        keys = [keys] if isinstance(keys, str) else list(keys)
        for key in keys:
            if isinstance(key, bool) or not isinstance(key, str | int | np.integer):
                raise GalleryError(f"{self.directory}: {key!r} is neither a path nor an id; nothing is removed")
        with self._change():
            before = len(self)
            by_path = self.snapshot.ids_of([key for key in keys if isinstance(key, str)])
            by_id = np.array([key for key in keys if not isinstance(key, str) and 0 < key < 1 << 62], np.int64)
            self._commit(changes.removed(self.snapshot, np.union1d(by_path, by_id)))
        return before - len(self)

    def compact(self) -> None:
        """Give back the space of removed items, and merge segments.

        Raises:
            GalleryError: If the gallery is open for reading, or the disk is full.
        """
        with self._change():
            self._commit(changes.compacted(self.snapshot))
            part = self.snapshot.manifest.index
            if part and isinstance(index := self._searching().index, ApproximateIndex) and index.removed:
                self._rewrite(part)

    def install_index(self, index: ApproximateIndex | None, curve: JSON) -> None:
        """Search by this index from now on, or compare with every vector if it is None.

        Args:
            index: Of all items here.
            curve: How that was decided, kept beside it.

        Raises:
            GalleryError: If the gallery is open for reading, or the disk is full.
        """
        with self._change():
            self._commit_index(index, json.dumps(curve, indent=1).encode())

    def install_calibration(self, write: Callable[[Path], None]) -> None:
        """Keep files about the model and the gallery as a whole, in place of earlier ones.

        Args:
            write: Puts them into the folder that it is given.
        """
        with self._change():
            self._commit(changes.with_part(self.snapshot, "calibration", write))

    def nearest(self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> SearchHits:
        """Find the ``k`` best vectors for each query, without their items.

        Args:
            vectors: Queries, float32 ``(Q, D)``; unit vectors for ``cosine``.
            k: Hits per query, at least 1, at most as many as there are items; rows end in ``-inf`` and ``-1`` only
                where no more are allowed.
            allowed: int64 ``(M,)``; only these ids may be found. None allows all. If they are few, each is compared.

        Raises:
            GalleryError: If ``k`` is below 1, a query is not finite or, for ``cosine``, no unit vector, or its
                dimensions are not the gallery's.
        """
        k = min(checked_k(k), max(1, len(self)))
        if self.metric == "cosine":
            check_unit(as_queries(vectors, self.dim, k), "query {}".format)
        return self._searching().nearest(vectors, k, None if allowed is None else as_ids(allowed))

    def search(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None
    ) -> list[list[Hit]]:
        """As :meth:`nearest`, with the items; fewer than ``k`` only if the gallery or ``allowed`` is smaller."""
        scores, ids = self.nearest(vectors, k, allowed)
        item = cache(self.snapshot.item)
        return [
            [Hit(key, item(key), score) for key, score in zip(*row, strict=True) if key >= 0]
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def vectors(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of these items, float32 ``(M, D)`` for int64 ``(M,)``; see :meth:`.Snapshot.vectors`."""
        return self.snapshot.vectors(as_ids(ids))

    def items(self, ids: NDArray[np.int64] | None = None) -> Iterator[tuple[int, Item]]:
        """Ids and items in order of id, all or those of ``ids`` that are here; until the gallery changes."""
        return self.snapshot.items(None if ids is None else as_ids(ids))

    def ids_of(self, paths: Sequence[str]) -> NDArray[np.int64]:
        """Ids of those paths that are here, int64, ascending."""
        return self.snapshot.ids_of(paths)

    def ids_of_sizes(self, sizes: Collection[int]) -> NDArray[np.int64]:
        """Ids of the items whose files had so many bytes when they were added, int64, ascending."""
        return self.snapshot.ids_of_sizes(sizes)

    def ids_where(self, conditions: Sequence[Condition]) -> NDArray[np.int64]:
        """Ids of the items for which all conditions hold, int64 ``(M,)``, ascending, read-only: for :meth:`search`."""
        return self.snapshot.ids_where(conditions)

    def unknown_fields(self, conditions: Sequence[Condition]) -> str | None:
        """A line that names fields of the conditions that no item has, and those there are; None if all are known."""
        return self.snapshot.unknown_fields(conditions)

    def unchanged(self, files: Mapping[str, tuple[int, int]]) -> set[str]:
        """Which files, given by path with size in bytes and time of change in ns, are here as they are now."""
        return self.snapshot.unchanged(files)

    def refresh(self) -> bool:
        """Go on to the current state, reading only what has changed; returns whether it is another one.

        Raises:
            GalleryError: If the gallery is damaged.
        """
        if self._closed:
            raise GalleryError(f"{self.directory}: is closed; open it again")
        stamp = Manifest.stamp(self.directory)  # taken first, so that a later state is never missed
        if stamp is not None and stamp == self._stamp:
            return False
        snapshot = Snapshot.open(self.directory, former=self.snapshot)
        another = snapshot.manifest != self.snapshot.manifest
        if another:
            self._go_on(snapshot)
        self._stamp = stamp
        return another

    def info(self) -> dict[str, JSON]:
        """Items, dimensions, metric, model, how it is searched, and what it takes on disk."""
        state = self.snapshot.manifest
        return {
            "items": len(self),
            "dim": state.dim,
            "metric": state.metric,
            "model": dict(state.model),
            "search": (self.curve() or {}).get("chosen", "exact, not tuned"),
            "segments": len(state.segments),
            "removed": sum(segment.rows - segment.live for segment in state.segments),
            "bytes": sum(record.bytes for part in state.parts() for record in part.files.values()),
        }

    def curve(self) -> dict[str, JSON] | None:
        """What :meth:`install_index` was given, if it was."""
        part = self.snapshot.manifest.index
        return read_curve(self.directory, part) if part else None

    def calibration_folder(self) -> Path | None:
        """Where the files of :meth:`install_calibration` are, if there are any."""
        part = self.snapshot.manifest.calibration
        return check_part(self.directory, part, ()) if part else None

    def _searching(self) -> Searcher:
        if self._searcher is None:
            self._searcher = Searcher(self.snapshot)
        return self._searcher

    @contextmanager
    def _change(self) -> Iterator[None]:
        if not self._writable:
            raise GalleryError(f"{self.directory}: is open for reading; open it with writable=True")
        # Whatever went wrong before, now or in an earlier change, the file says which state it is.
        self.refresh()
        self._check_lock()
        before = self.snapshot.manifest
        try:
            yield
        except Exception as error:
            self.refresh()
            self._check_lock()  # or it might delete what another writer is about to need
            changes.delete_leftovers(self.directory, self.snapshot.manifest)
            if not isinstance(error, GalleryError) and isinstance(error, OSError | sqlite3.Error | ValueError):
                state = "unchanged" if self.snapshot.manifest == before else "changed, but maybe not for good"
                mend = remedy(error, "open it again")
                raise GalleryError(f"{self.directory}: {state}, {error}; {mend}") from error
            raise

    def _commit(self, state: Manifest) -> None:
        former = self.snapshot.manifest
        if state == former:
            return
        # Opened first, so that no state becomes the current one that cannot be read.
        snapshot = Snapshot.open(self.directory, state, self.snapshot)
        try:
            self._check_lock()
            state.write(self.directory, former)
        except BaseException:
            snapshot.retire(self.snapshot)
            raise
        changes.delete_former(self.directory, former, state)
        self._go_on(snapshot)
        self._stamp = Manifest.stamp(self.directory)  # no other writer can have come in between

    def _go_on(self, snapshot: Snapshot) -> None:
        former, self.snapshot = self.snapshot, snapshot
        former.retire(snapshot)
        searcher, self._searcher = self._searcher, None  # forgotten if it cannot follow
        if searcher and former.manifest.uid == snapshot.manifest.uid:
            searcher.follow(snapshot)
            self._searcher = searcher

    def _commit_index(self, index: ApproximateIndex | None, curve: bytes) -> None:
        def write(folder: Path) -> None:
            (folder / CURVE).write_bytes(curve)
            if index is not None:
                index.save(folder)

        self._searcher = None
        self._commit(changes.with_part(self.snapshot, "index", write))
        if index is not None:
            self._searcher = Searcher(self.snapshot, index)

    def _refill_if_behind(self) -> None:
        """Write the tuned index again if opening the gallery would have to add or pass over too many."""
        part, most = self.snapshot.manifest.index, max(REFILL_AT[0], REFILL_AT[1] * len(self))
        if part and index_lag(self.snapshot) > most:
            self._rewrite(part, most)

    def _rewrite(self, part: Part, most_removed: float = 0) -> None:
        index = self._searching().index
        assert isinstance(index, ApproximateIndex)
        if index.removed > most_removed:
            index.compact(self.snapshot.blocks)
        self._commit_index(index, (self.directory / part.name / CURVE).read_bytes())
