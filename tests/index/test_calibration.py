from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index.calibration import SHOWN, Calibration, calibrate, fit_calibration, halves, z_scores
from index.errors import GalleryError


def planted(
    captions: int, images: int, shift: float = 4.0, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Irrelevant z-scores from N(0, 1), relevant ones from N(shift, 1): the log-likelihood ratio is
    ``shift * z - shift ** 2 / 2``.
    """
    random = np.random.default_rng(seed)
    z = random.standard_normal((captions, images))
    owner = random.integers(0, images, captions)
    z[np.arange(captions), owner] += shift
    return z, owner


def naive_loss(slope: float, offset: float, z: NDArray[Any], owner: NDArray[Any]) -> float:
    loss = 0.5e-2 * slope**2
    for row, own in zip(z, owner, strict=True):
        for image, value in enumerate(row):
            p = 1 / (1 + math.exp(-(slope * value + offset - math.log(len(row) - 1))))
            loss -= math.log(p if image == own else 1 - p)
    return loss


def naive_measures(calibration: Calibration, z: NDArray[Any], owner: NDArray[Any]) -> dict[str, float]:
    kept = found = 0
    shown = []
    for row, own in zip(z, owner, strict=True):
        odds = [math.exp(calibration.slope * value + calibration.offset) / (len(row) - 1) for value in row]
        pairs = [(o / (1 + o), image == own) for image, o in enumerate(odds)]
        kept += sum(p >= calibration.cut for p, _ in pairs)
        found += sum(p >= calibration.cut and truth for p, truth in pairs)
        shown += sorted(pairs, key=lambda pair: -pair[0])[:SHOWN]
    ece = 0.0
    for n in range(10):
        inside = [(p, truth) for p, truth in shown if n / 10 <= p < (n + 1) / 10]
        ece += abs(sum(p for p, _ in inside) - sum(truth for _, truth in inside)) / len(shown)
    precision, recall = found / kept, found / len(z)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "kept": kept / len(z),
        "brier": sum((p - truth) ** 2 for p, truth in shown) / len(shown),
        "ece": ece,
        "captions": len(z),
        "images": z.shape[1],
    }


@pytest.mark.parametrize("images", [20, 300])
def test_recovers_a_planted_likelihood_ratio_whatever_the_gallerys_size(images: int) -> None:
    calibration = fit_calibration(*planted(2000, images))
    assert calibration.slope == pytest.approx(4, rel=0.05)
    assert calibration.offset == pytest.approx(-8, rel=0.05)


def test_fit_is_the_minimum_of_the_naive_loss() -> None:
    z, owner = planted(60, 8, shift=1.5)
    fit = fit_calibration(z, owner)
    least = naive_loss(fit.slope, fit.offset, z, owner)
    for slope, offset in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert least < naive_loss(fit.slope + slope, fit.offset + offset, z, owner)


def test_probabilities_are_those_of_bayes() -> None:
    calibration = Calibration(slope=2.0, offset=-3.0, cut=0.5)
    p = calibration.probabilities(np.array([[1.5, 2.5, -np.inf, 1e6, -1e6]]), 11)
    ratio = math.exp(2)
    expected = [1 / 11, (ratio / 11) / (ratio / 11 + 10 / 11), 0, 1, 0]  # at z = 1.5 only the prior counts
    np.testing.assert_allclose(p, [expected], rtol=1e-12)
    np.testing.assert_array_equal(calibration.probabilities(p, 1), calibration.probabilities(p, 2))


@pytest.mark.parametrize(("fitted", "searched"), [(50, 1000), (1000, 50)])
def test_stays_calibrated_in_a_gallery_of_another_size(fitted: int, searched: int) -> None:
    calibration = fit_calibration(*planted(500, fitted, shift=3, seed=1))
    z, owner = planted(500, searched, shift=3, seed=2)
    ignorant = replace(calibration, offset=calibration.offset + math.log((searched - 1) / (fitted - 1)))
    assert calibration.measure(z, owner).ece < 0.02
    assert ignorant.measure(z, owner).ece > 0.05


def test_measures_match_loops() -> None:
    z, owner = planted(80, 30, shift=2.5)
    calibration = replace(fit_calibration(z, owner), cut=0.4)
    z, owner = planted(70, 40, shift=2.5, seed=1)
    assert vars(calibration.measure(z, owner)) == pytest.approx(naive_measures(calibration, z, owner))


def test_the_cut_has_the_best_f1_of_all() -> None:
    z, owner = np.round(planted(60, 20, shift=2)[0], 1), planted(60, 20, shift=2)[1]  # rounded: with many ties
    calibration = fit_calibration(z, owner)
    every = np.unique(calibration.probabilities(z, 20))
    best = max(naive_measures(replace(calibration, cut=cut), z, owner)["f1"] for cut in every)
    assert calibration.measure(z, owner).f1 == pytest.approx(best)


def test_nothing_kept_is_no_division_by_zero() -> None:
    quality = Calibration(1.0, 0.0, cut=2.0).measure(*planted(50, 5))
    assert (quality.precision, quality.recall, quality.f1, quality.kept) == (0, 0, 0, 0)


def test_separable_scores_stay_finite() -> None:
    z, owner = np.zeros((100, 50)), np.arange(100) % 50
    z[np.arange(100), owner] = 1
    calibration = fit_calibration(z, owner)
    assert 5 < calibration.slope < 1e3
    assert calibration.measure(z, owner).f1 == 1
    assert calibration.measure(z, owner).ece < 0.01


def test_z_scores_take_out_scale_and_level_of_each_query() -> None:
    scores, background = np.array([[1.0, 2.0, -np.inf]]), np.array([[0.0, 0.0, 2.0, 2.0]])
    np.testing.assert_array_equal(z_scores(scores, background), [[0, 1, -np.inf]])
    np.testing.assert_allclose(z_scores(3 * scores - 5, 3 * background - 5), [[0, 1, -np.inf]])
    two = z_scores(np.vstack([scores, scores]), np.vstack([background, 10 * background]))
    np.testing.assert_allclose(two, [[0, 1, -np.inf], [-0.9, -0.8, -np.inf]])


def test_a_background_without_spread_gives_numbers() -> None:
    z = z_scores(np.full((2, 3), 0.25, np.float32), np.full((2, 9), 0.25, np.float32))
    np.testing.assert_array_equal(z, np.zeros((2, 3)))
    with pytest.raises(GalleryError, match="no higher"):
        fit_calibration(np.zeros((100, 3)), np.arange(100) % 3)


def test_z_scores_mend_what_a_flat_threshold_cannot() -> None:
    z, owner = planted(1000, 100)
    level = np.random.default_rng(3).normal(0, 5, (1000, 1))
    scores = (z + level) / 20
    raw, standard = calibrate(scores, owner), calibrate(z_scores(scores, scores), owner)
    assert raw.quality
    assert standard.quality
    assert standard.quality.f1 > raw.quality.f1 + 0.2


def test_halves_share_neither_images_nor_captions() -> None:
    owner = np.random.default_rng(0).integers(0, 21, 100)
    parts = halves(owner, 21, seed=4)
    for captions, images, own in parts:
        np.testing.assert_array_equal(images[own], owner[captions])
    assert sorted(np.concatenate([part[0] for part in parts])) == list(range(100))
    assert sorted(np.concatenate([part[1] for part in parts])) == list(range(21))
    assert not np.array_equal(halves(owner, 21, seed=5)[0][1], parts[0][1])


def test_quality_is_that_of_the_other_half() -> None:
    z, owner = planted(400, 40, shift=3)
    (captions, images, own), (others, other_images, other_own) = halves(owner, 40, 7)
    calibration = calibrate(z, owner, seed=7)
    assert replace(calibration, quality=None) == fit_calibration(z[np.ix_(captions, images)], own)
    assert calibration.quality == calibration.measure(z[np.ix_(others, other_images)], other_own)
    assert calibrate(z, owner, seed=8) != calibration


def test_json_brings_back_an_equal_calibration() -> None:
    measured = calibrate(*planted(200, 20))
    for calibration in (measured, replace(measured, quality=None)):
        assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration


@pytest.mark.parametrize(
    "change",
    [{"slope": "1"}, {"cut": math.nan}, {"more": 1}, {"quality": {"f1": 1.0}}, {"quality": 3}, {"slope": None}],
)
def test_damaged_json_is_refused(change: dict[str, Any]) -> None:
    stored = calibrate(*planted(200, 20)).to_json()
    with pytest.raises(GalleryError, match="calibrate the gallery again"):
        Calibration.from_json({**stored, **change})
    with pytest.raises(GalleryError):
        Calibration.from_json({"slope": 1.0})


def test_bad_input_is_refused_in_one_line() -> None:
    z, owner = planted(200, 20)
    spoilt = z.copy()
    spoilt[3, 4] = np.nan
    for case in (
        (z[:49], owner[:49]),
        (z, owner[1:]),
        (z[0], owner),
        (z[:, :1], owner * 0),
        (spoilt, owner),
        (z, owner - 1),
        (z, np.where(owner == 19, 20, owner)),
        (z, owner.astype(float)),
        (-z, owner),
    ):
        for function in (fit_calibration, calibrate):
            with pytest.raises(GalleryError, match=r"calibration: [^\n]*$"):
                function(*case)
    with pytest.raises(GalleryError, match="100 or more"):
        calibrate(z[:90], owner[:90])
    fit_calibration(z[:50], owner[:50])
    for scores, background in ((z, z[1:]), (z, z[:, :0]), (z, spoilt), (z[0], z), (z, z[0])):
        with pytest.raises(GalleryError):
            z_scores(scores, background)
