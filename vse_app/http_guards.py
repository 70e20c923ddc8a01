"""What every request passes before anything looks at it: rate, name, password, size, origin; and what answers get."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, MutableMapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vse_app.http_hosts import Hosts, host_name, is_foreign
from vse_app.http_limits import Guesses, InFlight, Rate, key_of

SECURITY_HEADERS = {
    # Gradio's components compile templates and styles in the page; but nothing comes from, or goes to, anywhere else.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}
_SAFE = ("GET", "HEAD", "OPTIONS")
_PAGE, _UPLOAD = "/gradio_api/", "/gradio_api/upload"
_MOST_CALL, _MOST_NESTED = 200_000, 64
"""Bytes of a call to the page or a tool, which carries no file, and levels of its JSON."""
_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.S)


class Guards:
    """ASGI middleware around the whole server.

    Args:
        app: What answers requests that pass.
        max_body: Largest body in bytes; 413 beyond. Four times as many are received at a time; 503 beyond.
        hosts: Names of this server, and proxies that it trusts; 400 for others.
        rate: Requests a second from one address, in bursts of up to ten seconds' worth; 429 beyond. 0: no limit.
        password: ``USER:PASSWORD`` that a browser asks for, by HTTP's basic authentication; None lets everybody in.
        answered: Told the route, status and seconds of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body: int,
        hosts: Hosts,
        rate: float = 0,
        password: str | None = None,
        answered: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.max_body, self.hosts, self.password, self.answered = app, max_body, hosts, password, answered
        self.rate, self.guesses = Rate(rate), Guesses()
        self.in_flight = InFlight(4 * max_body, 2 * max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "websocket":  # nothing here speaks it, and nothing below would guard it
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope = self.hosts.behind_proxy(scope)
        started, status, begun = time.perf_counter(), 500, False
        head = scope["method"] == "HEAD" and not scope["path"].startswith(_PAGE)
        if head:  # whatever can be got has a head
            scope["method"] = "GET"

        async def dressed(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message = _dressed(message)
            elif head and "body" in message:
                message = {**message, "body": b""}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal:
                await refusal(scope, receive, dressed)
            else:
                await self._within_limits(scope, receive, dressed)
        except _Refused as refused:
            if not begun:
                await refused.answer(scope, receive, dressed)
        except ClientDisconnect:  # nobody is there to be told
            pass
        except Exception:
            if not begun:
                await _refuse(500, "the server made a mistake; its log says more")(scope, receive, dressed)
            raise
        finally:
            self.answered(_route(scope), status, time.perf_counter() - started)

    async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A body may be longer than its header says, or have no length at all."""
        key, taken, begun = key_of(scope), 0, False
        refused: _Refused | None = None

        async def counted() -> Message:
            nonlocal taken, refused
            message = await receive()
            size = len(message.get("body", b""))
            if taken + size > self._most(scope):
                refused = _Refused(self._too_large(scope))
            elif not self.in_flight.take(key, size):
                refused = _Refused(_refuse(503, "too much is being sent; try again", {"retry-after": "1"}))
            else:
                taken += size
            if refused:
                raise refused
            return message

        async def checked(message: Message) -> None:
            nonlocal begun
            if refused and not begun:  # to whoever reads forms, any error is a broken form
                raise refused
            begun = True
            await send(message)

        try:
            call = scope["method"] not in _SAFE and self._is_call(scope)
            await self.app(scope, await _read_whole(counted) if call else counted, checked)
        finally:
            self.in_flight.give_back(key, taken)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        key = key_of(scope)
        if not self.rate.allows(key):
            return _refuse(429, "too many requests; slow down", {"retry-after": "1"})
        if not self.hosts.knows(scope):
            name = host_name(*headers.getlist("host"))
            if name is None:
                return _refuse(400, "the request needs one Host header, with the name of this server")
            return _refuse(
                400, f"{name} is no name of this server; if it should be, start it with --allow-host {name}"
            )
        if self.password is not None and (refusal := self._unknown(key, headers, self.password)):
            return refusal
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return _refuse(400, "content-length is no number")
        if int(length[:20]) > self._most(scope):
            return self._too_large(scope)
        if scope["method"] not in _SAFE and is_foreign(headers):
            return _refuse(403, "another site's page may not change anything here")
        return None

    def _unknown(self, key: str, headers: Headers, password: str) -> JSONResponse | None:
        if seconds := self.guesses.locked(key):
            retry = {"retry-after": str(math.ceil(seconds))}
            return _refuse(429, "too many wrong passwords; wait before the next", retry)
        given = headers.get("authorization", "")
        if _knows(given, password):
            self.guesses.right(key)
            return None
        if given:
            self.guesses.wrong(key)
        realm = {"www-authenticate": 'Basic realm="vse"'}
        return _refuse(401, "this server asks for a user and a password", realm)

    def _is_call(self, scope: Scope) -> bool:
        path: str = scope["path"]
        return path.startswith(_PAGE) and path != _UPLOAD

    def _most(self, scope: Scope) -> int:
        return min(self.max_body, _MOST_CALL) if self._is_call(scope) else self.max_body

    def _too_large(self, scope: Scope) -> JSONResponse:
        most = self._most(scope)
        size = f"{most / 1e6:.0f} MB" if most >= 1e6 else f"{most / 1e3:.0f} kB"
        return _refuse(413, f"the request is too large; send at most {size}")


class _Refused(Exception):
    def __init__(self, answer: JSONResponse) -> None:
        super().__init__()
        self.answer = answer


def _refuse(status: int, detail: str, headers: MutableMapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


def _dressed(start: Message) -> Message:
    # Gradio would let pages of other ports of this machine read its answers.
    kept = [(name, value) for name, value in start["headers"] if not name.lower().startswith(b"access-control-")]
    start = {**start, "headers": kept}
    headers = MutableHeaders(scope=start)
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    return start


def _route(scope: Scope) -> str:
    page = "page" if scope["path"].startswith(_PAGE) else "other"
    return str(getattr(scope.get("route"), "path", page))


async def _read_whole(receive: Receive) -> Receive:
    """A receiver that has the whole body of a call already: what it nests too deeply would end those who parse it."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
    level = 0
    for bracket in _BRACKETS.findall(body):
        level += 1 if bracket in b"[{" else -1 if bracket in b"]}" else 0
        if level > _MOST_NESTED:
            raise _Refused(_refuse(400, f"the call is nested too deeply; use at most {_MOST_NESTED} levels"))
    waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _knows(given: str, password: str) -> bool:
    kind, _, code = given.partition(" ")
    try:
        told = base64.b64decode(code, validate=True) if kind.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        told = b""
    # Of one length, so that the time that is taken tells nothing of the password's.
    return secrets.compare_digest(hashlib.sha256(told).digest(), hashlib.sha256(password.encode()).digest())
