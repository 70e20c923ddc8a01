"""Conditions on what is known of an item, such as ``year>=2019`` or ``path~*/holiday/*``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any, Self

from index.errors import GalleryError

_TEXT = {"path": "items.path", "caption": "items.caption"}
_NUMBERS = {"size": "items.size", "modified": "items.mtime_ns / 1e9"}
COLUMNS = _TEXT | _NUMBERS
"""Fields that every item has, besides its metadata, in SQL."""
_WANTED = {
    "path": "text",
    "caption": "text or null",
    "size": "a number of bytes",
    "modified": "a date such as 2024-01-31 or seconds since 1970",
}
MOST_CONDITIONS = 500
"""SQLite takes no expressions of many more."""
_OPERATORS = {"=": "=", "!=": "=", "<": "<", "<=": "<=", ">": ">", ">=": ">=", "~": "GLOB"}
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_BARE = r"""[^".\\\x00-\x1f]+"""
_FIELD = re.compile(rf"(?:{_QUOTED}|{_BARE})(?:\.(?:{_QUOTED}|{_BARE}))*", re.DOTALL)
_NAME = re.compile(f"{_QUOTED}|{_BARE}", re.DOTALL)
_CONDITION = re.compile(
    rf"""\s*((?:{_QUOTED}|[^=!<>~"'\s])(?:{_QUOTED}|[^=!<>~"'])*?)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*""", re.DOTALL
)
# Names that SQLite can look up in JSON: it has no escapes.
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')


@dataclass(frozen=True)
class Condition:
    """One comparison; text compares with text and numbers with numbers, so a field of another type fails it.

    Attributes:
        field: ``path``, ``caption``, ``size`` (bytes), ``modified`` (seconds since the epoch) or a metadata field.
            ``exif.iso`` is the field ``iso`` within ``exif``, or one of the whole name. Names in quotes, as in JSON,
            may hold anything and are of the metadata: ``"exif.iso"``, ``exif."f/stop"``, ``"size"``, for which
            ``metadata.size`` stands too. A list holds if one of its elements does.
        operator: ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, or ``~`` for a pattern with ``*`` and ``?``;
            ``!=`` holds where ``=`` does not, so also where there is no such field.
        value: What to compare with.
    """

    field: str
    operator: str
    value: str | float | bool | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``FIELD OPERATOR VALUE``; a value that is a JSON number, boolean, null or string is that.

        ``path`` and ``caption`` are text whatever it looks like, unless it is ``null``. ``modified`` may be an ISO
        date or time, local unless it names a zone; a date is its first moment.

        Raises:
            GalleryError: If it is no condition.
        """
        match = _CONDITION.fullmatch(text)
        if not match:
            raise GalleryError(f"{text!r}: is no condition; write FIELD=VALUE, or !=, <, <=, >, >=, ~ for a pattern")
        field, operator, written = match.groups()
        return cls(field, operator, written if operator == "~" else _value(field, written))

    @property
    def names(self) -> list[list[str]]:
        """Where in the metadata the field may be: names from the outermost, most nested first; none for a column.

        Raises:
            GalleryError: If it is no field.
        """
        if not _FIELD.fullmatch(self.field):
            raise GalleryError(f"{self.field!r}: is no field; give names with dots between, special ones in quotes")
        if self.field in COLUMNS:
            return []
        within = self.field.removeprefix("metadata.")
        try:
            steps = [json.loads(name, strict=False) if name[0] == '"' else name for name in _NAME.findall(within)]
        except ValueError as error:
            raise GalleryError(f"{self.field!r}: is no field ({error}); quote names as JSON does") from error
        return [steps] if len(steps) == 1 or '"' in within else [steps, [within]]

    def sql(self) -> tuple[str, list[str | float]]:
        """An SQL expression on a row of the item table, and its parameters.

        Raises:
            GalleryError: If it cannot be asked, or can never hold.
        """
        if self.operator not in _OPERATORS:
            raise GalleryError(f"{self.operator!r}: is no operator; choose from {', '.join(_OPERATORS)}")
        names = self.names
        _check_text("".join([*chain(*names), str(self.value)]))
        if not names:
            holds, parameters = self._column_sql()
        else:
            compared, values = self._element_sql()
            found = [_at(steps) for steps in names]
            # The members of an object have text as their keys, elements of a list numbers, and a single value null.
            elements = "EXISTS (SELECT 1 FROM json_each({}) WHERE typeof(key) != 'text' AND " + compared + ")"
            holds = " OR ".join(elements.format(source) for source, _ in found)
            parameters = [value for _, place in found for value in (place, *values)]
        return (f"({holds}) IS NOT TRUE" if self.operator == "!=" else f"({holds})"), parameters

    def presence_sql(self) -> tuple[str, list[str]]:
        """An SQL expression that holds for items that have such a field, and its parameters."""
        found = [_at(steps) for steps in self.names]
        return " OR ".join(f"json_type({source}) IS NOT NULL" for source, _ in found) or "1", [at for _, at in found]

    def _column_sql(self) -> tuple[str, list[str | float]]:
        text, number = isinstance(self.value, str), isinstance(self.value, int | float)
        if self.field == "caption" and self.value is None and self.operator in ("=", "!="):
            return f"{COLUMNS[self.field]} IS NULL", []
        possible = text if self.field in _TEXT else number and self.operator != "~"
        if not possible or isinstance(self.value, bool):
            raise GalleryError(
                f"{self.field}{self.operator}{self.value!r:.80}: can never hold; {self.field} is {_WANTED[self.field]}"
            )
        return f"{COLUMNS[self.field]} {_OPERATORS[self.operator]} ?", [self._bound()]

    def _element_sql(self) -> tuple[str, list[str | float]]:
        """What holds for an element that :func:`json_each` has found."""
        if self.value is None or isinstance(self.value, bool):
            if self.operator not in ("=", "!="):
                raise GalleryError(f"{self.field!r}: true, false and null have no order; use = or !=")
            return "type = ?", [json.dumps(self.value)]  # json_each calls its types true, false and null
        kinds = "'text'" if isinstance(self.value, str) else "'integer', 'real'"
        return f"type IN ({kinds}) AND value {_OPERATORS[self.operator]} ?", [self._bound()]

    def _bound(self) -> str | float:
        assert self.value is not None
        if self.operator == "~":
            return str(self.value).replace("[", "[[]")  # which else begins a set of characters
        return self.value if isinstance(self.value, str) else _number(self.value)


def all_hold(conditions: Sequence[Condition]) -> tuple[str, list[str | float]]:
    """An SQL expression that holds where all conditions do, and its parameters.

    Raises:
        GalleryError: If one cannot be asked, or there are too many.
    """
    if len(conditions) > MOST_CONDITIONS:
        raise GalleryError(f"{len(conditions):,} conditions; give at most {MOST_CONDITIONS}")
    expressions = [condition.sql() for condition in conditions]
    where = " AND ".join(["1", *(sql for sql, _ in expressions)])
    return where, [value for _, values in expressions for value in values]


def written(name: str) -> str:
    """A name in the metadata as conditions write it."""
    bare = _CONDITION.fullmatch(f"{name}=")
    plain = bare and bare[1] == name and name not in COLUMNS and _FIELD.fullmatch(name) and '"' not in name
    return name if plain and not name.startswith("metadata.") else json.dumps(name, ensure_ascii=False)


def json_field(metadata: str, steps: str) -> str | None:
    """For SQL: the value to which names lead, a JSON list from the outermost; None if there is none."""
    value = json.loads(metadata)
    for step in json.loads(steps):
        if not isinstance(value, dict) or step not in value:
            return None
        value = value[step]
    return json.dumps(value, ensure_ascii=False)


def _at(steps: list[str]) -> tuple[str, str]:
    """What :func:`json_each` needs to find a value in the metadata, and its parameter."""
    if all(map(_PLAIN.fullmatch, steps)):
        return "items.metadata, ?", "$" + "".join(f'."{step}"' for step in steps)
    return "json_field(items.metadata, ?)", json.dumps(steps)


def _value(field: str, text: str) -> str | float | bool | None:
    value: Any
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, list | dict) or (field in _TEXT and not isinstance(value, str | None)):
        return text
    if field == "modified" and isinstance(value, str):
        with suppress(ValueError, OverflowError, OSError):
            value = datetime.fromisoformat(value).timestamp()
    found: str | float | bool | None = value
    return found


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GalleryError(f"{text!r}: is not Unicode; leave out this condition") from error
    if "\0" in text:
        raise GalleryError(f"{text!r}: contains a NUL, which no item does; leave out this condition")


def _number(value: float) -> float:
    """The nearest number that SQLite has."""
    if -(1 << 63) <= value < 1 << 63:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
