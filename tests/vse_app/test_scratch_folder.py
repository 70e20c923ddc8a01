from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vse_app.scratch_folder import scratch_folder

SERVER = """
from pathlib import Path
from vse_app.scratch_folder import scratch_folder
with scratch_folder() as folder:
    Path(folder, "picture").mkdir()
    Path(folder, "picture", "of a stranger.jpg").touch()
    print(folder, flush=True)
    input()
"""


def start() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_with_the_next_one_and_the_living_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    gallery, link = tmp_path / "gallery", tmp_path / "vse-serve-link"
    gallery.mkdir()
    (gallery / "lock").touch()
    link.symlink_to(gallery)
    (killed, abandoned), (living, kept) = start(), start()
    try:
        killed.kill()
        killed.communicate()
        assert (abandoned / "picture" / "of a stranger.jpg").exists()
        with scratch_folder() as own:
            assert not abandoned.exists()
            assert (kept / "picture" / "of a stranger.jpg").exists()
            assert Path(own).is_dir()
        assert not Path(own).exists()
        assert (gallery / "lock").exists()
        living.communicate("\n")
        assert not kept.exists()
    finally:
        living.kill()
