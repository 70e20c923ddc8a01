"""Attacks that wait on the page: a few, for those who listen, and never in the way of a search."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio
import pytest
from served import Place, jpeg
from starlette.testclient import TestClient

from vse_app.limits import Busy
from vse_app.live_attack import Progress
from vse_app.search_service import SearchService
from vse_app.server import Serving, create_app
from vse_app.web import robustness_tab
from vse_app.web.robustness_tab import MOST_WAITING, MOST_WAITING_EACH, RobustnessTab
from vse_app.web.waiting_line import WaitingLine

WAIT = 30


@dataclass
class Attacks:
    """Attacks that make steps until nobody wants them any more."""

    running: int = 0
    most: int = 0
    begun: int = 0
    closed: int = 0
    tabs: list[RobustnessTab] = field(default_factory=list)

    def run(self, *_: Any) -> Iterator[Progress]:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while True:
                time.sleep(0.05)
                yield Progress(1, 2, 0.0, 1, False)
        finally:
            self.running -= 1
            self.closed += 1

    @property
    def waiting(self) -> int:
        return len(self.tabs[-1]._line._places)


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> Attacks:
    of = Attacks()
    make = RobustnessTab.__init__

    def kept(tab: RobustnessTab, *arguments: Any) -> None:
        of.tabs.append(tab)
        make(tab, *arguments)

    monkeypatch.setattr(RobustnessTab, "__init__", kept)
    monkeypatch.setattr(robustness_tab, "run", of.run)
    monkeypatch.setattr(robustness_tab, "_WAIT", 0.1)
    return of


@dataclass
class Page:
    """The page's functions by name, as its clients call them."""

    client: TestClient
    functions: dict[str, int]
    picture: dict[str, str]

    def join(self, name: str, session: str, data: list[Any]) -> int:
        body = {"fn_index": self.functions[name], "data": data, "session_hash": session}
        return self.client.post("/gradio_api/queue/join", json=body).status_code

    def attack(self, session: str) -> int:
        return self.join("_attack", session, [None, self.picture, "query-image", "", "linf", 4, 100])

    def hear(self, session: str) -> list[Any]:
        answer = self.client.get("/gradio_api/queue/data", params={"session_hash": session})
        told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
        return [one["output"].get("data") for one in told if one["msg"] == "process_completed"]


@pytest.fixture
def page(place: Place, attacks: Attacks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setattr(RobustnessTab, "_prepare", lambda *_: (None, None))
    built: list[gradio.Blocks] = []
    queue = gradio.Blocks.queue

    def kept(blocks: gradio.Blocks, **options: Any) -> gradio.Blocks:
        built.append(blocks)
        return queue(blocks, **(options | {"max_size": 10}))

    monkeypatch.setattr(gradio.Blocks, "queue", kept)
    with SearchService(place.gallery) as service:
        app = create_app(service, Serving(place.gallery))
        with TestClient(app, "http://127.0.0.1:7860") as client:
            (path,) = client.post("/gradio_api/upload", files={"files": ("a.jpg", jpeg(1))}).json()
            yield Page(client, {str(of.name): key for key, of in built[-1].fns.items()}, {"path": path})


def until(wanted: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not wanted():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_attacks_that_nobody_listens_to_leave_searches_alone_and_end(
    page: Page, attacks: Attacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness_tab, "_UNREAD", 10**9)
    for n in range(14):  # more than Gradio's queue has room for
        assert page.attack(f"attacker-{n}") == 200
    until(lambda: attacks.waiting == MOST_WAITING_EACH <= MOST_WAITING)
    assert "try again in a minute" in page.hear("attacker-13")[0][0]
    assert page.join("_search", "reader", ["red disc", None, 0.5, 5, "", False, False, False, None]) == 200
    (found,) = page.hear("reader")
    assert found[0].count('<li class="vse-card"') == 5
    tool = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "health", "arguments": {}}}
    headers = {"accept": "application/json, text/event-stream"}
    assert "pictures" in page.client.post("/gradio_api/mcp/", json=tool, headers=headers).text
    for data in ([None] * 7, [None, 5, [], {}, "linf", "4", None], [None, None, "x", 1, "y", 1e300, 0]):
        page.join("_attack", "junk", data)
        page.hear("junk")
    assert (attacks.waiting, attacks.most) == (MOST_WAITING_EACH, 1)
    monkeypatch.setattr(robustness_tab, "_UNREAD", 3)
    until(lambda: not attacks.waiting and attacks.closed == attacks.begun)
    assert attacks.most == 1


def test_a_line_is_short_and_shorter_for_each() -> None:
    line = WaitingLine(3, 2)
    with line.place("a") as first, line.place("a") as second:
        assert (first(), second()) == (0, 1)
        with pytest.raises(Busy), line.place("a"):
            pass
        with line.place("b") as third, pytest.raises(Busy), line.place("c"):
            assert third() == 2
    with line.place("a") as first:
        assert first() == 0
