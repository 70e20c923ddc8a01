"""Hostile and honest requests at a real server for a long time: does it stay small, quick, and willing to end?

    python -m benchmarks.soak [--requests 10000] [--json FILE]

``vse serve`` runs in a process of its own on 127.0.0.1, with a small random model and generated pictures, three of
them of 24 megapixels. Some threads of another process send it what nobody sends by accident: texts and forms beyond
every limit, searches that collapse everything, large thumbnails side by side, JPEGs whose last scan is repeated,
broken uploads, MCP and page calls full of junk, attacks that nobody listens to, requests and uploads that stop
half-way. One client searches as people do, before and beside them. Afterwards it is told to stop. Nothing leaves the
machine, and every loop ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

WORDS = ("red", "green", "blue", "white", "disc", "ring", "star", "cross", "heart", "square")
SMALL, LARGE, SEED = 60, 3, 1
TIMEOUT, PAUSE, HOSTILE = 30.0, 0.02, 4
MOST_GROWTH, MOST_SLOWER, MOST_SECONDS, MOST_LOG = 200.0, 4.0, 10.0, 1.0
"""What is promised: MB of memory over the warm server's, times the idle p99, seconds to the end, MB of log."""
_OPEN = 40  # connections that are left half-way at a time


def furnish(folder: Path) -> Path:
    """A gallery of random pictures, embedded by a model that has learned nothing."""
    import torch

    from training.data.text import WordTokenizer
    from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
    from training.models.dual_encoder import DualEncoder
    from vse_app.search_engine import Facts, SearchEngine

    torch.manual_seed(SEED)
    config = ModelConfig(image=ImageTowerConfig(size=32), text=TextTowerConfig(word_dim=64), dim=64)
    DualEncoder(config, WordTokenizer(list(WORDS), min_count=1, source="soak")).save_pretrained(folder / "model")
    draws, paths, facts = np.random.default_rng(SEED), [], {}
    for n in range(SMALL + LARGE):
        path = folder / f"{n}.jpg"
        grid = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        side = (6000, 4000) if n >= SMALL else (64, 48)
        Image.fromarray(grid).resize(side, Image.Resampling.NEAREST).save(path, quality=80)
        paths.append(path)
        facts[path] = Facts(f"{WORDS[n % 4]} {WORDS[4 + n % 6]}", {"year": 2000 + n})
    with SearchEngine.open_or_create(folder / "gallery", folder / "model") as engine:
        engine.add(paths, facts)
    return folder / "gallery"


def repeated_scans(times: int, side: int = 1500) -> bytes:
    """A progressive JPEG whose last scan comes again and again, each time a pass over all coefficients."""
    file = BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]


@dataclass
class Clients:
    """What is sent to one server, and what came back.

    Attributes:
        port: Of the server.
        answers: By kind of request and status; 0 where there was none.
    """

    port: int
    answers: Counter[str] = field(default_factory=Counter)
    _halves: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> int:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (OSError, HTTPException):
            return 0
        finally:
            connection.close()

    def form(self, path: str, data: bytes, text: str = "") -> int:
        parts = f'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n{text}\r\n' if text else ""
        name = "images" if path == "/items" else "image"
        head = f'{parts}--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.jpg"\r\n\r\n'
        headers = {"content-type": "multipart/form-data; boundary=x"}
        return self.ask("POST", path, head.encode() + data + b"\r\n--x--\r\n", headers)

    def post(self, path: str, body: Any) -> int:
        headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
        return self.ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)

    def tool(self, name: str, arguments: Any) -> int:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
        return self.post("/gradio_api/mcp/", call)

    def stop_half_way(self, start: bytes) -> int:
        """Leave a request unfinished; the oldest of many is let go."""
        with suppress(OSError):
            half = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
            half.sendall(start)
            with self._lock:
                self._halves.append(half)
                old = self._halves.pop(0) if len(self._halves) > _OPEN else None
            if old:
                old.close()
            return 200
        return 0

    def let_go(self) -> None:
        """Close what was left half-way."""
        for half in self._halves:
            half.close()
        self._halves.clear()


