"""What the server writes to its log: never more than some lines a minute, and nothing raw that a client sent."""

from __future__ import annotations

import logging
import time
from typing import Any

MOST_A_MINUTE = 20
"""Records of one place in the code; the others are counted."""
LONGEST = 1000
"""Characters of a line; errors quote what was sent to them."""


class PlainLines(logging.Formatter):
    """Escapes whatever could steer a terminal or pretend to be another record."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Indented, so that no line of it looks like a record."""
        return "\n".join("  " + escaped(line) for line in super().formatException(ei).split("\n"))


class Bounded(logging.Filter):
    """Lets some records of each place in the code through, and says how many it left out when it does so again."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, int], list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this one is written."""
        now = time.monotonic()
        since, count = self._seen.setdefault((record.pathname, record.lineno), [now, 0])
        if now - since >= 60:
            if count > MOST_A_MINUTE:
                record.msg, record.args = f"{record.getMessage()} ({count - MOST_A_MINUTE:.0f} like it left out)", None
            since, count = now, 0
        self._seen[record.pathname, record.lineno] = [since, count + 1]
        return count < MOST_A_MINUTE


def escaped(text: str) -> str:
    """Text of one line, which leaves a terminal as it is, and is cut off where it is too long."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … ({len(text):,} characters)"
    return "".join(of if of.isprintable() else ascii(of)[1:-1] for of in text)


def set_up() -> None:
    """Send all warnings of this process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainLines())
    handler.addFilter(Bounded())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
