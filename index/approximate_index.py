"""A FAISS index that visits only part of the vectors, under stable ids and with removal in every type."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError, remedy
from index.segment import map_array, save_array
from index.vector_index import SearchHits, as_queries, as_rows, gathered, is_among, no_hits, selector

INDEX, IDS, PARAMETERS = "index.faiss", "ids.npy", "parameters.json"
_PARAMETERS = {"nprobe", "efSearch", "k_factor"}
_MEND = "run vse index tune to make it again"
_SCOPES = 8
"""So many lists of allowed ids are remembered: whoever filters asks for the same again and again."""

_swig: Any = faiss  # its type stubs lack what is used below


class ApproximateIndex:
    """A trained FAISS index searched with measured parameters (:mod:`index.tuning`).

    Vectors lie in FAISS by position, in ascending order of id, and a removed one is passed over by a bitmap
    that every search hands down, since graphs and packed codes cannot let go of a vector.

    Args:
        index: An inner-product FAISS index: IVF or HNSW or RaBitQ, with or without a refinement.
        parameters: Of the search: ``nprobe`` inverted lists visited, ``efSearch`` width in a graph,
            ``k_factor`` candidates refined per hit.
        ids: int64 ``(N,)``, ascending, of the vectors that are in ``index`` already.
    """

    def __init__(self, index: Any, parameters: Mapping[str, int], ids: NDArray[np.int64] | None = None) -> None:
        self.faiss = index
        self.ids = np.empty(0, np.int64) if ids is None else ids
        self._base: Any = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
        self._alive = np.ones(len(self.ids), bool)
        self._live = len(self.ids)
        self.parameters = dict(parameters)

    @property
    def parameters(self) -> dict[str, int]:
        """Of the search; see above."""
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Mapping[str, int]) -> None:
        self._parameters = dict(parameters)
        self._scopes: list[tuple[NDArray[np.int64] | None, _Scope]] = []

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.faiss.d)

    def __len__(self) -> int:
        """Number of vectors that are not removed."""
        return self._live

    def live_ids(self) -> NDArray[np.int64]:
        """Ids of the vectors that are not removed, int64 ``(N,)``, ascending."""
        return self.ids[self._alive]

    @property
    def last_id(self) -> int:
        """The highest id that ever was here, 0 if there was none."""
        return int(self.ids[-1]) if len(self.ids) else 0

    @property
    def removed(self) -> int:
        """Number of vectors that are only passed over."""
        return len(self.ids) - len(self)

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Add vectors under new ids, each above all earlier ones; see :meth:`VectorIndex.add`."""
        self._append(ids, vectors)

    def _append(
        self, ids: NDArray[np.int64], vectors: NDArray[np.float32], lists: NDArray[np.int64] | None = None
    ) -> None:
        """Add vectors, into the inverted lists int64 ``(N,)`` if they are known already."""
        ids = np.ascontiguousarray(ids, np.int64)
        rows = as_rows(vectors, self.dim, lambda row: f"id {ids[row]}")
        if ids.shape != (len(rows),) or (np.diff(ids, prepend=self.last_id) <= 0).any():
            raise GalleryError(f"ids of shape {ids.shape} for {len(rows)} vectors; give each a new id, ascending")
        if lists is None:
            self.faiss.add(rows)
        else:
            positions = np.arange(len(self.ids), len(self.ids) + len(rows))
            self.faiss.add_core(len(rows), *(faiss.swig_ptr(array) for array in (rows, positions, lists)))
            self.faiss.ntotal = len(self.ids) + len(rows)
        self.ids = np.concatenate([self.ids, ids])
        self._alive = np.concatenate([self._alive, np.ones(len(ids), bool)])
        self._live += len(ids)
        self._scopes = []

    def remove(self, ids: NDArray[np.int64]) -> int:
        """Pass over these ids from now on; returns how many were here."""
        positions = self._positions(ids)
        before = self._live
        self._alive[positions] = False
        self._live = int(np.count_nonzero(self._alive))
        self._scopes = []
        return before - self._live

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> SearchHits:
        """Find most of the ``k`` best; see :meth:`VectorIndex.search`.

        Where few ids are allowed, proportionally more lists or a wider stretch of the graph are visited;
        a row may still end in -1 before all that are allowed are found.
        """
        queries = as_queries(queries, self.dim, k)
        scope = self._scope_of(allowed)
        if not scope.allowed:
            return no_hits(len(queries), k)
        scores, positions = self.faiss.search(queries, k, params=scope.parameters)
        ids = self.ids[positions]  # a missing one, -1, takes the last id here, and loses it below
        if positions.min() < 0:
            scores[positions < 0], ids[positions < 0] = -np.inf, -1
        return SearchHits(scores, ids)

    def count(self, allowed: NDArray[np.int64]) -> int:
        """How many of these ids, int64 ``(M,)``, a search can find."""
        return self._scope_of(allowed).allowed

    def held(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the ids, int64 ``(M,)``, that are here and not removed, each once and ascending."""
        positions = self._positions(ids)
        held: NDArray[np.int64] = self.ids[positions[self._alive[positions]]]
        return held if (held[1:] > held[:-1]).all() else np.unique(held)

    def blocks(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]] | None:
        """These ids, int64 ``(M,)``, all of them here, with their vectors; None if those are kept in no such form."""
        refined = isinstance(self.faiss, faiss.IndexRefine)
        flat: Any = self.faiss.refine_index if refined else getattr(self._base, "storage", None)
        flat = flat and faiss.downcast_index(flat)
        if not isinstance(flat, faiss.IndexFlat):
            return None
        rows = _swig.rev_swig_ptr(flat.get_xb(), flat.ntotal * self.dim).reshape(-1, self.dim)
        return gathered(ids, rows, self._positions(ids))

    def refill(
        self, count: int, blocks: Callable[[], Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]]
    ) -> None:
        """Hold just these vectors, without training again.

        Room is made before, as growing step by step would copy vectors and need up to twice their memory. So inverted
        lists of whole vectors see the blocks twice, first to be counted.

        Args:
            count: Number of vectors.
            blocks: Gives ids int64 ``(B,)`` and vectors float32 ``(B, D)``, in ascending order of id.
        """
        self.faiss.reset()
        self.ids, self._alive, self._live, self._scopes = np.empty(0, np.int64), np.empty(0, bool), 0, []
        self._reserve(count)
        if not isinstance(self.faiss, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
            for ids, vectors in blocks():
                self.add(ids, vectors)
            return
        inverted: Any = self.faiss
        lists = [inverted.quantizer.search(vectors, 1)[1].ravel() for _, vectors in blocks()]
        for place, size in enumerate(np.bincount(np.concatenate(lists)).tolist() if lists else []):
            inverted.invlists.resize(place, size)
            inverted.invlists.resize(place, 0)
        for (ids, vectors), places in zip(blocks(), lists, strict=True):
            self._append(ids, vectors, places)

    def compact(self, blocks: Callable[[], Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]]) -> None:
        """Let go of removed vectors; the others keep their codes, except that a graph is built again.

        Args:
            blocks: Gives all vectors that are not removed; see :meth:`refill`.
        """
        if isinstance(self._base, faiss.IndexHNSW):
            self.refill(len(self), blocks)
            return
        gone, _bitmap = selector(~self._alive)
        self._base.remove_ids(gone)
        if self._base is not self.faiss:
            self.faiss.refine_index.remove_ids(gone)
            self.faiss.ntotal = len(self)
        if isinstance(self._base, faiss.IndexIVF):
            self._renumber(np.cumsum(self._alive) - 1)
        self.ids = self.ids[self._alive]
        self._alive, self._scopes = np.ones(len(self), bool), []

    def _renumber(self, positions: NDArray[np.int64]) -> None:
        """Give the vectors in the inverted lists new positions, int64 by the old ones, after some were removed."""
        lists: Any = _swig.downcast_InvertedLists(self._base.invlists)
        for place in range(lists.nlist):
            size = lists.list_size(place)
            if not size:
                continue
            held = _swig.rev_swig_ptr(lists.get_ids(place), size)
            held[:] = positions[held]
            if isinstance(lists, _swig.BlockInvertedLists):
                # FAISS adds codes to a block by "or", but leaves there what it has removed from its end.
                packer, used = lists.packer, (size - 1) % lists.packer.nvec + 1
                codes = _swig.rev_swig_ptr(lists.get_codes(place), -(-size // packer.nvec) * packer.block_size)
                for free in range(used, packer.nvec):
                    blank = np.zeros(packer.code_size, np.uint8)
                    packer.pack_1(blank, free, codes[-packer.block_size :].reshape(1, -1))

    def _reserve(self, count: int) -> None:
        """Make room for whole vectors, outside inverted lists."""
        parts = [self._base, self._base.storage if isinstance(self._base, faiss.IndexHNSW) else None]
        parts += [self.faiss.refine_index] if isinstance(self.faiss, faiss.IndexRefine) else []
        for part in map(faiss.downcast_index, filter(None, parts)):
            if isinstance(part, faiss.IndexFlatCodes):
                part.codes.resize(count * part.code_size)
                part.codes.resize(0)

    def save(self, folder: Path) -> None:
        """Write the index and its ids into a folder; removed vectors come back on loading until :meth:`refill`.

        Raises:
            OSError: If the disk is full.
        """
        # Left to open the file itself, FAISS would not notice that the disk is full when it closes it.
        with (folder / INDEX).open("wb") as file:
            faiss.write_index(self.faiss, _swig.PyCallbackIOWriter(file.write))
        save_array(folder / IDS, self.ids)
        (folder / PARAMETERS).write_text(json.dumps(self.parameters))

    @classmethod
    def load(cls, folder: Path, dim: int) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            GalleryError: If it is damaged, or another kind of index, or made for other dimensions.
        """
        path = folder / INDEX
        length = path.stat().st_size
        # A count in the file may promise no more than the file holds, whatever it says; but tables that are
        # computed on reading count too: 16 floats per centroid and subquantizer, of which each has a dimension.
        limit = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(16 * length)
        try:
            stored = faiss.read_index(str(path))
        except (RuntimeError, MemoryError) as error:
            path.open("rb").close()  # in case it only could not be opened
            raise GalleryError(f"{path}: damaged index; {_MEND}") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)
        index = cls(stored, _read_parameters(folder / PARAMETERS))
        if stored.d != dim or stored.metric_type != faiss.METRIC_INNER_PRODUCT or not index._is_complete():
            raise GalleryError(f"{path}: holds another kind of index; {_MEND}")
        ids: NDArray[np.int64] = map_array(folder / IDS, np.int64, (stored.ntotal,))
        if (ids[1:] <= ids[:-1]).any():
            raise GalleryError(f"{folder / IDS}: ids are not ascending; {_MEND}")
        index.ids, index._alive, index._live = np.array(ids), np.ones(len(ids), bool), len(ids)
        return index

    def _is_complete(self) -> bool:
        """Whether it is a kind that can be searched with these parameters, both its stages alike."""
        base, needed = self._base, set()
        if isinstance(base, faiss.IndexIVF):
            needed = {"nprobe"}
        elif isinstance(base, faiss.IndexHNSW):
            needed = {"efSearch"}
        elif not isinstance(base, _swig.IndexRaBitQ):
            return False
        if base is not self.faiss:
            needed |= {"k_factor"} & self.parameters.keys()
        same = (base.d, base.ntotal, base.metric_type) == (self.faiss.d, self.faiss.ntotal, self.faiss.metric_type)
        return bool(self.faiss.is_trained and base.is_trained and same and self.parameters.keys() == needed)

    def _positions(self, ids: NDArray[np.int64]) -> NDArray[np.intp]:
        if not len(self.ids):
            return np.empty(0, np.intp)
        ids = np.asarray(ids, np.int64)
        positions = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        found: NDArray[np.intp] = positions[self.ids[positions] == ids]
        return found

    def _scope_of(self, allowed: NDArray[np.int64] | None) -> _Scope:
        for known, scope in self._scopes:
            if known is allowed:
                return scope
        alive = self._alive if allowed is None else self._alive & is_among(self.ids, np.asarray(allowed, np.int64))
        scope = self._scope(alive)
        if allowed is None or not allowed.flags.writeable:  # or else its elements may be others the next time
            self._scopes = [(allowed, scope), *self._scopes[: _SCOPES - 1]]
        return scope

    def _scope(self, alive: NDArray[np.bool_]) -> _Scope:
        """What FAISS needs for a search among some positions, bool ``(N,)``.

        Where they are a share of all, visiting ``1 / share`` times as much compares with as many.
        """
        count = int(np.count_nonzero(alive))
        share = count / len(alive) if count else 1.0
        chosen: dict[str, Any] = {}
        bitmap = None
        if count < len(alive):
            chosen["sel"], bitmap = selector(alive)
        nprobe, width = self._parameters.get("nprobe"), self._parameters.get("efSearch")
        if nprobe is not None:
            kind = _swig.IVFSearchParameters
            chosen["nprobe"] = min(math.ceil(nprobe / share), self._base.nlist)
        elif width is not None:
            kind = _swig.SearchParametersHNSW
            chosen["efSearch"] = min(math.ceil(width / share), len(self.ids))
        else:
            kind = _swig.RaBitQSearchParameters
        parameters = kind(**chosen)
        if self._base is not self.faiss:
            factor = self._parameters.get("k_factor", 1)
            parameters = _swig.IndexRefineSearchParameters(k_factor=factor, base_index_params=parameters)
        return _Scope(count, parameters, bitmap)


class _Scope(NamedTuple):
    """Positions to be searched among: how many, FAISS' parameters, and the bitmap to which these point."""

    allowed: int
    parameters: Any
    bitmap: NDArray[np.uint8] | None


def _read_parameters(path: Path) -> dict[str, int]:
    try:
        stored = json.loads(path.read_bytes())
        if not isinstance(stored, dict) or not stored.keys() <= _PARAMETERS:
            raise ValueError(f"search parameters {stored!r}")
        if not all(type(value) is int and 0 < value <= 1 << 20 for value in stored.values()):
            raise ValueError(f"search parameters {stored!r}")
    except OSError as error:
        raise GalleryError(f"{path}: {error.strerror}; {remedy(error, _MEND)}") from error
    except (ValueError, RecursionError) as error:
        raise GalleryError(f"{path}: {error}; {_MEND}") from error
    return stored
