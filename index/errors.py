"""The exceptions of this package that users are meant to read."""


class GalleryError(ValueError):
    """A gallery, an index or what was given to it cannot be used.

    The message is a single line that names the file, the record and the mend.
    """


class ModelError(GalleryError):
    """A gallery's vectors come from another model than the one at hand."""
