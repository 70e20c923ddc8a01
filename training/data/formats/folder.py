"""Own photos: a folder of pictures with ``captions.csv``, ``captions.jsonl`` or a ``.txt`` beside each."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.corpus import Corpus
from training.data.formats.records import (
    PictureFinder,
    check_text,
    in_split,
    member,
    parse_json,
    read_text,
    text_lines,
)
from training.data.image_folders import SYSTEM_FOLDERS, find_images
from training.data.images import ImageFile
from training.errors import InputError, printable

_IMAGE_COLUMNS = ("image", "filename", "file", "image_name")
_CAPTION_COLUMNS = ("caption", "text", "comment")
_MOST_MALFORMED = 0.01  # of a table's rows; more are no slips but another dialect
_NUMBERED = re.compile(r"\s*(\d+)\s+(\S.*)")


@dataclass(frozen=True)
class _Row:
    """One caption as found; ``where`` names file and line, ``image`` a name in a table or the file itself."""

    where: str
    image: str | Path
    caption: str
    split: str | None = None
    caption_id: str | None = None


def read(directory: Path, split: str) -> Corpus:
    """Reads one split of a folder of pictures (searched recursively) and their captions.

    Captions come from ``captions.csv`` (columns image and caption, optionally split and id),
    ``captions.jsonl`` (``{"image", "caption" or "captions"}``, optionally ``split``), or from ``NAME.txt``
    beside each picture, one caption per line. Picture names are relative to the directory or its
    ``images/``. Without splits, :func:`split_of` assigns them. Image ids are relative paths.

    Args:
        directory: The folder.
        split: ``train``, ``val``, ``test``, another split the files name, or ``all``.

    Raises:
        InputError: On malformed records, captions without picture, pictures without caption, an image
            in two splits, or an unknown split.
    """
    notes: list[str] = []
    rows_of = _rows_by_picture(directory, notes)
    paths = list(rows_of)
    chosen = [paths[i] for i in in_split([_split(rows_of[path], path) for path in paths], split, directory)]
    image_ids = [printable(path.relative_to(directory).as_posix()) for path in chosen]
    captions = [(i, j, row) for i, path in enumerate(chosen) for j, row in enumerate(rows_of[path])]
    return Corpus(
        name=f"folder:{directory.resolve().name}",
        split=split,
        image_ids=image_ids,
        captions=[row.caption for _, _, row in captions],
        caption_ids=[row.caption_id or f"{image_ids[i]}#{j}" for i, j, row in captions],
        owner=np.array([i for i, _, _ in captions], dtype=np.int64),
        images=[ImageFile(path) for path in chosen],
        notes=notes,
    )


def splits(directory: Path) -> list[str]:
    """The splits that pictures are in."""
    return sorted({_split(rows, path) for path, rows in _rows_by_picture(directory, []).items()})


def split_of(file_name: str) -> str:
    """``train`` (80 %), ``val`` (10 %) or ``test`` (10 %) by SHA-256 of the file name.

    Adding or moving pictures never changes the split of another.
    """
    digest = hashlib.sha256(file_name.encode("utf-8", "surrogateescape")).digest()
    percent = int.from_bytes(digest[:8]) % 100
    return "train" if percent < 80 else "val" if percent < 90 else "test"


def _split(rows: list[_Row], path: Path) -> str:
    return rows[0].split or split_of(path.name)


def _rows_by_picture(directory: Path, notes: list[str]) -> dict[Path, list[_Row]]:
    """The rows of every picture; refuses captions without picture and pictures without caption.

    Args:
        directory: The folder.
        notes: Takes a line for whatever is left out or repaired.
    """
    tables = [directory / name for name in ("captions.csv", "captions.jsonl") if (directory / name).is_file()]
    if len(tables) > 1:
        raise InputError(f"{directory}: both captions.csv and captions.jsonl; keep one")
    listing = find_images([directory])
    on_disk = listing.files
    passed_over = listing.lines("move what is wanted into the data's folder")
    notes += [f"{path}: {reason}" for path, reason in listing.refused]
    notes += [f"{directory}: {line}" for line in passed_over]
    malformed: list[str] = []
    if not tables:
        rows, folders = _sidecars(directory, on_disk, notes), [directory]
    else:
        is_csv = tables[0].suffix == ".csv"
        rows = _csv_rows(tables[0], notes, malformed) if is_csv else _jsonl_rows(tables[0])
        folders = [directory, directory / "images"]

    rows_of: defaultdict[Path, list[_Row]] = defaultdict(list)
    find = PictureFinder()
    for row in rows:
        if not row.caption.strip():
            raise InputError(f"{row.where}: the caption is empty; write it or remove it")
        if row.split == "":
            raise InputError(f"{row.where}: the split is empty; fill it in or remove the column")
        for text in (row.image, row.caption, row.split, row.caption_id):
            if isinstance(text, str):
                check_text(text, row.where)
        path = row.image if isinstance(row.image, Path) else find(folders, row.image, row.where)
        group = rows_of[path]
        if group and group[0].split != row.split:
            raise InputError(f"{row.where}: {row.image} is in splits {group[0].split!r} and {row.split!r}; keep one")
        group.append(row)
    alone = [path for path in on_disk if path not in rows_of]
    count = sum(map(len, rows_of.values())) + len(malformed)
    if malformed and (alone or len(malformed) > _MOST_MALFORMED * count):
        raise InputError(f"{malformed[0]} ({len(malformed)} such rows)")
    if alone:
        raise InputError(f"{alone[0]}: no caption ({len(alone)} such pictures); caption it or remove it")
    if not rows_of:
        raise InputError("; ".join([f"{directory}: no pictures with captions", *passed_over]))
    notes += [f"{line}; left out" for line in malformed]
    return rows_of


def _csv_rows(path: Path, notes: list[str], malformed: list[str]) -> Iterator[_Row]:
    text = read_text(path)
    header_line = text.partition("\n")[0]
    delimiter = "|" if "|" in header_line and "," not in header_line else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        image, caption, split, caption_id = (
            _column(header, names, path) for names in (_IMAGE_COLUMNS, _CAPTION_COLUMNS, ("split",), ("id",))
        )
        if image is None or caption is None:
            raise InputError(
                f"{path}: line 1 must name the columns image and caption, not {header_line.strip()!r}; "
                "separate columns by commas"
            )
        for cells in reader:
            where = f"{path}: line {reader.line_num}"
            if not cells:
                continue
            if delimiter == "|" and (image, caption) == (0, 2) == (0, len(header) - 1):
                cells = _with_second_bar(cells, where, notes)
            if len(cells) != len(header):
                quote = f'put captions that contain "{delimiter}" in double quotes'
                remedy = quote if len(cells) > len(header) else "write all of them, or remove the row"
                malformed.append(f"{where}: {len(cells)} fields for {len(header)} columns; {remedy}")
                continue
            yield _Row(
                where,
                cells[image].strip(),
                cells[caption].strip(),
                None if split is None else cells[split].strip(),
                None if caption_id is None else cells[caption_id].strip(),
            )
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; correct the quoting") from error


def _column(header: list[str], names: tuple[str, ...], path: Path) -> int | None:
    """Where the first of ``names`` that the header has stands."""
    name = next((name for name in names if name in header), None)
    if name is None:
        return None
    if header.count(name) > 1:
        raise InputError(f"{path}: line 1 names {header.count(name)} columns {name!r}; rename all but one")
    return header.index(name)


def _with_second_bar(cells: list[str], where: str, notes: list[str]) -> list[str]:
    """The fields of a row of Flickr30k's table, one of which is published as ``NAME| 4   A dog runs .``."""
    numbered = _NUMBERED.fullmatch(cells[1]) if len(cells) == 2 else None
    if not numbered:
        return cells
    number, caption = numbered.groups()
    notes.append(f"{where}: has no second bar; read as number {number} and caption {caption!r}")
    return [cells[0], number, caption]


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    has_splits: bool | None = None
    for number, line in text_lines(path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        record = parse_json(line, where)
        image = member(record, "image", str, where)
        if has_splits is None:
            has_splits = "split" in record
        if has_splits != ("split" in record):
            raise InputError(f"{where}: some records have a 'split' and some none; give it to all or to none")
        split = member(record, "split", str, where) if has_splits else None
        key = "captions" if "captions" in record else "caption"
        captions = member(record, key, list, where) if key == "captions" else [member(record, key, str, where)]
        for caption in captions:
            if not isinstance(caption, str):
                raise InputError(f"{where}: 'captions' must be a list of strings, not contain {caption!r}")
            yield _Row(where, image, caption, split)


def _sidecars(directory: Path, pictures: list[Path], notes: list[str]) -> Iterator[_Row]:
    unused = set(directory.rglob("*.txt"))
    for picture in pictures:
        sidecar = picture.with_suffix(".txt")
        if not sidecar.is_file():
            continue
        unused.discard(sidecar)
        for number, line in text_lines(sidecar):
            if line.strip():
                yield _Row(f"{sidecar}: line {number}", picture, line.strip())
    for path in sorted(unused):
        parts = path.relative_to(directory).parts
        if not any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in parts):
            notes.append(f"{path}: no picture of that name can be read; left out")
