"""One state of a gallery, open for reading: its segments taken together."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from threading import Lock, Thread

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError
from index.filters import COLUMNS, Condition, all_hold, written
from index.items import Item
from index.manifest import Manifest
from index.segment import BLOCK_BYTES, Segment, check_part
from index.vector_index import is_among

_ATTEMPTS = 10
_ITEMS_AT_ONCE = 4096
_FOUND, _FOUND_BYTES = 64, 1 << 25
"""So many answers to conditions, and bytes of them, are kept: whoever filters asks for the same again and again."""
_NAMED = 40
"""Fields that are named to whoever asked for one that is unknown."""


class Snapshot:
    """The items and vectors that one manifest names. Later changes do not show, and files that they
    delete stay readable until :meth:`close`.

    Attributes:
        directory: The gallery.
        manifest: The state.
        segments: Its segments, in order of their ids.
    """

    def __init__(self, directory: Path, manifest: Manifest, segments: Sequence[Segment]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.segments = segments
        self._ends = [int(segment.ids[-1]) for segment in segments]
        self._found: dict[tuple[object, ...], NDArray[np.int64]] = {}
        self._lock = Lock()

    @classmethod
    def open(cls, directory: Path, manifest: Manifest | None = None, former: Snapshot | None = None) -> Snapshot:
        """Open a state.

        Args:
            directory: The gallery.
            manifest: The state, or None for the current one.
            former: A snapshot to be replaced, which lends the segments that are still the same: :meth:`retire` it.

        Raises:
            GalleryError: If it is damaged.
        """
        for attempt in range(_ATTEMPTS):
            state = manifest or Manifest.read(directory)
            try:
                return cls._open(directory, state, former)
            except GalleryError:
                # Between the reading of a manifest and the opening of its files a writer may have merged them away.
                if manifest is not None or attempt == _ATTEMPTS - 1 or Manifest.read(directory) == state:
                    raise
        raise AssertionError

    @classmethod
    def _open(cls, directory: Path, manifest: Manifest, former: Snapshot | None) -> Snapshot:
        for whole in (manifest.index, manifest.calibration):
            if whole:
                check_part(directory, whole, ())
        lent = {segment.part.name: segment for segment in former.segments} if former else {}
        segments = []
        with ExitStack() as opened:
            for part in manifest.segments:
                segment = lent.get(part.name)
                if segment is None or segment.part != part:
                    segment = opened.enter_context(closing(Segment(directory, part, manifest.dim)))
                segments.append(segment)
            ranges = np.array([[segment.ids[0], segment.ids[-1]] for segment in segments]).ravel()
            if (np.diff(ranges) < 0).any() or (np.diff(ranges)[1::2] == 0).any() or (ranges >= manifest.next_id).any():
                raise GalleryError(f"{directory}: segments share ids; restore it or build the gallery again")
            opened.pop_all()
        return cls(directory, manifest, segments)

    def close(self) -> None:
        """Release the files."""
        for segment in self.segments:
            segment.close()

    def retire(self, successor: Snapshot) -> None:
        """Release the files that were not lent to a successor, in a thread: who closes a deleted file last has to
        wait until the disk has freed it."""
        kept = set(map(id, successor.segments))
        gone = Snapshot(
            self.directory, self.manifest, [segment for segment in self.segments if id(segment) not in kept]
        )
        if gone.segments:
            Thread(target=gone.close, name="closing").start()

    def ids(self) -> NDArray[np.int64]:
        """Ids of all items, int64 ``(N,)``, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(segment.ids[segment.alive] for segment in self.segments)])

    def gone_since(self, former: Snapshot) -> NDArray[np.int64]:
        """Ids of the items of an earlier state that are not here, int64, looking only at segments that changed."""

        def only_in(one: Snapshot, other: Snapshot) -> NDArray[np.int64]:
            same = {(segment.part.name, segment.part.removed) for segment in other.segments}
            changed = (each for each in one.segments if (each.part.name, each.part.removed) not in same)
            return np.concatenate([np.empty(0, np.int64), *(each.ids[each.alive] for each in changed)])

        before = only_in(former, self)
        return before[~is_among(before, only_in(self, former))]

    def blocks(
        self, after: int = 0, among: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids and vectors in order of id, in blocks of bounded size.

        Args:
            after: Leave out ids up to this one.
            among: int64 ``(M,)``, ascending: only these, as far as they are here. None means all.
        """
        if among is not None and len(among) * 4 < self.manifest.items:
            # Few: reading just their rows is less than reading everything.
            step = max(1, BLOCK_BYTES // (4 * self.manifest.dim))
            for start in range(0, len(among), step):
                ids = among[start : start + step]
                yield ids, self.vectors(ids)
            return
        for segment in self.segments:
            for ids, vectors in segment.blocks(after):
                if among is not None:
                    start, stop = np.searchsorted(among, [ids[0], ids[-1] + 1])
                    wanted = np.isin(ids, among[start:stop], assume_unique=True)
                    ids, vectors = ids[wanted], vectors[wanted]
                yield ids, vectors

    def vectors(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of these ids.

        Args:
            ids: int64 ``(M,)``, in any order.

        Returns:
            float32 ``(M, D)``.

        Raises:
            GalleryError: If an id is not here.
        """
        vectors = np.empty((len(ids), self.manifest.dim), np.float32)
        found = np.zeros(len(ids), bool)
        order = np.argsort(ids, kind="stable")  # rows of a file are read in the order in which they lie there
        for segment, places in self._shares(ids, order):
            rows = segment.rows_of(ids[places])
            here = places[rows >= 0]
            vectors[here] = segment.take(rows[rows >= 0])
            found[here] = True
        if not found.all():
            raise GalleryError(f"{self.directory}: has no item {ids[~found][0]}; it may have been removed")
        return vectors

    def item(self, key: int) -> Item:
        """The item of an id that a search of this state has found."""
        return self.segments[bisect_left(self._ends, key)].items.get(key)

    def items(self, ids: NDArray[np.int64] | None = None) -> Iterator[tuple[int, Item]]:
        """Ids and items in order of id: all of them, or those of the given ids that are here."""
        wanted = self.ids() if ids is None else np.unique(ids)
        for segment, places in self._shares(wanted, np.arange(len(wanted))):
            rows = segment.rows_of(wanted[places])
            rows = rows[rows >= 0]
            for start in range(0, len(rows), _ITEMS_AT_ONCE):
                yield from segment.items.select(segment.ids[rows[start : start + _ITEMS_AT_ONCE]])

    def ids_of(self, paths: Sequence[str]) -> NDArray[np.int64]:
        """Ids of those paths that are here, int64, ascending."""
        return self._alive(segment.items.ids_of(paths) for segment in self.segments)

    def ids_below(self, folders: Sequence[str]) -> NDArray[np.int64]:
        """Ids of the items whose path is one of these, or below it as a folder, int64, ascending."""
        below = self._alive(segment.items.ids_below(folders) for segment in self.segments)
        return np.union1d(below, self.ids_of(folders))

    def ids_of_sizes(self, sizes: Collection[int]) -> NDArray[np.int64]:
        """Ids of the items whose files had so many bytes when they were added, int64, ascending."""
        return self._alive(segment.items.ids_of_sizes(sizes) for segment in self.segments)

    def ids_where(self, conditions: Sequence[Condition]) -> NDArray[np.int64]:
        """Ids of the items for which all conditions hold, int64, ascending; not to be written to, as they are kept."""
        where, parameters = all_hold(conditions)
        key = where, *parameters
        with self._lock:
            found = self._found.pop(key, None)
        if found is None:
            found = self._alive(segment.items.ids_where(conditions) for segment in self.segments)
            found.flags.writeable = False
        with self._lock:
            self._found[key] = found  # the latest comes last
            while len(self._found) > _FOUND or sum(ids.nbytes for ids in self._found.values()) > _FOUND_BYTES:
                del self._found[next(iter(self._found))]
        return found

    def unknown_fields(self, conditions: Sequence[Condition]) -> str | None:
        """A line that names fields of the conditions that no item has, and those there are; None if all are known."""
        unknown = [
            condition.field
            for condition in conditions
            if self.segments and not any(segment.items.has(condition) for segment in self.segments)
        ]
        if not unknown:
            return None
        names = sorted({written(name) for segment in self.segments for name in segment.items.metadata_names()})
        more = ", …" if len(names) > _NAMED else ""
        known = ", ".join([*COLUMNS, *names[:_NAMED]])
        return f"no item has a field {', '.join(map(repr, unknown))}; fields are {known}{more}"

    def paths(self) -> Iterator[tuple[int, str]]:
        """Id and path of every item, in order of id."""
        for key, path, *_ in self._facts(None):
            yield key, path

    def unchanged(self, files: Mapping[str, tuple[int, int]]) -> set[str]:
        """Which of these files are here as they are now.

        Args:
            files: Size in bytes and time of change in nanoseconds, by path.
        """
        # Looking up is several times as long as reading on, in each segment.
        few = len(files) * 4 * len(self.segments) < self.manifest.items
        return {path for _, path, *now in self._facts(list(files) if few else None) if files.get(path) == tuple(now)}

    def _facts(self, paths: Sequence[str] | None) -> Iterator[tuple[int, str, int, int]]:
        for segment in self.segments:
            if paths is not None:
                found = list(segment.items.facts(paths))
                rows = segment.rows_of(np.array([key for key, *_ in found], np.int64))
                yield from (facts for facts, row in zip(found, rows.tolist(), strict=True) if row >= 0)
                continue
            alive = set(segment.ids[segment.alive].tolist())
            yield from (facts for facts in segment.items.facts() if facts[0] in alive)

    def _alive(self, found: Iterator[NDArray[np.int64]]) -> NDArray[np.int64]:
        kept = [np.empty(0, np.int64)]
        for segment, ids in zip(self.segments, found, strict=True):
            rows = np.sort(segment.rows_of(ids))
            kept.append(segment.ids[rows[rows >= 0]])
        return np.concatenate(kept)

    def _shares(self, ids: NDArray[np.int64], order: NDArray[np.intp]) -> Iterator[tuple[Segment, NDArray[np.intp]]]:
        """For each segment the places of the ids that can only be there; ``order`` sorts the ids."""
        bounds = np.searchsorted(ids[order], self._ends, side="right")
        for segment, (start, stop) in zip(self.segments, pairwise([0, *bounds]), strict=True):
            if start < stop:
                yield segment, order[start:stop]
