"""The exceptions of this package that users are meant to read."""

from __future__ import annotations

import errno
import sqlite3

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_REMEDIES = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "let more files be open (ulimit -n), and try again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "see that this user may read and write there"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room and try again"),
    errno.EROFS: "its file system is read-only; copy it to another, or only search it",
    errno.ENOMEM: "free memory and try again",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV), "see that its disk answers, and try again"),
}


def remedy(error: Exception, absent: str) -> str:
    """What to do about an error of the operating system or of SQLite that is no damage.

    Args:
        error: What went wrong.
        absent: What to do if it says that a file is not there or no file.
    """
    number = error.errno if isinstance(error, OSError) else None
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        number = errno.ENOSPC
    return absent if number in _ABSENT else _REMEDIES.get(number or 0, "try again")


class GalleryError(ValueError):
    """A gallery, an index or what was given to it cannot be used.

    The message is a single line that names the file, the record and the mend.
    """


class ModelError(GalleryError):
    """A gallery's vectors come from another model than the one at hand."""
