"""Choosing how a gallery is searched by measuring it: type and parameters for a target recall and a memory budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index.approximate_index import ApproximateIndex
from index.errors import GalleryError
from index.gallery import Gallery
from index.items import JSON
from index.snapshot import Snapshot
from index.vector_index import ExactIndex, as_rows, search_blocks

EXACT_UP_TO = 20_000
"""So many vectors are searched exhaustively in a few milliseconds, and exactly."""
FEWEST_ITEMS = 1000
"""Fewer than this train nothing, and take no memory to speak of."""
COMPARE_ON = 100_000
"""Types are compared on so many vectors of a larger gallery; the chosen one is then measured on all."""
TRAIN_PER_LIST = 64
FEWEST_QUERIES = 50
_TIMED_EXACT = 50_000
_SINGLE = 100

Progress = Callable[[str, int, int], object]
_swig: Any = faiss  # its type stubs lack what is used below


@dataclass(frozen=True)
class OperatingPoint:
    """One measured way to search.

    Attributes:
        index: ``exact``, or a FAISS factory string.
        parameters: Of the search, as in :class:`index.approximate_index.ApproximateIndex`.
        recall: Share of the true ``k`` nearest that are found, mean over the queries.
        error: Standard error of that mean.
        queries_per_second: In one batch, on as many threads as FAISS has.
        milliseconds: Median for a query alone.
        bytes: Memory for the index.
    """

    index: str
    parameters: dict[str, int]
    recall: float
    error: float
    queries_per_second: float
    milliseconds: float
    bytes: int

    def __str__(self) -> str:
        return " ".join([self.index, *(f"{name}={value}" for name, value in self.parameters.items())])


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured and chose.

    Attributes:
        chosen: The fastest point that reaches the target, on the queries used for choosing.
        held_out_recall: Its recall on the other half of the queries.
        points: Everything measured, the operating curve.
        items: Number of vectors in the gallery.
        compared_on: Number of vectors on which the types were compared.
        queries: Number of queries, both halves together.
        target_recall: What was asked for.
        memory: Largest index allowed, in bytes, or None.
        k: Hits per query.
        threads: Threads that FAISS used.
    """

    chosen: OperatingPoint
    held_out_recall: float
    points: list[OperatingPoint]
    items: int
    compared_on: int
    queries: int
    target_recall: float
    memory: int | None
    k: int
    threads: int

    def to_json(self, source: str) -> dict[str, JSON]:
        """For the gallery: what is chosen, where the queries came from, and the curve."""
        record: dict[str, JSON] = {**asdict(self), "chosen": str(self.chosen), "queries_from": source}
        return record


