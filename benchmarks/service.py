"""What HTTP adds to a search, what many clients get at once, and what an attack beside them takes away.

    python -m benchmarks.service GALLERY [--queries FILE.txt|KIND:PATH] [--json FILE]

The server runs in a process of its own, without the page, and so do its clients; each computes with --threads threads.
Unless a line says otherwise, no text is asked for twice, so no embedding is remembered. One client's searches take
turns with calls of an engine in its own process. Then 32 clients ask at once, and one alone before and after them; and
8, with and without the server attacking a picture over and over. Clients are sockets, all in one thread. What they and
the server take of the processors stands beside each line in ms per search, and then the server's own counters: queries
per batch, mean wait of a query, embedding and searching per batch, and an attack's steps per second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import selectors
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import quote

K, CONTROL, PATIENCE = 10, "/benchmark/control", 60.0
PAIRS, REPEATED, ALONE = 300, 50, 200
CLIENTS, BESIDE, EACH, ATTACK_ALONE, ATTACK_STEPS = 32, 8, 50, 5.0, 20
ZIPF = 500  # so many texts are asked for again and again, the n-th most popular of them with a share as 1 / n


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {f"p{percent}": 1000 * cuts[percent - 1] for percent in (25, 50, 75, 90, 99)}


class Client:
    """A connection that stays open."""

    def __init__(self, port: int, texts: Sequence[str] = ()) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.texts, self.since, self.body = iter(texts), 0.0, b""
        self._buffer = bytearray()

    def send(self, target: str, method: str = "GET") -> None:
        self._buffer.clear()
        self.since = time.perf_counter()
        self.socket.sendall(f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode())

    def receive(self) -> int | None:
        """To be called after each part that arrives; the status once the answer is whole."""
        part = self.socket.recv(1 << 16)
        if not part:
            raise ConnectionError
        self._buffer += part
        end = self._buffer.find(b"\r\n\r\n") + 4
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", self._buffer[:end])
        if end < 4 or not length or len(self._buffer) < end + int(length[1]):
            return None
        self.body = bytes(self._buffer[end:])
        return int(self._buffer[9:12])

    def ask(self, target: str, method: str = "GET") -> bytes:
        self.send(target, method)
        while (status := self.receive()) is None:
            pass
        if status != 200:
            raise RuntimeError(f"{target}: {status}: {self.body.decode()}")
        return self.body


def search(text: str) -> str:
    return f"/search?text={quote(text)}&k={K}"


def load(port: int, asked: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A client for each list of texts, all at once; each sends its next request on the answer to the last."""
    seconds: list[float] = []
    errors: Counter[str] = Counter()
    with selectors.DefaultSelector() as selector:
        clients = [Client(port, texts) for texts in asked]
        begin, cpu = time.perf_counter(), time.process_time()
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
            client.send(search(next(client.texts)))
        while selector.get_map():
            if not (ready := selector.select(PATIENCE)):
                errors["no answer"] += len(selector.get_map())
                break
            for key, _ in ready:
                client = key.data
                try:
                    status = client.receive()
                except OSError:
                    status = 0
                if status is None:
                    continue
                if status == 200:
                    seconds.append(time.perf_counter() - client.since)
                else:
                    errors[str(status or "hung up")] += 1 if status else 1 + len(list(client.texts))
                if (text := next(client.texts, None)) is None:
                    selector.unregister(client.socket)
                    client.socket.close()
                else:
                    client.send(search(text))
    spent = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
    return {"seconds": seconds, "errors": errors, **spent}


def attack(service: Any, wanted: threading.Event, steps: list[int]) -> None:
    """Attack the gallery's first picture again and again while that is wanted, and count the steps."""
    from training.data.images import decode
    from vse_app.attack_case import AttackRequest, AttackTarget
    from vse_app.live_attack import Progress, run

    wanted.wait()
    target = service.call(AttackTarget.of).result()
    key, item = next(target.gallery.items())
    image, request = decode(Path(item.path)), AttackRequest("query-image", "linf", 2 / 255, ATTACK_STEPS)
    while wanted.wait():
        for news in run(target, image, request, key):
            steps[0] += isinstance(news, Progress)
            if not wanted.is_set():
                break


