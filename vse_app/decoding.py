"""Turns at decoding pictures: a few at a time in the whole process, whoever asks, and only so many waiting."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Condition, current_thread, get_native_id, main_thread

from vse_app.limits import Busy

AT_ONCE, WAITING, PATIENCE = 2, 40, 10.0
"""Pictures that are decoded at once, which bounds memory; requests that wait for that, and for how many seconds."""


class Turns:
    """Lets a few threads do something at once.

    Args:
        at_once: So many.
        waiting: So many others may wait.
        patience: Seconds after which these give up.
    """

    def __init__(self, at_once: int, waiting: int, patience: float) -> None:
        self._at_once, self._most, self._patience = at_once, waiting, patience
        self._running = self._waiting = 0
        self._changed = Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, which lasts as long as the block.

        Raises:
            Busy: If too many are waiting, or this one has for too long.
        """
        with self._changed:
            if self._waiting >= self._most:
                raise Busy(f"{self._most} pictures are waiting to be read already; try again in a second")
            self._waiting += 1
            try:
                if not self._changed.wait_for(lambda: self._running < self._at_once, self._patience):
                    raise Busy("the pictures before this one take too long to read; try again in a second")
                self._running += 1
            finally:
                self._waiting -= 1
        give_way()
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify()


def give_way() -> None:
    """Let other threads go first, the one that searches above all; a thread that has given way does so for good."""
    # Elsewhere than on Linux priorities are a process's.
    if sys.platform == "linux" and current_thread() is not main_thread():
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)


decoding = Turns(AT_ONCE, WAITING, PATIENCE)
"""Of uploads, thumbnails and the gallery's pictures alike."""