def candidates(count: int, dim: int) -> list[tuple[str, float, list[dict[str, int]]]]:
    """Ways to search ``count`` vectors: factory string, fewest bytes per vector, and parameters from fast to sure."""
    lists = 1 << round(math.log2(2 * math.sqrt(count)))
    codes = next(m for m in range(max(1, dim // 2), 0, -1) if dim % m == 0)
    # Captions lie apart from the pictures, so they need many more lists than pictures would.
    probes = [n for n in (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512) if n <= lists]
    inverted = [{"nprobe": n} for n in probes]
    refined = [{"nprobe": n, "k_factor": factor} for factor in (4, 8, 16) for n in probes]
    return [
        (f"IVF{lists},PQ{codes}x4fsr,RFlat", 4 * dim + codes / 2, refined),
        (f"IVF{lists},PQ{codes}x4fsr,Refine(SQ8)", dim + codes / 2, refined),
        (f"IVF{lists},RaBitQ,Refine(SQ8)", dim + dim / 8, refined),
        (f"IVF{lists},Flat", 4 * dim, inverted),
        (f"IVF{lists},SQ8", dim, inverted),
        ("RaBitQ,Refine(SQ8)", dim + dim / 8, [{"k_factor": factor} for factor in (4, 8, 16, 32)]),
        ("HNSW32", 4 * dim + 256, [{"efSearch": width} for width in (16, 32, 64, 128, 256, 512)]),
    ]


def tune(
    gallery: Gallery,
    queries: NDArray[np.float32],
    *,
    source: str,
    target_recall: float = 0.98,
    memory: int | None = None,
    k: int = 10,
    dry_run: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Tuning:
    """Measure ways to search the gallery, and from now on use the fastest that reaches the target.

    Half of the queries choose, the other half says how well the choice holds. Queries should be what users will
    ask: embedded captions lie elsewhere than images, and a search tuned on images finds less for them.

    Args:
        gallery: Open for writing; its metric is cosine.
        queries: float32 ``(Q, D)``, unit vectors.
        source: Where they come from, for the record.
        target_recall: Share of the true ``k`` nearest to be found, above 0 and at most 1.
        memory: Largest index in bytes; None for no limit.
        k: Hits per query.
        dry_run: Measure only.
        progress: Told the stage, and how many of how many vectors have been handled.

    Raises:
        GalleryError: If the gallery cannot be tuned, or nothing within the memory reaches the target.
    """
    if gallery.metric != "cosine":
        raise GalleryError(
            f"{gallery.directory}: {gallery.metric} similarity is searched exactly; only cosine is tuned"
        )
    if not 0 < target_recall <= 1 or k < 1:
        raise GalleryError(f"target recall {target_recall}, k {k}: give a recall above 0 and at most 1, and k from 1")
    if len(queries) < FEWEST_QUERIES or len(gallery) < k:
        raise GalleryError(
            f"{gallery.directory}: {len(queries)} queries for {len(gallery)} items; "
            f"tuning needs {FEWEST_QUERIES} queries and {k} items"
        )
    queries = as_rows(queries, gallery.dim, "query {}".format)
    queries = queries[np.random.default_rng(0).permutation(len(queries))]
    index, tuning = _Tuner(gallery.snapshot, queries, target_recall, memory, k, progress).run()
    if not dry_run:
        gallery.install_index(index, tuning.to_json(source))
    return tuning


@dataclass(frozen=True)
class _Judge:
    """Queries and their true neighbours among some of the vectors; the first half chooses, the second checks."""

    queries: NDArray[np.float32]
    truth: NDArray[np.int64]

    def choosing(self) -> _Judge:
        return _Judge(self.queries[::2], self.truth[::2])

    def held_out(self) -> _Judge:
        return _Judge(self.queries[1::2], self.truth[1::2])

    def recalls(self, index: ApproximateIndex) -> NDArray[np.float64]:
        """Share of the true neighbours that are found, per query, float64 ``(Q,)``."""
        found = index.search(self.queries, self.truth.shape[1]).ids
        recalls: NDArray[np.float64] = (self.truth[:, :, None] == found[:, None, :]).any(axis=2).mean(axis=1)
        return recalls


@dataclass(frozen=True)
class _Choice:
    point: OperatingPoint
    index: ApproximateIndex | None
    place: int | None
    held_out_recall: float


class _Tuner:
    """One tuning; what stays the same from candidate to candidate."""

    def __init__(
        self,
        snapshot: Snapshot,
        queries: NDArray[np.float32],
        target: float,
        memory: int | None,
        k: int,
        progress: Progress,
    ) -> None:
        self.snapshot, self.queries, self.target, self.memory, self.k = snapshot, queries, target, memory, k
        self.progress = progress
        self.dim, self.ids = snapshot.manifest.dim, snapshot.ids()
        self.points: list[OperatingPoint] = []
        self._slowest = 0.0

    def run(self) -> tuple[ApproximateIndex | None, Tuning]:
        """Compare on a sample if the gallery is large, then build and measure the winner on everything."""
        self.points.append(self._exact_point())
        exact = _Choice(self.points[0], None, None, 1.0) if self._fits(self.points[0].bytes) else None
        best, sample = exact, self.ids
        if len(self.ids) >= FEWEST_ITEMS and (exact is None or len(self.ids) > EXACT_UP_TO):
            if len(sample) > COMPARE_ON:
                sample = np.sort(np.random.default_rng(0).choice(sample, COMPARE_ON, replace=False))
            best = self._best(sample, range(len(candidates(len(sample), self.dim))), exact)
            if best and best.place is not None and len(sample) < len(self.ids):
                place, best = best.place, None  # lets go of the index on the sample before the next one is built
                best = self._best(self.ids, [place], None) or exact
        if best is None:
            raise GalleryError(self._out_of_reach())
        return best.index, Tuning(
            chosen=best.point,
            held_out_recall=best.held_out_recall,
            points=self.points,
            items=len(self.ids),
            compared_on=len(sample),
            queries=len(self.queries),
            target_recall=self.target,
            memory=self.memory,
            k=self.k,
            threads=faiss.omp_get_max_threads(),
        )

    def _best(self, ids: NDArray[np.int64], places: Iterable[int], best: _Choice | None) -> _Choice | None:
        """The fastest that reaches the target on these ids, or the given one if that is faster still."""
        judge = _Judge(self.queries, self._truth(ids))
        self._slowest = self.points[0].queries_per_second
        centroids: dict[int, NDArray[np.float32]] = {}
        for place in places:
            factory, row_bytes, grid = candidates(len(ids), self.dim)[place]
            if not self._fits(row_bytes * len(self.ids)):
                continue
            index = self._build(factory, ids, centroids)
            size = _size(index) * len(self.ids) // len(ids)
            for point in self._sweep(factory, index, size, grid, judge.choosing()):
                self.points.append(point)
                sure = point.recall - 2 * point.error >= self.target or point.recall == 1
                faster = best is None or point.queries_per_second > best.point.queries_per_second
                if sure and faster and self._fits(size):
                    best = _Choice(point, index, place, 0)
                    # What follows is slower than what came before, so past half this speed nothing can win any more.
                    self._slowest = point.queries_per_second / 2
        if best and best.index:
            best.index.parameters = best.point.parameters
            best = replace(best, held_out_recall=float(judge.held_out().recalls(best.index).mean()))
        return best

    def _sweep(
        self, factory: str, index: ApproximateIndex, size: int, grid: Sequence[dict[str, int]], judge: _Judge
    ) -> Iterator[OperatingPoint]:
        """Measure the parameters from fast to sure, as long as there is something to gain."""
        for _, group in groupby(grid, lambda parameters: parameters.get("k_factor")):
            before = -1.0
            for parameters in group:
                index.parameters = parameters
                recalls = judge.recalls(index)
                rate, alone = _speed(lambda queries: index.search(queries, self.k), judge.queries)
                recall, error = float(recalls.mean()), float(recalls.std() / math.sqrt(len(recalls)))
                yield OperatingPoint(factory, parameters, recall, error, rate, alone, size)
                stuck = recall < self.target and recall - before < 1e-3 and before > 0.5
                if rate < self._slowest or stuck or recall - 2 * error > (1 + self.target) / 2:
                    break
                before = recall

    def _build(
        self, factory: str, ids: NDArray[np.int64], centroids: dict[int, NDArray[np.float32]]
    ) -> ApproximateIndex:
        """Train and fill an index with these ids; inverted lists are trained once and shared."""
        built: Any = faiss.index_factory(self.dim, factory, faiss.METRIC_INNER_PRODUCT)
        inverted: Any = faiss.try_extract_index_ivf(built)
        lists = inverted.nlist if inverted else 256
        count = min(len(ids), lists * TRAIN_PER_LIST)
        training = self.snapshot.vectors(np.random.default_rng(0).choice(ids, count, replace=False))
        self.progress(f"{factory}: training", 0, len(ids))
        if inverted and lists in centroids:
            faiss.downcast_index(inverted.quantizer).add(centroids[lists])
        built.train(training)
        del training  # as much as a quarter of all vectors
        if inverted:
            centroids[lists] = inverted.quantizer.reconstruct_n(0, lists)
        index = ApproximateIndex(built, {})
        index.refill(len(ids), lambda: self._watched(f"{factory}: adding", ids))
        return index

    def _truth(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return search_blocks(self.queries, self.k, self._watched("exact neighbours", ids)).ids

    def _watched(self, stage: str, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        done = 0
        for block in self.snapshot.blocks(among=None if len(ids) == len(self.ids) else ids):
            yield block
            done += len(block[0])
            self.progress(stage, done, len(ids))

    def _exact_point(self) -> OperatingPoint:
        """Exhaustive search, timed on part of a large gallery: its time grows with the number of vectors."""
        self.progress("exact search", 0, len(self.ids))
        some = self.ids[:_TIMED_EXACT]
        index = ExactIndex(self.dim, len(some))
        for ids, vectors in self.snapshot.blocks(among=some):
            index.add(ids, vectors)
        rate, alone = _speed(lambda queries: index.search(queries, self.k), self.queries[::2])
        share = len(some) / len(self.ids)
        return OperatingPoint("exact", {}, 1.0, 0.0, rate * share, alone / share, 4 * self.dim * len(self.ids))

    def _fits(self, size: float) -> bool:
        return self.memory is None or size <= self.memory

    def _out_of_reach(self) -> str:
        fitting = [point for point in self.points if self._fits(point.bytes)]
        smallest = min(self.points[1:], key=lambda point: point.bytes, default=self.points[0])
        if not fitting:
            return f"{self.memory:,} bytes hold no index of these items; {smallest.index} needs {smallest.bytes:,}"
        best = max(fitting, key=lambda point: point.recall)
        return (
            f"nothing within {self.memory:,} bytes surely reaches recall {self.target}; the best is {best} with "
            f"{best.recall:.4f}: ask for less or give more memory"
        )


def _size(index: ApproximateIndex) -> int:
    """Bytes that the index takes when written, which is about what it takes in memory, ids included."""
    written = 0

    def count(chunk: bytes) -> int:
        nonlocal written
        written += len(chunk)
        return len(chunk)

    writer = _swig.PyCallbackIOWriter(count)
    faiss.write_index(index.faiss, _swig.BufferedIOWriter(writer, 1 << 20))
    return written + index.ids.nbytes


def _speed(search: Callable[[NDArray[np.float32]], object], queries: NDArray[np.float32]) -> tuple[float, float]:
    """Queries per second in a batch, the best of up to three, and the median milliseconds of one alone."""
    spent: list[float] = []
    while len(spent) < 3 and sum(spent) < 0.5:
        begin = time.perf_counter()
        search(queries)
        spent.append(time.perf_counter() - begin)
    alone = []
    for n in range(min(_SINGLE, len(queries))):
        begin = time.perf_counter()
        search(queries[n : n + 1])
        alone.append(time.perf_counter() - begin)
    return len(queries) / min(spent), 1e3 * float(np.median(alone))
