"""The one exception users are meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is a single line that names the file, the record and the mend. The command line prints it
    and exits with status 2; every other exception is a bug and keeps its traceback.
    """
