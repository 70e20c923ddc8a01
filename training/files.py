"""Writing files so that a crash or a full disk leaves either the old one or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place, flushed, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno:  # a failed write knows no name, and the temporary one would tell the user nothing
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_files(directory: Path) -> Iterator[Path]:
    """A temporary folder whose files, flushed, move to ``directory`` when the block ends well."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".", suffix=".tmp", dir=directory) as temporary:
            yield Path(temporary)
            written = sorted(Path(temporary).iterdir())
            for path in written:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            for path in written:
                path.replace(directory / path.name)
    except OSError as error:
        if error.errno:  # as above
            error.filename = str(directory)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
