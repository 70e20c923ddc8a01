"""One small protocol for vector indexes, and the two that search exhaustively, in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from index.errors import GalleryError

UNIT_ROUNDING = 1e-2
"""How far from 1 rounding, to bfloat16 even, takes the length of a unit vector."""
_BLOCK_ELEMENTS = 1 << 18
"""Gallery elements that an order scan handles at once: 1 MiB of float32, so temporaries stay in cache."""
_GATHERED = 1 << 22
"""Elements of vectors that are copied side by side at once: 16 MiB."""
_FEW = 8
"""Where less than one in so many vectors is allowed, copying those takes less time than passing over the others."""
_ROOM = 10_000
"""Vectors that fit in besides those that an index is made for, at least."""
_SPARSE = 16
"""Ids that span more than so many times their number are looked up by sorting."""

_swig: Any = faiss  # its type stubs lack what is used below


class SearchHits(NamedTuple):
    """The best vectors per query, best first; rows with fewer than ``k`` hits end in ``-inf`` and ``-1``.

    Attributes:
        scores: float32 ``(Q, k)``, higher is better.
        ids: int64 ``(Q, k)``.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]


class VectorIndex(Protocol):
    """Vectors under stable external ids.

    Several threads may search at once, but none while another adds or removes.
    """

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        ...

    def __len__(self) -> int:
        """Number of vectors."""
        ...

    @property
    def last_id(self) -> int:
        """The highest id that ever was here, 0 if there was none."""
        ...

    def live_ids(self) -> NDArray[np.int64]:
        """Ids of the vectors that are here, int64 ``(N,)``, ascending."""
        ...

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Add vectors under new ids: all of them, or none if one cannot be.

        Args:
            ids: int64 ``(N,)``, not negative, each new to the index.
            vectors: float32 ``(N, D)``.

        Raises:
            GalleryError: If an id is negative or taken, a vector is not finite, or shapes disagree.
        """
        ...

    def remove(self, ids: NDArray[np.int64]) -> int:
        """Remove those of the ids, int64 ``(N,)``, that are here; returns how many were."""
        ...

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> SearchHits:
        """Find the ``k`` best vectors for each query.

        Args:
            queries: float32 ``(Q, D)``.
            k: Hits per query, at least 1.
            allowed: int64 ``(M,)``; only these ids may be found. None allows all, an empty array none.

        Raises:
            GalleryError: If ``k`` is below 1, a query is not finite, or shapes disagree.
        """
        ...


def as_rows(vectors: ArrayLike, dim: int, name_row: Callable[[int], str]) -> NDArray[np.float32]:
    """Finite, contiguous float32 ``(N, dim)`` from what a caller gave.

    Raises:
        GalleryError: If the shape is another, or a row ``n`` is not finite; ``name_row(n)`` names it.
    """
    try:
        given = np.asarray(vectors)
    except ValueError as error:  # rows of different lengths
        raise GalleryError(f"vectors that are no array of numbers ({error}); give float32 (N, {dim})") from error
    if given.dtype.kind not in "fiu":
        raise GalleryError(f"vectors of {given.dtype}, which are no real numbers; give float32 (N, {dim})")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
        rows = np.ascontiguousarray(given, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise GalleryError(f"vectors of shape {rows.shape} where (N, {dim}) is needed; use the same encoder")
    # Whatever is not finite makes the sum so; only then it is worth looking where it is.
    if not math.isfinite(rows.sum()):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise GalleryError(f"{name_row(int(bad[0]))}: its vector is not finite; encode it again or leave it out")
    return rows


def as_queries(queries: ArrayLike, dim: int, k: int) -> NDArray[np.float32]:
    """Queries as :func:`as_rows`, for ``k`` hits each.

    Raises:
        GalleryError: Also if ``k`` is no whole number from 1.
    """
    checked_k(k)
    return as_rows(queries, dim, "query {}".format)


def checked_k(k: int) -> int:
    """A number of hits to ask for.

    Raises:
        GalleryError: If it is no whole number from 1.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise GalleryError(f"k is {k!r}; ask for at least 1 hit")
    return int(k)


def as_ids(ids: ArrayLike) -> NDArray[np.int64]:
    """Ids int64 ``(M,)`` from what a caller gave.

    Raises:
        GalleryError: If they are no whole numbers in a row.
    """
    given = np.asarray(ids)
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise GalleryError(f"ids of {given.dtype} {given.shape}; give whole numbers in a row")
    return given.astype(np.int64, copy=False)


