"""A picture field that hands over the file as it was sent, for our own limits and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio import component_meta
from PIL import Image

from training.errors import InputError
from vse_app.uploads import MAX_BYTES, read_upload

_write_stub = component_meta.create_or_modify_pyi
component_meta.create_or_modify_pyi = lambda *_: None  # Gradio would write a file beside this one


class Upload(gr.Image):  # type: ignore[misc]
    """Gradio's picture field, handing over the path of what was sent as it is.

    Gradio would decode it first, without limits, and its errors name temporary files. That the path lies in its folder
    of uploads is checked by Gradio before.
    """

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        """The path."""
        return payload.path if payload else None


component_meta.create_or_modify_pyi = _write_stub


def read(path: str) -> Image.Image:
    """The picture at a path from :class:`Upload`; see :func:`~vse_app.uploads.read_upload`.

    Raises:
        InputError: If it is broken or too large, or gone because the page was open for too long.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError("the picture is no longer on the server; send it again") from error
    return read_upload(data, Path(path).name)
