"""Conditions on what is known of an item, such as ``year>=2019`` or ``path~*/holiday/*``."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Self

from index.errors import GalleryError

# json_each has a column "path" of its own.
_COLUMNS = {
    "path": "items.path",
    "caption": "items.caption",
    "size": "items.size",
    "modified": "items.mtime_ns / 1e9",
}
_OPERATORS = {"=": "=", "!=": "=", "<": "<", "<=": "<=", ">": ">", ">=": ">=", "~": "GLOB"}
# What SQLite can look up in JSON: it has no escapes.
_FIELD = re.compile(r'[^".\\\x00-\x1f]+(\.[^".\\\x00-\x1f]+)*')
_CONDITION = re.compile(r"""\s*([^=!<>~"'\s][^=!<>~"']*?)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*""", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """One comparison; text compares with text and numbers with numbers, so a field of another type fails it.

    Attributes:
        field: ``path``, ``caption``, ``size`` (bytes), ``modified`` (seconds since the epoch) or a metadata
            field, dots for nested ones. A list holds if one of its elements does. ``metadata.size`` is the
            metadata field of a name that is taken.
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

        Raises:
            GalleryError: If it is no condition.
        """
        match = _CONDITION.fullmatch(text)
        if not match:
            raise GalleryError(f"{text!r}: is no condition; write FIELD=VALUE, or !=, <, <=, >, >=, ~ for a pattern")
        field, operator, written = match.groups()
        try:
            value = json.loads(written, parse_constant=_no_json)
        except (ValueError, RecursionError):
            value = written
        if isinstance(value, list | dict) or operator == "~":
            value = written
        return cls(field, operator, value)

    def sql(self) -> tuple[str, list[str | float]]:
        """An SQL expression on a row of the item table, and its parameters."""
        if self.operator not in _OPERATORS:
            raise GalleryError(f"{self.operator!r}: is no operator; choose from {', '.join(_OPERATORS)}")
        if not _FIELD.fullmatch(self.field):
            raise GalleryError(f"{self.field!r}: is no field; give names with dots, without quotes or backslashes")
        try:
            f"{self.field}{self.value}".encode()
        except UnicodeEncodeError as error:
            raise GalleryError(f"{error.object!r}: is not Unicode; leave out this condition") from error
        parameters: list[str | float] = []
        if self.field in _COLUMNS:
            source = f"json_array({_COLUMNS[self.field]})"
        else:
            steps = self.field.removeprefix("metadata.").split(".")
            source = "items.metadata, ?"
            parameters.append("$" + "".join(f'."{step}"' for step in steps))
        if self.value is None or isinstance(self.value, bool):
            if self.operator not in ("=", "!="):
                raise GalleryError(f"{self.field!r}: true, false and null have no order; use = or !=")
            compared = "type = ?"
            parameters.append(json.dumps(self.value))  # json_each calls its types true, false and null
        else:
            kinds = "'text'" if isinstance(self.value, str) else "'integer', 'real'"
            compared = f"type IN ({kinds}) AND value {_OPERATORS[self.operator]} ?"
            if self.operator == "~":
                parameters.append(str(self.value).replace("[", "[[]"))  # which else begins a set of characters
            else:
                parameters.append(self.value if isinstance(self.value, str) else _number(self.value))
        negated = "NOT " if self.operator == "!=" else ""
        # The members of an object have text as their keys, elements of a list numbers, and a value of its own null.
        elements = f"json_each({source}) WHERE typeof(key) != 'text' AND {compared}"
        return f"{negated}EXISTS (SELECT 1 FROM {elements})", parameters


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
