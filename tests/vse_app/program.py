"""The program as tests of its command line run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    status: object
    out: str
    err: str


Vse = Callable[..., Ended]
