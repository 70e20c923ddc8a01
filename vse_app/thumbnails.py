"""Pictures of the gallery as small JPEGs: drawn once, and kept while there is room and the file is the same."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import Lock

from training.data.images import decode
from vse_app.decoding import decoding
from vse_app.uploads import to_jpeg

_Key = tuple[str, int, int, int, int, int]


class Thumbnails:
    """Draws them, and keeps them on disk in a file without a name, which nothing outlives and nobody else can open.

    Args:
        most_bytes: That the file takes; what was drawn longest ago makes room.
    """

    def __init__(self, most_bytes: int = 128 << 20) -> None:
        self._most_bytes = most_bytes
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (for as long as this lives)
        self._kept: OrderedDict[_Key, tuple[int, int]] = OrderedDict()  # where in the file: first byte and length
        self._end = 0
        self._lock = Lock()

    def read(self, path: Path, side: int) -> bytes:
        """A picture's JPEG file, at most ``side`` pixels long, pixels alone.

        Raises:
            InputError: If there is no such picture any more.
            Busy: If too many others are being read.
        """
        if (kept := self._find(path, side)) is not None:
            return kept
        with decoding.turn():
            if (kept := self._find(path, side)) is not None:  # somebody was waiting for the same one
                return kept
            key = _key(path, side)
            content = to_jpeg(decode(path, side))
        if key is not None:
            with suppress(OSError):  # without room on the disk it is drawn again next time
                self._keep(key, content)
        return content

    def _find(self, path: Path, side: int) -> bytes | None:
        with self._lock:
            place = self._kept.get(key) if (key := _key(path, side)) else None
            return os.pread(self._file.fileno(), place[1], place[0]) if place else None

    def _keep(self, key: _Key, content: bytes) -> None:
        if len(content) > self._most_bytes:
            return
        with self._lock:
            if self._end + len(content) > self._most_bytes:  # begin the file anew
                self._forget(self._end, self._most_bytes)
                self._end = 0
            self._forget(self._end, self._end + len(content))
            os.pwrite(self._file.fileno(), content, self._end)
            self._kept.pop(key, None)
            self._kept[key] = self._end, len(content)
            self._end += len(content)

    def _forget(self, start: int, stop: int) -> None:
        """Those that lie there: they are the oldest, in this order."""
        while self._kept and start <= next(iter(self._kept.values()))[0] < stop:
            self._kept.popitem(last=False)


def _key(path: Path, side: int) -> _Key | None:
    """What tells a file from what it was before: its time of change of state cannot be set back."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, side
