"""What the readers share: text and JSON with errors that name the record, splits, and picture files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from training.errors import InputError

T = TypeVar("T")


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without byte-order mark; line endings are kept.

    Raises:
        InputError: If it cannot be read or is not UTF-8 (names the line).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check the path") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from error


def parse_json(text: str, where: str) -> Any:
    """A JSON value; ``where`` begins the message of the :class:`InputError` on bad syntax."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); correct it"
        ) from error


def member(record: object, key: str, kind: type[T], where: str) -> T:
    """``record[key]``, checked to be there and of type ``kind``; else an :class:`InputError`."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise InputError(f"{where}: {key!r} is missing or not of type {kind.__name__}; correct the record")
    return value


def in_split(splits: Sequence[str], split: str, where: Path) -> list[int]:
    """Indices of the records in ``split``; of all records when it is ``"all"``.

    Raises:
        InputError: If there are none; lists the splits there are.
    """
    chosen = [i for i, name in enumerate(splits) if split in (name, "all")]
    if not chosen:
        counts = ", ".join(f"{name} ({n} images)" for name, n in sorted(Counter(splits).items()))
        raise InputError(f"{where}: no images in split {split!r}; choose from {counts or 'none'}, or all")
    return chosen


def find_picture(folders: Iterable[Path], file_name: str, where: str) -> Path:
    """The file of that name in the first folder that has it.

    Raises:
        InputError: If none has it.
    """
    folders = list(folders)
    for folder in folders:
        candidate = os.path.join(folder, file_name)  # pathlib's join costs seconds on 100,000 records
        if os.path.isfile(candidate):
            return Path(candidate)
    looked = ", ".join(str(folder) for folder in folders)
    raise InputError(f"{where}: picture {file_name!r} is not in {looked}; restore it or remove the record")
