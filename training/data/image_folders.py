"""Picture files in folders: finding them, and telling which cannot be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from training.data.images import missing, raster_formats, read_picture
from training.errors import InputError, printable

SYSTEM_FOLDERS = frozenset(
    {
        *("@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "@transcode", "@__thumb", ".@__thumb"),
        *("#recycle", "#snapshot", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
        *("thumbnails", "lost+found", "lost.dir", "__macosx", "network trash folder", "temporary items"),
    }
)
"""Names, in small letters, of folders in which storage and desktop systems keep previews and what was deleted."""

_CANNOT_BE_READ = frozenset(
    {
        *(".3fr", ".3gp", ".ai", ".arw", ".avi", ".avif", ".cr2", ".cr3", ".crw", ".dds"),
        *(".djvu", ".dng", ".emf", ".eps", ".erf", ".exr", ".flv", ".hdr", ".heic", ".heif"),
        *(".hif", ".iiq", ".insv", ".jxl", ".jxr", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
        *(".mpeg", ".mpg", ".mrw", ".mts", ".nef", ".nrw", ".orf", ".pdf", ".pef", ".ps"),
        *(".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".svg", ".svgz", ".webm", ".wmf"),
        *(".wmv", ".x3f", ".xcf"),
    }
)
"""Suffixes of pictures and films, which are counted where no decoder for them is there."""


@dataclass
class Listing:
    """Picture files, and what was passed over where they were looked for.

    Attributes:
        files: In a stable order, each once.
        refused: ``(path, reason)`` of folders that cannot be read.
        unread: Number of files of picture and film types that cannot be read, by suffix.
        system: Number of folders left out by their names, see :data:`SYSTEM_FOLDERS`.
        links: Links to folders, which are not followed.
    """

    files: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    system: Counter[str] = field(default_factory=Counter)
    links: list[Path] = field(default_factory=list)

    def lines(self, remedy: str = "name what is wanted") -> list[str]:
        """A line for each kind of thing that was passed over; ``remedy`` says how folders are reached."""
        lines = []
        if self.unread:
            heic = "; pip install 'vse-app[heic]' reads .heic" if ".heic" in self.unread else ""
            lines.append(f"{_count(self.unread, 'file')} of types that cannot be read: {_each(self.unread)}{heic}")
        if self.system:
            lines.append(f"{_count(self.system, 'system folder')} left out: {_each(self.system)}; {remedy}")
        if self.links:
            linked = Counter({"": len(self.links)})
            lines.append(f"{_count(linked, 'linked folder')} left out, as {self.links[0]}; {remedy}")
        return lines


def _count(of: Counter[str], what: str) -> str:
    return f"{of.total():,} {what}{'s' if of.total() > 1 else ''}"


def _each(of: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in of.most_common())


def find_images(paths: Iterable[Path]) -> Listing:
    """Lists picture files.

    Files named in ``paths`` are always kept. Folders are walked recursively in alphabetical order for
    files whose suffix belongs to a picture format. Hidden files and folders are skipped; folders of the system, links
    to folders, folders that cannot be read and files of other picture types are skipped and told.

    Raises:
        InputError: If one of ``paths`` is missing, or a folder that cannot be read.
    """
    listing, found = Listing(), dict[Path, None]()
    formats = raster_formats()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    for path in paths:
        if not os.path.lexists(path):
            raise missing(path, "file or folder")
        if os.path.isdir(path):
            found |= dict.fromkeys(_walk(path, suffixes, listing))
        else:
            found[path] = None
    listing.files = list(found)
    return listing


def _walk(path: Path, suffixes: Container[str], listing: Listing) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        if Path(error.filename) == path:
            raise InputError(f"{path}: {error.strerror}; check the folder's permissions") from error
        listing.refused.append((Path(error.filename), f"{error.strerror}; make it readable or leave it out"))

    for folder, subfolders, files in os.walk(path, onerror=refuse):
        walked = []
        for name in sorted(subfolders):
            if name.lower() in SYSTEM_FOLDERS:
                listing.system[name] += 1
            elif name.startswith("."):
                continue
            elif os.path.islink(os.path.join(folder, name)):
                listing.links.append(Path(folder, name))
            else:
                walked.append(name)
        subfolders[:] = walked
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in suffixes:
                yield Path(folder, name)
            elif suffix in _CANNOT_BE_READ:
                listing.unread[suffix] += 1


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
        return "\n".join(map(printable, lines + [f"note     {path}: {note}" for path, note in self.notes]))

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
            quarantine.refused.append((path, str(error).removeprefix(printable(f"{path}: "))))
            continue
        quarantine.notes.extend((path, note) for note in picture.notes)
        yield path, picture.image
