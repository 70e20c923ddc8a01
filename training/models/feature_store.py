"""A float array on disk that is filled chunk by chunk, and trusted only as far as its checksums agree."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.errors import InputError
from training.files import write_text

logger = logging.getLogger(__name__)

VALUES, PROGRESS, LOCK = "values.npy", "progress.json", "lock"


class FeatureStore:
    """The files of one entry of the feature cache; whoever makes one holds the entry's lock.

    What does not look like an entry is deleted, a damaged chunk forgotten; either is said.

    Args:
        directory: The entry.
        bounds: Chunk ``k`` is ``values[bounds[k]:bounds[k + 1]]``.

    Attributes:
        values: Memory-mapped, None until the first row is put.
        dtype: Theirs, float16 or float32.
    """

    def __init__(self, directory: Path, bounds: Sequence[int]) -> None:
        self.directory, self.bounds = directory, bounds
        self.values: NDArray[np.floating] | None = None
        self.dtype: type[np.floating] = np.float16
        self._checksums: dict[int, int] = {}
        if any(path.name != LOCK for path in directory.iterdir()):
            try:
                self._open()
            except Exception as error:  # anything may lie there, and parsers raise whatever they stumble on
                logger.warning("%s: cannot be used (%s); its features are computed again", directory, error)
                self.clear()

    def _open(self) -> None:
        if not (self.directory / PROGRESS).exists():
            self.clear()  # what a killed process had just begun
            return
        record = json.loads((self.directory / PROGRESS).read_text(encoding="utf-8"))
        values = np.lib.format.open_memmap(self.directory / VALUES, "r+")
        found = list(self.bounds), list(values.shape), values.dtype in (np.float16, np.float32)
        if found != (record["bounds"], record["shape"], True):
            raise ValueError("it holds something else")
        self.values, self.dtype = values, values.dtype.type
        self._checksums = {int(chunk): int(checksum) for chunk, checksum in record["checksums"].items()}
        damaged = [chunk for chunk, checksum in self._checksums.items() if self._checksum(chunk) != checksum]
        if damaged:
            logger.warning(
                "%s: %d of %d chunks are damaged; their features are computed again",
                self.directory,
                len(damaged),
                len(self.bounds) - 1,
            )
        for chunk in damaged:
            del self._checksums[chunk]

    @property
    def missing(self) -> list[int]:
        """Numbers of the chunks that are to be computed."""
        return [chunk for chunk in range(len(self.bounds) - 1) if chunk not in self._checksums]

    def put(self, start: int, rows: NDArray[np.float32]) -> None:
        """Write rows from position ``start`` on.

        Raises:
            FloatingPointError: If one is too large for the type.
            InputError: If there is no room for all that are to come.
        """
        if self.values is None:
            self.values = self._create((self.bounds[-1], *rows.shape[1:]))
        with np.errstate(over="raise"):
            self.values[start : start + len(rows)] = rows.astype(self.dtype)

    def _create(self, shape: tuple[int, ...]) -> NDArray[np.floating]:
        """The array on disk, its room taken: a disk that fills up later would kill a process that maps the file."""
        file, dtype = self.directory / VALUES, np.dtype(self.dtype)
        size = math.prod(shape) * dtype.itemsize
        try:
            with file.open("wb") as stream:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                stream.flush()
                if size:
                    os.posix_fallocate(stream.fileno(), stream.tell(), size)
        except OSError as error:
            file.unlink(missing_ok=True)
            free = shutil.disk_usage(self.directory).free
            raise InputError(
                f"{file}: the features take {_bytes(size)} ({error.strerror}, {_bytes(free)} are free); "
                "make room or set VSE_CACHE to a directory on another disk"
            ) from None
        return np.lib.format.open_memmap(file, "r+")

    def finish(self, chunk: int, label: str) -> None:
        """Note that a chunk is filled; its values and then the note reach the disk."""
        assert isinstance(self.values, np.memmap)
        self.values.flush()
        self._checksums[chunk] = self._checksum(chunk)
        record = {
            "label": label,
            "bounds": list(self.bounds),
            "shape": self.values.shape,
            "checksums": self._checksums,
        }
        write_text(self.directory / PROGRESS, json.dumps(record))

    def clear(self, dtype: type[np.floating] = np.float16) -> None:
        """Begin anew. Files are unlinked, not cut: another process may have them mapped."""
        self.values, self.dtype, self._checksums = None, dtype, {}
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _checksum(self, chunk: int) -> int:
        assert self.values is not None
        return zlib.crc32(self.values[self.bounds[chunk] : self.bounds[chunk + 1]].data)


def _bytes(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
