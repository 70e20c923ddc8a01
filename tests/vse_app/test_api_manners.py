"""What the API says of its own faults, of sizes, of methods and of places on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Place, jpeg, serving
from starlette.testclient import TestClient

from vse_app.api import Api
from vse_app.uploads import MAX_BYTES


@pytest.fixture
def client(place: Place) -> Iterator[TestClient]:
    with serving(place) as (client, _):
        yield client


def test_a_gallery_that_is_gone_is_the_servers_fault(client: TestClient, place: Place) -> None:
    place.gallery.rename(place.gallery.with_name("moved"))
    for path in ("/health", "/search?text=red", "/search?like=1", "/items", "/items/1", "/items/1/image"):
        assert client.get(path).status_code == 503, path
        assert client.head(path).status_code == 503, path
    assert client.post("/items", files={"images": jpeg(1)}).status_code == 503
    assert client.delete("/items/1").status_code == 503
    place.gallery.with_name("moved").rename(place.gallery)
    assert client.get("/health").status_code == 200


def test_pictures_lie_in_memory_while_they_are_received(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_disk(*arguments: Any, **named: Any) -> Any:
        raise OSError(28, "No space left on device")

    for made in ("TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, made, no_disk)
    large = jpeg(1) + bytes(3_000_000)
    assert client.post("/search", files={"image": large}).status_code == 200
    assert client.post("/items", files=[("images", ("a.jpg", large))] * 2).status_code == 200


@pytest.mark.parametrize(("more", "said"), [(1, "20.1"), (500_000, "20.5"), (1_000_000, "21"), (19_000_000, "39")])
def test_how_large_is_too_large(more: int, said: str, client: TestClient) -> None:
    response = client.post("/search", files={"image": ("a.jpg", bytes(MAX_BYTES + more))})
    assert response.status_code == 400
    assert response.json()["detail"] == f"a.jpg: {said} MB; send at most 20 MB"
    assert "at most" not in client.post("/search", files={"image": ("a.jpg", bytes(MAX_BYTES))}).json()["detail"]


def test_methods_are_told(client: TestClient) -> None:
    for path, methods in (
        ("/search", "GET, HEAD, OPTIONS, POST"), ("/items", "GET, HEAD, OPTIONS, POST"),
        ("/items/1", "DELETE, GET, HEAD, OPTIONS"), ("/health", "GET, HEAD, OPTIONS"),
    ):  # fmt: skip
        response = client.options(path)
        assert (response.status_code, response.headers["allow"]) == (204, methods)
        assert client.head(path).headers["content-type"] == "application/json"
        assert client.get(f"{path}/", follow_redirects=False).status_code == 307


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("{gallery}: has no item 999", "gallery: has no item 999"),
        ("{gallery}/items/000000003/items.sqlite: lacks items", "gallery/items/000000003/items.sqlite: lacks items"),
        ("{run}/model.safetensors: is damaged", "run/model.safetensors: is damaged"),
        ("/home/me/My Photos/a b.png: not a readable picture", "a b.png: not a readable picture"),
        ("[Errno 2] No such file or directory: '/home/me/a.png'", "[Errno 2] No such file or directory: 'a.png'"),
        ("/a:b/c.png: broken", "c.png: broken"),
        ("(/etc/ssl/key.pem)", "(key.pem)"),
        ("send JPEG/PNG and/or WebP, 1/2, text/plain; see http://a.test/b/c", None),
        ("item 5: is not in the gallery; list what is with /items", None),
        ("caption \udc80\x00\n: is not Unicode", "caption ?\x00 : is not Unicode"),
    ],
)  # fmt: skip
def test_no_door_tells_where_files_lie(message: str, said: str | None, place: Place) -> None:
    with serving(place) as (_, service):
        public = Api(service, run=place.model, audit=place.model / "audit" / "audit.json")
        line = public.line(ValueError(message.format(gallery=place.gallery, run=place.model)))
    assert line == (message if said is None else said)


def test_a_redirect_stays_on_its_server(client: TestClient) -> None:
    for path in ("//evil.test/", "/health/", "//health/"):
        response = client.get("http://127.0.0.1:7860" + path, follow_redirects=False)
        assert response.status_code in (307, 404)
        assert response.headers.get("location", "http://127.0.0.1:7860/").startswith("http://127.0.0.1:7860/")
