"""What the page's reports are made of: text, tables, curves and pictures, free of any markup."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST_PICTURE = 3 << 20


@dataclass(frozen=True)
class Table:
    """Cells as text; the first of each row names it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    alt: str
    png: bytes


@dataclass(frozen=True)
class Curve:
    """Values against steps of training."""

    title: str
    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass
class Section:
    """One part of the page; text comes from files and is not to be trusted."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    trustworthy: bool | None = None
    verdict: str = ""
    checks: list[tuple[bool, str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, and the mend."""


def pictures(into: Section, folder: Path, figures: Mapping[str, str], where: str) -> None:
    """Add those of the named figures that are there; ``where`` joins what they show in words."""
    for name, alt in figures.items():
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > LARGEST_PICTURE:
            into.notes.append(f"{name}: larger than 3 MB, not shown")
            continue
        png = path.read_bytes()
        if png.startswith(b"\x89PNG\r\n"):
            into.pictures.append(Picture(f"{alt}; {where}", png))
        else:
            into.notes.append(f"{name}: not a PNG, not shown")


def measured_on(record: dict[str, Any]) -> str:
    """Data, split and counts, which no figure goes without."""
    return f"{record['data']} [{record['split']}], {record['images']:,} images, {record['captions']:,} captions"


def number(value: float | None, digits: int = 1) -> str:
    """A figure; a dash for one that is not known."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def span(low: float | None, high: float | None, digits: int = 1) -> str:
    """An interval; a dash for one that is not known."""
    return "–" if low is None or high is None else f"{number(low, digits)} – {number(high, digits)}"
