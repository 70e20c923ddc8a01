"""Hubness correction: images that are near to every query are put in their place by a bank of other queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError

BETAS = (5.0, 10.0, 20.0, 40.0, 80.0)
"""Inverse temperatures that :func:`choose_beta` tries."""

_BLOCK_ELEMENTS = 1 << 22  # scores of the bank that are held at once, 16 MB


@dataclass(frozen=True)
class QueryBank:
    """Querybank normalisation (Bogolin et al. 2022, "Cross Modal Retrieval with Querybank Normalisation").

    The inverted softmax divides ``exp(beta * s(q, g))`` by its sum over a bank of queries ``b``. Up to a
    monotone function that is, for every gallery item ``g``::

        s'(q, g) = s(q, g) - hubness(g),    hubness(g) = log(sum_b exp(beta * s(b, g))) / beta

    The dynamic inverted softmax corrects only the queries whose best item is the best one of some bank query
    too (section 3.3 of the paper): where no hub comes first there is nothing to mend.

    Attributes:
        vectors: Queries of the kind to be expected, but none that is to be judged by, float32 ``(B, D)``.
        beta: Inverse temperature; the larger, the more only the nearest bank query counts.

    Raises:
        GalleryError: If the bank is empty or not finite, or beta not positive.
    """

    vectors: NDArray[np.float32]
    beta: float

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not len(self.vectors) or not np.isfinite(self.vectors).all():
            raise GalleryError(f"query bank: vectors {self.vectors.shape}; give finite ones (B, D), 1 or more")
        if not 0 < self.beta < np.inf:
            raise GalleryError(f"query bank: beta is {self.beta}; give a positive number")

    def hubness(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """How near each gallery item is to the bank.

        Args:
            vectors: float32 ``(M, D)``.

        Returns:
            float32 ``(M,)``, in units of the similarity.
        """
        result = np.empty(len(vectors), np.float32)
        for rows, scores in self._blocks(vectors):
            top = scores.max(axis=1)
            total = np.exp(self.beta * (scores - top[:, None])).sum(axis=1, dtype=np.float64)  # at least 1
            result[rows] = top + np.log(total) / self.beta
        return result

    def activated(self, vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which gallery items come first for some query of the bank.

        Args:
            vectors: The whole gallery, float32 ``(M, D)``.

        Returns:
            bool ``(M,)``; of equal items the first counts.
        """
        best = np.full(len(self.vectors), -np.inf, np.float32)
        item = np.zeros(len(self.vectors), np.int64)
        for rows, scores in self._blocks(vectors):
            row = scores.argmax(axis=0)
            score = scores[row, np.arange(len(best))]
            item = np.where(score > best, rows.start + row, item)
            best = np.maximum(best, score)
        return np.isin(np.arange(len(vectors)), item)

    def _blocks(self, vectors: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Rows of the gallery and their similarities to the bank, float32 ``(m, B)``."""
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise GalleryError(f"query bank: of shape {self.vectors.shape} for vectors {vectors.shape}; rebuild it")
        step = max(1, _BLOCK_ELEMENTS // len(self.vectors))
        for start in range(0, len(vectors), step):
            rows = slice(start, start + step)
            yield rows, vectors[rows] @ self.vectors.T


def rescore(
    scores: NDArray[np.float32], hubness: NDArray[np.float32], activated: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Correct the similarities of candidates; their order may change, so sort again.

    Args:
        scores: Similarities, float32 ``(Q, m)``, in any order; -inf where there is no candidate.
        hubness: That of the same candidates, ``(Q, m)``, or ``(m,)`` if all queries have the same.
        activated: Whether they are :meth:`QueryBank.activated`, in the shape of ``hubness``; None corrects
            every query (inverted softmax), otherwise those whose best candidate is (dynamic inverted softmax).

    Returns:
        float32 ``(Q, m)``.
    """
    corrected = scores - hubness
    if activated is None:
        return corrected
    best = scores.argmax(axis=1)[:, None]  # (Q, 1)
    return np.where(np.take_along_axis(np.broadcast_to(activated, scores.shape), best, axis=1), corrected, scores)


def choose_beta(
    bank: NDArray[np.float32],
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    owner: NDArray[Any],
    *,
    dynamic: bool = True,
    betas: Sequence[float] = BETAS,
) -> float | None:
    """The beta with the highest R@1 on held-out queries, or None if none beats the plain scores.

    Args:
        bank: float32 ``(B, D)``.
        queries: Held-out queries, not those of the bank, float32 ``(Q, D)``.
        gallery: float32 ``(N, D)``.
        owner: ``(Q,)``, the gallery row that each query should find; a tie for the first place is a miss.
        dynamic: Whether it is for the dynamic inverted softmax.
        betas: What to try; of equally good ones the first is taken.
    """
    scores = queries @ gallery.T  # (Q, N)
    activated = QueryBank(bank, betas[0]).activated(gallery) if dynamic else None

    def hits(scores: NDArray[np.float32]) -> int:
        own = scores[np.arange(len(owner)), owner]
        return int(((scores >= own[:, None]).sum(axis=1) == 1).sum())

    best, most = None, hits(scores)
    for beta in betas:
        found = hits(rescore(scores, QueryBank(bank, beta).hubness(gallery), activated))
        if found > most:
            best, most = beta, found
    return best
