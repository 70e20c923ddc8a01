"""OMP_NUM_THREADS=1 python -m benchmarks.gallery.build_memory [--count N --dim D] [--folder DIR] [--json FILE]

How much memory does it take to build a gallery from a file of vectors, and to search it, beside what the finished
index takes? Each step runs in a process of its own:

* import: the file into a gallery that compares every vector;
* import and tune: the same, then :func:`index.tuning.tune` with queries of their own;
* search: open what was built, and look for one query.

The peak is the kernel's VmHWM. It counts everything resident, so also pages of mapped files; what is in memory once
the libraries are loaded is reported beside it. An index takes its files index.faiss and ids.npy, or for exact search
four bytes per number.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TARGET = 1.3
TOPICS, DIRECTIONS, STEP = 1000, 32, 10_000
Rows = NDArray[np.float32]


def draw(random: np.random.Generator, centres: Rows, along: Rows, count: int) -> Rows:
    """Unit vectors about centres, near a space of few dimensions, float32 ``(count, D)``."""
    rows = centres[random.integers(len(centres), size=count)]
    rows += random.standard_normal((count, len(along)), np.float32) @ along
    rows += 0.3 * centres.shape[1] ** -0.5 * random.standard_normal(rows.shape, np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def write_vectors(folder: Path, count: int, dim: int, queries: int) -> None:
    """``vectors.npy``, never whole in memory, and ``queries.npy`` from the same distribution."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((TOPICS, dim), np.float32) / dim**0.5
    along = random.standard_normal((DIRECTIONS, dim), np.float32) * (0.7 / (dim * DIRECTIONS) ** 0.5)
    np.save(folder / "queries.npy", draw(random, centres, along, queries))
    with (folder / "vectors.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)})
        for start in range(0, count, STEP):
            file.write(draw(random, centres, along, min(STEP, count - start)).data)


class Memory:
    """Peaks of this process, altogether and by stage."""

    def __init__(self) -> None:
        self.loaded = self._status("VmRSS")
        self.stages: dict[str, int] = {}
        self._stage = "start"

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.enter(stage)

    def enter(self, stage: str) -> None:
        self.stages[self._stage] = max(self.stages.get(self._stage, 0), self._status("VmHWM"))
        self._stage = stage
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here

    def peak(self) -> int:
        self.enter("end")
        return max(self.stages.values())

    @staticmethod
    def _status(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found
        return 1024 * int(found[1])


def run_step(step: str, folder: Path, target_recall: float) -> dict[str, Any]:
    """What a process of its own does."""
    from index.approximate_index import IDS, INDEX
    from index.exchange import import_vectors, source_shape
    from index.gallery import Gallery
    from index.tuning import tune

    memory = Memory()
    begin = time.perf_counter()
    queries = np.load(folder / "queries.npy", allow_pickle=False)
    made = folder / ("tuned" if "tune" in step else "exact")
    if step.startswith("search"):
        with Gallery.open(made) as gallery:
            memory.enter("opening and one search")
            gallery.search(queries[:1], 10)
    else:
        _, dim = source_shape(folder / "vectors.npy")
        with Gallery.create(made, dim=dim, metric="cosine", model={"name": "drawn", "checksum": "0"}) as gallery:
            import_vectors(gallery, folder / "vectors.npy", memory.progress)
            if made.name == "tuned":
                memory.enter("tuning")
                tune(gallery, queries, source="drawn", target_recall=target_recall, progress=memory.progress)
    seconds = time.perf_counter() - begin
    peak = memory.peak()
    with Gallery.open(made) as gallery:
        info = gallery.info()
        size = 4 * gallery.dim * len(gallery)
        files = [path for name in (INDEX, IDS) for path in made.glob(f"index/*/{name}")]
        if files:
            size = sum(path.stat().st_size for path in files)
    return {
        "step": step,
        "search": info["search"],
        "index_bytes": size,
        "loaded_bytes": memory.loaded,
        "peak_bytes": peak,
        "ratio": peak / size,
        "ratio_without_libraries": (peak - memory.loaded) / size,
        "seconds": seconds,
        "stages": memory.stages,
    }


STEPS = ("import", "search exact", "import and tune", "search tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--target-recall", type=float, default=0.98)
    parser.add_argument("--folder", type=Path, help="where several gigabytes are made and deleted again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(run_step(args.step, args.folder, args.target_recall)))
        return
    folder = Path(tempfile.mkdtemp(prefix="build-memory-", dir=args.folder))
    results = []
    try:
        write_vectors(folder, args.count, args.dim, args.queries)
        print(f"{args.count:,} x {args.dim}, bytes in MiB; target: peak at most {TARGET} times the index")
        print(f"{'step':24}{'index':>9}{'libraries':>11}{'peak':>9}{'ratio':>8}{'less libraries':>16}{'seconds':>9}")
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.gallery.build_memory", "--step", step]
            command += ["--folder", str(folder), "--target-recall", str(args.target_recall)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            of = json.loads(done.stdout.splitlines()[-1])
            results.append(of)
            print(
                f"{step:24}{of['index_bytes'] / 2**20:9.0f}{of['loaded_bytes'] / 2**20:11.0f}"
                f"{of['peak_bytes'] / 2**20:9.0f}{of['ratio']:8.2f}{of['ratio_without_libraries']:16.2f}"
                f"{of['seconds']:9.0f}  {of['search']}",
                flush=True,
            )
            if len(of["stages"]) > 3:
                for stage, peak in of["stages"].items():
                    print(f"    {stage:50}{peak / 2**20:9.0f}")
    finally:
        shutil.rmtree(folder)
    if args.json:
        record = {"count": args.count, "dim": args.dim, "queries": args.queries, "target": TARGET, "steps": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
