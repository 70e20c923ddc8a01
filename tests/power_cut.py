"""What a power cut may leave on disk, worked out from what a program did to a directory while it was watched.

Before each change to a directory, and at each fsync, the directory is read. So all files are seen as they are then,
whoever wrote them. Two models say what may be left at such a moment:

* strict, what POSIX allows: every name in a directory is as it was at the directory's last fsync or at any time since,
  each by itself; every file has the content of its last fsync, or any since, or half of what is new, or zeros;
* ordered, a journal (ext4, XFS): names change in the order of the operations, and each fsync puts all of them on disk;
  files that are not synced have their last synced content, zeros or what was written.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, bytes | None]
"""Files with their content, and directories, by path."""

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
_AT_RANDOM = 6
"""Combinations beyond the systematic ones, at every moment."""


@dataclass(eq=False)
class Node:
    """A file or a directory; of what changes there is the value at its last fsync and all since."""

    contents: list[bytes] = field(default_factory=lambda: [b""])
    names: dict[str, list[Node | None]] | None = None
    seen: tuple[int, int] = (0, 0)

    def sync(self) -> None:
        self.contents = self.contents[-1:]
        for name, values in list((self.names or {}).items()):
            values[:-1] = []
            if values == [None]:
                del self.names[name]  # type: ignore[union-attr]

    def torn(self) -> bytes:
        """The last content, of which half of what is not synced is missing."""
        kept = self._kept()
        return self.contents[-1][: (kept + len(self.contents[-1]) + 1) // 2]

    def zeroed(self) -> bytes:
        """The last content, with zeros for what is not synced."""
        return self.contents[-1][: self._kept()].ljust(len(self.contents[-1]), b"\0")

    def _kept(self) -> int:
        """How many bytes have not changed since the last fsync: all of a file to which was only appended."""
        return len(self.contents[0]) if self.contents[-1].startswith(self.contents[0]) else 0


@dataclass(frozen=True)
class State:
    """What may be left.

    Attributes:
        model: ``strict`` or ``ordered``.
        acknowledged: How many times :meth:`Recorder.acknowledge` had been called.
        tree: All there is.
    """

    model: str
    acknowledged: int
    tree: Tree


class Recorder:
    """Watches a directory, whose own name is on disk, and collects the states."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._nodes: dict[int, Node] = {}
        self._top = Node(names={})
        self._journal: list[tuple[Node, str, Node | None]] = []
        self._committed = self._acknowledged = 0
        self._random = random.Random(0)
        self._states: dict[tuple[str, int, int], State] = {}
        self._look()
        for node in [self._top, *self._nodes.values()]:
            node.sync()
        self._committed = len(self._journal)

    def acknowledge(self) -> None:
        """From now on what has been done must survive."""
        self._look()
        self._acknowledged += 1
        self._collect()

    def states(self, most: int | None = None) -> list[State]:
        """All different ones, or a sample of them."""
        found = list(self._states.values())
        return found if most is None or most >= len(found) else random.Random(0).sample(found, most)

    def before_change(self) -> None:
        """Look at what the last change has done."""
        if self._look():
            self._collect()

    def before_sync(self, descriptor: int) -> None:
        """As :meth:`before_change`; then something is on disk."""
        self.before_change()
        node = self._nodes.get(os.fstat(descriptor).st_ino)
        if node:
            node.sync()
            self._committed = len(self._journal)
            self._collect()

    def _look(self) -> bool:
        nodes: dict[int, Node] = {self._root.stat().st_ino: self._top}
        changed = False

        def look(path: Path, node: Node) -> None:
            nonlocal changed
            assert node.names is not None
            found = {entry.name: entry for entry in os.scandir(path)}
            for name in sorted(node.names.keys() | found.keys()):
                now = None
                if name in found:
                    status = found[name].stat(follow_symlinks=False)
                    known = nodes.get(status.st_ino) or self._nodes.get(status.st_ino)
                    now = known or Node(names={} if found[name].is_dir() else None)
                    nodes[status.st_ino] = now
                    if now.names is not None:
                        look(path / name, now)
                    else:
                        changed |= self._read(path / name, now, status)
                values = node.names.setdefault(name, [None])
                if values[-1] is not now:
                    values.append(now)
                    self._journal.append((node, name, now))
                    changed = True

        look(self._root, self._top)
        self._nodes = nodes  # whatever is gone gives its number to another
        return changed

    @staticmethod
    def _read(path: Path, node: Node, status: os.stat_result) -> bool:
        seen = status.st_mtime_ns, status.st_size
        if seen == node.seen and time.time_ns() - status.st_mtime_ns > 100_000_000:  # file systems have coarse clocks
            return False
        node.seen = seen
        content = path.read_bytes()
        if content == node.contents[-1]:
            return False
        node.contents.append(content)
        return True

    def _collect(self) -> None:
        for model, trees in (("strict", self._strict()), ("ordered", self._ordered())):
            for tree in trees:
                key = model, self._acknowledged, hash(frozenset(tree.items()))
                if key not in self._states:
                    self._states[key] = State(model, self._acknowledged, tree)

    def _strict(self) -> Iterator[Tree]:
        nodes = [self._top, *dict.fromkeys(self._nodes.values())]
        choices: dict[tuple[Node, str], list[Any]] = {}
        for node in nodes:
            for name, values in (node.names or {}).items():
                if len(values) > 1:
                    choices[node, name] = values
            if len(node.contents) > 1:
                choices[node, ""] = [*node.contents, node.torn(), node.zeroed()]

        def tree(chosen: dict[tuple[Node, str], Any]) -> Tree:
            return _tree(
                self._top,
                lambda node, name: chosen.get((node, name), node.names[name][-1]),  # type: ignore[index]
                lambda node: chosen.get((node, ""), node.contents[-1]),
            )

        keys = list(choices)
        if sum(map(len, choices.values())) <= 8:
            for combination in itertools.product(*choices.values()):
                yield tree(dict(zip(keys, combination, strict=True)))
            return
        lost = {key: values[0] for key, values in choices.items()}
        yield tree({})
        yield tree(lost)
        for key, values in choices.items():
            yield tree({other: value for other, value in lost.items() if other != key})
            for value in values:
                yield tree({key: value})
        for _ in range(_AT_RANDOM):
            yield tree({key: self._random.choice(values) for key, values in choices.items()})

    def _ordered(self) -> Iterator[Tree]:
        for length in range(self._committed, len(self._journal) + 1):
            names: dict[tuple[Node, str], Node | None] = {}
            for node, name, value in self._journal[:length]:
                names[node, name] = value
            for content in (
                lambda node: node.contents[0],
                lambda node: node.contents[-1],
                Node.zeroed,
            ):
                yield _tree(self._top, lambda node, name, names=names: names.get((node, name)), content)  # type: ignore[misc]


