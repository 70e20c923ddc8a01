"""What a gallery knows about scores: a calibration, its background sample, and a query bank, kept together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from index.calibration import Calibration, Quality, calibrate, halves, z_scores
from index.errors import GalleryError
from index.querybank import QueryBank, choose_beta
from index.segment import map_array, save_array
from index.snapshot import Snapshot

CALIBRATION, BACKGROUND, BANK = "calibration.json", "background.npy", "querybank.npy"
BACKGROUND_SIZE, BANK_SIZE = 1000, 5000
_IMAGES = 1000


@dataclass(frozen=True)
class Relevance:
    """Made from captions whose own image is known, for the model that embedded both.

    Attributes:
        calibration: From z-scores to probabilities.
        background: A sample of the gallery, float32 ``(B, D)``, against which z-scores are taken.
        bank: For hubness correction, if that found more of the held-out captions' images.
    """

    calibration: Calibration
    background: NDArray[np.float32]
    bank: QueryBank | None

    @classmethod
    def fit(
        cls,
        captions: NDArray[np.float32],
        images: NDArray[np.float32],
        owner: NDArray[np.int64],
        background: NDArray[np.float32],
    ) -> Self:
        """Fit on one half of the images, measure on the other.

        Args:
            captions: float32 ``(C, D)``, at least 100.
            images: float32 ``(I, D)``; of more than 1,000 a sample is used.
            owner: int64 ``(C,)``, the row of ``images`` that each caption describes.
            background: Vectors of the gallery to be searched, float32 ``(N, D)``; a sample is kept.

        Raises:
            GalleryError: If there are too few captions, or the model does not tell them apart.
        """
        random = np.random.default_rng(0)
        chosen = np.sort(random.permutation(len(images))[:_IMAGES])
        kept = np.flatnonzero(np.isin(owner, chosen))
        images, captions, owner = images[chosen], captions[kept], np.searchsorted(chosen, owner[kept])
        # Scores of the labelled images are compared with each other's; those of a gallery may lie elsewhere.
        calibration = calibrate(z_scores(captions @ images.T, captions @ images[:BACKGROUND_SIZE].T), owner)
        # Other captions of the image looked for would make it a hub, so the halves share no image.
        (judging, judged, own), (others, _, _) = halves(owner, len(images), seed=0)
        beta = choose_beta(captions[others], captions[judging], images[judged], own, dynamic=False)
        bank = QueryBank(captions[np.sort(random.permutation(len(captions))[:BANK_SIZE])], beta) if beta else None
        sample = background[np.sort(random.permutation(len(background))[:BACKGROUND_SIZE])]
        return cls(calibration, sample, bank)

    def probabilities(
        self, queries: NDArray[np.float32], scores: NDArray[np.float32], count: int
    ) -> NDArray[np.float64]:
        """Probability that each result is relevant, float64 ``(Q, k)``.

        Args:
            queries: Embedded texts, float32 ``(Q, D)``.
            scores: Their results' similarities, float32 ``(Q, k)``.
            count: Number of items searched.
        """
        return self.calibration.probabilities(z_scores(scores, queries @ self.background.T), count)

    def save(self, folder: Path) -> None:
        """Write the files that :meth:`load` reads."""
        record = {**self.calibration.to_json(), "beta": self.bank.beta if self.bank else None}
        (folder / CALIBRATION).write_text(json.dumps(record, indent=1))
        save_array(folder / BACKGROUND, self.background)
        if self.bank:
            save_array(folder / BANK, self.bank.vectors)

    @classmethod
    def load(cls, folder: Path, dim: int) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            GalleryError: If it is damaged or of other dimensions.
        """
        path = folder / CALIBRATION
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            beta = record.pop("beta")
            bank = QueryBank(_vectors(folder / BANK, dim), float(beta)) if beta is not None else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, GalleryError):
                raise
            raise GalleryError(f"{path}: {error}; run vse index tune to make it again") from error
        return cls(Calibration.from_json(record), _vectors(folder / BACKGROUND, dim), bank)

    @property
    def cut(self) -> float:
        """Results of at least this probability are likely."""
        return self.calibration.cut

    @property
    def quality(self) -> Quality | None:
        """What to expect of the cut."""
        return self.calibration.quality


def sample(snapshot: Snapshot) -> NDArray[np.float32]:
    """At most 1,000 vectors of a gallery, drawn evenly and each time the same, float32 ``(B, D)``."""
    chosen = np.random.default_rng(0).permutation(snapshot.ids())[:BACKGROUND_SIZE]
    return snapshot.vectors(np.sort(chosen))


def _vectors(path: Path, dim: int) -> NDArray[np.float32]:
    try:
        rows = (path.stat().st_size - 128) // (4 * dim)  # numpy's header has 128 bytes
    except OSError as error:
        raise GalleryError(f"{path}: {error.strerror}; run vse index tune to make it again") from error
    return np.array(map_array(path, np.float32, (rows, dim)))
