"""What every request passes before anything looks at it: size, rate, origin, password; and what answers carry."""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
_ADDRESSES = 10_000


class Guards:
    """ASGI middleware around the whole server.

    Args:
        app: What answers requests that pass.
        max_body: Largest body in bytes; 413 beyond.
        rate: Requests a second from one address, in bursts of up to ten seconds' worth; 429 beyond. 0: no limit.
        password: ``USER:PASSWORD`` that a browser asks for, by HTTP's basic authentication; None lets everybody in.
        answered: Told the route, status and seconds of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body: int,
        rate: float = 0,
        password: str | None = None,
        answered: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.max_body, self.rate, self.password, self.answered = app, max_body, rate, password, answered
        self._allowance: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "websocket":  # nothing here speaks it, and nothing below would guard it
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, begun = time.perf_counter(), 500, False

        async def dressed(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal:
                await refusal(scope, receive, dressed)
            else:
                await self._within_limit(scope, receive, dressed)
        except _TooLarge:
            if not begun:
                await self._too_large()(scope, receive, dressed)
        except Exception:
            if not begun:
                await _refuse(500, "the server made a mistake; its log says more")(scope, receive, dressed)
            raise
        finally:
            route = getattr(
                scope.get("route"), "path", "page" if scope.get("path", "").startswith("/gradio") else "other"
            )
            self.answered(route, status, time.perf_counter() - started)

    async def _within_limit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A body may be longer than its header says, or have no length at all."""
        left, begun = self.max_body, False

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLarge
            return message

        async def checked(message: Message) -> None:
            nonlocal begun
            if left < 0 and not begun:  # to whoever reads forms, any error is a broken form
                raise _TooLarge
            begun = True
            await send(message)

        await self.app(scope, counted, checked)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        address = (scope.get("client") or ("", 0))[0]
        if self.rate and not self._allow(address):
            return _refuse(429, "too many requests; slow down", {"retry-after": "1"})
        if self.password is not None and not _knows(headers.get("authorization", ""), self.password):
            return _refuse(
                401, "this server asks for a user and a password", {"www-authenticate": 'Basic realm="vse"'}
            )
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return _refuse(400, "content-length is no number")
        if int(length[:20]) > self.max_body:
            return self._too_large()
        if scope["method"] not in _SAFE and _foreign(headers):
            return _refuse(403, "another site's page may not change anything here")
        return None

    def _allow(self, address: str) -> bool:
        """A token bucket per address; the addresses seen longest ago are forgotten."""
        now, burst = time.monotonic(), 10 * self.rate
        tokens, since = self._allowance.pop(address, (burst, now))
        tokens = min(burst, tokens + (now - since) * self.rate)
        allowed = tokens >= 1
        self._allowance[address] = (tokens - allowed, now)
        while len(self._allowance) > _ADDRESSES:
            self._allowance.popitem(last=False)
        return allowed

    def _too_large(self) -> JSONResponse:
        return _refuse(413, f"the request is too large; send at most {self.max_body / 1e6:.0f} MB")


class _TooLarge(Exception):
    pass


def _refuse(status: int, detail: str, headers: MutableMapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


def _knows(given: str, password: str) -> bool:
    kind, _, code = given.partition(" ")
    try:
        told = base64.b64decode(code, validate=True) if kind.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        told = b""
    return secrets.compare_digest(told, password.encode())


def _foreign(headers: Headers) -> bool:
    """Whether a browser sends this for a page of another site, with the user's password perhaps."""
    origin = headers.get("origin")
    if origin is None:
        return False
    host = origin.partition("://")[2]
    return not host or host not in (headers.get("host"), headers.get("x-forwarded-host"))
