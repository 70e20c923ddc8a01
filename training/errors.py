"""The one exception users are meant to read."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text in one line for a terminal: what moves the cursor, colours or turns a line around becomes an escape.

    A file may be called anything. Written as it is, its name could forge a line of a report.
    """
    return _UNPRINTABLE.sub(lambda letter: letter[0].encode("unicode_escape").decode(), text)


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is a single line that names the file, the record and the mend. The command line prints it
    and exits with status 2; every other exception is a bug of this program.
    """

    def __str__(self) -> str:
        return printable(super().__str__())
