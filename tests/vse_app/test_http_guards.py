from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, UploadFile
from httpx import ASGITransport, AsyncClient, Response
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from vse_app import http_limits
from vse_app.http_guards import SECURITY_HEADERS, Guards
from vse_app.http_hosts import Hosts

LIMIT = 1000
HERE = Hosts(frozenset({"here.test", "testserver"}))
Answered = list[tuple[str, int]]


def app() -> FastAPI:
    inner = FastAPI()

    @inner.get("/things/{id}")
    def thing(id: int) -> dict[str, int]:
        return {"id": id}

    @inner.post("/things")
    async def add(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @inner.post("/forms")
    async def form(file: UploadFile) -> dict[str, int]:
        return {"bytes": len(await file.read())}

    @inner.delete("/things/{id}")
    def remove(id: int) -> dict[str, int]:
        return {"id": id}

    @inner.get("/broken")
    def broken() -> None:
        raise RuntimeError("secret of the server")

    return inner


def guarded(**options: Any) -> tuple[TestClient, Answered]:
    seen: Answered = []
    inner = app()
    inner.add_middleware(
        Guards,
        **{"max_body": LIMIT, "hosts": HERE, **options},
        answered=lambda route, status, seconds: seen.append((route, status)),
    )
    return TestClient(inner, "http://here.test:7860", raise_server_exceptions=False), seen


def refused(response: Response, status: int) -> str:
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert isinstance(detail, str)
    assert "\n" not in detail
    for name, value in SECURITY_HEADERS.items():
        assert response.headers[name] == value
    return detail


def chunks(count: int, size: int = 100) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(size)


def test_a_body_up_to_the_limit_passes() -> None:
    client, seen = guarded()
    assert client.post("/things", content=bytes(LIMIT)).json() == {"bytes": LIMIT}
    assert client.post("/things", content=chunks(10)).json() == {"bytes": LIMIT}
    assert seen == [("/things", 200)] * 2


def test_a_larger_body_is_refused_by_its_length() -> None:
    client, seen = guarded()
    assert "too large" in refused(client.post("/things", content=bytes(LIMIT + 1)), 413)
    assert "too large" in refused(client.post("/things", content=b"", headers={"content-length": "9" * 5000}), 413)
    for length in ("-1", "1e3", "0x10", "²", " ", "+5", "1_0"):
        assert "number" in refused(
            client.post("/things", content=b"", headers={"content-length": length.encode()}), 400
        )
    assert {status for _, status in seen} == {413, 400}


@pytest.mark.parametrize("path", ["/things", "/forms"])
@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"content-length": "0" * 30 + "99"}])
def test_a_longer_body_than_announced_is_cut_off(path: str, headers: dict[str, str]) -> None:
    """Also where whoever reads the body takes any error for a broken form."""
    client, _ = guarded()
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    taken = 0

    def body() -> Iterator[bytes]:
        nonlocal taken
        yield head
        for chunk in chunks(1000):
            taken += len(chunk)
            yield chunk

    headers = {**headers, "content-type": "multipart/form-data; boundary=x", "transfer-encoding": "chunked"}
    assert "too large" in refused(client.post(path, content=body(), headers=headers), 413)


def test_no_more_is_read_than_the_limit() -> None:
    client, _ = guarded()
    taken: list[int] = []

    async def ask() -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            taken.append(100)
            return {"type": "http.request", "body": bytes(100), "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"here.test")]
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/things",
            "raw_path": b"/things", "query_string": b"", "root_path": "", "scheme": "http", "headers": headers,
            "client": ("1.2.3.4", 5), "server": ("here.test", 80),
        }  # fmt: skip
        await client.app(scope, receive, send)
        return sent

    sent = asyncio.run(asyncio.wait_for(ask(), 10))
    assert sent[0]["status"] == 413
    assert sum(taken) <= LIMIT + 100


class Clock:
    now = 1000.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now

    @staticmethod
    def perf_counter() -> float:
        return 0.0


