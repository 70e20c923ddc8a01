from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from served import encoded, pixels
from starlette.testclient import TestClient

from vse_app.api import Refused
from vse_app.uploads import MAX_BYTES
from vse_app.web import scratch

PICTURE = encoded(pixels(1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def deleted() -> set[str]:
    return set()


@pytest.fixture
def client(folder: Path, deleted: set[str]) -> Iterator[TestClient]:
    app = FastAPI()
    app.add_exception_handler(Refused, _refuse)
    scratch.install(app, deleted)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return JSONResponse({"detail": str(error)}, error.status)


def send(client: TestClient, *files: tuple[str, bytes]) -> tuple[int, list[str] | str]:
    response = client.post("/gradio_api/upload", files=[("files", file) for file in files])
    answer = response.json()
    return response.status_code, answer if response.status_code == 200 else answer["detail"]


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_each_file_has_a_secret_folder_of_its_own(client: TestClient, folder: Path, deleted: set[str]) -> None:
    status, paths = send(client, ("a.png", PICTURE), ("a.png", PICTURE))
    assert status == 200
    assert len(set(paths)) == 2
    for path in paths:
        assert re.fullmatch(re.escape(str(folder)) + r"/[0-9a-f]{64}/a\.png", path)
        assert Path(path).read_bytes() == PICTURE
        assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    assert deleted == set(paths)


@pytest.mark.parametrize(
    "name", ["../../a.png", "/etc/passwd", "a\x1b[31m.png", "..", ".hidden", "a" * 999 + ".png", "a\nb", "\u202egnp.a"]
)
def test_names_stay_in_their_folder(name: str, client: TestClient, folder: Path) -> None:
    status, paths = send(client, (name, PICTURE))
    assert status == 200
    path = Path(paths[0])
    assert path.parent.parent == folder
    assert path.name.isprintable()
    assert not path.name.startswith(".")
    assert len(path.name) <= 100


def test_too_large_too_many_or_broken_leaves_nothing(client: TestClient, folder: Path) -> None:
    assert send(client, ("a.png", PICTURE), ("b.png", bytes(MAX_BYTES + 1))) == (
        413, "b.png: 20.1 MB; send at most 20 MB",
    )  # fmt: skip
    assert send(client, *[("a.png", PICTURE)] * 17)[0] == 400
    headers = {"content-type": "multipart/form-data; boundary=x"}
    cut = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a"\r\n\r\nabc'
    for body in (cut, b"", b"--x"):
        assert client.post("/gradio_api/upload", content=body, headers=headers).status_code in (200, 400)
    assert kept(folder) == []


def test_no_more_than_the_quota(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "MOST_KEPT_EACH", 3 * len(PICTURE))
    monkeypatch.setattr(scratch, "MOST_KEPT", 4 * len(PICTURE))
    now = [1000.0]
    monkeypatch.setattr(scratch.time, "monotonic", lambda: now[0])
    assert send(client, *[("a.png", PICTURE)] * 3)[0] == 200
    status, said = send(client, ("a.png", PICTURE))
    assert status == 503
    assert "try again" in said
    other = TestClient(client.app, client=("1.2.3.4", 5))
    assert send(other, ("a.png", PICTURE))[0] == 200
    assert send(other, ("a.png", PICTURE))[0] == 503  # of all together
    assert len(kept(folder)) == 4
    now[0] += 2 * scratch.UPLOADS_KEPT
    assert send(client, ("a.png", PICTURE))[0] == 200


def test_a_full_disk_keeps_nothing(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "b.png":
            write(path, content[:9])
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    status, said = send(client, ("a.png", PICTURE), ("b.png", PICTURE))
    assert (status, said) == (503, "the picture cannot be kept: No space left on device; try again later")
    assert list(folder.iterdir()) == []