def hostile_kinds(clients: Clients, chance: random.Random) -> dict[str, Callable[[], int]]:
    """Each kind of request, by name; the status of the answer."""
    many = repeated_scans(150)
    broken = bytearray(repeated_scans(1, 300))
    for _ in range(40):
        broken[chance.randrange(20, len(broken))] ^= 1 << chance.randrange(8)
    junk: list[Any] = [None, [], {}, 1e300, -1, "x" * 3000, [0] * 20_000, {"path": "/etc/passwd"}, True]

    def large() -> int:
        return clients.ask("GET", f"/items/{SMALL + chance.randint(1, LARGE)}/image?side={chance.randint(1500, 1600)}")

    def attack() -> int:
        data = [None, None, "gallery-promote", "red disc", "linf", 4, 100]
        return clients.post("/gradio_api/queue/join", {"fn_index": chance.randrange(30), "data": data,
                                                       "session_hash": f"s{chance.random()}"})  # fmt: skip

    return {
        "long text": lambda: clients.ask("GET", f"/search?text={'a' * 30_000}"),
        "long form": lambda: clients.form("/search", repeated_scans(1, 64), "a" * 500_000),
        "long caption of a tool": lambda: clients.tool("search_pictures", {"text": "a" * 500_000}),
        "long call": lambda: clients.post("/gradio_api/call/search_pictures", {"data": ["b" * 500_000, 10, ""]}),
        "junk for a tool": lambda: clients.tool(
            chance.choice(["search_pictures", "more_like", "health", "none"]),
            {chance.choice(["text", "item", "k", "where"]): chance.choice(junk)},
        ),
        "junk for a call": lambda: clients.post(
            "/gradio_api/queue/join",
            {"fn_index": chance.randrange(30), "data": [chance.choice(junk) for _ in range(chance.randrange(12))],
             "session_hash": f"s{chance.random()}"},
        ),
        "a call of the largest size": lambda: clients.post(
            "/gradio_api/call/search_pictures", {"data": ["b" * 190_000, 10, ""]}
        ),
        "no JSON": lambda: clients.post("/gradio_api/mcp/", b"[" * 5000),
        "everything collapsed": lambda: clients.ask("GET", "/search?text=red+disc&k=200&collapse=0.5"),
        "conditions": lambda: clients.ask("GET", "/items?" + "&".join(["where=year>=2000"] * chance.randint(1, 40))),
        "a large picture": large,
        "repeated scans": lambda: clients.form("/search", many),
        "a broken upload": lambda: clients.form(chance.choice(["/search", "/items"]), bytes(broken)),
        "an attack nobody hears": attack,
        "half a header": lambda: clients.stop_half_way(b"GET /search?text=a HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "),
        "half an upload": lambda: clients.stop_half_way(
            b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Content-Length: 60000000\r\n\r\n" + bytes(100_000)
        ),
        "an id": lambda: clients.ask("GET", f"/items/{chance.choice(['0', '9' * 30, '-1', 'x', '999'])}/image"),
    }  # fmt: skip


