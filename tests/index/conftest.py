from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gallery_tools import furnish

from index import exchange, vector_files


@pytest.fixture(scope="session")
def _furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile") / "g"
    furnish(directory)
    return directory


@pytest.fixture
def made(_furnished: Path, tmp_path: Path) -> Path:
    """A gallery to be changed, next to a directory that nobody may touch."""
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "precious.txt").write_text("do not touch")
    (tmp_path / "canary" / "000000001").mkdir()
    (tmp_path / "canary" / "000000001" / "more.txt").write_text("nor this")
    return Path(shutil.copytree(_furnished, tmp_path / "g"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BATCH", 7)
    monkeypatch.setattr(vector_files, "BATCH", 5)
    monkeypatch.setattr(exchange, "PARTITION", 16)
