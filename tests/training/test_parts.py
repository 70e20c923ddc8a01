from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from training.errors import InputError
from training.robustness.parts import Parts

IDENTITY = {"format": 1, "settings": {"epsilons": (0.1, 0.2)}}
PART = {"rows": [1, 2], "ranks": [[0.1, float("inf")]], "by": {1: "é"}}


def written(folder: Path) -> Path:
    Parts(folder, IDENTITY).get("a-000", lambda: PART)
    return folder / "a-000.json"


def test_a_part_is_computed_once_and_comes_back_as_json_gives_it(tmp_path: Path) -> None:
    first = Parts(tmp_path, IDENTITY).get("a-000", lambda: PART)
    assert first == json.loads(json.dumps(PART))
    again = Parts(tmp_path, IDENTITY).get("a-000", lambda: pytest.fail("computed again"))
    assert again == first


CHANGES: dict[str, Any] = {
    "nothing": b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "a changed rank": lambda content: content.replace(b"[1, 2]", b"[1, 3]"),
    "no checksum": json.dumps(PART).encode(),
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "an empty object": b"{}",
    "deep": b"[" * 100_000,
    "no Unicode": b'{"part": "\xff"}',
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_not_written_is_refused_in_one_line(change: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    to = CHANGES[change]
    path.write_bytes(to(path.read_bytes()) if callable(to) else to)
    with pytest.raises(InputError, match=r"a-000\.json: not what was written; remove it and run again") as error:
        Parts(tmp_path, IDENTITY).get("a-000", lambda: PART)
    assert "\n" not in str(error.value)
    path.unlink()
    written(tmp_path)


def test_no_part_is_taken_for_another(tmp_path: Path) -> None:
    path = written(tmp_path / "one")
    (tmp_path / "one" / "a-001.json").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"a-001\.json: not what was written"):
        Parts(tmp_path / "one", IDENTITY).get("a-001", lambda: PART)
    other = Parts(tmp_path / "two", {**IDENTITY, "format": 2})
    (tmp_path / "two" / "a-000.json").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"a-000\.json: not what was written"):
        other.get("a-000", lambda: PART)


@pytest.mark.parametrize("content", ["[]", "null", "7", "{", '{"format": 1}'])
def test_settings_of_something_else_are_refused(content: str, tmp_path: Path) -> None:
    written(tmp_path / "parts")
    (tmp_path / "parts" / "settings.json").write_text(content)
    with pytest.raises(InputError, match=r"holds an audit with other|not what was written"):
        Parts(tmp_path / "parts", IDENTITY)


def test_what_a_killed_audit_left_unfinished_is_deleted(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / f".a-001.json.{os.getpid()}.tmp").write_text("half")
    Parts(tmp_path, IDENTITY)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "a-000.json"}
