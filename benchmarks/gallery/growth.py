"""What does each operation cost in a gallery of ten times the size, and a filtered query against one without a filter?

    OMP_NUM_THREADS=1 python -m benchmarks.gallery.growth --json docs/gallery_results/growth.json

CPU time of the process, user and system, the median of rounds in which all operations and sizes take turns. What has
to read every item or vector once is marked ``scan``: an exact query, and conditions that were not asked before. What
looks into each segment takes longer the more there are, and their number grows with the logarithm of the size.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index.approximate_index import ApproximateIndex
from index.filters import Condition
from index.gallery import Gallery
from index.items import Item

DIM, K = 256, 10
SIZES = (10_000, 100_000)
FILTERS = {"0.1 %": "tag=t7", "4 %": "year=2019", "96 %": "year!=2019"}
NEW = "conditions, not asked before"


def rows(seed: int, number: int) -> NDArray[np.float32]:
    """Unit vectors float32 ``(N, DIM)`` in 200 clusters."""
    centres = np.random.default_rng(0).standard_normal((200, DIM), np.float32)
    random = np.random.default_rng(seed)
    drawn = centres[random.integers(0, 200, number)] + 0.7 * random.standard_normal((number, DIM), np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def item(n: int) -> Item:
    metadata = {"year": 1995 + n % 25, "tag": f"t{n % 1000}"}
    return Item(f"/photos/{n // 200}/{n}.jpg", f"caption of number {n}", n, n, f"{n:064x}", metadata)


class Subject:
    """A gallery of one size, a writer and a reader of it, and what is done to them."""

    def __init__(self, directory: Path, size: int, tuned: bool) -> None:
        self.writer = Gallery.create(directory, dim=DIM, metric="cosine", model={"name": "none", "checksum": ""})
        self.new = count(size)
        for start in range(0, size, 5000):
            self.writer.add([item(n) for n in range(start, start + 5000)], rows(start, 5000))
        if tuned:
            lists = 1 << round(math.log2(2 * math.sqrt(size)))
            built = faiss.index_factory(DIM, f"IVF{lists},PQ{DIM // 2}x4fsr,RFlat", faiss.METRIC_INNER_PRODUCT)
            built.train(rows(0, min(size, 64 * lists)))
            index = ApproximateIndex(built, {"nprobe": 16, "k_factor": 4})
            index.refill(size, self.writer.snapshot.blocks)
            self.writer.install_index(index, {})
        self.reader = Gallery.open(directory)
        self.query = rows(1, 1)
        self.allowed = {name: self.reader.ids_where([Condition.parse(text)]) for name, text in FILTERS.items()}
        self.search(None)

    def search(self, name: str | None) -> object:
        return self.reader.nearest(self.query, K, self.allowed[name] if name else None)

    def add(self, number: int) -> object:
        new = [next(self.new) for _ in range(number)]
        return self.writer.add([item(n) for n in new], rows(new[0], number))

    def ask_anew(self) -> object:
        self.reader.snapshot._found.clear()
        return self.ask_again()

    def ask_again(self) -> object:
        return self.reader.ids_where([Condition.parse(FILTERS["4 %"])])

    def changes(self) -> dict[str, Callable[[], object]]:
        """In this order: a refresh follows a change."""
        return {
            "add 1": lambda: self.add(1),
            "refresh after it": self.reader.refresh,
            "add 64": lambda: self.add(64),
            "refresh after them": self.reader.refresh,
            "remove 1": lambda: self.writer.remove(self.writer.snapshot.ids()[100:101].tolist()),
            "refresh after that": self.reader.refresh,
        }

    def questions(self) -> dict[str, Callable[[], object]]:
        path = item(500).path
        return {
            "open": lambda: Gallery.open(self.reader.directory).close(),
            "refresh, nothing new": self.reader.refresh,
            "path to id": lambda: self.reader.ids_of([path]),
            "folder to ids": lambda: self.reader.snapshot.ids_below(["/photos/3"]),
            "unchanged of 1 file": lambda: self.reader.unchanged({path: (500, 500)}),
            "40 items": lambda: list(self.reader.items(self.allowed["0.1 %"][:40])),
            NEW: self.ask_anew,
            "conditions, again": self.ask_again,
        }

    def queries(self) -> dict[str, Callable[[], object]]:
        within: dict[str, Callable[[], object]] = {name: lambda name=name: self.search(name) for name in FILTERS}
        return {"query": lambda: self.search(None)} | {f"query within {name}": act for name, act in within.items()}


def milliseconds(act: Callable[[], object], times: int = 1) -> float:
    """Of CPU, each time."""
    begin = time.process_time()
    for _ in range(times):
        act()
    return 1e3 * (time.process_time() - begin) / times


def measure(folder: Path, rounds: int) -> tuple[dict[int, int], dict[str, dict[int, float]]]:
    """Segments by size, and median milliseconds by operation and size."""
    subjects = {
        (size, kind): Subject(folder / f"{size}-{kind}", size, kind == "tuned")
        for size in SIZES
        for kind in ("exact", "tuned")
    }
    segments = {size: len(subject.reader.snapshot.segments) for (size, _), subject in subjects.items()}
    spent: dict[str, dict[int, list[float]]] = {}

    def note(name: str, size: int, *took: float) -> None:
        spent.setdefault(name, {}).setdefault(size, []).extend(took)

    for _ in range(rounds):
        for (size, kind), subject in subjects.items():
            for name, act in subject.queries().items():
                note(f"{name}, {kind}", size, milliseconds(act, 20 if kind == "tuned" else 3))
            if kind == "exact":
                for name, act in subject.questions().items():
                    note(name, size, milliseconds(act, 1 if name == NEW else 5))
    for _ in range(rounds):  # what a filter allows is another after each change, so not before
        for (size, kind), subject in subjects.items():
            for name, act in subject.changes().items():
                note(f"{name}, {kind}", size, milliseconds(act))
    medians = {name: {size: float(np.median(times)) for size, times in of.items()} for name, of in spent.items()}
    return segments, medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        segments, spent = measure(Path(folder), args.rounds)
    small, large = SIZES
    operations = {
        name: {
            "ms": {str(size): of[size] for size in SIZES},
            "growth": of[large] / of[small],
            "scan": name == NEW or (name.startswith("query") and name.endswith("exact")),
        }
        for name, of in spent.items()
    }
    filters = {
        kind: {name: spent[f"query within {name}, {kind}"][large] / spent[f"query, {kind}"][large] for name in FILTERS}
        for kind in ("exact", "tuned")
    }
    print(f"{'CPU ms':36}{small:>10,}{large:>10,}{'growth':>9}")
    print(f"{'segments':36}{segments[small]:>10}{segments[large]:>10}")
    for name, of in operations.items():
        scan = "  scan" if of["scan"] else ""
        print(f"{name:36}{spent[name][small]:10.3f}{spent[name][large]:10.3f}{of['growth']:9.2f}{scan}")
    for kind, ratios in filters.items():
        print(f"filtered / not, {large:,}, {kind}: " + ", ".join(f"{name} {of:.2f}" for name, of in ratios.items()))
    if args.json:
        record: dict[str, Any] = {"segments": segments, "dim": DIM, "operations": operations, "filters": filters}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