def check_unit(rows: NDArray[np.float32], name_row: Callable[[int], str]) -> None:
    """Refuse vectors ``(N, D)`` whose inner products would be no cosines.

    Raises:
        GalleryError: If a row ``n`` is not of length 1; ``name_row(n)`` names it.
    """
    # In float64 squares of finite float32 numbers neither overflow nor vanish.
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    off = np.flatnonzero(np.abs(lengths - 1) > UNIT_ROUNDING)
    if len(off):
        row = int(off[0])
        mend = "divide it by that" if lengths[row] else "leave it out"
        raise GalleryError(f"{name_row(row)}: its vector has length {lengths[row]:.4g} where cosine needs 1; {mend}")


def no_hits(queries: int, k: int) -> SearchHits:
    """Rows that have found nothing yet."""
    return SearchHits(np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64))


def in_order(scores: NDArray[np.float32], ids: NDArray[np.int64]) -> SearchHits:
    """Hits by falling score, ties by lower id."""
    order = np.lexsort((ids, -scores), axis=1)
    return SearchHits(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1))


def search_blocks(
    queries: NDArray[np.float32], k: int, blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]
) -> SearchHits:
    """Exhaustive search by inner product through vectors that need not fit in memory.

    Args:
        queries: float32 ``(Q, D)``.
        k: Hits per query.
        blocks: Ids int64 ``(B,)`` and vectors float32 ``(B, D)``, a block at a time.
    """
    best = no_hits(len(queries), k)
    for ids, vectors in blocks:
        scores, rows = faiss.knn(queries, vectors, min(k, len(ids)), metric=faiss.METRIC_INNER_PRODUCT)
        merged = in_order(np.hstack([best.scores, scores]), np.hstack([best.ids, ids[rows]]))
        best = SearchHits(merged.scores[:, :k], merged.ids[:, :k])
    return best


