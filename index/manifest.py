"""``gallery.json``: what a gallery is, and which files it consists of at this moment."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from index.errors import GalleryError, remedy
from index.files import FileRecord, replacing
from index.vector_index import METRICS

FORMAT = 2
NAME = "gallery.json"
MAX_BYTES = 1 << 26
"""A manifest has some 600 bytes per segment; one of 64 MiB was not written by us."""

KINDS = ("segments", "index", "calibration")
"""Folders of a gallery in which parts are kept."""

_TAIL = len('"sha256": ""}') + 64
"""Bytes at the end of a manifest that hold its checksum."""
_PART = re.compile(rf"({'|'.join(KINDS)})/[0-9]{{9}}")
_FILE = re.compile(r"[a-z_]+(-[0-9]{9})?\.(npy|sqlite|faiss|json)")
_NUMBER = re.compile("[0-9]{9}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """A directory of files that are never written again.

    Attributes:
        name: Relative to the gallery, e.g. ``segments/000000012``; no name is used twice.
        files: Its files by name.
    """

    name: str
    files: Mapping[str, FileRecord]

    def __post_init__(self) -> None:
        # These become paths below the gallery, so nothing but our own names may get through.
        if not _PART.fullmatch(self.name) or not all(map(_FILE.fullmatch, self.files)):
            raise ValueError(f"names a part {self.name!r} with {sorted(self.files)}")


@dataclass(frozen=True)
class SegmentPart(Part):
    """Vectors and items added or merged together.

    Attributes:
        rows: Number of vectors, removed ones included.
        live: Number of vectors that are not removed.
        removed: The file that says which rows are removed, or None if none is.
    """

    rows: int
    live: int
    removed: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.live <= self.rows or (self.removed is None) != (self.live == self.rows):
            raise ValueError(f"{self.name}: {self.live} of {self.rows} rows are live, removed {self.removed}")
        if self.removed is not None and self.removed not in self.files:
            raise ValueError(f"{self.name}: {self.removed} is not among its files")


@dataclass(frozen=True)
class Manifest:
    """One state of a gallery; replacing its file makes another state current.

    Attributes:
        dim: Dimensions of the vectors.
        metric: A key of :data:`index.vector_index.METRICS`.
        model: What the vectors come from: ``name`` and ``checksum``.
        uid: Random, so that a gallery made anew in the place of another is known as another.
        items: Number of items.
        next_id: The id that the next item gets; no item ever had it.
        next_part: The number that the next directory or file gets.
        segments: In ascending order of ids, which do not overlap.
        index: The tuned index with its operating curve, if there is one.
        calibration: What turns scores into probabilities, if there is such.
    """

    dim: int
    metric: str
    model: Mapping[str, str]
    uid: str
    items: int = 0
    next_id: int = 1
    next_part: int = 1
    segments: tuple[SegmentPart, ...] = ()
    index: Part | None = None
    calibration: Part | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "items", "next_id", "next_part"):
            if type(number := getattr(self, name)) is not int:
                raise TypeError(f"{name} is {number!r:.80}, no whole number")
        for text in (self.metric, self.uid, *self.model.keys(), *self.model.values()):
            _text(text)
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r}; choose from {', '.join(METRICS)}")
        if not 0 < self.dim <= 1 << 20 or not 0 < self.next_id < 1 << 62 or not 0 < self.next_part < 10**9:
            raise ValueError(f"dim {self.dim}, next_id {self.next_id}, next_part {self.next_part}")
        kinds: list[tuple[str, Part]] = [("segments", part) for part in self.segments]
        kinds += [(kind, part) for kind, part in (("index", self.index), ("calibration", self.calibration)) if part]
        for kind, part in kinds:
            # Whatever has the next number or a later one is deleted before it is written.
            numbers = _NUMBER.findall(" ".join([part.name, *part.files]))
            if not part.name.startswith(f"{kind}/") or max(map(int, numbers)) >= self.next_part:
                raise ValueError(f"{part.name} with {sorted(part.files)} is no part of the {kind} up to now")
        if len({part.name for part in self.segments}) < len(self.segments):
            raise ValueError("a segment occurs twice")
        if self.items != sum(segment.live for segment in self.segments):
            raise ValueError(f"{self.items} items, but its segments have another number")

    def parts(self) -> list[Part]:
        """Every directory of this state."""
        return [*self.segments, *(part for part in (self.index, self.calibration) if part)]

    def encode(self) -> bytes:
        """As JSON with a checksum of its own; equal manifests give equal bytes."""
        body = {"format": FORMAT, **vars(self)}
        body["sha256"] = hashlib.sha256(json.dumps(body, default=vars).encode()).hexdigest()
        return json.dumps(body, default=vars).encode()

    @staticmethod
    def stamp(directory: Path) -> tuple[int, int, int, bytes] | None:
        """What changes whenever another state becomes the current one, at the cost of a look at the file.

        Numbers of files are used again and clocks of file systems may tick every two seconds, but no state has the
        checksum of another.
        """
        try:
            descriptor = os.open(directory / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            checksum = os.pread(descriptor, _TAIL, max(0, status.st_size - _TAIL))
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return status.st_ino, status.st_mtime_ns, status.st_size, checksum

    def write(self, directory: Path, former: Manifest | None) -> None:
        """Make this the current state of the gallery in ``directory``, on disk when it returns.

        Args:
            directory: The gallery.
            former: The state that this one was made from; None for the first.

        Raises:
            GalleryError: If another one is current: a second writer would undo what the first has acknowledged.
        """
        path = directory / NAME
        with replacing(path) as file:
            file.write(self.encode())
            current = path.read_bytes() if path.exists() else None
            if current != (former and former.encode()):
                raise GalleryError(f"{path}: another program has changed the gallery meanwhile; open it again")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The current state.

        Raises:
            GalleryError: If there is none, or it is damaged, made up, or of another format.
        """
        path = directory / NAME
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise GalleryError(f"{path}: is a link or no file; a gallery holds plain files only, put one here")
            if status.st_size > MAX_BYTES:
                raise GalleryError(f"{path}: has more than {MAX_BYTES:,} bytes; restore it or build the gallery again")
            encoded = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise GalleryError(f"{path}: not found, so this is no gallery; create one or check the path") from error
        except OSError as error:
            raise GalleryError(f"{path}: {error.strerror}; {remedy(error, 'make it a plain file')}") from error
        try:
            stored = json.loads(encoded)
            version = stored["format"]
            if type(version) is int and version != FORMAT:
                mend = "update vse" if version > FORMAT else "build the gallery again with vse index add"
                raise GalleryError(f"{path}: format {version}, but this version reads {FORMAT}; {mend}")
            manifest = cls._decode(stored)
            # Whatever is not what we would have written is damage, down to the last space.
            if manifest.encode() != encoded:
                raise ValueError("its checksum does not match")
        except GalleryError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"{error!s:.200}".replace("\n", " ")
            raise GalleryError(f"{path}: {reason}; restore it or build the gallery again") from error
        return manifest

    @classmethod
    def _decode(cls, stored: dict[str, Any]) -> Self:
        def part(name: str) -> Part | None:
            of = stored[name]
            return None if of is None else Part(_text(of["name"]), _files(of["files"]))

        segments = tuple(
            SegmentPart(
                _text(of["name"]),
                _files(of["files"]),
                _count(of["rows"]),
                _count(of["live"]),
                None if of["removed"] is None else _text(of["removed"]),
            )
            for of in stored["segments"]
        )
        return cls(
            stored["dim"],
            stored["metric"],
            stored["model"],
            stored["uid"],
            stored["items"],
            stored["next_id"],
            stored["next_part"],
            segments,
            part("index"),
            part("calibration"),
        )


def _files(stored: dict[str, Any]) -> dict[str, FileRecord]:
    files = {name: FileRecord(_count(of["bytes"]), _text(of["sha256"])) for name, of in stored.items()}
    if not all(_SHA256.fullmatch(record.sha256) for record in files.values()):
        raise ValueError("a checksum is not a SHA-256")
    return files


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} where a number from 0 is needed")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text is needed")
    return value
