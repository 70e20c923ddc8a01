"""The short form of ``make soak``: the same requests and promises, but for the time that an honest search takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.soak import broken_promises, soak


def test_a_server_stays_small_and_willing_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    found = soak(tmp_path, requests=48, idle=10)
    with capsys.disabled():
        print(f"\nsoak: honest searches {json.dumps(found['idle_ms'])} alone, {json.dumps(found['beside_ms'])} beside")
    assert broken_promises(found, latency=False) == []
    assert len(found["answers"]) > 15
    assert not any(": 0" in answer for answer in found["answers"]), found["answers"]
