"""Writers that die or run out of disk, in processes forked from one that has imported everything and has no threads.

Usage: python crash_lab.py EXPERIMENT DIRECTORY; the last line printed is what happened, as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
from gallery_tools import CURVE, create, files_of, item, small_index, vectors

from index import changes
from index import gallery as galleries
from index.errors import GalleryError
from index.gallery import Gallery
from index.verification import verify

Operation: TypeAlias = Callable[[Gallery], object]
State: TypeAlias = dict[str, tuple[int, int]]
"""What a gallery holds: per path its id and the number that its vector and size come from."""


def vector(number: int) -> Any:
    return vectors(number, 1)[0]


def read(gallery: Gallery) -> State:
    """The state, checked to be coherent."""
    held = list(gallery.items())
    found = gallery.vectors(np.array([key for key, _ in held], np.int64))
    for (_, one), row in zip(held, found, strict=True):
        np.testing.assert_array_equal(row, vector(one.size))
    if held:
        hits = gallery.nearest(found, 1).ids[:, 0].tolist()
        assert hits == [key for key, _ in held]
    return {one.path: (key, one.size) for key, one in held}


def add(gallery: Gallery, numbers: list[int]) -> None:
    gallery.add([item(f"{n % 30}.jpg", size=n) for n in numbers], np.array([vector(n) for n in numbers]))


def install(gallery: Gallery, factory: str | None) -> None:
    gallery.install_index(small_index(gallery, factory) if factory else None, CURVE)


def calibrate(gallery: Gallery) -> None:
    gallery.install_calibration(lambda folder: (folder / "calibration.json").write_text("{}"))


def prepare(directory: Path) -> None:
    """Three segments with removed rows, a tuned index that is behind, and a calibration."""
    shutil.rmtree(directory, ignore_errors=True)
    with create(directory) as gallery:
        add(gallery, list(range(9)))
        add(gallery, list(range(9, 12)))
        install(gallery, "IVF2,Flat")
        calibrate(gallery)
        gallery.remove(["0.jpg", "1.jpg", "10.jpg"])
        gallery.add([item("25.jpg", size=25)], vectors(25, 1))
        assert [part.removed is None for part in gallery.snapshot.manifest.segments] == [False, False, True]


OPERATIONS: dict[str, Operation] = {
    "add": lambda gallery: add(gallery, [40]),
    "replace": lambda gallery: add(gallery, [32, 33, 41, 42, 55]),
    "remove": lambda gallery: gallery.remove(["2.jpg", "11.jpg", "25.jpg"]),
    "remove a segment": lambda gallery: gallery.remove([f"{n}.jpg" for n in range(9)]),
    "compact": lambda gallery: gallery.compact(),
    "tune": lambda gallery: install(gallery, "HNSW8"),
    "untune": lambda gallery: install(gallery, None),
    "calibrate": calibrate,
}


def forked(work: Callable[[], object]) -> int:
    """Exit status of a child that does this; minus the signal if one ended it."""
    gc.freeze()  # nothing that was there before is touched, and so copied, in the child
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def every_operation(act: Callable[[int], None], failing: set[str]) -> Iterator[None]:
    """Call ``act`` with 1, 2, 3 ... before each change to the file system."""
    done = 0

    def meet(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in failing:
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            done += 1
            act(done)

    witnesses.append(meet)
    yield
    witnesses.clear()


witnesses: list[Callable[[str, tuple[Any, ...]], None]] = []


def watch() -> None:
    """Tell witnesses of every event from now on; hooks stay for good."""

    def event(name: str, arguments: tuple[Any, ...]) -> None:
        if witnesses:
            witnesses[0](name, arguments)

    sys.addaudithook(event)
    os.fsync = lambda descriptor: event("os.fsync", ())  # what is written outlives a process without it


WRITES = {"open", "os.fsync", "os.mkdir", "os.rename"}
CHANGES = WRITES | {"sqlite3.connect", "os.remove", "os.rmdir", "shutil.rmtree"}


def check_after(directory: Path, allowed: list[State], thorough: bool) -> int:
    """Which of the states there is; nothing is wrong with it, and the next writer cleans up and goes on."""
    report = verify(directory)
    assert not report.problems, report.problems
    with Gallery.open(directory) as reader:
        state = read(reader)
    assert state in allowed, (state, allowed)
    with Gallery.open(directory, writable=True) as writer:
        assert not changes.leftovers(directory, writer.snapshot.manifest)
        before = writer.snapshot.manifest.next_id
        assert before > max([0, *(key for state in allowed[:1] for key, _ in state.values())])
        if thorough:
            add(writer, [29])
            assert read(writer) == {**state, "29.jpg": (before, 29)}
            assert not changes.leftovers(directory, writer.snapshot.manifest)
    return allowed.index(state)


def before_and_after(directory: Path, operation: Operation) -> list[State]:
    with Gallery.open(directory / "pristine") as reader:
        states = [read(reader)]
    shutil.copytree(directory / "pristine", directory / "done")
    with Gallery.open(directory / "done", writable=True) as writer:
        operation(writer)
        states.append(read(writer))
    shutil.rmtree(directory / "done")
    return states


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deaths(directory: Path) -> dict[str, list[int]]:
    """Die before every single change to the file system; counts the states before and after that were found."""
    outcomes: dict[str, list[int]] = {}
    for name in ("replace", "remove", "remove a segment", "compact", "tune"):
        operation = OPERATIONS[name]
        states = before_and_after(directory, operation)
        seen = outcomes.setdefault(name, [0, 0])
        for moment in range(1, 1000):
            shutil.copytree(directory / "pristine", directory / "g")

            def work(operation: Operation = operation, moment: int = moment) -> None:
                gallery = Gallery.open(directory / "g", writable=True)
                with every_operation(lambda done: die() if done == moment else None, CHANGES):
                    operation(gallery)

            status = forked(work)
            assert status in (0, -signal.SIGKILL), (name, moment, status)
            seen[check_after(directory / "g", states, moment % 4 == 0)] += 1
            shutil.rmtree(directory / "g")
            if status == 0:
                break
    return outcomes


ON_FULL_DISKS = ("replace", "remove", "compact", "tune")


def full(directory: Path, forever: bool) -> dict[str, list[int]]:
    """Let every single write fail, alone or with all that follow; counts operations that failed and succeeded."""
    outcomes: dict[str, list[int]] = {}
    for name in ("add", "tune") if forever else ON_FULL_DISKS:
        operation = OPERATIONS[name]
        states = before_and_after(directory, operation)
        seen = outcomes.setdefault(name, [0, 0])
        for moment in range(1, 1000):
            shutil.copytree(directory / "pristine", directory / "g")
            failed = fail_once(directory / "g", operation, moment, forever, states)
            shutil.rmtree(directory / "g")
            if failed is None:
                break
            seen[not failed] += 1
    return outcomes


def fail_once(directory: Path, operation: Operation, moment: int, forever: bool, states: list[State]) -> bool | None:
    """Whether the operation failed; None if there was nothing left that could."""
    fired = False

    def act(done: int) -> None:
        nonlocal fired
        if done == moment or (forever and done > moment):
            fired = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Gallery.open(directory, writable=True) as gallery:
        failed = survive(gallery, operation, every_operation(act, WRITES), states)
    return failed if fired else None


def survive(
    gallery: Gallery, operation: Operation, trouble: contextlib.AbstractContextManager[None], states: list[State]
) -> bool:
    """Whether trouble stopped an operation; the gallery has one of the states anyway, and goes on."""
    message, former = None, gallery.snapshot.manifest
    with trouble:
        try:
            operation(gallery)
        except GalleryError as error:
            message = str(error)
    manifest = gallery.snapshot.manifest
    assert read(gallery) in (states if message else states[1:]), message
    report = verify(gallery.directory)
    assert not report.problems, report.problems
    assert not report.leftovers, (message, report.leftovers)
    with Gallery.open(gallery.directory) as reader:
        assert reader.snapshot.manifest == manifest
        assert read(reader) == read(gallery)
    if message:
        assert read(gallery) == states[manifest != former]
        assert len(message.splitlines()) == 1
        assert f"{gallery.directory}: {'unchanged' if manifest == former else 'changed'}, " in message, message
        operation(gallery)
    assert not changes.leftovers(gallery.directory, gallery.snapshot.manifest)
    assert read(gallery).keys() == states[1].keys()
    return message is not None


def lengths_of_new_files(directory: Path, operation: Operation) -> list[int]:
    shutil.copytree(directory / "pristine", directory / "done")
    with Gallery.open(directory / "done", writable=True) as writer:
        operation(writer)
    new = set(files_of(directory / "done")) - set(files_of(directory / "pristine")) | {"gallery.json"}
    lengths = [(directory / "done" / name).stat().st_size for name in new]
    shutil.rmtree(directory / "done")
    return lengths


def limits(directory: Path) -> dict[str, list[int]]:
    """No file may grow beyond a limit, which the system sees to; counts operations that failed and succeeded."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    outcomes: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def limited(length: int) -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, resource.RLIM_INFINITY))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    for name in ON_FULL_DISKS:
        operation = OPERATIONS[name]
        states = before_and_after(directory, operation)
        seen = outcomes.setdefault(name, [0, 0])
        for length in sorted({0, 1 << 20, *(length - 1 for length in lengths_of_new_files(directory, operation))}):
            shutil.copytree(directory / "pristine", directory / "g")
            with Gallery.open(directory / "g", writable=True) as gallery:
                seen[not survive(gallery, operation, limited(length), states)] += 1
            shutil.rmtree(directory / "g")
    return outcomes


