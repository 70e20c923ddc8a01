"""What tuning gains on 200,000 images searched by captions, and what our search costs beyond bare FAISS.

    OMP_NUM_THREADS=1 python -m benchmarks.gallery.tuned_search shifted --json docs/gallery_results/shifted.json
    OMP_NUM_THREADS=1 python -m benchmarks.gallery.tuned_search flickr8k --run RUN --data DATA --cache FILE.npz

The queries that judge are captions that tuning has not seen. Times of alternatives are interleaved, in one process and
on one thread; with --autofaiss-python, what autofaiss chooses for the same vectors is among them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.gallery import peer_autofaiss
from benchmarks.gallery.peer_autofaiss import recall
from benchmarks.gallery.vectors import flickr8k, replicated, shifted
from benchmarks.timing import compare
from index.approximate_index import ApproximateIndex
from index.filters import Condition
from index.gallery import Gallery
from index.items import Item
from index.tuning import tune

K, ADDED, BATCH = 10, 10_000, 16_384
PEERS = ("autofaiss, 10 ms",)  # its defaults
TIERS: dict[str, tuple[float, float | None]] = {"speed": (0.98, None), "memory": (0.97, 0.35)}

Rows = NDArray[np.float32]


def exact_neighbours(gallery: Rows, queries: Rows) -> NDArray[np.int64]:
    return np.asarray(faiss.knn(queries, gallery, K, metric=faiss.METRIC_INNER_PRODUCT)[1], np.int64)


def add(gallery: Gallery, vectors: Rows, first: int) -> float:
    """Seconds to make the vectors durable and, if the gallery has been searched, findable."""
    begin = time.perf_counter()
    for start in range(0, len(vectors), BATCH):
        rows = vectors[start : start + BATCH]
        names = range(first + start, first + start + len(rows))
        gallery.add([Item(f"{n}.jpg", None, 0, 0, "", {"n": n}) for n in names], rows)
    return time.perf_counter() - begin


def rebuild(vectors: Rows, tuned: ApproximateIndex, factory: str) -> float:
    """Seconds to add everything to a new gallery, train the same index and fill it: no tuning."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with Gallery.create(Path(folder) / "g", dim=vectors.shape[1], metric="cosine", model={}) as gallery:
            add(gallery, vectors, 0)
            index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            inverted = faiss.try_extract_index_ivf(index)
            count = 64 * inverted.nlist if inverted else 65_536
            index.train(vectors[np.random.default_rng(0).permutation(len(vectors))[:count]])
            fresh = ApproximateIndex(index, tuned.parameters)
            fresh.refill(len(gallery), gallery.snapshot.blocks)
            gallery.install_index(fresh, {"chosen": factory})
        return time.perf_counter() - begin


def judge(gallery: Gallery, vectors: Rows, queries: Rows, peers: dict[str, Any]) -> dict[str, Any]:
    """Recall, and interleaved times: batch and single, ours and bare FAISS with the same index, Flat, and peers."""
    index = gallery._searching().index
    assert isinstance(index, ApproximateIndex)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    parameters = index._scope(index._alive).parameters
    truth = exact_neighbours(vectors, queries)
    found = gallery.nearest(queries, K).ids - 1  # ids count from 1 in the order of the rows
    single = iter(np.resize(np.arange(len(queries)), 100_000))

    def one() -> Rows:
        n = next(single)
        return queries[n : n + 1]

    batch = compare(
        {
            "faiss": lambda: index.faiss.search(queries, K, params=parameters),
            "nearest": lambda: gallery.nearest(queries, K),
            "search, with items": lambda: gallery.search(queries, K),
            "flat": lambda: flat.search(queries, K),
            **{name: partial(peer.search, queries, K) for name, peer in peers.items()},
        },
        repeats=5,
    )
    alone = compare(
        {
            "faiss": lambda: [index.faiss.search(one(), K, params=parameters) for _ in range(200)],
            "nearest": lambda: [gallery.nearest(one(), K) for _ in range(200)],
            "search, with items": lambda: [gallery.search(one(), K) for _ in range(200)],
            "flat": lambda: [flat.search(one(), K) for _ in range(20)],
            **{
                name: partial(lambda peer: [peer.search(one(), K) for _ in range(200)], p) for name, p in peers.items()
            },
        },
        repeats=5,
    )
    return {
        "recall": recall(found, truth),
        "peer_recall": {name: recall(peer.search(queries, K)[1], truth) for name, peer in peers.items()},
        "speedup_over_flat": batch["flat"]["min"] / batch["nearest"]["min"],
        "batch": batch,
        "alone_ms": {name: of["min"] / (20 if name == "flat" else 200) * 1e3 for name, of in alone.items()},
        "alone": alone,
    }


