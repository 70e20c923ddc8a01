"""What stands behind each vector of a gallery, in SQLite."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

# AUTOINCREMENT remembers the highest id ever given, so an id always means the same vector.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE, caption TEXT, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL, metadata TEXT NOT NULL,
    segment INTEGER NOT NULL, row INTEGER NOT NULL
)
"""
_ITEM = "id, path, caption, size, mtime_ns, sha256, metadata"
_INSERT = f"INSERT OR REPLACE INTO items ({_ITEM}, segment, row) VALUES ({', '.join('?' * 9)})"
# One bound JSON array stands for any number of values, past SQLite's limit on parameters.
_GIVEN = "(SELECT value FROM json_each(?))"


@dataclass(frozen=True)
class Item:
    """A file whose vector a gallery holds.

    Attributes:
        path: Where the file is; the natural key of an item.
        caption: A sentence that describes it, if one is known.
        size: Bytes in the file.
        mtime_ns: When it was last changed, in nanoseconds since the epoch.
        sha256: Hexadecimal SHA-256 of its content.
        metadata: Whatever else is known, as JSON.
    """

    path: str
    caption: str | None
    size: int
    mtime_ns: int
    sha256: str
    metadata: dict[str, JSON] = field(default_factory=dict)


class ItemTable:
    """The items of a gallery and where their vectors are: row ``row`` of segment ``segment``.

    A reader sees the state of the moment at which it opened until it closes.

    Raises:
        GalleryError: If the file is missing or damaged.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        mode = "rw" if writable else "ro"
        if not (writable or os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists()):
            # SQLite cannot set up its log here; without one the file alone is the whole state.
            mode = "ro&immutable=1"
        self._path = path
        with self._damage_reported():
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
            self._db.execute("PRAGMA synchronous = FULL" if writable else "BEGIN")

    @staticmethod
    def create(path: Path) -> None:
        """Make an empty table."""
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(_SCHEMA)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make what is done inside durable on leaving, or undo it if that fails."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def next_id(self) -> int:
        """The id that the next item gets; no item of this table has ever had it."""
        return 1 + (self._db.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()[0] or 0)

    def insert(self, items: Sequence[Item], ids: NDArray[np.int64], segment: int) -> None:
        """Add items whose vectors are the rows of ``segment``, in place of those with the same paths.

        Raises:
            GalleryError: If metadata is not JSON, or text is not Unicode.
        """
        for row, (key, item) in enumerate(zip(ids.tolist(), items, strict=True)):
            try:
                metadata = json.dumps(item.metadata, allow_nan=False)
                facts = (item.path, item.caption, item.size, item.mtime_ns, item.sha256, metadata)
                self._db.execute(_INSERT, (key, *facts, segment, row))
            except UnicodeEncodeError as error:
                raise GalleryError(f"{item.path!r}: {error.object!r} is not Unicode; rename it") from error
            except (TypeError, ValueError) as error:
                raise GalleryError(f"{item.path}: metadata is not JSON ({error}); leave that out") from error

    def delete(self, ids: NDArray[np.int64]) -> None:
        """Remove the items of these ids."""
        self._db.execute(f"DELETE FROM items WHERE id IN {_GIVEN}", (json.dumps(ids.tolist()),))

    def ids_of(self, paths: Sequence[str]) -> NDArray[np.int64]:
        """Ids of those paths that are here, int64, in no particular order."""
        found = self._db.execute(f"SELECT id FROM items WHERE path IN {_GIVEN}", (json.dumps(paths),))
        return np.fromiter((row[0] for row in found), np.int64)

    def has_unchanged(self, path: str, size: int, mtime_ns: int) -> bool:
        """Whether the item of this path has this size and time of change."""
        query = f"SELECT 1 FROM items WHERE path IN {_GIVEN} AND size = ? AND mtime_ns = ?"
        return self._db.execute(query, (json.dumps([path]), size, mtime_ns)).fetchone() is not None

    def locations(self) -> NDArray[np.int64]:
        """Where every vector is, int64 ``(N, 3)`` of id, segment and row, sorted by segment and row.

        Raises:
            GalleryError: If the file is damaged.
        """
        with self._damage_reported():
            found = self._db.execute("SELECT id, segment, row FROM items ORDER BY segment, row").fetchall()
        return np.array(found, np.int64).reshape(-1, 3)

    def select(self, ids: NDArray[np.int64] | None = None) -> Iterator[tuple[int, Item]]:
        """Ids and items in order of id: all of them, or those of the given ids."""
        where, given = ("", ()) if ids is None else (f"WHERE id IN {_GIVEN}", (json.dumps(ids.tolist()),))
        found = self._db.execute(f"SELECT {_ITEM} FROM items {where} ORDER BY id", given)
        for key, path, caption, size, mtime_ns, sha256, metadata in found:
            yield key, Item(path, caption, size, mtime_ns, sha256, json.loads(metadata))

    @contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise GalleryError(f"{self._path}: {error}; restore it or build the gallery again") from error