def kills(directory: Path, count: int) -> dict[str, list[int]]:
    """SIGKILL at random times; counts the states before and after the unacknowledged operation that were found."""
    random.seed(0)
    outcomes: dict[str, list[int]] = {}
    shutil.copytree(directory / "pristine", directory / "g")
    with Gallery.open(directory / "g") as reader:
        state, last_id = read(reader), reader.snapshot.manifest.next_id - 1
    number = 30
    for shot in range(count):
        kind = ("add", "remove", "tune", "compact")[shot % 4]
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(ours)
                keep_changing(directory / "g", kind, number, theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        with os.fdopen(ours) as lines:
            first = lines.readline()
            time.sleep(random.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            told = [json.loads(line) for line in [first, *lines] if line.endswith("\n")]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        possible = [(state, last_id)]
        for step in told:
            if step["acknowledged"]:
                possible = possible[-1:]
            else:
                state, last_id = possible[-1]
                possible.append(changed(state, last_id, step))
                number = max([number, *(n + 1 for n in step["numbers"])])
        report = verify(directory / "g")
        assert not report.problems, report.problems
        with Gallery.open(directory / "g") as reader:
            state = read(reader)
        assert state in [known for known, _ in possible], (kind, state, possible)
        place = [known for known, _ in possible].index(state)
        last_id = max(known for _, known in possible)
        outcomes.setdefault(kind, [0, 0])[place if possible[0][0] != possible[-1][0] else 0] += 1
        with Gallery.open(directory / "g", writable=True) as writer:
            assert not verify(directory / "g").leftovers
            last_id = writer.snapshot.manifest.next_id - 1
            assert last_id in [known for _, known in possible]
    return outcomes


def changed(state: State, last_id: int, step: dict[str, Any]) -> tuple[State, int]:
    paths = [f"{n % 30}.jpg" for n in step["numbers"]]
    if step["kind"] == "add":
        added = {
            path: (last_id + n, number) for n, (path, number) in enumerate(zip(paths, step["numbers"], strict=True), 1)
        }
        return {path: held for path, held in state.items() if path not in added} | added, last_id + len(added)
    return {path: held for path, held in state.items() if path not in paths}, last_id


def keep_changing(directory: Path, kind: str, number: int, pipe: int) -> None:
    """Announce and acknowledge one change after the other, until killed."""
    choose = random.Random(number)
    with Gallery.open(directory, writable=True) as gallery:
        while True:
            count = choose.randint(1, 5)
            numbers = list(range(number, number + count)) if kind in ("add", "remove") else []
            number += count
            step = {"kind": kind, "numbers": numbers, "acknowledged": False}
            os.write(pipe, json.dumps(step).encode() + b"\n")
            if kind == "add":
                add(gallery, numbers)
            elif kind == "remove":
                gallery.remove([f"{n % 30}.jpg" for n in numbers])
            elif kind == "tune":
                install(gallery, choose.choice(["IVF2,Flat", "HNSW8", None]))
            else:
                gallery.compact()
            os.write(pipe, json.dumps({**step, "acknowledged": True}).encode() + b"\n")


def main() -> None:
    experiment, folder = sys.argv[1], Path(sys.argv[2])
    faiss.omp_set_num_threads(1)
    watch()
    prepare(folder / "pristine")
    changes.MERGE_AT, galleries.REFILL_AT = 3, (3, 0.1)
    run = {
        "deaths": deaths,
        "full once": lambda directory: full(directory, False),
        "full": lambda directory: full(directory, True),
        "limits": limits,
        "kills": lambda directory: kills(directory, int(sys.argv[3])),
    }[experiment]
    print(json.dumps(run(folder)))


if __name__ == "__main__":
    main()
