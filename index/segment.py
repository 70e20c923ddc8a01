"""Vectors and items that were added or merged together: a directory of files written once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError, remedy
from index.files import FileRecord, check_directory, check_file, new_directory, replacing, sync
from index.items import Item, ItemFile, merge_items, write_items
from index.manifest import Part, SegmentPart

VECTORS, IDS, ITEMS = "vectors.npy", "ids.npy", "items.sqlite"
ITEMS_AGAIN = "items-"
"""What the file of the items begins with, before a number, once some of them are changed."""
_MEND = "restore it or build the gallery again"
_NEAR = 8
"""Reading so many rows in between takes less time than another call."""
BLOCK_BYTES = 1 << 24
"""Vectors are streamed in blocks of 16 MiB, so memory does not grow with the gallery."""


class Segment:
    """One segment as it is now, open for reading; its vectors stay on disk until they are touched.

    Attributes:
        part: What the manifest says of it.
        ids: int64 ``(N,)``, ascending.
        dim: Dimensions of the vectors, which stay on disk.
        alive: bool ``(N,)``, False for rows that are removed.
        items: Their items.

    Raises:
        GalleryError: If a file is missing, damaged or not what the manifest says.
    """

    def __init__(self, directory: Path, part: SegmentPart, dim: int) -> None:
        self.part = part
        items = next((name for name in part.files if name.startswith(ITEMS_AGAIN)), ITEMS)
        folder = check_part(directory, part, (VECTORS, IDS, items))
        self.ids: NDArray[np.int64] = map_array(folder / IDS, np.int64, (part.rows,))
        self.dim = dim
        # Looked at but not kept: pages of a mapping, once touched, would stay in memory.
        self._offset = part.files[VECTORS].bytes - map_array(folder / VECTORS, np.float32, (part.rows, dim)).nbytes
        self.alive = np.ones(part.rows, bool)
        if part.removed is not None:
            packed = map_array(folder / part.removed, np.uint8, (-(-part.rows // 8),))
            self.alive &= ~np.unpackbits(packed, count=part.rows).astype(bool)
        if self.alive.sum() != part.live or self.ids[0] < 1 or (self.ids[1:] <= self.ids[:-1]).any():
            raise GalleryError(f"{folder / IDS}: is not what the manifest says; {_MEND}")
        with ExitStack() as resources:
            # Held open, so that the rows can be read even after a writer has merged and deleted the segment.
            self._file = resources.enter_context(_open(folder / VECTORS))
            self.items = resources.enter_context(closing(ItemFile(folder / items)))
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Release the files."""
        self._resources.close()

    def rows_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the ids, int64 ``(M,)``; -1 for those that are not here or removed."""
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where((self.ids[rows] == ids) & self.alive[rows], rows, -1)

    def blocks(self, after: int = 0) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids above ``after`` and vectors of the rows that are not removed, in blocks."""
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        for start in range(int(np.searchsorted(self.ids, after, side="right")), len(self.ids), step):
            alive = self.alive[start : start + step]
            if alive.any():
                rows = self._read(start, len(alive))
                yield self.ids[start : start + step][alive], rows if alive.all() else rows[alive]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """These rows, int64 ``(M,)`` in ascending order, float32 ``(M, D)``; near ones are read in one go."""
        taken = np.empty((len(rows), self.dim), np.float32)
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        apart = np.flatnonzero((np.diff(rows) > _NEAR) | (np.diff(rows // step) > 0)) + 1
        for start, stop in pairwise([0, *apart.tolist(), len(rows)]):
            if start < stop:
                near = rows[start:stop]
                taken[start:stop] = self._read(int(near[0]), int(near[-1] - near[0]) + 1)[near - near[0]]
        return taken

    def without(self, directory: Path, ids: NDArray[np.int64], number: int) -> SegmentPart | None:
        """Write down that these ids, of which at least one is here, are removed.

        Returns:
            The segment as it is then, or None if nothing is left of it.

        Raises:
            OSError: If the disk is full.
        """
        rows = self.rows_of(ids)
        alive = self.alive.copy()
        alive[rows[rows >= 0]] = False
        if not alive.any():
            return None
        name = f"removed-{number:09d}.npy"
        path = directory / self.part.name / name
        with replacing(path) as file:
            removed = np.packbits(~alive)
            _write_array(file, [removed], removed.dtype, removed.shape)
        files = {key: record for key, record in self.part.files.items() if key != self.part.removed}
        return replace(self.part, files={**files, name: FileRecord.of(path)}, live=int(alive.sum()), removed=name)

    def updated(self, directory: Path, items: Mapping[int, Item], number: int) -> SegmentPart:
        """Write down that what is known of these ids, all of which are here, is another.

        Raises:
            GalleryError: If an item cannot be stored.
            OSError: If the disk is full.
        """
        name = f"{ITEMS_AGAIN}{number:09d}.sqlite"
        path = directory / self.part.name / name
        # What is removed stays out, as its path may be another's by now.
        out = np.union1d(self.ids[~self.alive], np.fromiter(items, np.int64))
        try:
            merge_items(path, [(self.items.path, out)], items)
            sync(path)
            sync(path.parent)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        files = {key: record for key, record in self.part.files.items() if key != self.items.path.name}
        return replace(self.part, files={**files, name: FileRecord.of(path)})

    def _read(self, start: int, count: int) -> NDArray[np.float32]:
        row_bytes = 4 * self.dim
        if self._file.closed:
            raise GalleryError(f"{self._file.name}: is closed; open the gallery again")
        try:
            read = os.pread(self._file.fileno(), count * row_bytes, self._offset + start * row_bytes)
        except OSError as error:
            raise GalleryError(f"{self._file.name}: {error.strerror}; {remedy(error, _MEND)}") from error
        if len(read) != count * row_bytes:
            raise GalleryError(f"{self._file.name}: ends early; {_MEND}")
        rows = np.frombuffer(read, np.float32).reshape(count, -1)
        if not np.isfinite(rows).all():
            raise GalleryError(f"{self._file.name}: holds vectors that are not finite; {_MEND}")
        return rows


def write_segment(
    directory: Path, name: str, items: Sequence[Item], ids: NDArray[np.int64], vectors: NDArray[np.float32]
) -> SegmentPart:
    """Put new items on disk.

    Args:
        directory: The gallery.
        name: The segment's, e.g. ``segments/000000001``.
        items: ``(N,)``, at least one.
        ids: int64 ``(N,)``, ascending.
        vectors: float32 ``(N, D)``.

    Raises:
        GalleryError: If an item cannot be stored; nothing is left on disk then.
        OSError: If the disk is full; nothing is left either.
    """
    with new_directory(directory / name) as folder:
        write_items(folder / ITEMS, items, ids)
        save_array(folder / IDS, ids)
        save_array(folder / VECTORS, vectors)
        return SegmentPart(name, records(folder), len(ids), len(ids))


def merge_segments(directory: Path, name: str, segments: Sequence[Segment]) -> SegmentPart:
    """Put what is not removed of several neighbouring segments into one; memory stays at one block.

    Raises:
        OSError: If the disk is full; nothing is left on disk then.
    """
    live = [segment.ids[segment.alive] for segment in segments]
    rows = sum(map(len, live))
    with new_directory(directory / name) as folder:
        merge_items(folder / ITEMS, [(segment.items.path, segment.ids[~segment.alive]) for segment in segments])
        save_array(folder / IDS, np.concatenate(live))
        vectors = (block for segment in segments for _, block in segment.blocks())
        with (folder / VECTORS).open("wb") as file:
            _write_array(file, vectors, np.dtype(np.float32), (rows, segments[0].dim))
        return SegmentPart(name, records(folder), rows, rows)


def check_part(directory: Path, part: Part, needed: Sequence[str]) -> Path:
    """The folder of a part whose files are all there, plain and of the right length.

    Raises:
        GalleryError: If one is not, or one that is needed is not in the manifest.
    """
    folder = directory / part.name
    missing = set(needed) - part.files.keys()
    if missing:
        raise GalleryError(f"{folder / min(missing)}: is not in the manifest; {_MEND}")
    check_directory(folder.parent)
    check_directory(folder)
    for name, record in part.files.items():
        check_file(folder / name, record.bytes)
    return folder


def map_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...] | None) -> NDArray[Any]:
    """Map a numpy file that must be as expected; a header that promises more than there is is refused.

    Args:
        path: The file.
        dtype: Of its elements.
        shape: Of the array; None for any number of elements in a row.

    Raises:
        GalleryError: If it is anything else.
    """
    try:
        # Unlike np.load this neither unpickles nor unzips, whatever the file says.
        mapped = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise GalleryError(f"{path}: {error.strerror or error}; {remedy(error, _MEND)}") from error
    except Exception as error:  # numpy evaluates the header as Python: any error may come of it
        reason = f"{error!s:.200}".replace("\n", " ")
        raise GalleryError(f"{path}: {reason}; {_MEND}") from error
    if mapped.dtype != dtype or mapped.shape != (mapped.shape[:1] if shape is None else shape):
        raise GalleryError(f"{path}: does not hold {dtype.__name__} {shape}; {_MEND}")
    if not mapped.flags.c_contiguous:
        raise GalleryError(f"{path}: holds columns instead of rows; {_MEND}")
    return mapped.view(np.ndarray)  # numpy's own class for maps is slow to index


def records(folder: Path) -> Mapping[str, FileRecord]:
    """Lengths and checksums of the files in a folder."""
    return {path.name: FileRecord.of(path) for path in sorted(folder.iterdir())}


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:  # a writer may have just deleted it
        raise GalleryError(f"{path}: {error.strerror}; {remedy(error, _MEND)}") from error


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a numpy file.

    Raises:
        OSError: If the disk is full, which :func:`numpy.save` overlooks: it leaves the end to a stream that C closes.
    """
    with path.open("wb") as file:
        _write_array(file, [array], array.dtype, array.shape)


def _write_array(file: BinaryIO, blocks: Iterable[NDArray[Any]], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """A numpy file whose length is known before its content."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(np.ascontiguousarray(block).data)
