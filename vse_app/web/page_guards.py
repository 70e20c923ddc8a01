"""What every call to the page passes: its routes, the files that it names, and what it is told when it fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from index.errors import GalleryError
from training.errors import InputError
from vse_app.api import Refused
from vse_app.limits import Busy
from vse_app.web.upload import names_other_file

REFUSALS = (InputError, GalleryError, Busy, Refused)
"""What is told in one line; anything else is a bug, or a call that fits no function."""
_ROUTES = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|robots\.txt|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(info/?|openapi\.json|theme\.css|startup-events|cancel|reset/?"
    r"|(run|call|heartbeat)/.+|queue/(join|data)|file=.+|mcp(/.*)?)"
)
_SESSIONS = 500
"""Open pages whose fields are remembered; each keeps what was last sent to it."""
_log = logging.getLogger(__name__)


class OpenRoutes:
    """ASGI middleware around Gradio's application: the routes that the page and its clients use, and no others.

    The others keep what somebody sees for whoever has the link, fetch from elsewhere, or edit the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "http" and not _ROUTES.fullmatch(scope["path"]):
            return await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
        await self.app(scope, receive, send)


class GuardedBlocks(gr.Blocks):  # type: ignore[misc]
    """Gradio's blocks, whose every call is looked at before any field sees what it brings.

    Args:
        line: Says what is wrong in one line that may be sent.
        arguments: As :class:`gradio.Blocks` takes them.
    """

    def __init__(self, line: Callable[[Exception], str], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._line = line
        self.state_session_capacity = _SESSIONS
        self.has_launched = True  # or Gradio would not check which files it copies; nobody launches what is mounted

    async def process_api(self, block_fn: Any, inputs: list[Any], *arguments: Any, **named: Any) -> Any:
        """As Gradio's, for every way to call a function: queue, direct, MCP."""
        try:
            if names_other_file(inputs):
                raise InputError("no such upload; send the file first")
            return await super().process_api(block_fn, inputs, *arguments, **named)
        except gr.Error as error:  # of a field, about what it was sent
            raise _Line(self._line(ValueError(error.message))) from None
        except REFUSALS as error:
            raise _Line(self._line(error)) from error
        except Exception as error:
            _log.exception("a call to the page failed: %s", type(error).__name__)
            raise _Line("this call cannot be answered; open the page anew") from error


@dataclass(frozen=True)
class SessionBlocks:
    """What Gradio needs of the page for a new session.

    With the page itself it would describe every field anew for each session, for deep links, which are closed here:
    that takes the time of several searches.
    """

    default_config: Any
    blocks: Mapping[int, Any] = field(default_factory=dict)


class _Line(gr.Error):  # type: ignore[misc]
    """What went wrong, without a trace in the log."""

    def __init__(self, message: str) -> None:
        super().__init__(message, print_exception=False)

    def __str__(self) -> str:  # Gradio's has quotation marks, which MCP clients would be sent
        return str(self.message)