def attack_server(port: int, requests: int) -> Counter[str]:
    """So many hostile requests, from some threads at once; how often each kind had which status."""
    clients = Clients(port)
    numbers = iter(range(requests))
    lock = threading.Lock()

    def work(seed: int) -> None:
        kinds = hostile_kinds(clients, random.Random(seed))
        names = list(kinds)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            name = names[number % len(names)]
            status = kinds[name]()
            with lock:
                clients.answers[f"{name}: {status}"] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(HOSTILE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clients.let_go()
    return clients.answers


class Honest(threading.Thread):
    """Searches as a person does, one after the other, until told to stop."""

    def __init__(self, clients: Clients, most: int = 1_000_000) -> None:
        super().__init__()
        self._clients, self._most = clients, most
        self.stopped, self.seconds, self.failed = threading.Event(), list[float](), Counter[int]()

    def run(self) -> None:
        for number in range(self._most):
            if self.stopped.wait(PAUSE):
                return
            text = f"{WORDS[number % 4]} {WORDS[4 + number % 6]} {number}"
            begun = time.perf_counter()
            status = self._clients.ask("GET", f"/search?text={quote(text)}&k=10")
            self.seconds.append(time.perf_counter() - begun)
            if status != 200:
                self.failed[status] += 1


def memory(process: subprocess.Popen[str]) -> float:
    """Resident megabytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) / 1000 if found else 0.0


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": round(1000 * float(np.percentile(seconds, share)), 2) for share in (50, 99)}


def soak(folder: Path, requests: int, idle: int) -> dict[str, Any]:
    """Serve, attack, measure, and stop.

    Args:
        folder: Where all of it lies.
        requests: Hostile ones, beside a tenth as many, or 48, to warm up.
        idle: Searches measured before.

    Returns:
        What was measured, ready for ``json.dump``.
    """
    command = [sys.executable, "-m", "vse_app.cli", "serve", str(furnish(folder)), "--port", "0"]
    with ExitStack() as resources:
        log = resources.enter_context((folder / "log.txt").open("w+"))
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        resources.callback(server.kill)
        assert server.stdout
        said = re.search(r"http://127\.0\.0\.1:(\d+)/", server.stdout.readline())
        assert said, (folder / "log.txt").read_text()
        clients = Clients(int(said[1]))
        # In a process of its own, or a search would wait for this interpreter rather than for the server.
        hostile = resources.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        hostile.submit(attack_server, clients.port, max(requests // 10, 48)).result()
        alone = Honest(clients, idle)
        alone.run()
        peak = before = memory(server)
        begun = time.perf_counter()
        honest = Honest(clients)
        honest.start()
        attacked = hostile.submit(attack_server, clients.port, requests)
        while not attacked.done():
            peak = max(peak, memory(server))
            time.sleep(0.2)
        wall = time.perf_counter() - begun
        honest.stopped.set()
        honest.join()
        Honest(clients, idle).run()
        after, told = memory(server), time.perf_counter()
        server.send_signal(signal.SIGTERM)
        code = server.wait(6 * MOST_SECONDS)
        ended = time.perf_counter() - told
    quick, slow = milliseconds(alone.seconds), milliseconds(honest.seconds)
    return {
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[2], 2),
        "hostile_requests": requests,
        "honest_searches": len(honest.seconds),
        "seconds": round(wall, 1),
        "idle_ms": quick,
        "beside_ms": slow,
        "p99_ratio": round(slow["p99"] / quick["p99"], 2),
        "honest_failures": dict(alone.failed + honest.failed),
        "memory_mb": {"before": round(before), "peak": round(peak), "after": round(after)},
        "stopped_after_s": round(ended, 2),
        "exit_status": code,
        "log_mb": round((folder / "log.txt").stat().st_size / 1e6, 3),
        "answers": dict(sorted(attacked.result().items())),
    }


def broken_promises(found: dict[str, Any], latency: bool = True) -> list[str]:
    """What the server did not keep, a line each.

    Args:
        found: From :func:`soak`.
        latency: Also judge how much slower honest searches were, which is of this machine and its other work.
    """
    grown = found["memory_mb"]["after"] - found["memory_mb"]["before"]
    kept = {
        f"memory grew by {grown} MB": grown <= MOST_GROWTH,
        f"it ended {found['stopped_after_s']} s after SIGTERM": found["stopped_after_s"] <= MOST_SECONDS,
        f"its exit status is {found['exit_status']}": found["exit_status"] == 0,
        f"its log has {found['log_mb']} MB": found["log_mb"] <= MOST_LOG,
        f"honest searches failed: {found['honest_failures']}": not found["honest_failures"],
        f"the p99 is {found['p99_ratio']} times as long": not latency or found["p99_ratio"] <= MOST_SLOWER,
    }
    return [said for said, good in kept.items() if not good]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), args.requests, 400)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if broken := broken_promises(found):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
