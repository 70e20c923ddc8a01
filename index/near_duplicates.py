"""Near duplicates among search results, shown once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError

_ROUNDING = 1e-6  # copies of a float32 vector must reach a threshold of 1


def collapse(vectors: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    """Group ranked results so that each near duplicate stands behind a better one.

    Best first, a result joins the first representative whose cosine with it is at least ``threshold``, or
    becomes a representative itself. Only representatives attract others, so a chain of small differences
    does not drag in what looks nothing like the first.

    Args:
        vectors: Those of the results, best first, float32 ``(m, D)``; of any length.
        threshold: Cosine, up to 1, from which two results count as the same.

    Returns:
        int64 ``(m,)``: the position of each result's representative; its own if it is one.

    Raises:
        GalleryError: If a vector is not finite, or the threshold not a number up to 1.
    """
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise GalleryError(f"near duplicates: vectors {vectors.shape}; give finite ones (m, D)")
    if not threshold <= 1:
        raise GalleryError(f"near duplicates: threshold {threshold}; give a cosine up to 1")
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    representative = np.full(len(unit), -1, np.int64)
    for position in range(len(unit)):
        if representative[position] < 0:
            representative[position] = position
            free = position + 1 + np.flatnonzero(representative[position + 1 :] < 0)
            same = unit[free] @ unit[position] >= threshold - _ROUNDING
            representative[free[same]] = position
    return representative
