"""What stands behind each vector of a segment, in an SQLite file that is written once."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError, remedy
from index.filters import Condition, all_hold, json_field

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

_SCHEMA = (
    "CREATE TABLE items (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, caption TEXT, size INTEGER NOT NULL, "
    "mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL, metadata TEXT NOT NULL)"
)
_INSIDE = "<gallery>/"
"""Begins the stored path of a file in the gallery's own directory, which may be moved."""
_MEND = "restore it or build the gallery again"
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # as JSON writes it
_SYSTEM = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
"""Kinds of SQLite's errors that come from the operating system, not from what the file holds."""
_ITEM = "id, path, caption, size, mtime_ns, sha256, metadata"
# One bound JSON array stands for any number of values, past SQLite's limit on parameters.
_GIVEN = "(SELECT value FROM json_each(?))"


@dataclass(frozen=True)
class Item:
    """A file whose vector a gallery holds.

    Attributes:
        path: Where the file is; the natural key of an item. What lies in the gallery's directory moves with it.
        caption: A sentence that describes it, if there is one.
        size: The file's size in bytes.
        mtime_ns: Its time of last change, in nanoseconds since the epoch.
        sha256: Hex digest of its content.
        metadata: Whatever else is known, as JSON.
    """

    path: str
    caption: str | None
    size: int
    mtime_ns: int
    sha256: str
    metadata: dict[str, JSON] = field(default_factory=dict)


