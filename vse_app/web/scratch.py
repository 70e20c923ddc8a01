"""Where what is sent to the page lies for some minutes: never more than a quota, each file under a secret name."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from pathlib import Path, PurePath
from typing import Any

from anyio import to_thread
from fastapi import Request, Response
from gradio.utils import get_upload_folder
from starlette.datastructures import UploadFile

from vse_app.api import MOST_UPLOADS, Refused
from vse_app.http_limits import key_of
from vse_app.uploads import MAX_BYTES, too_large

UPLOADS_KEPT = 600
"""Seconds for which what was sent to the page stays on disk."""
MOST_KEPT, MOST_KEPT_EACH = 1_000_000_000, MOST_UPLOADS * MAX_BYTES
"""Bytes that lie there at most, of all together and of what came from one address."""


class Scratch:
    """The folder of uploads to the page.

    Args:
        deleted: Paths that Gradio deletes once they are old.
    """

    def __init__(self, deleted: set[str]) -> None:
        self._deleted = deleted
        self._sent: list[tuple[float, str, int]] = []

    async def receive(self, request: Request) -> list[str]:
        """Keep the ``files`` of a form; all of them, or none.

        Returns:
            Their paths, which calls to the page name them by.

        Raises:
            Refused: If they are too large or too many, or there is no room.
        """
        async with request.form(max_files=MOST_UPLOADS, max_fields=MOST_UPLOADS) as form:
            sent = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
            for file in sent:
                if (file.size or 0) > MAX_BYTES:
                    raise Refused(413, too_large(_name(file), file.size or 0))
            total = sum(file.size or 0 for file in sent)
            self._take(key_of(request.scope), total)
            contents = [(_name(file), await file.read()) for file in sent]
        paths = await to_thread.run_sync(_write, contents)
        self._deleted.update(paths)
        return paths

    def _take(self, key: str, size: int) -> None:
        """Room for as long as the files are kept; it is not given back earlier, nor when they cannot be written."""
        now = time.monotonic()
        self._sent = [sent for sent in self._sent if now - sent[0] < 1.2 * UPLOADS_KEPT]
        each = sum(one for _, whose, one in self._sent if whose == key)
        if each + size > MOST_KEPT_EACH or sum(one for *_, one in self._sent) + size > MOST_KEPT:
            raise Refused(503, "enough pictures wait on the server already; try again in some minutes")
        self._sent.append((now, key, size))


def _name(file: UploadFile) -> str:
    """What a file is called in messages."""
    return re.sub(r"[^\w. -]", "_", PurePath(file.filename or "").name)[-100:].lstrip(".") or "picture"


def _write(contents: list[tuple[str, bytes]]) -> list[str]:
    folders: list[Path] = []
    paths: list[str] = []
    try:
        for name, content in contents:
            folders.append(Path(get_upload_folder()) / secrets.token_hex(32))
            folders[-1].mkdir(mode=0o700, parents=True)
            (folders[-1] / name).write_bytes(content)
            paths.append(str(folders[-1] / name))
    except OSError as error:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise Refused(503, f"the picture cannot be kept: {error.strerror}; try again later") from error
    return paths


def install(app: Any, deleted: set[str]) -> None:
    """Receive uploads in the place of Gradio, which has no quota and leaves what was cut off."""
    app.post("/gradio_api/upload", include_in_schema=False)(Scratch(deleted).receive)
    app.get("/gradio_api/upload_progress", include_in_schema=False)(_progress)


def _progress() -> Response:
    """The page asks how far an upload is; that it is done, as far as there is anything to tell."""
    return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
