"""Which items are copies of each other, as far as their gradients can tell."""

from __future__ import annotations

import numpy as np

from training.sampling.clustering import Floats, Labels


def duplicate_groups(vectors: Floats, tolerance: float) -> list[Labels]:
    """Groups of nearly equal vectors, largest first.

    A vector joins the first leader from which it differs by at most ``tolerance`` times the leader's length; one
    that joins none becomes a leader. They are visited along the direction in which they vary most, so that only
    those that are close in it are compared.

    Args:
        vectors: Gradients or sketches, ``(N, m)``, all at the same weights. Vectors of length 0 join nobody.
        tolerance: See above.

    Returns:
        Item indices, the leader first; groups of one are left out.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    centered = vectors - vectors.mean(axis=0)
    places = vectors @ np.linalg.eigh(centered.T @ centered)[1][:, -1]  # no farther apart than the vectors
    order = np.argsort(places, kind="stable")
    rows, places, reach = vectors[order], places[order], tolerance * lengths[order]
    slack = 1e-6 * lengths.max(initial=0.0)  # of rounding, where a tolerance is tiny
    free = lengths[order] > 0
    groups = []
    for leader in range(len(order)):
        if free[leader]:
            end = np.searchsorted(places, places[leader] + reach[leader] + slack, side="right")
            near = leader + np.flatnonzero(free[leader:end])
            near = near[np.linalg.norm(rows[near] - rows[leader], axis=1) <= reach[leader] + slack]
            free[near] = False
            if len(near) > 1:
                groups.append(order[near])
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))
