"""Own photos: a folder of pictures with ``captions.csv``, ``captions.jsonl`` or a ``.txt`` beside each."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.corpus import Corpus
from training.data.formats.records import find_picture, in_split, member, parse_json, read_text
from training.data.image_folders import find_images
from training.data.images import ImageFile
from training.errors import InputError

_IMAGE_COLUMNS = ("image", "filename", "file", "image_name")
_CAPTION_COLUMNS = ("caption", "text", "comment")


@dataclass(frozen=True)
class _Row:
    """One caption as found; ``where`` names file and line."""

    where: str
    image: str
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
    rows_of = _rows_by_picture(directory)
    paths = list(rows_of)
    chosen = [paths[i] for i in in_split([_split(rows_of[path], path) for path in paths], split, directory)]
    image_ids = [path.relative_to(directory).as_posix() for path in chosen]
    captions = [(i, j, row) for i, path in enumerate(chosen) for j, row in enumerate(rows_of[path])]
    return Corpus(
        name=f"folder:{directory.resolve().name}",
        split=split,
        image_ids=image_ids,
        captions=[row.caption for _, _, row in captions],
        caption_ids=[row.caption_id or f"{image_ids[i]}#{j}" for i, j, row in captions],
        owner=np.array([i for i, _, _ in captions], dtype=np.int64),
        images=[ImageFile(path) for path in chosen],
    )


def splits(directory: Path) -> list[str]:
    """The splits that pictures are in."""
    return sorted({_split(rows, path) for path, rows in _rows_by_picture(directory).items()})


def split_of(file_name: str) -> str:
    """``train`` (80 %), ``val`` (10 %) or ``test`` (10 %) by SHA-256 of the file name.

    Adding or moving pictures never changes the split of another.
    """
    percent = int.from_bytes(hashlib.sha256(file_name.encode()).digest()[:8]) % 100
    return "train" if percent < 80 else "val" if percent < 90 else "test"


def _split(rows: list[_Row], path: Path) -> str:
    return rows[0].split or split_of(path.name)


def _rows_by_picture(directory: Path) -> dict[Path, list[_Row]]:
    """The rows of every picture; refuses captions without picture and pictures without caption."""
    tables = [directory / name for name in ("captions.csv", "captions.jsonl") if (directory / name).is_file()]
    if len(tables) > 1:
        raise InputError(f"{directory}: both captions.csv and captions.jsonl; keep one")
    on_disk = find_images([directory])
    if not tables:
        rows, folders = _sidecars(directory, on_disk), [directory]
    else:
        rows = _csv_rows(tables[0]) if tables[0].suffix == ".csv" else _jsonl_rows(tables[0])
        folders = [directory, directory / "images"]

    rows_of: defaultdict[Path, list[_Row]] = defaultdict(list)
    for row in rows:
        if not row.caption.strip():
            raise InputError(f"{row.where}: the caption is empty; write it or remove it")
        if Path(row.image).is_absolute():
            raise InputError(f"{row.where}: {row.image} is absolute; write it relative to {directory}")
        path = find_picture(folders, row.image, row.where)
        group = rows_of[path]
        if group and group[0].split != row.split:
            raise InputError(f"{row.where}: {row.image} is in splits {group[0].split!r} and {row.split!r}; keep one")
        group.append(row)
    alone = [path for path in on_disk if path not in rows_of]
    if alone:
        raise InputError(f"{alone[0]}: no caption ({len(alone)} such pictures); caption it or remove it")

    return rows_of


def _csv_rows(path: Path) -> Iterator[_Row]:
    text = read_text(path)
    header_line = text.partition("\n")[0]
    delimiter = "|" if "|" in header_line and "," not in header_line else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        image, caption = (
            next((header.index(name) for name in names if name in header), None)
            for names in (_IMAGE_COLUMNS, _CAPTION_COLUMNS)
        )
        if image is None or caption is None:
            raise InputError(f"{path}: line 1 must name the columns image and caption, not {header_line.strip()!r}")
        for cells in reader:
            where = f"{path}: line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} fields for {len(header)} columns; "
                    f'put captions that contain "{delimiter}" in double quotes'
                )
            optional = {name: cells[header.index(name)].strip() for name in ("split", "id") if name in header}
            if optional.get("split") == "":
                raise InputError(f"{where}: the split is empty; fill it in or remove the column")
            yield _Row(where, cells[image].strip(), cells[caption].strip(), optional.get("split"), optional.get("id"))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; correct the quoting") from error


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    has_splits: bool | None = None
    for number, line in enumerate(read_text(path).split("\n"), start=1):
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


def _sidecars(directory: Path, pictures: list[Path]) -> Iterator[_Row]:
    for picture in pictures:
        sidecar = picture.with_suffix(".txt")
        if not sidecar.is_file():
            continue
        for number, line in enumerate(read_text(sidecar).split("\n"), start=1):
            if line.strip():
                yield _Row(f"{sidecar}: line {number}", str(picture.relative_to(directory)), line.strip())
