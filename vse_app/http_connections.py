"""Connections that nobody waits on for ever: deadlines for what clients send and take, and how many there may be."""

from __future__ import annotations

import asyncio
import resource
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vse_app.http_hosts import Hosts, address
from vse_app.http_limits import key_of

HEADERS_WITHIN, STALLED_AFTER, BODY_WITHIN = 20.0, 30.0, 300.0
"""Seconds for a request's headers, between parts of its body or of the answer, and for the whole body."""
MOST_CONNECTIONS, MOST_FROM_ONE = 1000, 64
"""Connections of all clients together, or half of the files that may be open; and of one other machine."""


class Connection(H11Protocol):
    """uvicorn's connection, which can tell whether its client is late.

    Args:
        most: See :data:`MOST_CONNECTIONS`.
        hosts: Whose proxies may have any number of connections.
        arguments: As uvicorn gives them.
    """

    def __init__(self, most: int, hosts: Hosts, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._most, self._hosts = most, hosts
        self._began = self._heard = self._taken = self.loop.time()
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room by ending what has waited longest for its client, or else do without this one."""
        super().connection_made(transport)
        self._key = key_of({"client": self.client})
        others = [of for of in self.connections if isinstance(of, Connection) and not of.transport.is_closing()]
        own = [of for of in others if of._key == self._key]
        if len(own) > MOST_FROM_ONE and not self._may_have_many():
            _make_room(own, self)
        elif len(others) > self._most:
            _make_room(others, self)

    def data_received(self, data: bytes) -> None:
        """Note when."""
        self._heard = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """The next request has as long as the first."""
        self._began = self._heard = self.loop.time()
        super().on_response_complete()

    def waits(self) -> bool:
        """Whether the client has not sent all of a request."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.flow.read_paused

    def is_late(self) -> bool:
        """Whether the client has taken too long."""
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._taken = unsent, now
        if not self.waits():
            return now - self._taken > STALLED_AFTER
        if self.conn.their_state is h11.IDLE:
            return now - self._began > HEADERS_WITHIN
        return now - self._heard > STALLED_AFTER or now - self._began > BODY_WITHIN

    def _may_have_many(self) -> bool:
        client = address({"client": self.client})
        return client is None or client.is_loopback or self._hosts.trusts(client)


class Server(uvicorn.Server):
    """uvicorn's server, which ends connections whose clients are late, and itself in time.

    Attributes:
        interrupted: Whether it was told to end by a signal.

    Args:
        config: uvicorn's.
        stopped: Called in a thread of its own if the server has not ended that many seconds after it was told to.
        within: Those seconds.
    """

    def __init__(self, config: uvicorn.Config, stopped: Callable[[], None], within: float) -> None:
        super().__init__(config)
        self.interrupted = False
        self._stop = threading.Timer(within, stopped)
        self._stop.daemon = True

    async def on_tick(self, counter: int) -> bool:
        """Once a second, look for late clients."""
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection) and connection.is_late():
                    connection.transport.abort()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, whatever threads are at work."""
        if not self.interrupted:
            self.interrupted = True
            self._stop.start()
        super().handle_exit(sig, frame)

    def run(self, sockets: Any = None) -> None:
        """Until it is interrupted or terminated, also when that happens just before."""
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn, once it has stopped, sends itself the signal anew
            signal.signal(number, self.handle_exit)
        super().run(sockets)


def most_connections() -> int:
    """As many as leave enough files to answer with, once the limit of this process is as high as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MOST_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft // 2)


def _make_room(among: list[Connection], new: Connection) -> None:
    waiting = [of for of in among if of is not new and of.waits()]
    (min(waiting, key=lambda of: of._began) if waiting else new).transport.abort()