def filtered(gallery: Gallery, vectors: Rows, queries: Rows) -> dict[str, Any]:
    """A condition that leaves one item in a thousand: exactly k results, recall 1?"""
    allowed = gallery.ids_where([Condition("n", "<", len(vectors) // 1000)])
    found = gallery.nearest(queries, K, allowed)
    truth = allowed[exact_neighbours(vectors[allowed - 1], queries)]
    return {
        "allowed": len(allowed),
        "fewest_results": int((found.ids >= 0).sum(axis=1).min()),
        "recall": recall(found.ids, truth),
    }


def run(vectors: Rows, queries: Rows, autofaiss: str | None, keep: Path | None) -> dict[str, Any]:
    """Tune with two thirds of the queries for each tier, judge with the last third."""
    held_out, seen = queries[:1000], queries[1000:]
    report: dict[str, Any] = {"items": len(vectors), "dim": vectors.shape[1], "threads": faiss.omp_get_max_threads()}
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        if autofaiss:
            report["autofaiss"] = {}
            (Path(folder) / "vectors").mkdir()
            np.save(Path(folder) / "vectors" / "gallery.npy", vectors)
            for name in PEERS:
                share, milliseconds = peer_autofaiss.TIERS[name]
                out = (keep or Path(folder)) / f"{share}.faiss"
                infos = out.with_name(f"{out.name}.json")
                if not infos.exists():
                    peer_autofaiss.build(
                        autofaiss, Path(folder) / "vectors", out, share * vectors.nbytes, milliseconds
                    )
                report["autofaiss"][name] = json.loads(infos.read_bytes())
                del report["autofaiss"][name]["index_path"]
                peers[name] = peer_autofaiss.read(out)
                print(json.dumps(report["autofaiss"][name], indent=1), flush=True)
        with Gallery.create(Path(folder) / "g", dim=vectors.shape[1], metric="cosine", model={}) as gallery:
            report["add_seconds"] = add(gallery, vectors, 0)
            for tier, (target, share) in TIERS.items():
                memory = None if share is None else int(share * vectors.nbytes)
                begin = time.perf_counter()
                tuning = tune(gallery, seen, source="captions", target_recall=target, memory=memory)
                of = {"chosen": str(tuning.chosen), "target": target, "tuning_seconds": time.perf_counter() - begin}
                of |= {
                    "bytes_over_flat": tuning.chosen.bytes / vectors.nbytes,
                    **judge(gallery, vectors, held_out, peers),
                }
                of["points"] = tuning.to_json("captions")["points"]
                report[tier] = of
                print(json.dumps({key: value for key, value in of.items() if key != "points"}, indent=1), flush=True)
            report["filter"] = filtered(gallery, vectors, held_out)
        more = vectors[:ADDED] + 0.1 * np.random.default_rng(1).standard_normal((ADDED, vectors.shape[1]), np.float32)
        more /= np.linalg.norm(more, axis=1, keepdims=True)
        index = None
        with Gallery.open(Path(folder) / "g", writable=True) as gallery:
            gallery.nearest(held_out[:1], K)
            report["add_10000_seconds"] = add(gallery, more, len(vectors))
            index = gallery._searching().index
            assert isinstance(index, ApproximateIndex)
            report["rebuild_seconds"] = rebuild(vectors, index, tuning.chosen.index)
    report["add_over_rebuild"] = report["add_10000_seconds"] / report["rebuild_seconds"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors", choices=["shifted", "flickr8k"])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--run", type=Path, help="of flickr8k: the model")
    parser.add_argument("--data", help="of flickr8k: KIND:PATH")
    parser.add_argument("--cache", type=Path, help="of flickr8k: keeps the embeddings, .npz")
    parser.add_argument("--autofaiss-python", metavar="PATH", help="interpreter that has autofaiss, to compare with")
    parser.add_argument("--keep", type=Path, help="folder with autofaiss' indexes of these vectors, if they are there")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.vectors == "shifted":
        vectors, queries = shifted(args.count, 512, 3000, 0)
    else:
        vectors, queries = replicated(*flickr8k(args.run, args.data, args.cache), args.count, 1.0, 0)
        queries = queries[np.random.default_rng(0).permutation(len(queries))]
    report = {"vectors": args.vectors, **run(vectors, queries[:3000], args.autofaiss_python, args.keep)}
    print(json.dumps({key: value for key, value in report.items() if key not in TIERS}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
