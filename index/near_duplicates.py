"""Near duplicates among search results, shown once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError

_ROUNDING = 1e-6  # copies of a float32 vector must reach a threshold of 1
_BLOCK = 512  # results compared at once


def collapse(vectors: NDArray[np.float32], threshold: float, most: int | None = None) -> NDArray[np.int64]:
    """Group ranked results so that each near duplicate stands behind a better one.

    Best first, a result joins the first representative whose cosine with it is at least ``threshold``, or
    becomes a representative itself. Only representatives attract others, so a chain of small differences
    does not drag in what looks nothing like the first.

    Cosines are float32 matrix products, block by block; those too near the threshold for that are computed again in
    float64. Memory beyond the vectors grows with the representatives alone.

    Args:
        vectors: Those of the results, best first, float32 ``(m, D)``; of any length.
        threshold: Cosine, up to 1, from which two results count as the same.
        most: So many representatives are wanted; None makes as many as there are.

    Returns:
        int64 ``(m,)``: the position of each result's representative; its own if it is one; -1 for results beyond the
        last wanted representative that are like none of them.

    Raises:
        GalleryError: If a vector is not finite, or the threshold not a number up to 1.
    """
    if vectors.ndim != 2:
        raise GalleryError(f"near duplicates: vectors {vectors.shape}; give finite ones (m, D)")
    if not threshold <= 1:
        raise GalleryError(f"near duplicates: threshold {threshold}; give a cosine up to 1")
    cut = threshold - _ROUNDING
    representative = np.full(len(vectors), -1, np.int64)
    leaders: list[_Rows] = []
    left = len(vectors) if most is None else most
    for start in range(0, len(vectors), _BLOCK):
        free = _Rows.of(vectors, np.arange(start, min(start + _BLOCK, len(vectors))))
        for earlier in leaders:
            alike = free.alike(earlier, cut)
            found = alike.any(axis=1)
            representative[free.places[found]] = earlier.places[alike[found].argmax(axis=1)]
            free = free.at(np.flatnonzero(~found))
        alike = free.alike(free, cut) if left else np.zeros((0, 0), bool)
        own = np.full(len(free.places), -1)
        numbers = np.arange(len(own))
        for row in range(len(alike)):
            if own[row] < 0 and left:
                own[(own < 0) & (alike[:, row] | (numbers == row))] = row
                left -= 1
        representative[free.places] = np.where(own < 0, -1, free.places[own])
        if (own >= 0).any():
            leaders.append(free.at(np.flatnonzero(own == numbers)))
    return representative


@dataclass(frozen=True)
class _Rows:
    """Some of the results: all vectors, which of them these are, and these at length 1 in float32."""

    vectors: NDArray[np.float32]
    places: NDArray[np.int64]
    unit: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: NDArray[np.float32], places: NDArray[np.int64]) -> _Rows:
        rows = vectors[places]
        if not np.isfinite(rows).all():
            raise GalleryError(f"near duplicates: vectors {vectors.shape}; give finite ones (m, D)")
        return cls(vectors, places, _unit(rows).astype(np.float32))

    def at(self, wanted: NDArray[np.intp]) -> _Rows:
        return _Rows(self.vectors, self.places[wanted], self.unit[wanted])

    def alike(self, others: _Rows, cut: float) -> NDArray[np.bool_]:
        """Which of these have a cosine of at least ``cut`` with which of the others, bool ``(n, others)``."""
        cosines = self.unit @ others.unit.T
        found: NDArray[np.bool_] = cosines >= cut
        # A float32 product of unit vectors is off by less than this.
        slack = (self.unit.shape[1] + 4) * float(np.finfo(np.float32).eps)
        near, other = np.nonzero(np.abs(cosines - cut) <= slack)
        for start in range(0, len(near), _BLOCK):
            some = slice(start, start + _BLOCK)
            pairs = [_unit(of.vectors[of.places[at]]) for of, at in ((self, near[some]), (others, other[some]))]
            found[near[some], other[some]] = np.einsum("pd,pd->p", *pairs) >= cut
        return found


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """At length 1; a vector of length 0 stays."""
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return unit
