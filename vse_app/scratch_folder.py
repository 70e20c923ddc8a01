"""A folder for what lives no longer than its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "vse-serve-"
_LOCK = "lock"


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A temporary folder, deleted on leaving, or by the next process that makes one if this one is killed before.

    The folder holds a file that its process keeps locked: the system lets go of it with the process.
    """
    _delete_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        descriptor = os.open(f"{folder}/.{_LOCK}", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.rename(f"{folder}/.{_LOCK}", f"{folder}/{_LOCK}")  # nobody meets it unlocked
            yield folder
        finally:
            os.close(descriptor)


def _delete_abandoned(root: Path) -> None:
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):  # locked, or not ours
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)
