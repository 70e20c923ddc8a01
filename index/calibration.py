"""Which of the results are relevant: from similarities to probabilities that mean the same for every query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError

MIN_CAPTIONS = 50
"""Fewer labelled captions than this say too little about two parameters and a cut."""
SHOWN = 10
"""Brier score and calibration error are taken over so many best results per caption."""

_STD_FLOOR = 1e-6  # what float32 can tell apart of cosines; a constant background has a spread of 0
_RIDGE = 1e-2  # bounds the slope where relevant and irrelevant scores do not overlap; negligible where they do
_BINS = 10


@dataclass(frozen=True)
class Quality:
    """What a calibration is worth on captions that it has not been fitted to, each with one relevant image.

    Attributes:
        precision: Share of the kept results, over all captions, that are the caption's own image.
        recall: Share of the captions whose own image is kept.
        f1: Harmonic mean of the two.
        kept: Mean number of results kept per caption.
        brier: Mean squared difference of probability and truth over the :data:`SHOWN` best per caption.
        ece: Expected calibration error over the same results: mean absolute difference between probability
            and share of relevant ones in ten equally wide bins, weighted by their numbers.
        captions: Number of captions.
        images: Number of images that each caption was compared with.
    """

    precision: float
    recall: float
    f1: float
    kept: float
    brier: float
    ece: float
    captions: int
    images: int


@dataclass(frozen=True)
class Calibration:
    """A two-parameter logistic from z-scores (:func:`z_scores`) to probabilities of relevance.

    ``slope * z + offset`` is the log-likelihood ratio ``log p(z | relevant) - log p(z | irrelevant)``, which
    does not depend on how many images there are. Their number ``N`` enters by Bayes' rule, the prior being
    one relevant image::

        P(relevant | z, N) = sigmoid(slope * z + offset - log(N - 1))

    so what was fitted on 1,000 images says for 1,000,000 that the same score is worth less. Each result is
    judged by itself: several relevant images do not take probability from each other, as they would in a
    softmax over the gallery, but where they are many all their probabilities are too low.

    Attributes:
        slope: Change of the log-likelihood ratio per unit of z, positive.
        offset: Log-likelihood ratio at z = 0.
        cut: Results with at least this probability are kept.
        quality: What to expect of it, measured on other captions; None if it was not measured.
    """

    slope: float
    offset: float
    cut: float
    quality: Quality | None = None

    def probabilities(self, z: NDArray[Any], images: int) -> NDArray[np.float64]:
        """Probability that each result is relevant.

        Args:
            z: z-scores of any shape; -inf, where there is no result, gets 0.
            images: Number of images that were searched; below 2 counts as 2.

        Returns:
            float64 in the shape of ``z``, increasing with it.
        """
        return _sigmoid(self.slope * np.asarray(z, np.float64) + self.offset - np.log(max(images - 1, 1)))

    def measure(self, z: NDArray[Any], owner: NDArray[np.integer[Any]]) -> Quality:
        """How good probabilities and cut are on captions; arguments as for :func:`fit_calibration`."""
        relevant = _relevant(z, owner)
        captions, images = z.shape
        probability = self.probabilities(z, images)  # (Q, N)
        kept = probability >= self.cut
        found, total = int((kept & relevant).sum()), int(kept.sum())

        shown = np.argpartition(-probability, min(SHOWN, images) - 1, axis=1)[:, :SHOWN]
        p = np.take_along_axis(probability, shown, axis=1).ravel()
        truth = np.take_along_axis(relevant, shown, axis=1).ravel()
        bins = (p * _BINS).astype(np.int64)
        return Quality(
            precision=found / max(total, 1),
            recall=found / captions,
            f1=2 * found / (total + captions),
            kept=total / captions,
            brier=float(np.mean((p - truth) ** 2)),
            ece=float(np.abs(np.bincount(bins, p - truth)).sum() / len(p)),
            captions=captions,
            images=images,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, from which :meth:`from_json` makes an equal calibration."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            GalleryError: If fields are missing, unknown or not finite numbers.
        """
        try:
            quality = stored["quality"] and Quality(**stored["quality"])
            made = cls(**{**stored, "quality": quality})
            if np.isfinite([made.slope, made.offset, made.cut, *(stored["quality"] or {}).values()]).all():
                return made
        except (KeyError, TypeError):
            pass
        raise GalleryError("calibration: fields are missing or wrong; calibrate the gallery again")


def z_scores(scores: NDArray[Any], background: NDArray[Any]) -> NDArray[np.float64]:
    """Similarities in standard deviations above what the same query has with the gallery at large.

    ``z = (s - mean) / std`` takes out the level and spread that a query has with everything, so what was
    fitted on texts holds for queries by picture too, whose similarities are on another scale.

    Args:
        scores: Similarities ``(Q, k)``; -inf where there is no result.
        background: The queries' similarities to a fixed sample of the gallery, ``(Q, B)``; B of about 1,000
            is plenty.

    Returns:
        float64 ``(Q, k)``. A background of equal scores counts as one with a spread of 1e-6.

    Raises:
        GalleryError: If shapes disagree or the background is empty or not finite.
    """
    if background.ndim != 2 or not background.shape[1] or not np.isfinite(background).all():
        raise GalleryError(f"calibration: background scores {background.shape}; give finite ones (Q, B), B at least 1")
    if scores.ndim != 2 or len(scores) != len(background):
        raise GalleryError(f"calibration: scores {scores.shape}, background {background.shape}; give a row per query")
    mean = background.mean(axis=1, dtype=np.float64, keepdims=True)  # (Q, 1)
    std = background.std(axis=1, dtype=np.float64, keepdims=True)
    standard: NDArray[np.float64] = (scores - mean) / np.maximum(std, _STD_FLOOR)
    return standard


