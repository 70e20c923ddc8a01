from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index.errors import GalleryError
from index.relevance import Relevance

DIM = 24


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs(noise: float, hubs: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """300 images with three captions each; ``hubs`` draws some images towards what all captions have in common."""
    random = np.random.default_rng(0)
    common = random.standard_normal(DIM)
    meaning = random.standard_normal((300, DIM))
    pull = hubs * random.random((300, 1)) ** 4
    captions = np.repeat(meaning, 3, axis=0) + noise * random.standard_normal((900, DIM)) + (hubs > 0) * common
    return unit(captions), unit(meaning + pull * common), np.arange(900) // 3


def test_hits_of_unseen_captions_are_as_likely_as_said() -> None:
    captions, images, owner = pairs(0.7)
    relevance = Relevance.fit(captions, images, owner, images)
    scores = captions @ images.T
    probability = relevance.probabilities(captions, scores, len(images))
    relevant = owner[:, None] == np.arange(300)
    for low, high in ((0.05, 0.3), (0.3, 0.7), (0.7, 0.95)):
        within = (probability >= low) & (probability < high)
        assert relevant[within].mean() == pytest.approx(probability[within].mean(), abs=0.1)
    assert relevance.quality
    assert relevance.quality.images == 150
    # In ten times as many images, the same score is worth a tenth of the odds.
    more = relevance.probabilities(captions, scores, 2991)
    odds = [np.log(p / (1 - p)) for p in (probability[0, :5], more[0, :5])]
    np.testing.assert_allclose(odds[0] - odds[1], np.log(10), rtol=1e-6)


def test_a_query_bank_is_kept_only_where_it_helps() -> None:
    plain = Relevance.fit(*pairs(0.2), background=pairs(0.2)[1])
    assert plain.bank is None
    captions, images, owner = pairs(0.7, hubs=3.0)
    hubby = Relevance.fit(captions, images, owner, images)
    assert hubby.bank is not None
    scores = captions @ images.T
    before, after = (np.mean(of.argmax(axis=1) == owner) for of in (scores, scores - hubby.bank.hubness(images)))
    assert after > before


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    for name, hubs in (("plain", 0.0), ("hubs", 3.0)):
        captions, images, owner = pairs(0.7, hubs)
        relevance = Relevance.fit(captions, images, owner, images)
        (tmp_path / name).mkdir()
        relevance.save(tmp_path / name)
        loaded = Relevance.load(tmp_path / name, DIM)
        assert loaded.calibration == relevance.calibration
        np.testing.assert_array_equal(loaded.background, relevance.background)
        assert (loaded.bank is None) == (relevance.bank is None)
        if loaded.bank and relevance.bank:
            assert loaded.bank.beta == relevance.bank.beta
            np.testing.assert_array_equal(loaded.bank.vectors, relevance.bank.vectors)


def test_large_collections_are_sampled() -> None:
    random = np.random.default_rng(1)
    images = unit(random.standard_normal((3000, DIM)))
    captions = unit(np.repeat(images, 2, axis=0) + 0.1 * random.standard_normal((6000, DIM)))
    relevance = Relevance.fit(captions, images, np.arange(6000) // 2, images)
    assert len(relevance.background) == 1000
    assert relevance.quality
    assert relevance.quality.images == 500


@pytest.mark.parametrize("damage", ["calibration.json", "background.npy", "not JSON", "other dimensions"])
def test_damage_is_reported(tmp_path: Path, damage: str) -> None:
    captions, images, owner = pairs(0.7)
    Relevance.fit(captions, images, owner, images).save(tmp_path)
    if damage == "not JSON":
        (tmp_path / "calibration.json").write_text("[1]")
    elif damage == "other dimensions":
        with pytest.raises(GalleryError):
            Relevance.load(tmp_path, DIM - 1)
        return
    else:
        (tmp_path / damage).unlink()
    with pytest.raises(GalleryError) as refusal:
        Relevance.load(tmp_path, DIM)
    assert "\n" not in str(refusal.value)


def test_a_calibration_of_odd_values_is_refused(tmp_path: Path) -> None:
    captions, images, owner = pairs(0.7)
    Relevance.fit(captions, images, owner, images).save(tmp_path)
    path = tmp_path / "calibration.json"
    for change in ({"slope": None}, {"beta": "x"}, {"beta": -1.0}, {"more": 1}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(GalleryError):
            Relevance.load(tmp_path, DIM)
