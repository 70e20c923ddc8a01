"""Picture files in folders: finding them, and keeping count of those that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from training.data.images import raster_formats, read_picture
from training.errors import InputError


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Lists picture files in a stable order, each once.

    Files named in ``paths`` are always kept. Folders are walked recursively in alphabetical order for
    files whose suffix belongs to a picture format; hidden files and folders, and links to folders, are
    skipped.

    Raises:
        InputError: If a path is missing or a folder cannot be read.
    """
    formats = raster_formats()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; check the folder's permissions") from error

    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
        if not path.is_dir():
            found[path] = None
            continue
        for folder, subfolders, files in os.walk(path, onerror=refuse):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                    found[Path(folder, name)] = None
    return list(found)


@dataclass
class Quarantine:
    """What happened to files that could not be used, or only after a conversion.

    Attributes:
        refused: ``(path, reason)`` of files left out.
        notes: ``(path, conversion)`` of files used after a conversion.
    """

    refused: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[tuple[Path, str]] = field(default_factory=list)

    def report(self) -> str:
        """One line per file, refusals first; empty when there is nothing to say."""
        lines = [f"refused  {path}: {reason}" for path, reason in self.refused]
        return "\n".join(lines + [f"note     {path}: {note}" for path, note in self.notes])

    def to_json(self) -> dict[str, list[dict[str, str]]]:
        """The same as plain lists of ``{"path", "reason"}``, ready for ``json.dump``."""
        return {
            kind: [{"path": str(path), "reason": reason} for path, reason in entries]
            for kind, entries in (("refused", self.refused), ("notes", self.notes))
        }


def decode_all(paths: Iterable[Path], quarantine: Quarantine) -> Iterator[tuple[Path, Image.Image]]:
    """Decodes the files that can be decoded, in order; the others end in ``quarantine``."""
    for path in paths:
        try:
            picture = read_picture(path)
        except InputError as error:
            quarantine.refused.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        quarantine.notes.extend((path, note) for note in picture.notes)
        yield path, picture.image
