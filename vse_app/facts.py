"""What is known of pictures beside their pixels, from a table that a user keeps."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from training.data.formats.records import parse_json, read_text
from training.errors import InputError
from vse_app.search_engine import Facts


def read_facts(path: Path) -> dict[Path, Facts]:
    """Read captions and other fields of pictures.

    Args:
        path: CSV with a header, or JSON lines (``.jsonl``). ``image`` is a file, relative to the table's folder;
            ``caption`` its sentence; all else becomes metadata. Numbers, ``true`` and ``false`` in a CSV are such.

    Raises:
        InputError: If the file cannot be read, or a line names no image.
    """
    text = read_text(path)
    rows: list[dict[str, Any]]
    if path.suffix == ".jsonl":
        rows = [parse_json(line, f"{path}: line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        rows = [
            {key: _value(value) for key, value in row.items() if key and value}
            for row in csv.DictReader(io.StringIO(text, newline=""))
        ]
    facts = {}
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise InputError(f"{path}: record {n}: names no image; give it in the field 'image'")
        caption = row.get("caption")
        metadata = {key: value for key, value in row.items() if key not in ("image", "caption")}
        facts[path.parent / row["image"]] = Facts(None if caption is None else str(caption), metadata)
    return facts


def _value(text: str) -> Any:
    """What a cell means; a name such as NaN is a word here."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text