def serve(gallery: Path, pipe: Any) -> None:
    """As ``vse serve`` without the page, with a route that starts and stops attacks and tells what was spent."""
    import uvicorn

    from vse_app.search_service import SearchService
    from vse_app.server import Serving, _listen, create_app

    with SearchService(gallery) as service:
        app = create_app(service, Serving(gallery), page=False)
        wanted, steps = threading.Event(), [0]
        threading.Thread(target=attack, args=(service, wanted, steps), daemon=True).start()

        def control(attacks: bool) -> list[float]:
            (wanted.set if attacks else wanted.clear)()
            return [time.process_time(), steps[0]]

        app.add_api_route(CONTROL, control, methods=["POST"], include_in_schema=False)
        listener = _listen("127.0.0.1", 0)  # the server's own: how it is made decides over the latency
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sends itself the signal anew
        pipe.send(listener.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
        wanted.clear()
        time.sleep(1)  # no thread may be within an attack's step when the process ends


@contextmanager
def running(gallery: Path) -> Iterator[int]:
    """The server's port."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(gallery, there))
    process.start()
    there.close()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join(10)
        process.kill()


def distinct(source: str | None, gallery: Path) -> Iterator[str]:
    """Texts in random order, each once; when they are used up, each again with a word left out."""
    if source and source.endswith(".txt"):
        lines: Sequence[str | None] = Path(source).read_text(encoding="utf-8").split("\n")
    elif source:
        from training.data.formats import load_corpus

        lines = load_corpus(source, "val").captions
    else:
        from index.gallery import Gallery

        with Gallery.open(gallery) as opened:
            lines = [item.caption for _, item in opened.items()]
    whole = list(dict.fromkeys(line.strip() for line in lines if line and line.strip()))
    random.Random(0).shuffle(whole)
    words = [line.split() for line in whole]
    less = [" ".join(w[:n] + w[n + 1 :]) for n in range(max(map(len, words), default=0)) for w in words if len(w) > n]
    yield from (text for text in dict.fromkeys(whole + less) if text)
    raise SystemExit("too few distinct texts; give some thousands with --queries")


def one_client(port: int, gallery: Path, texts: Iterator[str]) -> dict[str, Any]:
    from vse_app.queries import Query
    from vse_app.search_engine import SearchEngine

    found: dict[str, Any] = {}
    with SearchEngine.open(gallery) as engine:
        client = Client(port)
        popular = list(islice(texts, REPEATED))
        for text in popular:
            ours = [result.id for result in engine.search([Query(text=text)], K)[0]]
            if ours != [result["id"] for result in json.loads(client.ask(search(text)))["results"]]:
                raise RuntimeError(f"{text!r}: the service finds something else than the engine")
        again = popular * (2 * PAIRS // REPEATED)
        for name, asked in (("new texts", list(islice(texts, 2 * PAIRS))), ("remembered texts", again)):
            seconds: tuple[list[float], list[float]] = ([], [])
            for n in range(2 * PAIRS):
                served = (n + n // 2) % 2  # direct, served; served, direct; and so on
                begin = time.perf_counter()
                if served:
                    client.ask(search(asked[n]))
                else:
                    engine.search([Query(text=asked[n])], K)
                seconds[served].append(time.perf_counter() - begin)
            direct, service = map(milliseconds, seconds)
            low, _, high = quantiles(b / a for a, b in zip(*seconds, strict=True))
            ratio = service["p50"] / direct["p50"]
            found[name] = {"direct_ms": direct, "service_ms": service, "ratio": ratio, "low": low, "high": high}
            print(f"{name + ', ms':24}" + "".join(f"{percent:>9}" for percent in direct))
            for kind, row in (("direct", direct), ("service", service)):
                print(f"  {kind:22}" + "".join(f"{value:9.2f}" for value in row.values()))
            print(f"  {'ratio of p50':22}{ratio:18.3f}  quartiles of pairs {low:.3f}..{high:.3f}", flush=True)
    return found


class Loads:
    """Runs loads in a process of its own, and prints a line for each."""

    def __init__(self, port: int, pool: ProcessPoolExecutor) -> None:
        self._port, self._pool, self.attacks = port, pool, False
        columns = ("errors", "p50", "p99", "p99/p50", "per s", "client", "server", "batch", "wait", "embed", "search")
        print(f"\n{'ms':24}" + "".join(f"{column:>8}" for column in (*columns, "steps/s")))

    def counters(self) -> dict[str, float]:
        cpu, steps = json.loads(Client(self._port).ask(f"{CONTROL}?attacks={self.attacks}", "POST"))
        text = Client(self._port).ask("/metrics").decode()
        found = re.findall(r'^vse_(?:stage_seconds|batch_queries)_(sum|count)(?:\{stage="(\w+)"\})? (\S+)', text, re.M)
        stages = {f"{stage or 'batch'} {kind}": float(value) for kind, stage, value in found}
        return {**stages, "cpu": cpu, "steps": steps}

    def run(self, name: str, wanted: Iterable[str], clients: int = 1) -> dict[str, Any]:
        texts, before = list(wanted), self.counters()
        of = self._pool.submit(load, self._port, [texts[n::clients] for n in range(clients)]).result()
        spent = {key: value - before.get(key, 0) for key, value in self.counters().items()}
        count, times = len(of["seconds"]), milliseconds(of["seconds"])
        row = {"errors": sum(of["errors"].values()), "p50": times["p50"], "p99": times["p99"]}
        row |= {"p99_over_p50": times["p99"] / times["p50"], "per_second": count / of["wall"]}
        row |= {"client_cpu": 1000 * of["cpu"] / count, "server_cpu": 1000 * spent["cpu"] / count}
        for key, scale in (("batch", 1), ("wait", 1000), ("embed", 1000), ("search", 1000)):
            row[key] = scale * spent[f"{key} sum"] / max(1, spent[f"{key} count"])
        row["steps_per_second"] = spent["steps"] / of["wall"]
        print(f"{name:24}{row['errors']:8}" + "".join(f"{v:8.2f}" for v in list(row.values())[1:]), flush=True)
        return {**row, "clients": clients, "searches": count, "errors": of["errors"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("--queries", help="a file with a text a line, or a data set whose val captions are taken")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before anything that computes is loaded, here and below
    texts, spawn = distinct(args.queries, args.gallery), multiprocessing.get_context("spawn")
    with running(args.gallery) as port, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found: dict[str, Any] = {"cores": os.cpu_count(), "threads": args.threads, "load_average": os.getloadavg()[0]}
        found["pictures"] = json.loads(Client(port).ask("/health"))["pictures"]
        print(", ".join(f"{value:.4g} {name.replace('_', ' ')}" for name, value in found.items()))
        found["one_client"] = one_client(port, args.gallery, texts)
        loads = Loads(port, pool)
        found["one_before"] = loads.run("one client, before", islice(texts, ALONE))
        found["many"] = loads.run(f"{CLIENTS} clients", islice(texts, CLIENTS * EACH), CLIENTS)
        found["one_after"] = loads.run("one client, after", islice(texts, ALONE))
        shares = list(accumulate(1 / (n + 1) for n in range(ZIPF)))
        zipf = random.Random(1).choices(list(islice(texts, ZIPF)), cum_weights=shares, k=CLIENTS * EACH)
        found["many_zipf"] = loads.run(f"{CLIENTS} clients, Zipf", zipf, CLIENTS)
        found["beside_none"] = loads.run(f"{BESIDE} clients", islice(texts, BESIDE * EACH), BESIDE)
        loads.attacks = True
        while not (steps := loads.counters()["steps"]):
            time.sleep(1)  # until the captions are embedded
        time.sleep(ATTACK_ALONE)
        found["attack_alone_steps_per_second"] = (loads.counters()["steps"] - steps) / ATTACK_ALONE
        found["beside_attack"] = loads.run(f"{BESIDE} clients, attack", islice(texts, BESIDE * EACH), BESIDE)
    once = (found["one_before"]["per_second"] + found["one_after"]["per_second"]) / 2
    found["many_over_one"] = found["many"]["per_second"] / once
    print(f"{CLIENTS} clients are answered {found['many_over_one']:.2f} times as many searches a second as one")
    print(f"an attack makes {found['attack_alone_steps_per_second']:.2f} steps a second if nobody searches")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
