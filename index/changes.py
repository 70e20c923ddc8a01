"""What a writer does to a gallery: each function puts new files on disk and returns the state that names them.

Nothing here makes a state current, so whatever fails or is killed half-way leaves the gallery as it was.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from index import manifest as manifests
from index.errors import GalleryError
from index.files import check_directory, new_directory
from index.items import Item
from index.manifest import KINDS, Manifest, Part, SegmentPart
from index.merge_policy import packed, runs_to_merge
from index.segment import merge_segments, records, write_segment
from index.snapshot import Snapshot

MERGE_AT = 8
"""So many neighbouring segments of a size class become one, so there are few and each row is copied seldom."""
MERGED_BYTES = 1 << 29
"""No merge makes a segment of more bytes of vectors than this, so none takes long."""


def added(snapshot: Snapshot, items: Sequence[Item], vectors: NDArray[np.float32]) -> Manifest:
    """With new items, in place of those with the same paths.

    Args:
        snapshot: The state to change.
        items: ``(N,)``, at least one, each path once.
        vectors: float32 ``(N, D)``.

    Raises:
        GalleryError: If an item cannot be stored.
    """
    (twice, times), *_ = Counter(item.path for item in items).most_common(1)
    if times > 1:
        raise GalleryError(f"{twice}: occurs twice among the items to add; give each path once")
    state = snapshot.manifest
    ids = np.arange(state.next_id, state.next_id + len(items))
    segment = write_segment(snapshot.directory, f"segments/{state.next_part:09d}", items, ids, vectors)
    state = replace(state, next_id=state.next_id + len(items), next_part=state.next_part + 1)
    state = removed(snapshot, snapshot.ids_of([item.path for item in items]), state)
    return _with(state, (*state.segments, segment))


def removed(snapshot: Snapshot, ids: NDArray[np.int64], state: Manifest | None = None) -> Manifest:
    """Without these ids, as far as they are here.

    Args:
        snapshot: The state to change.
        ids: int64 ``(M,)``.
        state: A later state with the same segments, to go on from.
    """
    state = state or snapshot.manifest
    segments: list[SegmentPart] = []
    number = state.next_part
    for segment in snapshot.segments:
        if (segment.rows_of(ids) < 0).all():
            segments.append(segment.part)
        elif rest := segment.without(snapshot.directory, ids, number):
            segments.append(rest)
            number += 1
    return _with(replace(state, next_part=number), tuple(segments))


def updated(snapshot: Snapshot, items: Mapping[int, Item]) -> Manifest:
    """With something else known of some ids, all of which are here; vectors stay.

    Args:
        snapshot: The state to change.
        items: By id, no path twice, and none that an id has which is not among them.
    """
    state = snapshot.manifest
    ids = np.fromiter(items, np.int64)
    segments, number = [], state.next_part
    for segment in snapshot.segments:
        here = ids[segment.rows_of(ids) >= 0].tolist()
        changed = {key: items[key] for key in here}
        segments.append(segment.updated(snapshot.directory, changed, number) if here else segment.part)
        number += bool(here)
    return _with(replace(state, next_part=number), tuple(segments))


def merged(snapshot: Snapshot) -> Manifest:
    """With segments merged if there are many of a size; see :mod:`index.merge_policy`."""
    rows = [part.live for part in snapshot.manifest.segments]
    return _merge(snapshot, runs_to_merge(rows, _row_limit(snapshot), MERGE_AT))


def compacted(snapshot: Snapshot) -> Manifest:
    """With all segments merged as far as the size limit goes, and no removed row left."""
    parts = snapshot.manifest.segments
    runs = packed([part.live for part in parts], _row_limit(snapshot))
    return _merge(snapshot, [run for run in runs if run.stop - run.start > 1 or parts[run.start].removed])


def with_part(snapshot: Snapshot, kind: Literal["index", "calibration"], write: Callable[[Path], None]) -> Manifest:
    """With another index or calibration.

    Args:
        snapshot: The state to change.
        kind: Which.
        write: Puts its files into the folder that it is given.
    """
    state = snapshot.manifest
    name = f"{kind}/{state.next_part:09d}"
    with new_directory(snapshot.directory / name) as folder:
        write(folder)
        part = Part(name, records(folder))
    state = replace(state, next_part=state.next_part + 1)
    return replace(state, index=part) if kind == "index" else replace(state, calibration=part)


def delete_former(directory: Path, former: Manifest, current: Manifest) -> None:
    """Delete what only a former state names; who has it open goes on reading it.

    What cannot be deleted is left to the next writer, as the new state counts already.
    """
    kept = {part.name: part for part in current.parts()}
    for part in former.parts():
        if part.name not in kept:
            shutil.rmtree(directory / part.name, ignore_errors=True)
        else:
            for name in part.files.keys() - kept[part.name].files.keys():
                with suppress(OSError):
                    (directory / part.name / name).unlink()


def delete_leftovers(directory: Path, current: Manifest) -> list[Path]:
    """Delete what a killed writer left behind: files in the gallery's folders that no state names.

    What cannot be listed or deleted is left to the next writer.
    """
    gone: list[Path] = []
    with suppress(OSError):
        gone = leftovers(directory, current)
    for path in gone:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    return gone


def leftovers(directory: Path, current: Manifest) -> list[Path]:
    """Files and folders in the gallery's folders that the state does not name.

    Raises:
        GalleryError: If one of its folders is a link out of the gallery.
    """
    parts = {directory / part.name: part for part in current.parts()}
    temporary = directory / f"{manifests.NAME}.tmp"
    found = [temporary] if temporary.exists() or temporary.is_symlink() else []
    for folder in (directory / kind for kind in KINDS):
        if folder.exists() or folder.is_symlink():
            check_directory(folder)
            # Only what a writer can have made: whoever made something else here may miss it.
            for path in sorted(folder.glob("[0-9]" * 9)):
                if path not in parts:
                    found.append(path)
                else:
                    check_directory(path)
                    found += [file for file in sorted(path.iterdir()) if file.name not in parts[path].files]
    return found


def _merge(snapshot: Snapshot, runs: Sequence[slice]) -> Manifest:
    """With each of these runs of segments, in their order, as one."""
    state = snapshot.manifest
    for run in reversed(runs):  # so that the places of earlier segments stay what they are
        name = f"segments/{state.next_part:09d}"
        segment = merge_segments(snapshot.directory, name, snapshot.segments[run])
        segments = (*state.segments[: run.start], segment, *state.segments[run.stop :])
        state = _with(replace(state, next_part=state.next_part + 1), segments)
    return state


def _with(state: Manifest, segments: tuple[SegmentPart, ...]) -> Manifest:
    return replace(state, segments=segments, items=sum(segment.live for segment in segments))


def _row_limit(snapshot: Snapshot) -> int:
    return max(1, MERGED_BYTES // (4 * snapshot.manifest.dim))
