"""The exceptions of this package that users are meant to read."""

from __future__ import annotations

import errno
import re
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


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text in one line for a terminal: what moves the cursor, colours or turns a line around becomes an escape.

    A file may be called anything. Written as it is, its name could forge a line of a report.
    """
    return _UNPRINTABLE.sub(lambda letter: letter[0].encode("unicode_escape").decode(), text)


class GalleryError(ValueError):
    """A gallery, an index or what was given to it cannot be used.

    The message is a single line that names the file, the record and the mend.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ModelError(GalleryError):
    """A gallery's vectors come from another model than the one at hand."""