def calibrate(z: NDArray[Any], owner: NDArray[np.integer[Any]], seed: int = 0) -> Calibration:
    """Fit on the captions of one half of the images, and measure on captions and images of the other.

    Arguments and errors are those of :func:`fit_calibration`; ``seed`` draws the halves.
    """
    _relevant(z, owner)
    fitted, other = halves(owner, z.shape[1], seed)
    calibration = fit_calibration(z[np.ix_(*fitted[:2])], fitted[2])
    return replace(calibration, quality=calibration.measure(z[np.ix_(*other[:2])], other[2]))


def halves(
    owner: NDArray[np.integer[Any]], images: int, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]]:
    """Two random halves of the images; of each its captions, its images, and owners counted within it."""
    order = np.random.default_rng(seed).permutation(images)
    parts = []
    for rows in (np.sort(order[: images // 2]), np.sort(order[images // 2 :])):
        captions = np.flatnonzero(np.isin(owner, rows))
        parts.append((captions, rows, np.searchsorted(rows, owner[captions])))
    return parts


def fit_calibration(z: NDArray[Any], owner: NDArray[np.integer[Any]]) -> Calibration:
    """Fit the logistic by maximum likelihood, and the cut that maximises F1 on the same captions.

    All pairs take part: every caption has one relevant image among ``N``, so the log-odds of the fit differ
    from the log-likelihood ratio by exactly ``-log(N - 1)``, which enters as a constant and leaves slope and
    offset free of ``N``. Takes about 60 bytes per pair.

    Args:
        z: z-scores of captions and all images of a gallery, ``(Q, N)``.
        owner: ``(Q,)``, the column of each caption's own image; all others count as irrelevant.

    Raises:
        GalleryError: If there are too few captions, shapes disagree, something is not finite, or captions
            score no higher with their own images than with others.
    """
    relevant = _relevant(z, owner)
    slope, offset = _fit_logistic(np.asarray(z, np.float64), relevant, -np.log(z.shape[1] - 1))
    if not slope > 0:
        raise GalleryError("calibration: captions score no higher with their own images; use the gallery's model")
    calibration = Calibration(slope, offset, 0.0)
    return replace(calibration, cut=best_f1_cut(calibration.probabilities(z, z.shape[1]), relevant))


def best_f1_cut(values: NDArray[np.float64], relevant: NDArray[np.bool_]) -> float:
    """The threshold ``t`` for which keeping ``values >= t`` has the highest F1 over all pairs."""
    order = np.argsort(-values, axis=None)
    descending, found = values.ravel()[order], np.cumsum(relevant.ravel()[order])
    f1 = 2 * found / (np.arange(1, len(order) + 1) + found[-1])
    f1[:-1][descending[:-1] == descending[1:]] = -1  # equal values are kept or dropped together
    return float(descending[np.argmax(f1)])


def _fit_logistic(z: NDArray[np.float64], relevant: NDArray[np.bool_], prior: float) -> tuple[float, float]:
    """Slope and offset of ``P = sigmoid(slope * z + offset + prior)`` by Newton's method with halved steps."""

    def loss(parameters: NDArray[np.float64]) -> float:
        log_odds = parameters[0] * z + (parameters[1] + prior)
        return float(np.logaddexp(0, log_odds).sum() - log_odds[relevant].sum() + _RIDGE / 2 * parameters[0] ** 2)

    parameters = np.zeros(2)
    value = loss(parameters)
    for _ in range(100):
        p = _sigmoid(parameters[0] * z + (parameters[1] + prior))
        error, weight = p - relevant, p * (1 - p)
        gradient = np.array([np.vdot(error, z) + _RIDGE * parameters[0], error.sum()])
        wz = np.vdot(weight, z)
        hessian = np.array([[np.vdot(weight * z, z) + _RIDGE, wz], [wz, weight.sum()]])
        step = np.linalg.solve(hessian, gradient)
        # Where the curve is flat a full step overshoots; near the optimum the loss differs by rounding only.
        while (after := loss(parameters - step)) > value * (1 + 1e-12) and np.abs(step).max() > 1e-9:
            step /= 2
        parameters, value = parameters - step, after
        if np.abs(step).max() < 1e-9:
            break
    return float(parameters[0]), float(parameters[1])


def _sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without overflow at either end."""
    p: NDArray[np.float64] = np.exp(-np.logaddexp(0, -log_odds))
    return p


def _relevant(z: NDArray[Any], owner: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which pairs belong together, ``(Q, N)``, after a look at the arguments of the public functions."""
    if z.ndim != 2 or z.shape[1] < 2 or owner.shape != z.shape[:1] or owner.dtype.kind not in "iu":
        raise GalleryError(
            f"calibration: z-scores {z.shape} and {owner.dtype} owners {owner.shape}; give (Q, N), N at least 2, and "
            "integers (Q,)"
        )
    if len(z) < MIN_CAPTIONS:
        raise GalleryError(f"calibration: {len(z)} captions to fit or test with; give {2 * MIN_CAPTIONS} or more")
    if not np.isfinite(z).all() or (owner < 0).any() or (owner >= z.shape[1]).any():
        raise GalleryError(f"calibration: a score is not finite or an owner not within 0 to {z.shape[1] - 1}")
    relevant: NDArray[np.bool_] = np.arange(z.shape[1]) == owner[:, None]
    return relevant