def check_item(item: Item) -> str:
    """The metadata of an item as it is stored.

    Raises:
        GalleryError: If any of the item cannot be stored: it is of a wrong type, a path leads elsewhere, metadata is
            not JSON, or text is not Unicode or contains a NUL.
    """
    if strange := _strange(item):
        raise GalleryError(f"{item.path!r}: {strange}; correct it")
    _check_path(item.path)
    try:
        # Not escaped, as SQLite compares the names of fields as they are written.
        metadata = json.dumps(item.metadata, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GalleryError(f"{item.path}: metadata is not JSON ({error}); leave that out") from error
    for what, text in (("its caption", item.caption or ""), ("its metadata", metadata), ("its checksum", item.sha256)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]  # of a pair, as a scraper may have cut it
            raise GalleryError(
                f"{item.path}: {half!r} in {what} is half a character, not Unicode; correct it"
            ) from error
    # SQLite's functions end at a NUL, so conditions would see something else than what is stored.
    if "\0" in f"{item.caption}{item.sha256}" or _NUL.search(metadata):
        raise GalleryError(f"{item.path}: its caption or metadata contains a NUL character; leave that out")
    if not max(abs(item.size), abs(item.mtime_ns)) < 1 << 63:
        raise GalleryError(f"{item.path}: size {item.size} or time {item.mtime_ns} is too large; correct it")
    return metadata


def write_items(path: Path, items: Sequence[Item], ids: NDArray[np.int64]) -> None:
    """Make the file of a segment.

    Args:
        path: Where.
        items: ``(N,)``, no path twice.
        ids: int64 ``(N,)``.

    Raises:
        GalleryError: If an item cannot be stored, see :func:`check_item`.
    """
    with _new_table(path) as table:
        _insert(table, _gallery(path), zip(ids.tolist(), items, strict=True))


def merge_items(
    path: Path, sources: Iterable[tuple[Path, NDArray[np.int64]]], changed: Mapping[int, Item] | None = None
) -> None:
    """Make the file of a merged segment.

    Args:
        path: Where.
        sources: Files, and for each the ids to leave out, int64 ``(M,)``.
        changed: Items to put in by their ids, in place of some that are left out.

    Raises:
        GalleryError: If one of these cannot be stored, see :func:`check_item`.
    """
    with _new_table(path) as table:
        for source, removed in sources:
            source.open("rb").close()  # or else SQLite would not say why it cannot
            table.execute("ATTACH ? AS source", (f"{source.absolute().as_uri()}?mode=ro&immutable=1",))
            kept = f"SELECT {_ITEM} FROM source.items WHERE id NOT IN {_GIVEN} ORDER BY id"
            table.execute(f"INSERT INTO main.items ({_ITEM}) {kept}", (json.dumps(removed.tolist()),))
            table.execute("COMMIT")
            table.execute("DETACH source")
            table.execute("BEGIN")
        _insert(table, _gallery(path), (changed or {}).items())


class ItemFile:
    """Reads what :func:`write_items` or :func:`merge_items` wrote; several threads may.

    Raises:
        GalleryError: If the file is damaged or holds more than a table of items.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gallery = _gallery(path)
        with self._damage_reported():
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
            )
            try:
                self._db.execute("PRAGMA trusted_schema = OFF")
                self._db.create_function("json_field", 2, json_field, deterministic=True)
                # A view or trigger in a file from elsewhere would be code.
                schema = self._db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
                if schema != [("table", "items", _SCHEMA), ("index", "sqlite_autoindex_items_1", None)]:
                    raise sqlite3.DatabaseError("is no table of items")
            except sqlite3.Error:
                self._db.close()
                raise

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def ids_of(self, paths: Sequence[str]) -> NDArray[np.int64]:
        """Ids of those paths that are here, int64, in no particular order."""
        return self._ids(f"path IN {_GIVEN}", [self._stored(paths)])

    def ids_of_sizes(self, sizes: Collection[int]) -> NDArray[np.int64]:
        """Ids of the items whose files had so many bytes, int64, in no particular order."""
        return self._ids(f"size IN {_GIVEN}", [json.dumps(list(sizes))])

    def ids_where(self, conditions: Sequence[Condition]) -> NDArray[np.int64]:
        """Ids of the items for which all conditions hold, int64."""
        return self._ids(*all_hold(conditions))

    def ids_below(self, folders: Sequence[str]) -> NDArray[np.int64]:
        """Ids of the items in these folders or below, int64, in no particular order."""
        inside = [_INSIDE] if any(self._gallery.startswith(f"{folder.rstrip('/')}/") for folder in folders) else []
        folders = [*folders, *inside, *(_stored(folder, self._gallery) for folder in folders)]
        # The index of paths serves this range: after the slash comes the zero.
        where = "path >= json_extract(?1, '$[0]') AND path < json_extract(?1, '$[1]')"
        ranges = (json.dumps([f"{folder.rstrip('/')}{end}" for end in "/0"]) for folder in folders)
        return np.concatenate([np.empty(0, np.int64), *(self._ids(where, [ends]) for ends in ranges)])

    def has(self, condition: Condition) -> bool:
        """Whether some item has the field of a condition."""
        present, parameters = condition.presence_sql()
        return bool(len(self._ids(f"{present} LIMIT 1", parameters)))

    def metadata_names(self) -> set[str]:
        """Names of the outermost fields of the metadata."""
        return {name for (name,) in self._rows("SELECT DISTINCT key FROM items, json_each(items.metadata)", [])}

    def get(self, key: int) -> Item:
        """The item of an id.

        Raises:
            GalleryError: If it is not here, or damaged.
        """
        with self._damage_reported():
            row = self._db.execute(f"SELECT {_ITEM} FROM items WHERE id = ?", (key,)).fetchone()
        if row is None:
            raise GalleryError(f"{self.path}: lacks items of the vectors; {_MEND}")
        return self._item(*row)

    def select(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, Item]]:
        """The ids and their items, in order of id.

        Raises:
            GalleryError: If one is not here, or damaged.
        """
        found = 0
        query = f"SELECT {_ITEM} FROM items WHERE id IN {_GIVEN} ORDER BY id"
        for row in self._rows(query, [json.dumps(ids.tolist())]):
            yield row[0], self._item(*row)
            found += 1
        if found < len(ids):
            raise GalleryError(f"{self.path}: lacks items of the vectors; {_MEND}")

    def facts(self, paths: Sequence[str] | None = None) -> Iterator[tuple[int, str, int, int]]:
        """Id, path, size and time of change of every item in order of id, or of those paths that are here."""
        wanted = "ORDER BY id" if paths is None else f"WHERE path IN {_GIVEN}"
        given = [] if paths is None else [self._stored(paths)]
        for key, path, *state in self._rows(f"SELECT id, path, size, mtime_ns FROM items {wanted}", given):
            yield key, _absolute(path, self._gallery), *state

    def paths(self) -> Iterator[tuple[int, str]]:
        """Id and path of every item, in order of path, which the index of paths serves."""
        return self._rows("SELECT id, path FROM items ORDER BY path", [])

    def check(self) -> None:
        """Read everything once.

        Raises:
            GalleryError: If anything is damaged.
        """
        for (answer,) in self._rows("PRAGMA integrity_check", []):
            if answer != "ok":
                raise GalleryError(f"{self.path}: {answer}; {_MEND}".replace("\n", " "))
        for row in self._rows(f"SELECT {_ITEM} FROM items", []):
            self._item(*row)

    def _item(self, key: int, *facts: Any) -> Item:
        """SQLite does not hold columns to their types, so a file from elsewhere may have anything in them."""
        try:
            path, *plain, metadata = facts
            item = Item(_absolute(path, self._gallery), *plain, json.loads(metadata))  # type: ignore[call-arg]
        except (TypeError, ValueError, RecursionError) as error:
            raise GalleryError(f"{self.path}: id {key}: {error}; {_MEND}") from error
        if strange := _strange(item):
            raise GalleryError(f"{self.path}: id {key}: is no item, {strange}; {_MEND}")
        _check_path(item.path)
        return item

    def _stored(self, paths: Sequence[str]) -> str:
        """Paths as they may be stored, as a JSON array; earlier versions wrote the whole path of every file."""
        return json.dumps([*paths, *(_stored(path, self._gallery) for path in paths)])

    def _ids(self, where: str, parameters: Sequence[str | float]) -> NDArray[np.int64]:
        found = self._rows(f"SELECT id FROM items WHERE {where}", parameters)
        return np.fromiter((row[0] for row in found), np.int64)

    def _rows(self, query: str, parameters: Sequence[str | float]) -> Iterator[Any]:
        with self._damage_reported():
            yield from self._db.execute(query, parameters)

    @contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise GalleryError(f"{self.path}: is closed; open the gallery again") from error
        except (sqlite3.DatabaseError, MemoryError) as error:
            reason = f"{error!s:.200}".replace("\n", " ")
            raise GalleryError(f"{self.path}: {reason}; {self._mend(error)}") from error

    def _mend(self, error: Exception) -> str:
        """What to do: not every error says that the file is damaged."""
        code = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_IOERR_SHORT_READ or code & 0xFF not in _SYSTEM:
            return _MEND
        try:
            self.path.open("rb").close()
        except OSError as cause:
            return f"{cause.strerror}; {remedy(cause, _MEND)}"
        return remedy(error, _MEND)


@contextmanager
def _new_table(path: Path) -> Iterator[sqlite3.Connection]:
    """A file that counts for nothing until it is complete, so SQLite need not guard it against crashes."""
    path.touch()  # or else SQLite would not say why it cannot
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rwc", uri=True, isolation_level=None)) as table:
        table.execute("PRAGMA journal_mode = OFF")
        table.execute("PRAGMA synchronous = OFF")
        table.execute(_SCHEMA)
        table.execute("BEGIN")
        yield table
        table.execute("COMMIT")


def _insert(table: sqlite3.Connection, gallery: str, items: Iterable[tuple[int, Item]]) -> None:
    def row(key: int, item: Item) -> tuple[object, ...]:
        metadata = check_item(item)
        return key, _stored(item.path, gallery), item.caption, item.size, item.mtime_ns, item.sha256, metadata

    table.executemany(f"INSERT INTO items ({_ITEM}) VALUES (?, ?, ?, ?, ?, ?, ?)", starmap(row, items))


def _gallery(path: Path) -> str:
    """The directory of the gallery that a file of items belongs to, with a slash behind it."""
    return f"{os.path.realpath(path.parents[2]).rstrip('/')}/"


def _stored(path: str, gallery: str) -> str:
    return f"{_INSIDE}{path.removeprefix(gallery)}" if path.startswith(gallery) else path


def _absolute(path: Any, gallery: str) -> Any:
    return f"{gallery}{path.removeprefix(_INSIDE)}" if isinstance(path, str) and path.startswith(_INSIDE) else path


def _strange(item: Item) -> str | None:
    """What is of another type than an item's, if anything is."""
    kinds = {"path": str, "caption": str | None, "size": int, "mtime_ns": int, "sha256": str, "metadata": dict}
    for name, kind in kinds.items():
        if not isinstance(value := getattr(item, name), kind):
            return f"its {name} is {value!r:.80}"
    return None


def _check_path(path: str) -> None:
    """Whoever serves an item's file must not be led out of a folder by its name."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise GalleryError(f"{path!r}: its name is not Unicode; rename it") from error
    if not path or "\0" in path or ".." in path.replace("\\", "/").split("/"):
        raise GalleryError(f"{path!r}: is no plain path of an item; give it without '..'")