def _tree(top: Node, value: Callable[[Node, str], Node | None], content: Callable[[Node], bytes]) -> Tree:
    tree: Tree = {}

    def add(path: str, node: Node) -> None:
        assert node.names is not None
        for name in node.names:
            child = value(node, name)
            if child is not None:
                tree[f"{path}{name}"] = content(child) if child.names is None else None
                if child.names is not None:
                    add(f"{path}{name}/", child)

    add("", top)
    return tree


_watching: Recorder | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _watching
    recorder = _watching
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if recorder and (writes or event in _CHANGES or event == "sqlite3.connect"):
        _watching = None  # what follows is our own
        try:
            recorder.before_change()
        finally:
            _watching = recorder


@contextmanager
def recording(root: Path) -> Iterator[Recorder]:
    """Watch what is done to a directory."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # there is no way to take it away again
        _hooked = True
    recorder, fsync = Recorder(root), os.fsync

    def watched(descriptor: int) -> None:
        recorder.before_sync(descriptor)
        fsync(descriptor)

    os.fsync, _watching = watched, recorder
    try:
        yield recorder
    finally:
        os.fsync, _watching = fsync, None


def bad_states(
    recorder: Recorder, check: Callable[[Path, int], object], scratch: Path, most: int | None = None
) -> list[str]:
    """Put each state on disk and look at it.

    Args:
        recorder: What was recorded.
        check: Is given the directory and how often :meth:`Recorder.acknowledge` had been called; raises if it is bad.
        scratch: Where.
        most: Look at no more, chosen at random.

    Returns:
        What is wrong, of each bad state; prints how many there are.
    """
    states, bad = recorder.states(most), []
    for number, state in enumerate(states):
        directory = scratch / "after"
        directory.mkdir()
        for path, content in state.tree.items():
            if content is None:
                (directory / path).mkdir()
            else:
                (directory / path).write_bytes(content)
        try:
            check(directory, state.acknowledged)
        except Exception as error:
            kept = directory.rename(scratch / f"bad{number}")
            bad.append(f"{state.model}, {state.acknowledged} acknowledged: {kept}: {type(error).__name__}: {error}")
        else:
            shutil.rmtree(directory)
    for model in ("strict", "ordered"):
        wrong = sum(line.startswith(model) for line in bad)
        print(f"{model}: {sum(state.model == model for state in states):,} states, {wrong:,} bad")
    return bad
