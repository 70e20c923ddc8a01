"""Every way in, asked for files that were never sent to this server: none is opened, copied, shown or kept."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio.routes
import pytest
from gradio.utils import get_upload_folder
from served import COUNT, MARKER, Place, encoded, furnish, pixels
from starlette.testclient import TestClient

from training.errors import InputError
from vse_app.search_service import SearchService
from vse_app.server import Serving, create_app
from vse_app.web.upload import read

RPC = {"accept": "application/json, text/event-stream"}
_watched: set[str] = set()
_opened: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Hooks cannot be taken away again, so this one mostly does nothing."""
    if _watched and event in ("open", "shutil.copyfile") and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path in _watched:
            _opened.append(path)


sys.addaudithook(_watch)


@dataclass
class Walk:
    """A server with its page, and what it answered."""

    client: TestClient
    page: gradio.routes.App
    place: Place
    picture: Path
    answers: list[bytes] = field(default_factory=list)

    def ask(self, method: str, path: str, **options: Any) -> bytes:
        response = self.client.request(method, path, **options)
        self.answers.append(response.content)
        return response.content

    def call(self, function: int, every: list[list[Any]]) -> None:
        """Through the queue, all at once, or directly where there is none."""
        session = f"walk-{function}-{len(self.answers)}"
        for data in every:
            body = {"fn_index": function, "data": data, "session_hash": session, "event_data": {"path": data[0]}}
            self.ask("POST", "/gradio_api/queue/join", json=body)
        self.ask("POST", "/gradio_api/run/predict", json=body)
        self.ask("GET", "/gradio_api/queue/data", params={"session_hash": session})

    @property
    def scratch(self) -> list[Path]:
        return [path for path in Path(get_upload_folder()).rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    place = furnish(tmp_path_factory.mktemp("walked"))
    picture = place.secret.with_name("secret.png")
    picture.write_bytes(encoded(pixels(4711)) + MARKER.encode())
    pages: list[gradio.routes.App] = []
    create = gradio.routes.App.create_app

    def spy(*arguments: Any, **named: Any) -> gradio.routes.App:
        pages.append(create(*arguments, **named))
        return pages[-1]

    with pytest.MonkeyPatch.context() as patch, SearchService(place.gallery) as service:
        patch.setenv("GRADIO_TEMP_DIR", str(place.secret.with_name("scratch")))
        patch.setattr(gradio.routes.App, "create_app", staticmethod(spy))
        app = create_app(service, Serving(place.gallery))
        with TestClient(app, "http://127.0.0.1:7860", raise_server_exceptions=False) as client:
            yield Walk(client, pages[0], place, picture)


@pytest.fixture(autouse=True)
def _nothing_told(walk: Walk) -> Iterator[None]:
    walk.answers.clear()
    _opened.clear()
    yield
    told = MARKER.encode()
    assert _opened == []
    assert not any(told in answer for answer in walk.answers)
    for path in walk.scratch:
        assert path.is_symlink() or told not in path.read_bytes(), path
        assert told not in walk.client.get(f"/gradio_api/file={path}").content
    total = walk.client.get("/items").json()["total"]
    assert total == COUNT
    assert not (walk.place.gallery / "uploads").exists()


@contextmanager
def watching(*paths: Path) -> Iterator[None]:
    _watched.update(os.path.realpath(path) for path in paths)
    try:
        yield
    finally:
        _watched.clear()


def spellings(path: Path) -> list[str]:
    """Ways to name a file."""
    scratch = get_upload_folder()
    climb = "../" * (len(Path(scratch).parts) + 1)
    folder = Path(scratch) / ("0" * 64)
    folder.mkdir(parents=True, exist_ok=True)
    link, inner = folder / f"link-{path.name}", Path(scratch) / f"linked-{path.stem}"
    for made, target in ((link, path), (inner, path.parent)):
        if not made.is_symlink():
            made.symlink_to(target)
    return [
        str(path), str(link), f"{inner}/{path.name}", f"file://{path}", f"{scratch}/{climb}{path}",
        os.path.relpath(path), f"file:{path}", f"file://localhost{path}", f"/proc/self/root{path}",
        f"{scratch}/../{path.name}", f"{folder}/../../{path.name}", f"/gradio_api/file={path}",
        f"http://127.0.0.1:7860/gradio_api/file={path}",
    ]  # fmt: skip


def payloads(path: str) -> list[Any]:
    """What a field may be sent that names it."""
    meta = {"meta": {"_type": "gradio.FileData"}}
    plain = {"path": path}
    whole = {**plain, "url": f"/gradio_api/file={path}", "orig_name": "a.png", "size": 5, "mime_type": "image/png"}
    return [
        path, plain, {**plain, **meta}, {**whole, **meta}, {**whole, **meta, "is_stream": True}, [plain],
        [{**whole, **meta}], {"image": {**plain, **meta}}, {"value": {**plain, **meta}, "__type__": "update"},
        [[{"a": {**plain, **meta}}]], {"path": plain, **meta},
    ]  # fmt: skip


def functions(walk: Walk) -> list[tuple[int, list[str]]]:
    """All that the page registered, with the kinds of their inputs."""
    config = walk.client.get("/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    return [(of["id"], [kinds[key] for key in of["inputs"]]) for of in config["dependencies"] if of["backend_fn"]]


PLAIN = {"textbox": "", "slider": 1, "number": 1, "checkbox": False, "radio": "query-image", "dropdown": "linf"}
FILES = {"file", "files", "image", "imageslider", "gallery", "video", "audio", "upload", "uploads", "downloadbutton"}


def test_no_function_of_the_page(walk: Walk) -> None:
    """Also ones that will be registered later."""
    config = walk.client.get("/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    found = [(of["id"], [kinds[key] for key in of["inputs"]]) for of in config["dependencies"] if of["backend_fn"]]
    names = [str(walk.place.secret), *spellings(walk.picture)]
    every = [payload for name in names for payload in payloads(name)]
    files = 0
    with watching(walk.place.secret, walk.picture):
        for function, inputs in found:
            plain = [PLAIN.get(kind) for kind in inputs]
            for n, kind in enumerate(inputs):
                some = every[::4] if kind in FILES else []
                files += len(some)
                walk.call(function, [[*plain[:n], sent, *plain[n + 1 :]] for sent in [every, *some]])
    assert len(found) > 12
    assert files >= 3 * 30


def test_no_route_of_the_api(walk: Walk) -> None:
    described = walk.client.get("/openapi.json").json()
    routes = [(path, method.upper()) for path, of in described["paths"].items() for method in of]
    assert len(routes) >= 10
    with watching(walk.place.secret, walk.picture):
        for name in [str(walk.place.secret), *spellings(walk.picture)[:5]]:
            for path, method in routes:
                operation = described["paths"][path][method.lower()]
                asked = {of["name"]: name for of in operation.get("parameters", ()) if of["in"] == "query"}
                for value in (name, json.dumps({"path": name})):
                    form = dict.fromkeys(("text", "caption", "metadata", "where", "image", "images"), value)
                    sent = {"data": form, "files": {"a": (name, b"")}} if method == "POST" else {}
                    walk.ask(method, path.replace("{id}", value), params=asked, **sent)


def test_no_route_of_gradio(walk: Walk) -> None:
    """Whichever Gradio has: a path in the place of every parameter, in the query, and in JSON."""
    routes = [(path, method.upper()) for path, of in walk.page.openapi()["paths"].items() for method in of]
    assert len(routes) > 40
    with watching(walk.place.secret, walk.picture):
        for name in [str(walk.place.secret), *spellings(walk.picture)[:5]]:
            for path, method in routes:
                if "heartbeat" in path or "upload_progress" in path:
                    continue  # these go on for ever, and read nothing
                for key in re.findall(r"{(.*?)}", path):
                    path = path.replace(f"{{{key}}}", name)
                asked = dict.fromkeys(("session_hash", "deep_link", "page", "upload_id", "file"), name)
                sent = {
                    "json": {
                        "path": name,
                        "data": payloads(name),
                        "session_hash": "s",
                        "component_id": 1,
                        "fn_name": name,
                    }
                }
                walk.ask(method, path, params=asked, **(sent if method == "POST" else {}))


def test_no_tool(walk: Walk) -> None:
    def ask(method: str, **parameters: Any) -> Any:
        call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        said = walk.ask("POST", "/gradio_api/mcp/", json=call, headers=RPC).decode()
        return json.loads(said.partition("data: ")[2]).get("result")

    tools = ask("tools/list")["tools"]
    assert len(tools) == 4
    with watching(walk.place.secret, walk.picture):
        for name in [str(walk.place.secret), *spellings(walk.picture)[:5]]:
            for payload in payloads(name)[:3:2]:
                for tool in tools:
                    ask(
                        "tools/call",
                        name=tool["name"],
                        arguments=dict.fromkeys(tool["inputSchema"]["properties"], payload),
                    )
                    walk.ask("POST", f"/gradio_api/call/v2/{tool['name']}", json={"text": payload, "item": payload})
            ask("resources/read", uri=f"file://{name}")


def test_what_another_session_sees_cannot_be_kept_or_opened(walk: Walk) -> None:
    sent = walk.client.post("/gradio_api/upload", files={"files": ("mine.png", encoded(pixels(5)))}).json()[0]
    walk.call(6, [["", {"path": sent}, 0.5, 5, "", False, False, False, None]])
    assert walk.client.get("/gradio_api/deep_link", params={"session_hash": "walk-6-0"}).status_code == 404
    for where in ("/", "/config"):
        assert b"mine.png" not in walk.ask("GET", where, params={"deep_link": "walk-6-0", "session_hash": "walk-6-0"})


@pytest.mark.parametrize("where", ["folder", "file", "root"])
def test_uploads_are_read_without_following_links(
    where: str, walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    sent = scratch / "a" / "sent.png"
    sent.parent.mkdir(parents=True)
    sent.write_bytes(encoded(pixels(5)))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(scratch))
    assert read(str(sent)).size == (40, 32)
    (tmp_path / "elsewhere").mkdir()
    sent.rename(tmp_path / "elsewhere" / "sent.png")
    if where == "file":
        sent.symlink_to(tmp_path / "elsewhere" / "sent.png")
    else:
        sent.parent.rmdir()
        sent.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="send it again"):
        read(str(sent))
