"""Killed writers and full disks; what happens in them is in ``crash_lab.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gallery_tools import CURVE, create, item, small_index, vectors

import index
from index.manifest import Manifest

LAB = Path(__file__).with_name("crash_lab.py")


def experiment(name: str, directory: Path, *arguments: str) -> dict[str, list[int]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(index.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(LAB), name, str(directory), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    outcome: dict[str, list[int]] = json.loads(result.stdout.splitlines()[-1])
    return outcome


def test_a_writer_killed_before_any_change_to_the_file_system_leaves_one_of_two_states(tmp_path: Path) -> None:
    found = experiment("deaths", tmp_path)
    assert sum(map(sum, found.values())) > 150
    for name in ("replace", "remove", "remove a segment"):
        before, after = found[name]
        assert before > 3, name
        assert after >= 2, name


def test_writers_killed_at_random_lose_nothing_they_acknowledged(tmp_path: Path) -> None:
    found = experiment("kills", tmp_path, "200")
    assert sum(map(sum, found.values())) == 200
    assert found.keys() == {"add", "remove", "tune", "compact"}


def test_any_write_may_fail(tmp_path: Path) -> None:
    found = experiment("full once", tmp_path)
    assert all(failed > 5 for failed, _ in found.values())
    assert found["replace"][1] > 5  # adding was done, and the merge after it can wait


def test_a_disk_may_stay_full(tmp_path: Path) -> None:
    found = experiment("full", tmp_path)
    assert all(failed > 5 for failed, _ in found.values())


def test_files_that_may_not_grow_fail_the_same_way(tmp_path: Path) -> None:
    found = experiment("limits", tmp_path)
    assert all(failed > 1 for failed, _ in found.values())
    assert all(succeeded > 0 for _, succeeded in found.values())


def test_whatever_a_state_names_is_on_disk_before_it_is_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real_fsync, real_replace = os.fsync, Path.replace
    states = 0

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(temporary: Path, target: Any) -> Path:
        nonlocal states
        if target.name == "gallery.json":
            states += 1
            assert synced[-1] == temporary
            # A removed-... file is synced as the temporary one that takes its name.
            on_disk = {path.with_name(path.name.removesuffix(".tmp")) for path in synced}
            for part in Manifest._decode(json.loads(temporary.read_bytes())).parts():
                folder = target.parent / part.name
                assert {folder.parent, folder, *(folder / name for name in part.files)} <= on_disk
        return real_replace(temporary, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with create(tmp_path / "g") as gallery:
        for change in (
            lambda: gallery.add([item(f"{n}") for n in range(5)], vectors(1, 5)),
            lambda: gallery.add([item("new")], vectors(2, 1)),
            lambda: gallery.install_index(small_index(gallery), CURVE),
            lambda: gallery.remove(["3"]),
            gallery.compact,
        ):
            change()
            assert synced[-1] == tmp_path / "g"
    assert states == 7


SAVING = """
import resource, signal, sys
from pathlib import Path
import faiss
import numpy as np
from gallery_tools import vectors
from index.approximate_index import ApproximateIndex
from index.segment import save_array
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
index = ApproximateIndex(faiss.IndexHNSWFlat(8, 8, faiss.METRIC_INNER_PRODUCT), {"efSearch": 9})
index.add(np.arange(1, 31), vectors(0, 30))
overlooked = []
for name, save in {
    "array.npy": lambda: save_array(folder / "array.npy", np.arange(9)),
    "index.faiss": lambda: index.save(folder),
}.items():
    save()
    length = (folder / name).stat().st_size
    for limit in (length - 1, length - 8, 129):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save()
        except OSError:
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        overlooked.append((name, limit, length))
assert not overlooked, overlooked
"""


def test_the_last_bytes_of_a_file_are_missed_too(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(LAB.parent), str(Path(index.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVING, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
