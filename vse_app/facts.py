"""What is known of pictures beside their pixels, from a table that a user keeps."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from index.errors import GalleryError
from index.items import Item, check_item
from training.data.corpus import text_fault
from training.data.formats.records import parse_json, read_text, text_lines
from training.errors import InputError
from vse_app.indexing import Facts


class FactTable(dict[Path, Facts]):
    """Facts by picture, and what of their table is not among them.

    Attributes:
        problems: A line for each record, column or value that could not be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []


def read_facts(path: Path) -> FactTable:
    """Read captions and other fields of pictures.

    Args:
        path: CSV with a header, or JSON lines (``.jsonl``). ``image`` is a file, relative to the table's folder;
            ``caption`` its sentence; all else becomes metadata. The names of a CSV's columns are read in small
            letters, and numbers, ``true`` and ``false`` in it are such, but in the caption.

    Raises:
        InputError: If the file cannot be read, or none of its columns is ``image``.
    """
    table = FactTable()
    seen: dict[str, str] = {}
    records = _json_records(path, table.problems) if path.suffix == ".jsonl" else _csv_records(path, table.problems)
    for where, record in records:
        try:
            picture, facts = _read(record, path.parent)
        except InputError as error:
            table.problems.append(f"{where}: {error}")
            continue
        key = os.path.realpath(picture)
        if key in seen:
            table.problems.append(f"{where}: {record['image']} was there before, in {seen[key]}; this one counts")
        seen[key] = where.removeprefix(f"{path}: ")
        table[picture] = facts
    return table


def _read(record: object, folder: Path) -> tuple[Path, Facts]:
    if not isinstance(record, dict) or not isinstance(record.get("image"), str) or not record["image"]:
        raise InputError("names no image; give it in the field 'image'")
    image, caption = record["image"], record.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise InputError(f"the caption {caption!r:.50} is no text; put it in quotes")
    metadata = {key: value for key, value in record.items() if key not in ("image", "caption")}
    if fault := text_fault(image):
        raise InputError(f"the image {image!r:.50} holds {fault}; correct it")
    try:
        check_item(Item("its", caption, 0, 0, "", metadata))
    except GalleryError as error:
        raise InputError(str(error).removeprefix("its: ")) from error
    return folder / image, Facts(caption, metadata)


def _json_records(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in text_lines(path):
        where = f"{path}: line {number}"
        if line.strip():
            try:
                yield where, parse_json(line, where)
            except InputError as error:
                problems.append(str(error))


def _csv_records(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    header: list[str] | None = None
    while True:
        where = f"{path}: line {reader.line_num + 1}"
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            break
        except csv.Error as error:
            problems.append(f"{where}: {error}; shorten or correct it")
            continue
        if header is None:
            header = _header([name.lower() for name in cells], where, problems)
        elif len(cells) > len(header) and any(cells[len(header) :]):
            problems.append(
                f"{where}: {len(cells)} fields for {len(header)} columns; put values that contain commas in quotes"
            )
        elif any(cells):
            named = {name: cell for name, cell in zip(header, cells, strict=False) if name and cell}
            yield where, {name: cell if name in ("image", "caption") else _value(cell) for name, cell in named.items()}


def _header(names: list[str], where: str, problems: list[str]) -> list[str]:
    """The columns' names; those that cannot be used are empty."""
    if "image" not in names:
        raise InputError(f"{where}: names no column image among {', '.join(names)[:200]!r}; separate them by commas")
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            fault = f"is called {name!r} again" if name else "has no name"
            problems.append(f"{where}: column {number + 1} {fault}; it is left out")
            names[number] = ""
    return names


def _value(text: str) -> Any:
    """What a cell means; names such as NaN, and numbers that no computer holds, are words here."""
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else text
