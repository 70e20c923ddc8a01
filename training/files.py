"""Writing files so that a crash, a power cut or a full disk leaves either the old ones or the new ones."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_READY = ".ready"
"""A folder of files that count already and are being put in their places."""
_TEMPORARY = re.compile(r"\.(?:.+\.)?(?P<process>[0-9]+)\.tmp|\.[a-z0-9_]{8}\.tmp", re.DOTALL)
"""Temporary names, those without a process from earlier versions."""


def make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing; they are on disk, with their names, on return."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a directory that others made may lie where we cannot look
        sync(path.parent)  # even if it was there: whoever made it may have been killed before this


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well, and is on disk then."""
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno:  # a failed write knows no name, and the temporary one would tell the user nothing
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_files(directory: Path) -> Iterator[Path]:
    """A temporary folder whose files move to ``directory`` when the block ends well: all of them or none.

    The folder itself counts from then until each file is in its place; whoever reads them asks :func:`current_files`.
    """
    make_directory(directory)
    recover(directory)
    temporary = directory / f".{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        temporary.rename(directory / _READY)  # from here on the new files count
        sync(directory)
        recover(directory)
    except OSError as error:
        if error.errno:  # as above
            error.filename = str(directory)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(directory: Path) -> None:
    """Put files in their places that a killed process had ready, and delete what it left unfinished."""
    _delete_leftovers(directory)
    ready, done = directory / _READY, directory / f".{os.getpid()}.tmp"
    if ready.is_dir():
        for path in sorted(ready.iterdir()):
            with replacing(directory / path.name) as temporary:
                try:
                    temporary.hardlink_to(path)  # not moved: the set stays whole until every file is in its place
                except OSError:  # a file system without links
                    shutil.copyfile(path, temporary)
        ready.rename(done)
        sync(directory)
        shutil.rmtree(done)


def current_files(directory: Path) -> Path:
    """Where the files of the last :func:`replacing_files` are: all in one folder, whatever was killed meanwhile."""
    ready = directory / _READY
    return ready if ready.is_dir() else directory


def file_sha256(path: Path) -> str | None:
    """Hex digest of a file's content; None if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _delete_leftovers(directory: Path) -> None:
    for path in directory.iterdir() if directory.is_dir() else ():
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _runs(found["process"]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _runs(process: str | None) -> bool:
    """Whether another process of that number runs; what has our own number is left of one that had it before."""
    if process is None or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
