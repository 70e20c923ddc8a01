"""Who waits for what is done one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vse_app.limits import Busy


class WaitingLine:
    """Those who wait for what one may do at a time; for one event loop.

    Args:
        most: So many may stand in it, the first included.
        each: So many of one sort.
    """

    def __init__(self, most: int, each: int) -> None:
        self._most, self._each = most, each
        self._places: list[tuple[str, object]] = []

    @contextmanager
    def place(self, who: str) -> Iterator[Callable[[], int]]:
        """A place at the end, and how many are before it; left when the block ends.

        Raises:
            Busy: If the line is too long.
        """
        if len(self._places) >= self._most or sum(who == other for other, _ in self._places) >= self._each:
            raise Busy("enough attacks are waiting already; try again in a minute")
        place = who, object()
        self._places.append(place)
        try:
            yield lambda: self._places.index(place)
        finally:
            self._places.remove(place)