def test_a_burst_then_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "time", Clock)
    monkeypatch.setattr(Clock, "now", 1000.0)
    client, seen = guarded(rate=2.0)

    def passed(count: int) -> int:
        return sum(client.get("/things/1").status_code == 200 for _ in range(count))

    assert passed(30) == 20  # ten seconds' worth
    response = client.get("/things/1")
    assert "slow down" in refused(response, 429)
    assert response.headers["retry-after"] == "1"
    Clock.now += 1
    assert passed(5) == 2
    Clock.now += 0.4
    assert passed(2) == 0
    Clock.now += 0.1
    assert passed(2) == 1  # what was refused took nothing away
    Clock.now += 10_000
    assert passed(30) == 20
    assert seen.count(("other", 429)) == sum(status == 429 for _, status in seen)


def test_addresses_have_rates_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "time", Clock)
    monkeypatch.setattr(http_limits, "_ADDRESSES", 2)

    async def ask() -> AsyncIterator[int]:
        guards = Guards(app(), max_body=LIMIT, hosts=HERE, rate=0.1, answered=lambda *_: None)
        for address in ("a", "a", "b", "a", "c", "d", "a"):
            transport = ASGITransport(guards, client=(address, 1))
            async with AsyncClient(transport=transport, base_url="http://here.test") as client:
                yield (await client.get("/things/1")).status_code
        assert len(guards.rate._states) == 2

    async def collect() -> list[int]:
        return [status async for status in ask()]

    # The last one was forgotten, for two that came after it.
    assert asyncio.run(collect()) == [200, 429, 200, 429, 200, 200, 200]


def basic(text: str | bytes) -> str:
    return "Basic " + base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def test_wrong_passwords_lock_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "time", Clock)
    monkeypatch.setattr(Clock, "now", 1000.0)
    guards = Guards(app(), max_body=LIMIT, hosts=HERE, password="anna:password", answered=lambda *_: None)

    def ask(given: str | None, address: str = "1.2.3.4", **headers: str) -> int:
        client = TestClient(guards, "http://here.test:7860", client=(address, 1))
        return client.get(
            "/things/1", headers=headers | ({"authorization": basic(given)} if given else {})
        ).status_code

    assert {ask(None) for _ in range(50)} == {401}  # a browser that has not been told yet
    assert [ask(f"anna:{n}") for n in range(7)] == [401] * 6 + [429]
    assert ask("anna:password") == 429  # or guessing would go on
    for spoken in ("x-forwarded-for", "forwarded", "x-real-ip"):
        assert ask("anna:7", **{spoken: "9.9.9.9"}) == 429
    assert ask("anna:password", "1.2.3.5") == 200
    Clock.now += 2.1
    assert [ask("anna:8"), ask("anna:9")] == [401, 429]
    Clock.now += 3.9
    assert ask("anna:password") == 429  # each lock is twice as long
    Clock.now += 0.2
    assert ask("anna:password") == 200
    assert [ask(f"anna:{n}") for n in range(7)] == [401] * 6 + [429]
    for n in range(200):  # the longest lock has an end, and nothing overflows
        Clock.now += 10_000
        assert ask(f"anna:{n}") == 401
    assert guards.guesses.locked("1.2.3.4") <= 300


def test_guesses_from_one_network_count_together_and_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "_ADDRESSES", 3)
    guards = Guards(app(), max_body=LIMIT, hosts=HERE, password="anna:password", answered=lambda *_: None)
    answers = []
    for n in range(7):
        client = TestClient(guards, "http://here.test:7860", client=(f"2001:db8:1:2::{n}", 1))
        answers.append(client.get("/things/1", headers={"authorization": basic("anna:1")}).status_code)
    assert answers == [401] * 6 + [429]
    for n in range(9):
        client = TestClient(guards, "http://here.test:7860", client=(f"10.0.0.{n}", 1))
        assert client.get("/things/1", headers={"authorization": basic("anna:1")}).status_code == 401
    assert len(guards.guesses._states) == 3


