"""What the readers share: text and JSON with errors that name the record, splits, and picture files."""

from __future__ import annotations

import json
import ntpath
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

from training.data.corpus import text_fault
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


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers, from 1 on, and without their ends.

    Lines end at newlines only. ``str.splitlines`` also breaks at characters such as U+2028, which JSON and captions
    may hold.

    Raises:
        InputError: As :func:`read_text`.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        yield number, line.removesuffix("\r")


def parse_json(text: str, where: str) -> Any:
    """A JSON value; ``where`` begins the message of the :class:`InputError` on what cannot be parsed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); correct it"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: JSON nested too deeply to be read; remove the nested value") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{where}: JSON with a number too long to be read; shorten it") from error


def member(record: object, key: str, kind: type[T], where: str) -> T:
    """``record[key]``, checked to be there, of type ``kind``, and usable as text; else an :class:`InputError`."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: {key!r} is missing or not of type {kind.__name__}; correct the record")
    if isinstance(value, str):
        check_text(value, f"{where}: {key!r}")
    return value


def check_text(text: str, where: str) -> None:
    """Refuses text with characters that no file, hash or tokenizer takes; ``where`` begins the message."""
    if fault := text_fault(text):
        raise InputError(f"{where} holds {fault}; remove it")


def in_split(splits: Sequence[str], split: str, where: Path) -> list[int]:
    """Indices of the records in ``split``; of all records when it is ``"all"`` and no split has that name.

    Raises:
        InputError: If there are none; lists the splits there are.
    """
    everything = split == "all" and split not in splits
    chosen = [i for i, name in enumerate(splits) if everything or name == split]
    if not chosen:
        counts = ", ".join(f"{name} ({n} images)" for name, n in sorted(Counter(splits).items()))
        choice = f"choose from {counts}, or all" if counts else "there are no images with captions at all"
        raise InputError(f"{where}: no images in split {split!r}; {choice}")
    return chosen


def inside(file_name: str, where: str) -> str:
    """``file_name`` without ``./`` and ``x/../``.

    Raises:
        InputError: If it is absolute or leads out of the folder that it is relative to.
    """
    if posixpath.isabs(file_name) or ntpath.isabs(file_name):
        raise InputError(f"{where}: {file_name} is absolute; write it relative to the data's folder")
    path = posixpath.normpath(file_name)
    if path.startswith("../") or path == "..":
        raise InputError(f"{where}: {file_name} leads out of the data's folder; move the picture into it")
    return path


class PictureFinder:
    """Finds the files that records name; one object serves all records of a reading.

    A name is looked for as it is written, then with ``/`` for Windows's separators, and then, in case a file system
    or an archive changed its Unicode form ("é" as one character or as two), among the files whose names are
    canonically equivalent.
    """

    def __init__(self) -> None:
        self._names: dict[str, dict[str, list[str]]] = {}  # of the folders listed so far, by their NFC forms

    def __call__(self, folders: Iterable[Path], file_name: str, where: str) -> Path:
        """The file of that name in the first folder that has it.

        Raises:
            InputError: If none has it, several fit equally well, or the name leads out of the folders.
        """
        folders = list(folders)
        names = dict.fromkeys(inside(name, where) for name in (file_name, file_name.replace("\\", "/")))
        for name in names:
            for folder in folders:
                candidate = os.path.join(folder, name)  # pathlib's join costs seconds on 100,000 records
                if os.path.isfile(candidate):
                    return Path(candidate)
        for name in names:
            for folder in folders:
                if found := self._equivalent(str(folder), name, where):
                    return Path(found)
        looked = ", ".join(str(folder) for folder in folders)
        raise InputError(f"{where}: picture {file_name!r} is not in {looked}; restore it or remove the record")

    def _equivalent(self, folder: str, name: str, where: str) -> str | None:
        path = folder
        for part in name.split("/"):
            found = self._listing(path).get(normalize("NFC", part), [])
            if len(found) > 1 and part not in found:
                raise InputError(f"{where}: {name!r} fits {len(found)} names in {path} equally well; rename one")
            if not found:
                return None
            path = os.path.join(path, part if part in found else found[0])
        return path if os.path.isfile(path) else None

    def _listing(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._names:
            names = self._names[folder] = {}
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                names.setdefault(normalize("NFC", name), []).append(name)
        return self._names[folder]
