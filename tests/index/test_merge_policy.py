from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from index.merge_policy import packed, runs_to_merge

LIMIT = 1 << 19
"""Rows of 256 dimensions that a merged segment may have."""


class Life:
    """Segments as lists of batches, ``[batch, rows left]``, and how often the rows of each batch were copied."""

    def __init__(self, limit: int, merge_at: int) -> None:
        self.limit, self.merge_at = limit, merge_at
        self.segments: list[list[list[int]]] = []
        self.copies: Counter[int] = Counter()
        self.added = self.removed = self.copied = 0

    def rows(self) -> list[int]:
        return [sum(left for _, left in segment) for segment in self.segments]

    def add(self, count: int) -> None:
        self.segments.append([[len(self.copies), count]])
        self.copies[len(self.copies)] = 0
        self.added += count
        for run in reversed(runs_to_merge(self.rows(), self.limit, self.merge_at)):
            merged = [batch for segment in self.segments[run] for batch in segment]
            assert run.stop - run.start > 1
            assert sum(left for _, left in merged) <= self.limit
            self.copies.update(batch for batch, _ in merged)
            self.copied += sum(left for _, left in merged)
            self.segments[run] = [merged]

    def remove(self, place: int, count: int) -> None:
        """From one segment; it goes when nothing is left of it."""
        segment = self.segments[place]
        for batch in segment:
            gone = min(count, batch[1])
            batch[1] -= gone
            count -= gone
            self.removed += gone
        segment[:] = [batch for batch in segment if batch[1]]
        self.segments = [segment for segment in self.segments if segment]

    @property
    def classes(self) -> int:
        return math.ceil(math.log(max(2, min(self.limit, self.added)), self.merge_at)) + 1

    def check(self) -> None:
        rows = self.rows()
        assert len(rows) <= self.merge_at * self.classes + 2 * sum(rows) / self.limit
        assert not runs_to_merge(rows, self.limit, self.merge_at)


sizes = st.integers(1, 9) | st.sampled_from([1, 1, 64, 63, 65, 512, 1000, 10_000, 65_536, 65_537, 100_000])
batches = st.lists(st.tuples(sizes, st.integers(1, 40)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(batches=batches, limit=st.sampled_from([LIMIT, 100_000, 4096, 10]), merge_at=st.sampled_from([8, 8, 2, 3]))
def test_a_row_is_copied_once_per_class_and_segments_are_few(
    batches: list[tuple[int, int]], limit: int, merge_at: int
) -> None:
    life = Life(limit, merge_at)
    for size, times in batches:
        for _ in range(times):
            life.add(size)
            life.check()
            assert max(life.copies.values()) <= life.classes + 2
    assert sum(life.rows()) == life.added


@settings(max_examples=40, deadline=None)
@given(data=st.data(), limit=st.sampled_from([LIMIT, 4096]))
def test_removals_are_paid_for_by_what_they_remove(data: st.DataObject, limit: int) -> None:
    life = Life(limit, 8)
    for size, times in data.draw(batches):
        for _ in range(times):
            life.add(size)
            assert len(life.segments) <= 8 * life.classes + 2 * (sum(life.rows()) + life.removed) / limit
        if life.segments:
            place = data.draw(st.integers(0, len(life.segments) - 1))
            life.remove(place, data.draw(st.integers(1, life.rows()[place])))
    assert life.copied <= (life.classes + 2) * (life.added + life.removed)


def test_small_additions_leave_a_large_segment_alone() -> None:
    for head, size in ((100_000, 64), (250_000, 1)):
        life = Life(LIMIT, 8)
        life.add(head)
        for _ in range(500):
            life.add(size)
        assert life.copies[0] <= 1
        assert life.copied <= 5 * life.added


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 30))
def test_packs_are_as_long_as_the_limit_allows(rows: list[int], limit: int) -> None:
    runs = packed(rows, limit)
    assert [place for run in runs for place in range(run.start, run.stop)] == list(range(len(rows)))
    totals = [sum(rows[run]) for run in runs]
    assert all(total <= limit or run.stop - run.start == 1 for run, total in zip(runs, totals, strict=True))
    assert all(total + rows[run.stop] > limit for run, total in zip(runs[:-1], totals, strict=False))
