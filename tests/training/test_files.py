from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.files import current_files, make_directory, recover, replacing, replacing_files, write_text


class Killed(BaseException):
    """What no handler of errors may mend: the process is not there any more."""


def killed_after(monkeypatch: pytest.MonkeyPatch, changes: int) -> None:
    """End at the next change of a directory once there were so many; everything after that fails too."""
    done = 0

    def counted(name: str) -> None:
        change = getattr(os, name)

        def wrapped(*arguments: object, **named: object) -> object:
            nonlocal done
            done += 1
            if done > changes:
                raise Killed
            return change(*arguments, **named)

        monkeypatch.setattr(os, name, wrapped)

    for name in ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir"):
        counted(name)


def test_a_set_of_files_is_the_old_or_the_new_one_whenever_the_process_dies(tmp_path: Path) -> None:
    names, outcomes = ["config", "vocabulary", "weights"], []
    for changes in range(60):
        directory = tmp_path / str(changes)
        for name in names:
            write_text(directory / name, "old")
        with pytest.MonkeyPatch.context() as patch:
            killed_after(patch, changes)
            try:
                with replacing_files(directory) as folder:
                    for name in names:
                        (folder / name).write_text("new")
            except Killed:
                finished = False
            else:
                finished = True
        found = {(current_files(directory) / name).read_text() for name in names}
        assert len(found) == 1, changes
        recover(directory)
        assert {path.name: path.read_text() for path in directory.iterdir()} == dict.fromkeys(names, *found)
        outcomes += found
        if finished:
            break
    assert finished
    assert outcomes == sorted(outcomes, reverse=True), "once new, always new"
    assert set(outcomes) == {"old", "new"}


def test_directories_and_names_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    make_directory(tmp_path / "a" / "b" / "c")
    assert [path.relative_to(tmp_path.parent) for path in synced[-3:]] == [
        Path(tmp_path.name, *parts) for parts in ((), ("a",), ("a", "b"))
    ]
    for write in (write_text, lambda path, text: _as_set(path, text)):
        synced.clear()
        write(tmp_path / "a" / "new" / "file", "text")
        assert tmp_path / "a" in synced
        assert synced[-1] == tmp_path / "a" / "new"
    make_directory(tmp_path / "a" / "new")
    assert synced[-1] == tmp_path / "a", "whoever made it may have been killed before it was on disk"


def _as_set(path: Path, text: str) -> None:
    with replacing_files(path.parent) as folder:
        (folder / path.name).write_text(text)


def test_what_the_dead_left_is_deleted_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        kept = [tmp_path / f".weights.{living.pid}.tmp", tmp_path / "notes.1.tmp", tmp_path / ".hidden"]
        gone = [tmp_path / f".weights.{dead.pid}.tmp", tmp_path / f".{os.getpid()}.tmp", tmp_path / ".k3_x9ab0.tmp"]
        for path in (*kept, gone[0]):
            path.write_text("half")
        for folder in gone[1:]:
            folder.mkdir()
            (folder / "weights").write_text("half")
        recover(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(kept)
        living.communicate(b"\n")


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    for text in ("old", "new"):
        _as_set(tmp_path / "file", text)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_two_processes_may_replace_the_same_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as outer:
        outer.write_text("outer")
        script = "import sys; from pathlib import Path; from training.files import write_text; "
        script += "write_text(Path(sys.argv[1]), 'inner')"
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=True)
        assert (tmp_path / "file").read_text() == "inner"
    assert (tmp_path / "file").read_text() == "outer"