def test_the_password_lets_in() -> None:
    client, _ = guarded(password="anna:pass:wörd")
    for given in (basic("anna:pass:wörd"), basic("anna:pass:wörd").replace("Basic", "bAsIc")):
        assert client.get("/things/1", headers={"authorization": given}).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Basic",
        "Basic ",
        "Basic =",
        "Basic !!!!",
        "Basic YW5uYQ",
        "Bearer YW5uYTpwYXNzd29yZA==",
        "YW5uYTpwYXNzd29yZA==",
        basic("anna:"),
        basic("anna:passwor"),
        basic("anna:password "),
        basic("Anna:password"),
        basic("anna:password\0"),
        basic(""),
        basic(b"\xff\xfe:\xff"),
        "Basic " + "A" * 50_000,
        "Basic ü".encode("latin-1"),
        "Basic  YW5uYTpwYXNzd29yZA==",
        "Digest username=anna",
    ],
)
def test_anything_else_does_not(given: str | bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    client, seen = guarded(password="anna:password")
    monkeypatch.setattr(http_limits, "_FREE_GUESSES", 100)
    headers = {} if given is None else {"authorization": given}
    for path in ("/things/1", "/nothing", "/openapi.json"):
        response = client.get(path, headers=headers)  # type: ignore[arg-type]
        assert "password" in refused(response, 401)
        assert response.headers["www-authenticate"] == 'Basic realm="vse"'
    assert client.delete("/things/1", headers=headers).status_code == 401  # type: ignore[arg-type]
    assert {status for _, status in seen} == {401}


FOREIGN = [
    "http://evil.test",
    "https://evil.test:7860",
    "http://here.test",
    "http://here.test:7861",
    "http://here.test:7860.evil.test",
    "http://here.test:7860@evil.test",
    "null",
    "",
    "here.test:7860",
    "file://",
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_pages_of_other_sites_may_not_change_anything(origin: str) -> None:
    client, _ = guarded()
    for ask in (lambda h: client.post("/things", headers=h), lambda h: client.delete("/things/1", headers=h)):
        assert "another site" in refused(ask({"origin": origin}), 403)
    for host in ("", "null"):
        assert refused(client.delete("/things/1", headers={"origin": origin, "host": host}), 400)
    forwarded = {"origin": origin, "x-forwarded-host": origin.partition("://")[2]}
    assert "another site" in refused(client.delete("/things/1", headers=forwarded), 403)
    assert client.get("/things/1", headers={"origin": origin}).status_code == 200
    assert "access-control-allow-origin" not in client.get("/things/1", headers={"origin": origin}).headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://here.test:7860"},
        {"origin": "http://HERE.test:7860"},
        {"origin": "https://here.test", "host": "here.test"},
    ],
)
def test_own_pages_and_programs_may(headers: dict[str, str]) -> None:
    client, _ = guarded()
    assert client.post("/things", headers=headers, content=b"abc").json() == {"bytes": 3}
    assert client.delete("/things/1", headers=headers).json() == {"id": 1}


def test_every_answer_has_the_security_headers() -> None:
    client, seen = guarded()
    for response, status in (
        (client.get("/things/1"), 200),
        (client.get("/things/x"), 422),
        (client.get("/nothing"), 404),
        (client.put("/things/1"), 405),
        (client.get("/broken"), 500),
        (client.get("/openapi.json"), 200),
    ):
        assert response.status_code == status
        for name, value in SECURITY_HEADERS.items():
            assert response.headers[name] == value, response
        assert "secret of the server" not in response.text
    assert [status for _, status in seen] == [200, 422, 404, 405, 500, 200]
    assert [route for route, _ in seen] == [
        "/things/{id}",
        "/things/{id}",
        "other",
        "/things/{id}",
        "/broken",
        "other",
    ]


def test_an_error_is_one_line_and_still_reported() -> None:
    inner = app()
    inner.add_middleware(Guards, max_body=LIMIT, hosts=HERE, answered=lambda *_: None)
    with pytest.raises(RuntimeError, match="secret"):
        TestClient(inner).get("/broken")
    assert refused(TestClient(inner, raise_server_exceptions=False).get("/broken"), 500)


