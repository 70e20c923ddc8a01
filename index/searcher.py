"""Searching one state of a gallery, and following it to the next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.approximate_index import IDS, INDEX, PARAMETERS, ApproximateIndex
from index.errors import GalleryError, remedy
from index.files import FileRecord
from index.items import JSON
from index.manifest import Manifest, Part
from index.segment import check_part, map_array
from index.snapshot import Snapshot
from index.vector_index import METRICS, SearchHits, VectorIndex, as_queries, is_among, search_blocks

CURVE = "curve.json"
_MEND = "run vse index tune to make it again"
EXACT_AMONG = 10_000
"""Among so few ids, or a fiftieth of the gallery, every vector is compared: a tuned index would miss some."""


def load_index(snapshot: Snapshot, part: Part) -> ApproximateIndex:
    """Read a snapshot's tuned index as it was written.

    Raises:
        GalleryError: If it is damaged, or misses items that it should hold by then.
    """
    folder = check_part(snapshot.directory, part, (INDEX, IDS, PARAMETERS))
    try:
        # FAISS trusts what it reads, so damage would end the process.
        if FileRecord.of(folder / INDEX) != part.files[INDEX]:
            raise GalleryError(f"{folder / INDEX}: is not what was written; {_MEND}")
        index = ApproximateIndex.load(folder, snapshot.manifest.dim)
    except OSError as error:  # a writer may have just deleted it
        raise GalleryError(f"{folder / INDEX}: {error.strerror}; {remedy(error, _MEND)}") from error
    expected = snapshot.ids()
    expected = expected[expected <= index.last_id]
    if index.last_id >= snapshot.manifest.next_id or not is_among(expected, index.ids).all():
        raise GalleryError(f"{folder / IDS}: is of other items; {_MEND}")
    return index


def read_curve(directory: Path, part: Part) -> dict[str, JSON]:
    """How an index was chosen.

    Raises:
        GalleryError: If that is damaged.
    """
    path = check_part(directory, part, (CURVE,)) / CURVE
    try:
        curve = json.loads(path.read_bytes())
        if not isinstance(curve, dict):
            raise ValueError("is no JSON object")
    except OSError as error:
        raise GalleryError(f"{path}: {error.strerror}; {remedy(error, _MEND)}") from error
    except (ValueError, RecursionError) as error:
        raise GalleryError(f"{path}: {error}; {_MEND}") from error
    return curve


class Searcher:
    """The vectors of a snapshot, ready to be searched: all of them in memory, or in the gallery's tuned index.

    Args:
        snapshot: The state.
        index: The snapshot's index if it is in memory already.
    """

    def __init__(self, snapshot: Snapshot, index: VectorIndex | None = None) -> None:
        self._snapshot = snapshot
        self.index = self._load() if index is None else index

    def follow(self, snapshot: Snapshot) -> None:
        """Go on to a later snapshot, reading only what has changed unless its tuned index is another one."""
        former, self._snapshot = self._snapshot, snapshot
        if snapshot.manifest.index != former.manifest.index:
            self.index = self._load()
        else:
            self._catch_up(self.index, snapshot.gone_since(former))

    def nearest(self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None) -> SearchHits:
        """See :meth:`index.gallery.Gallery.nearest`."""
        if not isinstance(self.index, ApproximateIndex):
            return self.index.search(vectors, k, allowed)
        possible = len(self.index)
        if allowed is not None:
            few = max(EXACT_AMONG, possible // 50)
            if len(allowed) <= few or (possible := self.index.count(allowed)) <= few:
                return self._exhaustive(vectors, k, self.index.held(allowed))
        hits = self.index.search(vectors, k, allowed)
        if hits.ids.min(initial=0) >= 0:
            return hits
        # A graph may run dry, and the lists visited may hold too few: then there is only the long way.
        short = np.flatnonzero((hits.ids >= 0).sum(axis=1) < min(k, possible))
        if len(short):
            found = self._exhaustive(vectors[short], k, None if allowed is None else self.index.held(allowed))
            hits.scores[short], hits.ids[short] = found.scores, found.ids
        return hits

    def _exhaustive(self, vectors: NDArray[np.float32], k: int, among: NDArray[np.int64] | None) -> SearchHits:
        queries = as_queries(vectors, self.index.dim, k)
        blocks = None
        if isinstance(self.index, ApproximateIndex) and among is not None:
            blocks = self.index.blocks(among)  # in memory, if it keeps whole vectors
        return search_blocks(queries, k, blocks or self._snapshot.blocks(among=among))

    def _load(self) -> VectorIndex:
        state = self._snapshot.manifest
        index: VectorIndex | None = None
        if state.index and INDEX in state.index.files:
            try:
                index = load_index(self._snapshot, state.index)
            except GalleryError:
                # A writer may have put another index in its place since; the vectors stay readable.
                if Manifest.read(self._snapshot.directory).index == state.index:
                    raise
        if index is None:
            index = METRICS[state.metric](state.dim, state.items)
        held = index.live_ids()
        self._catch_up(index, held[~is_among(held, self._snapshot.ids())])
        return index

    def _catch_up(self, index: VectorIndex, gone: NDArray[np.int64]) -> None:
        if len(gone):
            index.remove(gone)
        # Ids only grow, so whatever is new comes after all that an index has ever held.
        for ids, vectors in self._snapshot.blocks(after=index.last_id):
            index.add(ids, vectors)


def index_lag(snapshot: Snapshot) -> int:
    """How many vectors the file of the tuned index lacks, or holds though they are removed, whichever is more."""
    part = snapshot.manifest.index
    if not part or IDS not in part.files:
        return 0
    held: NDArray[np.int64] = map_array(snapshot.directory / part.name / IDS, np.int64, None)
    last = int(held[-1]) if len(held) else 0
    fresh = sum(int((segment.ids[segment.alive] > last).sum()) for segment in snapshot.segments)
    return max(fresh, len(held) - (snapshot.manifest.items - fresh))
