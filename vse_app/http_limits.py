"""How much one address may ask, guess and send at a time; what is known of addresses is bounded."""

from __future__ import annotations

import time
from collections import OrderedDict
from ipaddress import IPv6Address
from typing import Generic, TypeVar

from starlette.types import Scope

from vse_app.http_hosts import address

_ADDRESSES = 10_000
_FREE_GUESSES, _LONGEST_LOCK = 5, 300.0

State = TypeVar("State")


class _PerAddress(Generic[State]):
    """A state for each address; those seen longest ago are forgotten."""

    def __init__(self) -> None:
        self._states: OrderedDict[str, State] = OrderedDict()

    def _keep(self, key: str, state: State) -> None:
        self._states[key] = state
        self._states.move_to_end(key)
        while len(self._states) > _ADDRESSES:
            self._states.popitem(last=False)


class Rate(_PerAddress[tuple[float, float]]):
    """A token bucket per address.

    Args:
        rate: Requests a second, in bursts of up to ten seconds' worth; 0 allows everything.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def allows(self, key: str) -> bool:
        """Whether one more request may pass now."""
        if not self.rate:
            return True
        now, burst = time.monotonic(), 10 * self.rate
        tokens, since = self._states.get(key, (burst, now))
        tokens = min(burst, tokens + (now - since) * self.rate)
        allowed = tokens >= 1
        self._keep(key, (tokens - allowed, now))
        return allowed


class Guesses(_PerAddress[tuple[int, float]]):
    """Wrong passwords: the sixth in a row locks an address for two seconds, and each further one twice as long."""

    def locked(self, key: str) -> float:
        """Seconds for which no password is looked at."""
        return max(0.0, self._states.get(key, (0, 0.0))[1] - time.monotonic())

    def wrong(self, key: str) -> None:
        """Count one more."""
        count = self._states.get(key, (0, 0.0))[0] + 1
        lock = min(_LONGEST_LOCK, 2.0 ** min(count - _FREE_GUESSES, 20)) if count > _FREE_GUESSES else 0.0
        self._keep(key, (count, time.monotonic() + lock))

    def right(self, key: str) -> None:
        """Forget the wrong ones."""
        self._states.pop(key, None)


class InFlight:
    """Bytes of requests that are being received and answered, which lie in memory meanwhile.

    Args:
        most: For all together.
        most_each: For one address.
    """

    def __init__(self, most: int, most_each: int) -> None:
        self.most, self.most_each = most, most_each
        self._held: dict[str, int] = {}

    def take(self, key: str, count: int) -> bool:
        """Take room for that many more, if there is."""
        held = self._held.get(key, 0) + count
        if held > self.most_each or sum(self._held.values()) + count > self.most:
            return False
        self._held[key] = held
        return True

    def give_back(self, key: str, count: int) -> None:
        """Free what was taken."""
        self._held[key] = self._held.get(key, 0) - count
        if self._held[key] <= 0:
            del self._held[key]


def key_of(scope: Scope) -> str:
    """What counts as one address: with IPv6 a network of 64 bits, which is what one subscriber has."""
    found = address(scope)
    if isinstance(found, IPv6Address):
        return found.exploded[:19]
    return str(found or (scope.get("client") or ("", 0))[0])
