"""Files that are sent to the page: where they lie, how they are read, and fields that hand over their paths."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import gradio as gr
from gradio import component_meta
from gradio.utils import get_upload_folder
from PIL import Image

from training.errors import InputError
from vse_app.uploads import MAX_BYTES, read_upload, too_large

_GONE = "the picture is no longer on the server; send it again"

_write_stub = component_meta.create_or_modify_pyi
component_meta.create_or_modify_pyi = lambda *_: None  # Gradio would write a file beside this one


class Upload(gr.Image):  # type: ignore[misc]
    """Gradio's picture field, handing over the path of what was sent as it is.

    Gradio would decode it first, without limits, and its errors name temporary files.
    """

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        """The path."""
        return payload.path if payload else None


class Uploads(gr.File):  # type: ignore[misc]
    """Gradio's field of files, handing over the paths of what was sent; Gradio would make an empty file for each."""

    is_template = True

    def preprocess(self, payload: Any) -> list[str]:
        """The paths."""
        return [file.path for file in payload] if payload else []


component_meta.create_or_modify_pyi = _write_stub


def read(path: str) -> Image.Image:
    """The picture at a path from :class:`Upload`; see :func:`~vse_app.uploads.read_upload`.

    Raises:
        InputError: If it is broken or too large, was not sent to this server, or is gone because the page was open
            for too long.
    """
    try:
        file = _open(path)
    except (OSError, ValueError) as error:
        raise InputError(_GONE) from error
    with os.fdopen(file, "rb") as opened:
        if (size := os.fstat(file).st_size) > MAX_BYTES:
            raise InputError(too_large(PurePath(path).name, size))
        data = opened.read(MAX_BYTES)
    return read_upload(data, PurePath(path).name)


def names_other_file(data: Any) -> bool:
    """Whether JSON from a client names a file, at any depth, that does not lie where uploads do.

    Gradio copies every file that any field's value names to where it can be fetched, before the field sees it.
    """
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value and _parts(value["path"]) is None:
                return True
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return False


def _parts(path: Any) -> tuple[str, str] | None:
    """Folder and name of an upload: each lies in a folder of its own, whose name nobody can guess."""
    try:
        folder, name = PurePath(path).relative_to(get_upload_folder()).parts
    except (TypeError, ValueError):
        return None
    return None if ".." in (folder, name) else (folder, name)


def _open(path: str) -> int:
    """Descriptor of an upload; no part of the way below the folder of uploads may be a link."""
    parts = _parts(path)
    if parts is None:
        raise FileNotFoundError(path)
    root = os.open(get_upload_folder(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        folder = os.open(parts[0], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
    finally:
        os.close(root)
    try:
        return os.open(parts[1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
