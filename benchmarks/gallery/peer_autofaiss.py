"""OMP_NUM_THREADS=1 python -m benchmarks.gallery.peer_autofaiss --autofaiss-python PATH [--ours FILE PARAMETERS]

What autofaiss chooses for a gallery, and what its choice is worth to captions: recall@10 and speed beside Flat's.

autofaiss runs in an environment of its own (it wants an old numpy). It may spend memory and time per query as each
of ``TIERS`` says; its index file is then loaded here and timed in turn with Flat and with ours, on one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.gallery.vectors import Rows, flickr8k, replicated, shifted
from benchmarks.timing import compare

TIERS = {
    "autofaiss, 10 ms": (1.5, 10.0),  # its default
    "autofaiss, 1 ms": (1.5, 1.0),
    "autofaiss, 0.35 x bytes": (0.35, 10.0),
}
"""Memory limit, in bytes of the float32 vectors, and milliseconds per query."""

_CHILD = """
import json, multiprocessing, sys, time
multiprocessing.cpu_count = lambda: 1
import faiss
opq = faiss.OPQMatrix
faiss.OPQMatrix = lambda d, M, d2: opq(d, M, d2)  # faiss 1.15 has renamed the argument M
from autofaiss import build_index, score_index
folder, index, memory, milliseconds = sys.argv[1:]
begin = time.perf_counter()
build_index(folder, index_path=index, index_infos_path=index + ".infos", max_index_memory_usage=memory,
            max_index_query_time_ms=float(milliseconds), current_memory_available="16G", metric_type="ip", verbose=30)
seconds = time.perf_counter() - begin
score_index(index, folder, output_index_info_path=index + ".score", current_memory_available="16G", verbose=30)
infos = {**json.load(open(index + ".infos")), **json.load(open(index + ".score")), "build seconds": seconds}
json.dump(infos, open(index + ".json", "w"))
"""


class Searched(NamedTuple):
    """An index as :func:`measure` found it; QPS is of the fastest batch, ratios are to Flat in the same round."""

    recall: float
    qps: float
    ratio: float
    low: float
    high: float
    single_ms: float
    bytes: int


def build(python: str, folder: Path, out: Path, memory: float, milliseconds: float) -> dict[str, Any]:
    """Let autofaiss choose, build and score an index.

    Args:
        python: Interpreter that has autofaiss.
        folder: Holds the gallery as ``.npy``, float32 ``(N, D)``.
        out: The FAISS index file it writes; its search parameters are stored in the file.
        memory: Limit in bytes.
        milliseconds: Limit per query.

    Returns:
        Its infos: ``index_key``, ``index_param``, what it claims of recall and speed (measured with the first rows
        of the gallery as queries), and ``build seconds``.
    """
    command = [python, "-c", _CHILD, str(folder), str(out), f"{int(memory)}B", str(milliseconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    infos: dict[str, Any] = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    return infos


def read(path: Path | str, parameters: str = "") -> Any:
    """A FAISS index from a file, with search parameters such as ``"nprobe=64,k_factor_rf=8"``."""
    index = faiss.read_index(str(path))
    if parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    return index


def measure(
    indexes: Mapping[str, Any], gallery: Rows, queries: Rows, k: int = 10, repeats: int = 5
) -> dict[str, Searched]:
    """Search the same queries with Flat and each index in turn, as one batch and one at a time, on one thread.

    Args:
        indexes: FAISS indexes by name, rows numbered as in the gallery, search parameters set.
        gallery: Float32 ``(N, D)``.
        queries: Float32 ``(Q, D)``. Flat needs some 300 of them to multiply matrices at full speed.
        k: Hits per query.
        repeats: Rounds.

    Returns:
        Results by name, the first being ``"Flat"``.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(gallery.shape[1])
    flat.add(gallery)
    contenders = {"Flat": flat, **indexes}

    def one_by_one(index: Any) -> None:
        for row in range(min(100, len(queries))):
            index.search(queries[row : row + 1], k)

    def in_turn(function: Callable[[Any], object]) -> dict[str, dict[str, float]]:
        return compare({name: partial(function, index) for name, index in contenders.items()}, repeats)

    try:
        hits = {name: index.search(queries, k)[1] for name, index in contenders.items()}
        batch, single = in_turn(lambda index: index.search(queries, k)), in_turn(one_by_one)
    finally:
        faiss.omp_set_num_threads(threads)
    return {
        name: Searched(
            recall=recall(hits[name], hits["Flat"]),
            qps=len(queries) / batch[name]["min"],
            ratio=1 / batch[name]["ratio"],
            low=1 / batch[name]["high"],
            high=1 / batch[name]["low"],
            single_ms=1000 * single[name]["min"] / min(100, len(queries)),
            bytes=len(faiss.serialize_index(index)),
        )
        for name, index in contenders.items()
    }


def recall(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Fraction of the exact hits, int64 ``(Q, k)``, that were found."""
    return float((found[:, :, None] == exact[:, None, :]).any(axis=1).mean())


def format_searched(results: Mapping[str, Searched]) -> str:
    """A text table of what :func:`measure` returned."""
    width, flat = max(map(len, results)), results["Flat"].bytes
    lines = [f"{'':{width}}  recall@10       QPS  x Flat  quartiles      single ms  bytes / Flat"]
    for name, of in results.items():
        lines.append(
            f"{name:{width}}  {of.recall:9.4f}  {of.qps:8.0f}  {of.ratio:6.2f}  {of.low:5.2f}..{of.high:<5.2f}  "
            f"{of.single_ms:11.3f}  {of.bytes / flat:12.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autofaiss-python", required=True, metavar="PATH")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--flickr8k", nargs=3, metavar=("RUN", "DATA", "CACHE"), help="instead of made vectors")
    parser.add_argument(
        "--ours",
        nargs=2,
        action="append",
        default=[],
        metavar=("FILE", "PARAMETERS"),
        help="an index of these vectors",
    )
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--keep", type=Path, help="folder for autofaiss' indexes; those of the same vectors are used")
    args = parser.parse_args()
    if args.flickr8k:
        run, data, cache = args.flickr8k
        gallery, queries = replicated(*flickr8k(run, data, Path(cache)), args.count, noise=1.0, seed=0)
        queries = queries[np.random.default_rng(0).permutation(len(queries))[:1000]]
    else:
        gallery, queries = shifted(args.count, 512, 1000, seed=0)

    indexes = {f"ours {Path(file).name} {parameters}": read(file, parameters) for file, parameters in args.ours}
    with tempfile.TemporaryDirectory() as temporary:
        keep, folder = args.keep or Path(temporary), Path(temporary) / "vectors"
        keep.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        np.save(folder / "gallery.npy", gallery)
        for name in args.tiers:
            memory, milliseconds = TIERS[name]
            out = keep / f"{zlib.crc32(gallery):08x}-{memory}-{milliseconds}.faiss"
            if not out.with_name(out.name + ".json").exists():
                build(args.autofaiss_python, folder, out, memory * gallery.nbytes, milliseconds)
            infos = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
            print(
                f"{name}: {infos['index_key']} {infos['index_param']}, built in {infos['build seconds']:.0f} s; "
                f"claims 20-recall@20 {infos['20-recall@20']:.4f}, {infos['avg_search_speed_ms']:.2f} ms per query"
            )
            indexes[name] = read(out)
        begin = time.perf_counter()
        print(format_searched(measure(indexes, gallery, queries)))
        print(f"{len(gallery):,} x {gallery.shape[1]}, {len(queries):,} queries, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
