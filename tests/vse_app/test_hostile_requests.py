from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes, urlencode

import hostile
import pytest
from hostile import multipart
from PIL import Image
from served import COUNT, MARKER, Place, encoded, furnish, is_bare, jpeg, pixels, serving
from starlette.testclient import TestClient
from starlette.types import Message

from vse_app.api import MAX_BODY

SECONDS, MEGABYTES = 10.0, 600
FORM = b"multipart/form-data; boundary=" + hostile.BOUNDARY
Header = tuple[bytes, bytes]


def memory() -> float:
    """Resident megabytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1000


@dataclass
class Prober:
    """Sends requests as they are, past what a client would mend, and looks at every answer."""

    client: TestClient
    before: float = field(default_factory=memory)
    sent: int = 0

    def ask(
        self,
        method: str,
        path: bytes,
        query: bytes = b"",
        body: bytes | Iterable[bytes] = b"",
        headers: Sequence[Header] = (),
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        chunks = iter([body] if isinstance(body, bytes) else body)
        answer: list[Message] = []

        async def receive() -> Message:
            part = next(chunks, None)
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        async def send(message: Message) -> None:
            answer.append(message)

        async def run() -> None:
            await self.client.app(
                {
                    "type": "http",
                    "asgi": {"version": "3.0"},
                    "http_version": "1.1",
                    "method": method,
                    "scheme": "http",
                    "path": decoded(path),
                    "raw_path": path,
                    "query_string": query,
                    "root_path": "",
                    "headers": [(b"host", b"127.0.0.1:7860"), *headers],
                    "client": ("127.0.0.1", 50_000),
                    "server": ("127.0.0.1", 7860),
                },
                receive,
                send,
            )

        started = time.perf_counter()
        assert self.client.portal
        self.client.portal.call(run)
        took = time.perf_counter() - started
        request = (method, path[:100], query[:200], headers)
        status, content = answer[0]["status"], b"".join(part.get("body", b"") for part in answer[1:])
        assert status < 500, (request, content[:500])
        assert took < SECONDS, (request, took)
        assert MARKER.encode() not in content, request
        assert b"root:" not in content, request
        assert memory() - self.before < MEGABYTES, request
        if status >= 400 and method != "HEAD":
            detail = json.loads(content)["detail"]
            assert isinstance(detail, str), (request, detail)
            assert "\n" not in detail, request
            assert len(detail) <= 1000, request
        self.sent += 1
        return status, content

    def form(self, path: bytes, *parts: tuple[bytes, bytes | None, bytes], kind: bytes = FORM) -> tuple[int, bytes]:
        """Send a form."""
        body = multipart(*parts)
        return self.ask("POST", path, b"", body, [(b"content-type", kind), (b"content-length", b"%d" % len(body))])


def decoded(path: bytes) -> str:
    """As a server decodes it."""
    return unquote_to_bytes(path).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = furnish(tmp_path_factory.mktemp("hostile"))
    place.pictures[1].unlink()
    place.pictures[1].symlink_to(place.secret)
    place.pictures[2].write_bytes(place.secret.read_bytes())
    place.pictures[3].unlink()
    place.pictures[3].symlink_to("/etc/passwd")
    place.pictures[4].unlink()
    place.pictures[4].mkdir()
    return place


@pytest.fixture(scope="module")
def prober(place: Place) -> Iterator[Prober]:
    with serving(place) as (client, _):
        client.get("/search", params={"text": "warm"})
        client.post("/search", files={"image": jpeg(1)})
        yield Prober(client)


@pytest.fixture(autouse=True)
def _as_before(prober: Prober, place: Place) -> Iterator[None]:
    """Whatever was sent, the gallery is served as before, and only what the server itself named is kept."""
    yield
    status, content = prober.ask("GET", b"/search", b"like=1&k=200")
    found = {result["id"] for result in json.loads(content)["results"]}
    assert status == 200
    assert set(range(2, COUNT + 1)) <= found
    status, content = prober.ask("GET", b"/items", b"where=year=2023")
    assert [item["id"] for item in json.loads(content)["items"]] == [COUNT]
    kept = list((place.gallery / "uploads").glob("**/*"))
    assert all(re.fullmatch(r"[0-9a-f]{24}\.jpg", path.name) and is_bare(path.read_bytes()) for path in kept)
    _, content = prober.ask("GET", b"/items", b"limit=1000&offset=%d" % COUNT)
    assert {path.name for path in kept} == {item["name"] for item in json.loads(content)["items"]}
    assert {path.name for path in place.gallery.parent.iterdir()} == {"gallery", "model", "photos", "secret.txt"}


@pytest.mark.parametrize("kind", ["damaged", "impostors"])
def test_uploads(kind: str, prober: Prober) -> None:
    before, accepted = prober.sent, set()
    for n, (name, content) in enumerate(getattr(hostile, kind)()):
        status, answer = prober.form(b"/search", (b"image", name.encode(), content))
        assert status in (200, 400), (name, status)
        if status == 200:
            accepted.add(name)
        if n % 4 == 0 and len(content) < 1_000_000:
            added, answer = prober.form(b"/items", (b"images", name.encode(), content))
            assert added == status, name
            for key in json.loads(answer).get("ids", ()):
                status, image = prober.ask("GET", b"/items/%d/image" % key)
                assert is_bare(image), name
                assert hostile.SCRIPT not in image, name
                assert prober.ask("DELETE", b"/items/%d" % key)[0] == 200
    assert prober.sent - before > (120 if kind == "damaged" else 60)
    if kind == "impostors":
        assert accepted == {
            "39-megapixels.png", "6000.jpg", "frame.gif", "thin.png", "flat.png", "long-data.png",
            "bad-exif.png", "exif-loop.jpg", "animated.gif", "animated.webp", "gif-and-page.gif",
            "jpeg-and-archive.jpg",
        }  # fmt: skip


def test_names_of_files(prober: Prober) -> None:
    for name in hostile.NAMES:
        prober.form(b"/search", (b"image", name, b"no picture"))
        prober.form(b"/search", (b"image", name, jpeg(1)))
        status, answer = prober.form(b"/items", (b"images", name, encoded(pixels(600))))
        for key in json.loads(answer)["ids"] if status == 200 else ():
            prober.ask("GET", b"/items/%d/image" % key)
            prober.ask("DELETE", b"/items/%d" % key)
    for kind in (
        b"unicode_escape",
        b"utf-7",
        b"utf-16",
        b"idna",
        b"punycode",
        b"undefined",
        b"zlib",
        b"nonsense",
        b"\xff",
    ):
        form = FORM + b"; charset=" + kind
        parts = (b"text", None, rb"\ud800 red +2AA-"), (b"image", rb"\ud800.jpg", jpeg(1))
        status, _ = prober.form(b"/search", *parts, kind=form)
        assert status == 422 or kind not in (b"unicode_escape", b"utf-7"), kind
        prober.form(b"/search", (b"image", rb"\ud800+2AA-\n.jpg", b"no picture"), kind=form)
        parts = (b"caption", None, rb"\ud800+2AA-"), (b"images", rb"\ud800.jpg", jpeg(1))
        status, answer = prober.form(b"/items", *parts, kind=form)
        assert status in (200, 400, 422), kind
        for key in json.loads(answer)["ids"] if status == 200 else ():
            prober.ask("DELETE", b"/items/%d" % key)


def test_paths_and_ids(prober: Prober) -> None:
    for path in hostile.PATHS:
        for method in ("GET", "DELETE"):
            assert prober.ask(method, path)[0] in (200, 307, 404, 405, 422), path
    for key in (quote(key).encode() for key in hostile.IDS):
        for method, path in (("GET", b""), ("GET", b"/image"), ("DELETE", b"")):
            status, _ = prober.ask(method, b"/items/" + key + path)
            assert status in (404, 422), key
        assert prober.ask("GET", b"/search", b"like=" + key)[0] in (400, 422)
        assert prober.ask("GET", b"/search", b"text=a&k=" + key)[0] in (200, 422)
        assert prober.ask("GET", b"/items", b"offset=" + key + b"&limit=" + key)[0] in (200, 422)
    for key in (b"1.0", b"%201", b"+1", b"0001", b"0" * 3000 + b"1"):  # other spellings, or none
        assert prober.ask("GET", b"/items/" + key)[0] in (200, 422), key
    for key in (2, 3, 4, 5):
        for side in (b"", b"side=64"):
            assert prober.ask("GET", b"/items/%d/image" % key, side)[0] == 404


def test_conditions(prober: Prober) -> None:
    for condition in hostile.CONDITIONS:
        query = urlencode({"where": condition}).encode()
        statuses = {prober.ask("GET", b"/items", query)[0], prober.ask("GET", b"/search", b"text=red&" + query)[0]}
        parts = (b"image", b"a.jpg", jpeg(1)), *[(b"where", None, condition.encode())] * 16
        statuses.add(prober.form(b"/search", *parts)[0])
        assert statuses <= {200, 400, 422}, condition
    assert prober.ask("GET", b"/items", b"&".join([b"where=year=1"] * 100))[0] == 422
    assert prober.ask("GET", b"/items", b"&".join([b"where=year>1"] * 16))[0] == 200
    assert prober.ask("GET", b"/items", b"where=%ED%A0%80=1&where=a=%ED%A0%80")[0] == 200
    assert prober.ask("GET", b"/items", b"where=" + b"a" + b"+" * 60_000 + b"b")[0] == 422


def test_texts(prober: Prober) -> None:
    for text in hostile.TEXTS:
        query = urlencode({"text": text}).encode()
        assert prober.ask("GET", b"/search", query)[0] in (200, 400, 422)
        prober.form(b"/search", (b"text", None, text.encode()), (b"image", b"a.jpg", jpeg(1)))
        status, answer = prober.form(b"/items", (b"caption", None, text.encode()), (b"images", b"a.jpg", jpeg(9)))
        for key in json.loads(answer)["ids"] if status == 200 else ():
            assert prober.ask("DELETE", b"/items/%d" % key)[0] == 200
    for query in (b"text=%ED%A0%80", b"text=%ff%fe", b"text=%", b"text=%zz", b"text", b"=a", b"\xff=\xff",
                  b"&" * 10_000, b"text=a&" * 2000, b"text=a&k=1&k=2&k=x", b"text[]=a", b"text=a&weight=NaN",
                  b"text=a&collapse=nan", b"text=a&collapse=inf", b"text=a&querybank=2", b"text=a;k=3"):  # fmt: skip
        assert prober.ask("GET", b"/search", query)[0] in (200, 400, 422), query
    for weight in (b"nan", b"inf", b"-1", b"1e999", b"0x1", b""):
        parts = (b"text", None, b"a"), (b"image", b"a.jpg", jpeg(1)), (b"weight", None, weight)
        assert prober.form(b"/search", *parts)[0] in (200, 400, 422), weight


def test_metadata(prober: Prober) -> None:
    for n, metadata in enumerate(hostile.METADATA):
        parts = (b"metadata", None, metadata.encode()), (b"images", b"a.png", encoded(pixels(700 + n)))
        status, answer = prober.form(b"/items", *parts)
        assert status in (200, 400, 422), metadata
        for key in json.loads(answer)["ids"] if status == 200 else ():
            assert prober.ask("GET", b"/items/%d" % key)[0] == 200
            assert prober.ask("GET", b"/items", b"where=a=1")[0] == 200
            assert prober.ask("DELETE", b"/items/%d" % key)[0] == 200


def test_headers_and_bodies(prober: Prober) -> None:
    good = multipart((b"image", b"a.jpg", jpeg(1)))
    for headers in ([(b"x", b"a" * 1_000_000)], [(b"x" * 100_000, b"")], [(b"cookie", b"a=b;" * 50_000)],
                    [(b"authorization", b"Basic \xff")], [(b"range", b"bytes=0-,0-,0-")],
                    [(b"accept", b"\xff\xfe")], [(b"x-forwarded-for", b"1.2.3.4" * 999)], [(b"origin", b"http://evil.test")],
                    [(b"content-type", b"application/json")], [(b"x-http-method-override", b"DELETE")]):  # fmt: skip
        assert prober.ask("GET", b"/items/1", headers=headers)[0] == 200
    for host in (b"evil.test", b"127.0.0.1:7860"):  # a second one
        assert prober.ask("GET", b"/items/1", headers=[(b"host", host)])[0] == 400
    for length in (b"-1", b"abc", b"", b"9" * 400, b"\xb2", b"1, 2", b"0x9"):
        assert prober.ask("POST", b"/search", b"", good, [(b"content-length", length)])[0] in (400, 413)
    for kind in (FORM, FORM.replace(b"limit", b"other"), b"multipart/form-data", b"multipart/form-data; boundary=",
                 b"multipart/form-data; boundary=" + b"x" * 10_000, b"multipart/form-data; boundary=\xff\0", b"\xff",
                 b"", b"application/json", b"application/x-www-form-urlencoded", b"text/plain; charset=undefined",
                 b"multipart/mixed; boundary=limit-of-parts"):  # fmt: skip
        for length in (b"5", b"%d" % len(good), b"79999999"):
            for body in (good, good[:-20], good[20:], b"", b"--" * 5000, b'{"a": 1}', good.replace(b'"image"', b"")):
                headers = [(b"content-type", kind), (b"content-length", length)]
                assert prober.ask("POST", b"/search", b"", body, headers)[0] in (200, 400, 422)
    empty = [(b"f%d" % n, None, b"") for n in range(1500)]
    assert prober.form(b"/search", *empty)[0] == 400
    assert prober.form(b"/search", *[(b"image", b"a.jpg", b"")] * 1500)[0] == 400
    for origin in (b"http://evil.test", b"null", b"http://127.0.0.1:7861"):
        assert prober.ask("DELETE", b"/items/1", headers=[(b"origin", origin)])[0] == 403


def test_endless_bodies(prober: Prober) -> None:
    part = multipart((b"image", b"a.jpg", b""))[: -len(hostile.BOUNDARY) - 8]

    def endless() -> Iterator[bytes]:
        yield part
        for _ in range(2 * MAX_BODY >> 22):
            yield bytes(1 << 22)

    for headers in ([], [(b"content-length", b"10")], [(b"transfer-encoding", b"chunked")]):
        for path in (b"/search", b"/items"):
            assert prober.ask("POST", path, b"", endless(), [(b"content-type", FORM), *headers])[0] == 413
    assert prober.ask("GET", b"/search", b"text=a", endless())[0] == 200
    large = (b"images", b"a.jpg", jpeg(1) + bytes(19_000_000))
    status, answer = prober.form(b"/items", *[large] * 4)
    assert status == 200
    assert prober.ask("DELETE", b"/items/%d" % json.loads(answer)["ids"][0])[0] == 200


def test_methods(prober: Prober) -> None:
    methods = ("PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND", "get", "G" * 10_000, "\x00")
    for path in (b"/search", b"/items", b"/items/1", b"/items/1/image", b"/health", b"/metrics", b"/audit"):
        for method in methods:
            assert prober.ask(method, path)[0] == 405, (method, path)
            assert prober.ask(method, path + b"/")[0] in (307, 405), (method, path)
        assert prober.ask("POST", path)[0] in (405, 422)
        assert prober.ask("HEAD", path)[0] == prober.ask("GET", path)[0]
        assert prober.ask("OPTIONS", path) == (204, b"")
    assert prober.ask("DELETE", b"/items")[0] == 405


def test_there_were_many(prober: Prober) -> None:
    """Last, over all tests of this file; run alone it says nothing."""
    if prober.sent > 10:
        assert prober.sent >= 200


def test_what_is_shown_is_never_more_than_pixels(prober: Prober) -> None:
    tail = b"\n" + hostile.SCRIPT + MARKER.encode()
    status, answer = prober.form(b"/items", (b"images", b"a.html", jpeg(3) + tail), (b"caption", None, hostile.SCRIPT))
    assert status == 200
    (key,) = json.loads(answer)["ids"]
    for side in (b"side=16", b"side=1600"):
        status, image = prober.ask("GET", b"/items/%d/image" % key, side)
        assert is_bare(image)
        with Image.open(BytesIO(image)) as seen:
            assert seen.format == "JPEG"
    assert prober.ask("DELETE", b"/items/%d" % key)[0] == 200