def test_headers_that_the_application_chose_stay(tmp_path: Path) -> None:
    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"referrer-policy", b"no-referrer")]})
        await send({"type": "http.response.body", "body": b""})

    response = TestClient(Guards(own, max_body=1, hosts=HERE, answered=lambda *_: None)).get("/")
    assert response.headers.get_list("referrer-policy") == ["no-referrer"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_no_way_around_by_websocket() -> None:
    reached: list[str] = []

    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["type"])

    client = TestClient(Guards(own, max_body=1, hosts=HERE, password="anna:password", answered=lambda *_: None))
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass
    assert reached == []


async def raw(guards: Guards, method: str, path: str, messages: list[Message], **scope: Any) -> list[Message]:
    """What is sent for a request whose body arrives in these parts."""
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await guards(
        {
            "type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"here.test")],
            "client": ("1.2.3.4", 5), "server": ("1.1.1.1", 80), "scheme": "http", **scope,
        },
        receive,
        send,
    )  # fmt: skip
    return sent


def test_what_is_received_at_once_is_bounded_and_given_back() -> None:
    async def hungry(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            await receive()
        within.append(guards)
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    within: list[Guards] = []
    guards = Guards(hungry, max_body=LIMIT, hosts=HERE, answered=lambda *_: None)

    async def ask(address: str) -> int:
        part = {"type": "http.request", "body": bytes(LIMIT // 3), "more_body": True}
        return int((await raw(guards, "POST", "/", [part] * 3, client=(address, 1)))[0]["status"])

    async def together() -> list[int]:
        return list(await asyncio.gather(*map(ask, ["a"] * 3 + ["b"] * 2 + ["c"])))

    statuses = asyncio.run(together())
    assert statuses.count(503) == 2
    assert statuses[2] == statuses[5] == 503  # half of it for each address, and no more than all
    assert asyncio.run(ask("c")) == 200
    assert guards.in_flight._held == {}


def test_a_client_that_is_gone_is_no_mistake() -> None:
    guards = Guards(app(), max_body=LIMIT, hosts=HERE, answered=lambda *_: None)
    part: Message = {"type": "http.request", "body": b"a", "more_body": True}
    assert asyncio.run(raw(guards, "POST", "/gradio_api/call/x", [part, {"type": "http.disconnect"}])) == []
    assert guards.in_flight._held == {}


@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * 10_000, '{"a":' + "[" * 65, "[" * 199_000, '["\\"", [' * 70])
def test_calls_that_nest_too_deeply_are_refused(text: str) -> None:
    client, _ = guarded(max_body=10_000_000)
    assert "too deeply" in refused(client.post("/gradio_api/mcp/", content=text), 400)


@pytest.mark.parametrize("text", ['["' + "[" * 190_000 + '"]', "[]" * 90_000, '"' + '\\"' * 90_000, "[" * 64])
def test_calls_may_hold_any_text(text: str) -> None:
    client, _ = guarded(max_body=10_000_000)
    assert client.post("/gradio_api/queue/join", content=text).status_code == 404  # nobody is there


def test_calls_are_short() -> None:
    client, _ = guarded(max_body=10_000_000)
    assert "at most 200 kB" in refused(client.post("/gradio_api/run/predict", content=bytes(200_001)), 413)
    assert "at most 200 kB" in refused(client.post("/gradio_api/mcp/", content=chunks(3, 100_000)), 413)
    assert client.post("/things", content=bytes(1_000_001)).status_code == 200


def test_no_answer_invites_other_sites() -> None:
    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        invited = [
            (b"access-control-allow-origin", b"http://localhost:9"),
            (b"Access-Control-Allow-Credentials", b"true"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": invited})
        await send({"type": "http.response.body", "body": b""})

    client = TestClient(Guards(own, max_body=1, hosts=HERE, answered=lambda *_: None))
    for method in ("GET", "OPTIONS"):
        headers = client.request(method, "/", headers={"origin": "http://localhost:9"}).headers
        assert not [name for name in headers if name.startswith("access-control")]


def test_what_can_be_got_has_a_head() -> None:
    client, _ = guarded()
    head, got = client.head("/things/1"), client.get("/things/1")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head("/nothing").status_code == 404
