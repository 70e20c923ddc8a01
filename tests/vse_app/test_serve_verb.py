from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from index.gallery import Gallery
from training.data.text import WordTokenizer
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from vse_app.cli import main
from vse_app.search_engine import identity
from vse_app.server import Serving


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


@pytest.fixture(autouse=True)
def same_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving takes half of the threads, which other tests shall keep."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    config = ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8), dim=8)
    model = DualEncoder(config, WordTokenizer(["red disc"], min_count=1, source="test"))
    model.save_pretrained(tmp_path / "model")
    made = Gallery.create(tmp_path / "gallery", dim=8, metric="cosine", model=identity(tmp_path / "model", model))
    made.close()
    return tmp_path / "gallery"


def test_no_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, str(tmp_path / "nowhere"))


def test_no_audit(gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no audit.json" in refused(capsys, str(gallery), "--audit", str(tmp_path))


def test_half_a_password(gallery: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSE_PASSWORD", "ada")
    said = refused(capsys, str(gallery))
    assert "USER:PASSWORD" in said
    assert "ada" not in said


def test_a_port_that_is_taken(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "choose another --host or --port" in refused(capsys, str(gallery), "--port", str(port))


@pytest.mark.parametrize("port", ["-1", "65536", "99999", str(10**30)])
def test_no_such_port(port: str, gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose one from 1 to 65535" in refused(capsys, str(gallery), f"--port={port}")


@pytest.mark.parametrize(
    ("flag", "value"), [("--allow-host", "http://a.test"), ("--allow-host", ""), ("--trusted-proxy", "nginx")]
)
def test_no_such_name(flag: str, value: str, gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repr(value) in refused(capsys, str(gallery), f"{flag}={value}")


@pytest.mark.parametrize(
    ("options", "local"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "127.0.0.2"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"allowed_hosts": ("photos.home",)}, False),  # whoever asks under a name comes through a proxy
        ({"trusted_proxies": ("127.0.0.1",)}, False),
    ],
)
def test_who_is_told_where_files_lie(options: dict[str, Any], local: bool, gallery: Path) -> None:
    assert Serving(gallery, **options).local is local


def test_without_gradio(gallery: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def missing(name: str, *arguments: Any) -> Any:
        return None if name == "gradio" else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert "pip install 'vse-app[demo]'" in refused(capsys, str(gallery))
