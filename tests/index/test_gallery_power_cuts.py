"""A gallery after a power cut at any moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gallery_tools import CURVE, create, item, small_index, vectors
from power_cut import Recorder, bad_states, recording

from index import changes
from index.gallery import Gallery
from index.verification import verify

State = dict[str, int]
"""Paths and the seeds of their vectors."""


def held(gallery: Gallery) -> State:
    """What is there, checked."""
    found = dict(gallery.items())
    for key, one in found.items():
        np.testing.assert_array_equal(gallery.vectors(np.array([key])), vectors(one.size, 1))
    hits = gallery.search(gallery.vectors(gallery.snapshot.ids()), 1) if found else []
    assert [row[0].id for row in hits] == list(found)
    return {one.path: one.size for one in found.values()}


def add(gallery: Gallery, seeds: range) -> None:
    items = [item(f"{seed % 10}.jpg", size=seed) for seed in seeds]
    gallery.add(items, np.concatenate([vectors(seed, 1) for seed in seeds]))


def calibrate(gallery: Gallery) -> None:
    gallery.install_calibration(lambda folder: (folder / "calibration.json").write_text("{}"))


WORK: list[Callable[[Gallery], object]] = [
    lambda gallery: add(gallery, range(3)),
    lambda gallery: add(gallery, range(3, 6)),
    lambda gallery: gallery.install_index(small_index(gallery), CURVE),
    calibrate,
    lambda gallery: add(gallery, range(11, 18)),
    lambda gallery: gallery.remove(["1.jpg", "4.jpg"]),
    lambda gallery: gallery.compact(),
    lambda gallery: gallery.install_index(small_index(gallery, "HNSW8"), CURVE),
    lambda gallery: add(gallery, range(20, 21)),
]


def work(root: Path) -> tuple[Recorder, list[State]]:
    states: list[State] = []
    with recording(root) as recorder, create(root / "a" / "b" / "gallery") as gallery:
        recorder.acknowledge()
        states.append(held(gallery))
        for operation in WORK:
            operation(gallery)
            recorder.acknowledge()
            states.append(held(gallery))
    return recorder, states


def look(directory: Path, acknowledged: int, states: list[State]) -> None:
    directory = directory / "a" / "b" / "gallery"
    if not acknowledged and not Gallery.exists(directory):
        create(directory).close()
        return
    report = verify(directory)
    assert not report.problems, report.problems
    with Gallery.open(directory) as gallery:
        assert held(gallery) in states[max(0, acknowledged - 1) : acknowledged + 1]
    with Gallery.open(directory, writable=True) as gallery:
        assert not changes.leftovers(directory, gallery.snapshot.manifest)
        before = held(gallery)
        add(gallery, range(99, 100))
        assert held(gallery) == before | {"9.jpg": 99}


@pytest.mark.parametrize("most", [30, pytest.param(None, marks=pytest.mark.soak)])
def test_what_was_acknowledged_survives_a_power_cut_at_any_moment(most: int | None, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    recorder, states = work(tmp_path / "disk")
    bad = bad_states(recorder, lambda directory, acknowledged: look(directory, acknowledged, states), tmp_path, most)
    assert not bad, bad[:3]
