"""Two processes search a gallery while a third adds, replaces and removes: no error, no wrong result, what latency?

    OMP_NUM_THREADS=1 python -m benchmarks.gallery.concurrent --seconds 60 --json docs/gallery_results/concurrent.json

Every vector follows from its item's path, so each result can be checked: its score must be that of its path's
vector, and a batch must be there as a whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import zlib
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.filters import Condition
from index.gallery import Gallery
from index.items import Item
from index.tuning import tune

DIM, BATCH, K = 256, 64, 10
REFRESH = 1.0
"""Seconds after which a reader looks for a later state."""


def vectors_of(paths: list[str]) -> NDArray[np.float32]:
    """Unit vectors float32 ``(N, DIM)`` that follow from the paths."""
    rows = [np.random.default_rng(zlib.crc32(path.encode())).standard_normal(DIM, np.float32) for path in paths]
    vectors = np.stack(rows)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def items_of(batch: int, version: int = 0) -> list[Item]:
    return [Item(f"{batch}/{n}/{version}", None, 0, 0, "", {"batch": batch}) for n in range(BATCH)]


def build(directory: Path, items: int, tuned: bool) -> None:
    with Gallery.create(directory, dim=DIM, metric="cosine", model={"name": "none", "checksum": ""}) as gallery:
        for start in range(0, items // BATCH, 64):
            batch = [item for n in range(start, min(start + 64, items // BATCH)) for item in items_of(n)]
            gallery.add(batch, vectors_of([item.path for item in batch]))
        if tuned:
            queries = vectors_of([f"query {n}" for n in range(400)])
            tune(gallery, queries, source="random vectors", target_recall=0.9)


def search(directory: Path, seed: int, rate: float, stop: Event, answers: Any) -> None:
    """Answer queries that come at random times, and between them go on to the current state once a second.

    Latency counts from when a query comes, so waiting for a refresh or for the query before is part of it.
    """
    random = np.random.default_rng(seed)
    spent: list[float] = []
    refreshed: list[float] = []
    checked = states = 0
    with Gallery.open(directory) as gallery:
        gallery.search(vectors_of(["warm"]), K)
        coming = looked = time.perf_counter()
        while not stop.is_set():
            coming += random.exponential(1 / rate)
            query = vectors_of([f"query {random.integers(1 << 40)}"])
            time.sleep(max(0.0, coming - time.perf_counter()))
            (hits,) = gallery.search(query, K)
            spent.append(time.perf_counter() - coming)
            if time.perf_counter() - looked > REFRESH:
                looked = time.perf_counter()
                states += gallery.refresh()
                refreshed.append(time.perf_counter() - looked)
            truth = vectors_of([hit.item.path for hit in hits]) @ query[0]
            assert len({hit.id for hit in hits}) == K, "a result is missing or double"
            assert np.allclose(truth, [hit.score for hit in hits], atol=2e-2), "a score is not its item's"
            checked += K
            if len(spent) % 50 == 0:
                batch = int(random.choice([hit.item.path.split("/")[0] for hit in hits]))
                found = gallery.ids_where([Condition("batch", "=", batch)])
                assert len(found) == BATCH, f"batch {batch} is there by half"
                coming = max(coming, time.perf_counter())  # the check is ours, not a user's
    answers.put({"seconds": spent, "refresh": refreshed, "checked": checked, "states": states})


def write(directory: Path, first: int, pace: float, stop: Event, answers: Any) -> None:
    """Add a batch, remove an old one, replace one in its place, again and again, so many changes a second at most."""
    changes, oldest, newest, begin = 0, 0, first, time.perf_counter()
    with Gallery.open(directory, writable=True) as gallery:
        while not stop.is_set():
            added = items_of(newest)
            gallery.add(added, vectors_of([item.path for item in added]))
            gallery.remove(gallery.ids_where([Condition("batch", "=", oldest)]).tolist())
            gallery.add(added, vectors_of([item.path for item in added]))  # the same paths: replaces them
            changes, oldest, newest = changes + 3, oldest + 1, newest + 1
            time.sleep(max(0.0, begin + changes / pace - time.perf_counter()))
            if changes % 300 == 0:
                gallery.compact()
    answers.put({"changes": changes})


def run(seconds: float, items: int, rate: float, pace: float, tuned: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "gallery"
        build(directory, items, tuned)
        phases = {}
        for phase in ("idle", "busy"):
            stop, answers = context.Event(), context.Queue()
            workers = [context.Process(target=search, args=(directory, seed, rate, stop, answers)) for seed in (1, 2)]
            if phase == "busy":
                workers.append(context.Process(target=write, args=(directory, items // BATCH, pace, stop, answers)))
            for worker in workers:
                worker.start()
            time.sleep(seconds if phase == "busy" else max(seconds / 3, 5))
            stop.set()
            found = [answers.get(timeout=60) for _ in workers]
            for worker in workers:
                worker.join()
            assert all(worker.exitcode == 0 for worker in workers)
            spent = np.concatenate([of["seconds"] for of in found if "seconds" in of]) * 1e3
            refresh = np.concatenate([of["refresh"] for of in found if "refresh" in of]) * 1e3
            phases[phase] = {
                "searches": len(spent),
                "p50_ms": float(np.median(spent)),
                "p99_ms": float(np.percentile(spent, 99)),
                "max_ms": float(spent.max()),
                "refresh_p50_ms": float(np.median(refresh)) if len(refresh) else None,
                "refresh_max_ms": float(refresh.max()) if len(refresh) else None,
                "states_seen": sum(of.get("states", 0) for of in found),
                "results_checked": sum(of.get("checked", 0) for of in found),
                "changes": sum(of.get("changes", 0) for of in found),
            }
    return {"items": items, "dim": DIM, "tuned": tuned, "rate": rate, "pace": pace, "seconds": seconds, **phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--items", type=int, default=32_768)
    parser.add_argument("--rate", type=float, default=20, help="searches per second and process")
    parser.add_argument("--pace", type=float, default=3, help="changes of 64 items per second at most")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    results = [run(args.seconds, args.items, args.rate, args.pace, tuned) for tuned in (False, True)]
    print(f"{'':8}{'phase':8}{'searches':>9}{'p50 ms':>9}{'p99 ms':>9}{'states':>8}{'changes':>9}")
    for result in results:
        for phase in ("idle", "busy"):
            of = result[phase]
            print(
                f"{'tuned' if result['tuned'] else 'exact':8}{phase:8}{of['searches']:9}{of['p50_ms']:9.2f}"
                f"{of['p99_ms']:9.2f}{of['states_seen']:8}{of['changes']:9}"
            )
        print(f"{'':8}p99 busy / idle {result['busy']['p99_ms'] / result['idle']['p99_ms']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
