from __future__ import annotations

import asyncio
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from vse_app import http_connections
from vse_app.http_connections import Connection, Server, most_connections
from vse_app.http_hosts import Hosts

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
Ask = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a body with its length, and /large with more than a client's buffers take."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send(
        {"type": "http.response.body", "body": bytes(50_000_000) if scope["path"] == "/large" else b"%d" % size}
    )


def serving(talk: Callable[[Ask], Awaitable[None]], most: int = 100) -> None:
    """Let a client talk to a server; whatever hangs ends after a while."""

    async def run() -> None:
        connection = partial(Connection, most, Hosts())
        config = uvicorn.Config(app, port=0, http=connection, ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]
        server = Server(config, lambda: None, 60)
        task = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            async with asyncio.timeout(20):
                await talk(lambda: asyncio.open_connection("127.0.0.1", port))
        finally:
            server.should_exit = server.force_exit = True
            await task

    asyncio.run(run())


async def ended(reader: asyncio.StreamReader) -> bytes:
    """All that is sent until the connection ends."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET", HEAD, HEAD + b"X: ", POST, POST + b"a" * 99, HEAD + b"\r\n" + HEAD,
     HEAD.replace(b"/", b"/large", 1) + b"\r\n"],
    ids=["nothing", "line", "headers", "header", "no body", "body", "second request", "reads nothing"],
)  # fmt: skip
def test_who_is_late_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for deadline in ("HEADERS_WITHIN", "STALLED_AFTER"):
        monkeypatch.setattr(http_connections, deadline, 0.5)

    async def talk(ask: Ask) -> None:
        reader, writer = await ask()
        if b"large" in sent:
            reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(3 if b"large" in sent else 0)
        if b"large" in sent:
            reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await ended(reader)) < 50_000_000

    serving(talk)


def test_a_body_in_drops_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "BODY_WITHIN", 1.0)

    async def talk(ask: Ask) -> None:
        reader, writer = await ask()
        writer.write(POST)
        reading = asyncio.create_task(ended(reader))
        while not reading.done():
            writer.write(b"a")
            await asyncio.sleep(0.2)
        assert reading.result() == b""

    serving(talk)


def test_the_oldest_that_waits_makes_room() -> None:
    async def talk(ask: Ask) -> None:
        waiting = [await ask() for _ in range(5)]
        for _, writer in waiting:
            writer.write(HEAD)
        for _ in range(20):
            reader, writer = await ask()
            writer.write(HEAD + b"Connection: close\r\n\r\n")
            assert (await ended(reader)).startswith(b"HTTP/1.1 200")
        assert await ended(waiting[0][0]) == b""
        _, writer = waiting[4]
        writer.write(b"Connection: close\r\n\r\n")
        assert (await ended(waiting[4][0])).startswith(b"HTTP/1.1 200")

    serving(talk, most=5)


def test_one_other_machine_has_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connections, "MOST_FROM_ONE", 3)
    monkeypatch.setattr(Connection, "_may_have_many", lambda connection: False)

    async def talk(ask: Ask) -> None:
        waiting = [await ask() for _ in range(3)]
        reader, writer = await ask()
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        assert (await ended(reader)).startswith(b"HTTP/1.1 200")
        assert await ended(waiting[0][0]) == b""

    serving(talk)


def test_connections_leave_files_to_answer_with(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: kept.append(limits))
    for soft, hard, most, raised in (
        (1024, 1024, 512, (1024, 1024)), (256, 1 << 20, 1000, (4000, 1 << 20)), (1 << 20, 1 << 20, 1000, None),
        (100, resource.RLIM_INFINITY, 1000, (4000, resource.RLIM_INFINITY)),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1000, None),
    ):  # fmt: skip
        kept.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda kind, pair=(soft, hard): pair)
        assert most_connections() == most
        assert kept == ([raised] if raised else [])


def test_the_end_does_not_wait_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[int] = []
    server = Server(uvicorn.Config(app), lambda: stopped.append(1), 0.01)
    # Streams of the whole process end with a server, if sse-starlette is there; those of later tests must not.
    if status := getattr(sys.modules.get("sse_starlette.sse"), "AppStatus", None):
        monkeypatch.setattr(status, "should_exit", False)
    server.handle_exit(signal.SIGTERM, None)
    server.handle_exit(signal.SIGTERM, None)  # and again
    server._stop.join()
    assert server.should_exit
    assert stopped == [1]
    assert server._stop.daemon
