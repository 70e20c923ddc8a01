"""Writing files so that a crash leaves either the old one or the new one, and knowing them again."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from index.errors import GalleryError, remedy

_CHUNK = 1 << 20
_MEND = "restore it or build the gallery again"


@dataclass(frozen=True)
class FileRecord:
    """Length in bytes and SHA-256 of a file that is never written again."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, advance: Callable[[int], object] | None = None) -> FileRecord:
        """Read a whole file; ``advance`` is told how many bytes each step read."""
        digest = hashlib.sha256()
        length = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                length += len(chunk)
                if advance:
                    advance(len(chunk))
        return cls(length, digest.hexdigest())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write ``path`` through a temporary neighbour that takes its name once it is safely on disk.

    Yields:
        The temporary file, open for writing bytes.

    Raises:
        OSError: If the disk is full or the directory cannot be written; ``path`` is then as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # left behind by a crash; a link here would be written through
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name lives in the directory, so it lasts only once the directory is on disk too.
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing; they are on disk, with their names, on return."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a directory that others made may lie where we cannot look
        sync(path.parent)  # even if it was there: whoever made it may have been killed before this


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory of files; all of it is on disk on leaving, and none of it if that fails."""
    path.parent.mkdir(exist_ok=True)  # no more than that: a whole path that is missing is a wrong one
    make_directory(path.parent)
    shutil.rmtree(path, ignore_errors=True)  # left behind by a crash: nothing that counts has this name yet
    try:
        path.mkdir()
        yield path
        for file in path.iterdir():
            sync(file)
        sync(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(path: Path, length: int) -> None:
    """Refuse a file that is not where or what it should be before anything of it is read.

    Raises:
        GalleryError: If it is missing, a symbolic link, not a regular file, or of another length.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise GalleryError(f"{path}: {error.strerror}; {remedy(error, _MEND)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise GalleryError(f"{path}: is a link or no file; a gallery holds plain files only, put the file itself here")
    if status.st_size != length:
        raise GalleryError(
            f"{path}: has {status.st_size:,} bytes, not {length:,}; restore it or build the gallery again"
        )


def check_directory(path: Path) -> None:
    """Refuse a directory that is missing, or a symbolic link out of the gallery.

    Raises:
        GalleryError: If it is.
    """
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise GalleryError(f"{path}: {error.strerror}; {remedy(error, _MEND)}") from error
    if not stat.S_ISDIR(mode):
        raise GalleryError(f"{path}: is no directory of the gallery's own; put the directory itself here")


@contextmanager
def locked(directory: Path) -> Iterator[Callable[[], None]]:
    """Be the only writer; the end of the process, however it comes, lets others write.

    Yields:
        A check that it still is so: raises :class:`GalleryError` once the file that is locked has been deleted or
        replaced, as another writer may then have locked a new one.

    Raises:
        GalleryError: If another process is, or the lock cannot be had at all.
    """
    path = directory / "lock"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        mend = remedy(error, "make it a plain file in a directory that can be written")
        raise GalleryError(f"{path}: {error.strerror}; {mend}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GalleryError(f"{directory}: another writer has this gallery open; wait for it to close") from error
        except OSError as error:
            raise GalleryError(f"{path}: {error.strerror}; put the gallery on a disk with locks") from error

        def check() -> None:
            with suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), os.fstat(descriptor)):
                    return
            raise GalleryError(f"{path}: was deleted, so others may be writing; open the gallery again")

        check()
        yield check
    finally:
        os.close(descriptor)
