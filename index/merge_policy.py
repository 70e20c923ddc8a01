"""Which segments of a gallery are merged, told from their numbers of rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def packed(rows: Sequence[int], limit: int) -> list[slice]:
    """All segments in runs of neighbours, each as long as the limit allows.

    Args:
        rows: Rows of each segment, oldest first.
        limit: Most rows of a run; a segment of more is a run of its own.
    """
    starts: list[int] = []
    total = 0
    for place, size in enumerate(rows):
        if not starts or total + size > limit:
            starts.append(place)
            total = 0
        total += size
    return [slice(*run) for run in pairwise([*starts, len(rows)])]


def runs_to_merge(rows: Sequence[int], limit: int, merge_at: int) -> list[slice]:
    """Runs of neighbouring segments of which each should become one, as in a log-structured merge tree.

    Size classes are powers of ``merge_at`` below the limit. A segment absorbs older neighbours of lower classes, and
    ``merge_at`` neighbours of one class become one of the next. Where the limit forbids either, segments are packed
    as tightly as it allows.

    So a row is copied once when it arrives at most, once whenever it rises by a class, and once when it is packed;
    and besides two segments for every ``limit`` rows there are fewer than ``merge_at`` of each class.

    Args:
        rows: Rows of each segment that are not removed, at least 1, oldest first.
        limit: Most rows of a run.
        merge_at: So many segments of a class are merged, at least 2.
    """

    def depth(size: int) -> int:
        """How many classes there are above."""
        return 0 if size * merge_at > limit else 1 + depth(size * merge_at)

    starts: list[int] = []
    sizes: list[int] = []
    for place, size in enumerate(rows):
        starts.append(place)
        sizes.append(size)
        while len(sizes) > 1:
            newest, *older = map(depth, sizes[: -merge_at - 1 : -1])
            if older[0] > newest and sizes[-2] + sizes[-1] <= limit:
                first = len(sizes) - 2
            elif newest and older == [newest] * (merge_at - 1):
                first = len(sizes) - merge_at
            else:
                break
            sizes[first:] = [sum(sizes[first:])]
            del starts[first + 1 :]
    settled = len(sizes) - next((n for n, size in enumerate(reversed(sizes)) if not depth(size)), len(sizes))
    # The last pack is still open: more may fit in.
    packs = packed(sizes[:settled], limit)[:-1]
    bounds = [*(starts[pack.start] for pack in packs), *starts[packs[-1].stop if packs else 0 :], len(rows)]
    return [slice(*run) for run in pairwise(bounds) if run[1] - run[0] > 1]