def is_among(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """As :func:`numpy.isin`, bool ``(N,)``, but without sorting where the ids, int64 ``(N,)``, lie close together."""
    if not len(ids):
        return np.zeros(0, bool)
    first, last = int(ids.min()), int(ids.max())
    if last - first > _SPARSE * len(ids):
        return np.isin(ids, wanted)
    table = np.zeros(last - first + 1, bool)
    table[wanted[(wanted >= first) & (wanted <= last)] - first] = True
    return table[ids - first]


def selector(chosen: NDArray[np.bool_]) -> tuple[Any, NDArray[np.uint8]]:
    """FAISS' selector of the rows that are chosen, bool ``(N,)``, and the bitmap to which it points."""
    bitmap = np.packbits(chosen, bitorder="little")
    return _swig.IDSelectorBitmap(len(bitmap), _swig.swig_ptr(bitmap)), bitmap


def gathered(
    ids: NDArray[np.int64], rows: NDArray[np.float32], places: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Ids, int64 ``(M,)``, and their vectors ``rows[places]`` in blocks of bounded size."""
    step = max(1, _GATHERED // rows.shape[1])
    for start in range(0, len(ids), step):
        yield ids[start : start + step], rows[places[start : start + step]]


class _FlatIndex:
    """Uncompressed vectors in row order; what :class:`ExactIndex` and :class:`OrderIndex` have in common.

    Args:
        dim: Dimensions of a vector.
        capacity: So many vectors, and an eighth more, can be added without moving those that are here.
    """

    def __init__(self, dim: int, capacity: int = 0) -> None:
        self._dim = dim
        # Room takes no memory until something is written to it.
        room = capacity + max(_ROOM, capacity // 8)
        self._all_rows = np.empty((room, dim), np.float32)
        self._all_ids = np.empty(room, np.int64)
        self._count = 0
        self._last_id = 0

    @property
    def dim(self) -> int:
        return self._dim

    def __len__(self) -> int:
        return self._count

    @property
    def last_id(self) -> int:
        return self._last_id

    def live_ids(self) -> NDArray[np.int64]:
        return np.sort(self._ids)

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        rows = as_rows(vectors, self.dim, lambda row: f"id {ids[row]}")
        if ids.shape != (len(rows),):
            raise GalleryError(f"ids of shape {ids.shape} for {len(rows)} vectors; give one id per vector")
        unique, counts = np.unique(ids, return_counts=True)
        refused = unique[(unique < 0) | (counts > 1)]
        if not len(refused) and len(ids) and unique[0] <= self._last_id:
            refused = unique[is_among(unique, self._ids)]
        if len(refused):
            raise GalleryError(f"id {refused[0]} is negative or taken; remove the old vector or use a new id")
        count = self._count + len(ids)
        if count > len(self._all_ids):
            # In place where the system can move pages: a copy would need the memory of all vectors once more.
            self._all_rows.resize((count + count // 8, self.dim), refcheck=False)
            self._all_ids.resize(count + count // 8, refcheck=False)
        self._all_rows[self._count : count] = rows
        self._all_ids[self._count : count] = ids
        self._count = count
        self._last_id = max([self._last_id, *unique[-1:].tolist()])

    def remove(self, ids: NDArray[np.int64]) -> int:
        gone = is_among(self._ids, ids)
        kept = self._count - int(gone.sum())
        # The last rows fill the gaps: closing them up would move almost everything.
        gaps, last = np.flatnonzero(gone[:kept]), kept + np.flatnonzero(~gone[kept:])
        self._all_rows[gaps] = self._all_rows[last]
        self._all_ids[gaps] = self._all_ids[last]
        removed = self._count - kept
        self._count = kept
        return removed

    @property
    def _ids(self) -> NDArray[np.int64]:
        """Ids in row order, int64 ``(N,)``."""
        return self._all_ids[: self._count]

    @property
    def _rows(self) -> NDArray[np.float32]:
        """The vectors themselves, float32 ``(N, D)``: a view that lasts until the next add."""
        return self._all_rows[: self._count]


class ExactIndex(_FlatIndex):
    """Exhaustive search by inner product, which for unit vectors is cosine similarity.

    Equal scores come lower id first; which of several that tie for the last place are kept is left open.
    """

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> SearchHits:
        """Find the vectors of largest inner product; see :meth:`VectorIndex.search`."""
        queries = as_queries(queries, self.dim, k)
        chosen = None if allowed is None else is_among(self._ids, np.asarray(allowed, np.int64))
        if chosen is not None and np.count_nonzero(chosen) * _FEW < len(self):
            places = np.flatnonzero(chosen)
            return search_blocks(queries, k, gathered(self._ids[places], self._rows, places))
        found = no_hits(len(queries), k)
        picked, _bitmap = (None, None) if chosen is None else selector(chosen)
        asked, held, scores, places = (_swig.swig_ptr(array) for array in (queries, self._rows, *found))
        _swig.knn_inner_product(asked, held, self.dim, len(queries), len(self), k, scores, places, picked)
        missing = found.ids < 0
        found.ids[~missing] = self._ids[found.ids[~missing]]
        found.scores[missing] = -np.inf
        return in_order(*found)


class OrderIndex(_FlatIndex):
    """Exhaustive search by order similarity, images in the gallery and captions as queries.

    ``s(i, c) = -||max(0, c - i)||_2`` is 0 where the image lies above its caption in every dimension
    (Vendrov et al. 2016, "Order-Embeddings of Images and Language", section 3). Ties are broken by lower
    id. Besides the hits, a search needs memory for one score per vector and one block of the gallery.
    """

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> SearchHits:
        """Find the images that lie furthest above each caption; see :meth:`VectorIndex.search`."""
        queries = as_queries(queries, self.dim, k)
        ids = self._ids
        chosen = None if allowed is None else np.flatnonzero(is_among(ids, allowed))
        ids = ids if chosen is None else ids[chosen]
        hits = no_hits(len(queries), k)
        squared = np.empty(len(ids), np.float32)
        for query, best_scores, best_ids in zip(queries, *hits, strict=True):
            for rows, block in self._blocks(chosen):
                gap = np.subtract(query, block)  # (B, D)
                np.maximum(gap, 0, out=gap)
                np.einsum("bd,bd->b", gap, gap, out=squared[rows])
            scores = 0 - np.sqrt(squared)
            best = _best(scores, ids, k)
            best_scores[: len(best)], best_ids[: len(best)] = scores[best], ids[best]
        return hits

    def _blocks(self, chosen: NDArray[np.intp] | None) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Chosen rows of the gallery, a cacheful ``(B, D)`` at a time, and where they stand among them."""
        gallery = self._rows
        step = max(1, _BLOCK_ELEMENTS // self.dim)
        for start in range(0, len(gallery) if chosen is None else len(chosen), step):
            rows = slice(start, start + step)
            yield rows, gallery[rows if chosen is None else chosen[rows]]


def _best(scores: NDArray[np.float32], ids: NDArray[np.int64], k: int) -> NDArray[np.intp]:
    """Positions of the ``k`` best scores, best first, ties by lower id."""
    kept = np.arange(len(scores))
    if k < len(scores):
        kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return kept[np.lexsort((ids[kept], -scores[kept]))][:k]


METRICS: dict[str, type[ExactIndex] | type[OrderIndex]] = {"cosine": ExactIndex, "order": OrderIndex}
"""The exact index of each similarity that a gallery can be searched by."""
