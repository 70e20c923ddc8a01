"""Calls to the page and the tools that fit no function: each is answered in one line that tells nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from html import unescape
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
from served import Place, furnish
from starlette.datastructures import QueryParams
from starlette.testclient import TestClient

from vse_app.search_service import SearchService
from vse_app.server import Serving, create_app
from vse_app.web.calls import calls
from vse_app.web.search_tab import SearchTab

RPC = {"accept": "application/json, text/event-stream"}
LARGE = 2**60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return furnish(tmp_path_factory.mktemp("called"))


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[TestClient]:
    """For strangers, who are not told where files lie."""
    with pytest.MonkeyPatch.context() as patch, SearchService(place.gallery) as service:
        patch.setenv("GRADIO_TEMP_DIR", str(place.secret.with_name("scratch")))
        app = create_app(service, Serving(place.gallery, host="0.0.0.0", audit=None))
        patch.setattr("vse_app.http_limits.Rate.allows", lambda rate, key: True)
        with TestClient(app, "http://1.2.3.4:7860", raise_server_exceptions=False, client=("1.2.3.5", 1)) as client:
            yield client


EVENTS = [None, {}, {"action": "why"}, {"action": "why", "id": LARGE}, {"action": "attack", "id": "x"}, [], "a", 1]


def test_no_call_tells_what_python_or_the_disk_says(
    client: TestClient, place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    answers = []
    with caplog.at_level(logging.CRITICAL):
        for of in client.get("/config").json()["dependencies"]:
            empty = [None] * len(of["inputs"])
            fits = [([value] * len(empty), {}) for value in ("x", LARGE, {"a": 1})]
            asked = {"fn_index": of["id"], "session_hash": f"session-{of['id']}"}
            for data, event in [([], None), ([[], *empty], None), *fits, *((empty, event) for event in EVENTS)]:
                body = {**asked, "data": data, "event_data": event}
                answers.append(
                    client.post("/gradio_api/" + ("queue/join" if of["queue"] else "run/predict"), json=body).text
                )
            answers.append(client.get("/gradio_api/queue/data", params=asked).text)
    assert len(answers) > 200
    for answer in answers:
        for told in ("Traceback", "NoneType", "object has no", "IndexError", "list index", str(place.gallery.parent)):
            assert told not in answer
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("more_like", {"item": 999}),
        ("more_like", {"item": 1e30}),
        ("more_like", {"item": -1}),
        ("more_like", {"item": "x\x1b[31m"}),
        ("search_pictures", {"text": " "}),
        ("search_pictures", {"text": "red", "where": "nonsense"}),
        ("search_pictures", {"text": "red", "where": "\n".join(["year>1"] * 5000)}),
        ("search_pictures", {"text": "red", "k": 10**20}),
        ("audit_record", {}),
    ],
)
def test_tools_refuse_in_one_line_without_paths(
    tool: str, arguments: dict[str, Any], client: TestClient, place: Place
) -> None:
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    said = client.post("/gradio_api/mcp/", json=request, headers=RPC).text
    result = json.loads(said.partition("data: ")[2])["result"]
    text = result["content"][0]["text"]
    assert result["isError"]
    assert len(text.splitlines()) == 1
    for answer in (text, client.post(f"/gradio_api/run/{tool}", json={"data": list(arguments.values())}).text):
        assert str(place.gallery.parent) not in answer
        assert "Traceback" not in answer


def test_deep_calls_are_refused(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("mcp/", "queue/join", "run/predict", "call/health", "cancel"):
        deep = client.post(f"/gradio_api/{path}", content="[" * 10_000 + "]" * 10_000, headers=RPC)
        assert deep.status_code == 400
        assert "too deeply" in deep.json()["detail"]
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize("origin", ["http://localhost:9", "http://1.2.3.4:9", "null", "https://evil.test"])
@pytest.mark.parametrize(
    "path", ["/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/mcp/", "/items", "/search"]
)
def test_other_sites_change_and_read_nothing(path: str, origin: str, client: TestClient) -> None:
    host = origin.partition("://")[2] or "evil.test"
    spoken = {"origin": origin, "x-forwarded-host": host, "forwarded": f"host={host}"}
    assert client.post(path, json={}, headers=spoken).status_code == 403
    asked = spoken | {"access-control-request-method": "POST", "access-control-request-headers": "x-forwarded-host"}
    for answer in (client.options(path, headers=asked), client.get("/config", headers=spoken)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert host not in client.get("/config", headers=spoken | {"x-gradio-server": f"http://{host}"}).text


def opened(query: str) -> list[Any]:
    tab = SimpleNamespace(_service=SimpleNamespace(corrects_hubs=True))
    return SearchTab._opened(tab, SimpleNamespace(query_params=QueryParams(query)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["likely", "collapse", "querybank"])
def test_links_say_yes_and_no_as_the_api_does(name: str) -> None:
    place = 3 + ["likely", "collapse", "querybank"].index(name)
    for written in ("false", "0", "off", "No", ""):
        assert opened(f"text=a&{name}={written}")[place] is False
    for written in ("true", "1", "on", "Yes"):
        assert opened(f"text=a&{name}={written}")[place] is True
    assert opened("text=a")[place] is False


def test_links_give_as_many_as_the_page_can() -> None:
    asked = {"7": 7, "100": 100, "150": 100, "200": 100, "9" * 15: 100, "0": 12, "x": 12, "-5": 12, "9" * 30: 12}
    assert {k: opened(f"text=a&k={k}")[1] for k in asked} == asked


@pytest.mark.parametrize("text", ["@home", "<3", "@/etc/passwd", "it's", "a;type=b"])
def test_the_call_that_is_shown_sends_the_text_itself(text: str) -> None:
    shown = calls({"text": text}, "http://a", with_picture=True).partition("<code>")[2].partition("</code>")[0]
    words = split(unescape(shown))
    assert words[words.index("--form-string") + 1] == f"text={text}"
    assert words.count("-F") == 1
