"""Reading a whole gallery to see that every byte is what was written."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from index.approximate_index import INDEX
from index.changes import leftovers
from index.errors import GalleryError
from index.files import FileRecord, check_directory, check_file
from index.manifest import Manifest, Part, SegmentPart
from index.searcher import load_index, read_curve
from index.segment import Segment
from index.snapshot import Snapshot

_ATTEMPTS = 5


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        problems: One line each, beginning with the file's path; none means that all is well.
        leftovers: Files that belong to no state; the next writer deletes them.
        files: Number of files read.
        bytes: Their length together.
    """

    problems: list[str]
    leftovers: list[Path]
    files: int
    bytes: int


def verify(directory: Path, advance: Callable[[int, int], object] = lambda done, total: None) -> Verification:
    """Read every file of the current state, and see that its content makes sense.

    Args:
        directory: The gallery; it may be in use.
        advance: Told how many bytes each step read, and how many there are.
    """
    for attempt in range(_ATTEMPTS):
        try:
            state = Manifest.read(directory)
        except GalleryError as error:
            return Verification([str(error)], [], 1, 0)
        total = sum(record.bytes for part in state.parts() for record in part.files.values())
        problems: list[str] = []
        for part in state.parts():
            damage = list(_damage(directory, part, lambda step: advance(step, total)))  # noqa: B023 (called at once)
            problems += damage or list(_nonsense(directory, state, part))
        if not problems:
            problems += _disagreement(directory, state)
        # A writer may have deleted files of this state meanwhile.
        if not problems or attempt == _ATTEMPTS - 1 or _is_current(directory, state):
            break
    files = 1 + sum(len(part.files) for part in state.parts())
    try:
        unnamed = leftovers(directory, state)
    except (GalleryError, OSError) as error:
        unnamed = []
        if _is_current(directory, state):  # or else a writer has just deleted something
            problems = [*problems, str(error)]
    return Verification(problems, unnamed, files, total)


def _damage(directory: Path, part: Part, advance: Callable[[int], object]) -> Iterator[str]:
    folder = directory / part.name
    try:
        check_directory(folder.parent)
        check_directory(folder)
    except GalleryError as error:
        yield str(error)
        return
    for name, record in part.files.items():
        try:
            check_file(folder / name, record.bytes)
            if FileRecord.of(folder / name, advance) != record:
                yield f"{folder / name}: is not what was written; restore it or build the gallery again"
        except (GalleryError, OSError) as error:
            yield str(error) if isinstance(error, GalleryError) else f"{folder / name}: {error.strerror}"


def _nonsense(directory: Path, state: Manifest, part: Part) -> Iterator[str]:
    """What no flipped bit explains: files whose checksums match, but which cannot have been written by us."""
    try:
        if isinstance(part, SegmentPart):
            with closing(Segment(directory, part, state.dim)) as segment:
                segment.items.check()
                held = np.fromiter((key for key, *_ in segment.items.facts()), np.int64)
                # Removed ones may be missing: they are left out when others are changed.
                if not np.isin(held, segment.ids).all() or not np.isin(segment.ids[segment.alive], held).all():
                    yield f"{segment.items.path}: its items are not those of the vectors; build the gallery again"
                for _ in segment.blocks():
                    pass
    except GalleryError as error:
        yield str(error)


def _disagreement(directory: Path, state: Manifest) -> Iterator[str]:
    """Parts that do not fit together: ids or paths of two segments, or an index of other items."""
    try:
        with closing(Snapshot.open(directory, state)) as snapshot:
            # Each segment's in order of path, so that memory does not grow with the gallery.
            ordered = (_live_paths(segment) for segment in snapshot.segments)
            for (path, _), (next_path, where) in pairwise(heapq.merge(*ordered)):
                if path == next_path:
                    yield f"{where}: {path!r} is there twice; remove it and add it again"
            if state.index:
                read_curve(directory, state.index)
                if INDEX in state.index.files:
                    load_index(snapshot, state.index)
    except GalleryError as error:
        yield str(error)


def _live_paths(segment: Segment) -> Iterator[tuple[str, str]]:
    """Paths of the items that are not removed, ascending, and the file that holds them."""
    gone = set(segment.ids[~segment.alive].tolist())
    for key, path in segment.items.paths():
        if key not in gone:
            yield path, str(segment.items.path)


def _is_current(directory: Path, state: Manifest) -> bool:
    try:
        return Manifest.read(directory) == state
    except GalleryError:
        return False
