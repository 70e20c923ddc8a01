"""What the browser tests know of the server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        address: Where it is.
        captions: Of the pictures in its gallery, in order.
        pictures: Their files.
    """

    address: str
    captions: list[str]
    pictures: list[Path]
