from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from threading import Thread
from threading import enumerate as enumerate_threads

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from vse_app.attack_case import AttackRequest, AttackTarget
from vse_app.live_attack import Outcome, Progress, run
from vse_app.queries import Query
from vse_app.search_engine import Facts, SearchEngine

WORDS = ["red", "green", "blue", "disc", "ring", "star", "cross", "heart"]
COUNT = 12


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SearchEngine]:
    """Twelve noisy pictures, two of them with the same caption, and one without any."""
    torch.manual_seed(0)
    config = ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8), dim=8)
    DualEncoder(config, WordTokenizer(WORDS, min_count=1, source="test")).save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    paths, facts = [], {}
    for n in range(COUNT):
        path = tmp_path / f"photo{n:02}.png"
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        paths.append(path)
        caption = None if n == COUNT - 1 else f"{WORDS[n % 3]} {WORDS[3 + n % 5]}"
        facts[path] = Facts("red disc" if n < 2 else caption)
    with SearchEngine.open_or_create(tmp_path / "gallery", tmp_path / "model") as engine:
        engine.add(paths, facts)
        yield engine


def picture(engine: SearchEngine, item: int) -> Image.Image:
    return Image.open(engine.gallery.snapshot.item(item).path)


def attacked(engine: SearchEngine, request: AttackRequest, item: int | None = 4) -> tuple[list[Progress], Outcome]:
    image = picture(engine, item or 4)
    *steps, outcome = run(AttackTarget.of(engine), image, request, item)
    assert isinstance(outcome, Outcome)
    assert all(isinstance(step, Progress) for step in steps)
    return steps, outcome  # type: ignore[return-value]


def test_a_query_loses_its_caption(engine: SearchEngine) -> None:
    steps, found = attacked(engine, AttackRequest(epsilon=64 / 255, steps=10))
    image = engine.model.encode_images([picture(engine, 4)]).numpy()[0]
    captions = [item.caption for _, item in engine.gallery.items() if item.caption]
    scores = engine.model.encode_texts(captions).numpy() @ image
    own = np.array([caption == engine.gallery.snapshot.item(4).caption for caption in captions])
    assert found.among == len(captions)
    assert found.rank_before == 1 + (scores[~own] >= scores[own].max()).sum()
    assert found.rank_after > found.rank_before
    assert [row.before for row in found.before] == list(range(1, 11))
    assert [row.after for row in found.after] == list(range(1, 11))
    assert (
        next(row.after for row in sorted(found.after + found.before, key=lambda r: r.after) if row.own)
        == found.rank_after
    )
    assert [step.step for step in steps if not step.curve] == list(range(11))
    assert steps[-1].curve


def test_equal_captions_are_all_right_answers(engine: SearchEngine) -> None:
    _, found = attacked(engine, AttackRequest(epsilon=1 / 255, steps=1), item=1)
    assert sum(row.own for row in found.before) == 2


def test_hiding_and_lifting(engine: SearchEngine) -> None:
    vectors = engine.gallery.vectors(engine.gallery.snapshot.ids())
    for threat, text in (("gallery-owner", None), ("gallery-promote", "green heart")):
        words = text or engine.gallery.snapshot.item(4).caption or ""
        scores = vectors @ engine.model.encode_texts([words]).numpy()[0]
        _, found = attacked(engine, AttackRequest(threat, epsilon=64 / 255, steps=10, text=text))
        assert found.rank_before == 1 + (np.delete(scores, 3) >= scores[3]).sum()
        assert (
            found.rank_after > found.rank_before if threat == "gallery-owner" else found.rank_after < found.rank_before
        )
        assert found.among == COUNT
        ranks = [rank for _, rank in found.curve]
        assert ranks == sorted(ranks, reverse=threat == "gallery-promote")


def test_a_picture_from_outside(engine: SearchEngine) -> None:
    _, found = attacked(engine, AttackRequest(epsilon=64 / 255, steps=5), item=None)
    assert (found.rank_before, found.among) == (1, COUNT)  # what it finds today is what it should find
    _, found = attacked(
        engine, AttackRequest("gallery-promote", epsilon=64 / 255, steps=5, text="blue ring"), item=None
    )
    assert found.among == COUNT + 1
    with pytest.raises(InputError, match="only a picture of the gallery can be hidden"):
        attacked(engine, AttackRequest("gallery-owner", text="blue ring"), item=None)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 4 / 255), ("l2", 1.0), ("l1", 20.0), ("fourier-linf", 0.2)])
def test_the_change_is_as_small_as_was_asked(engine: SearchEngine, norm: str, epsilon: float) -> None:
    _, found = attacked(engine, AttackRequest(norm=norm, epsilon=epsilon, steps=5))
    if norm in found.norms:
        assert found.norms[norm] <= epsilon * (1 + 1e-5)
    assert found.curve[0] == (0.0, found.rank_before)
    assert any(radius == epsilon for radius, _ in found.curve)


def test_what_is_saved_has_the_rank_that_is_told(engine: SearchEngine) -> None:
    _, found = attacked(engine, AttackRequest(epsilon=32 / 255, steps=5))
    file = BytesIO()
    found.adversarial.save(file, "PNG")
    again = Image.open(BytesIO(file.getvalue()))
    captions = [item.caption for _, item in engine.gallery.items() if item.caption]
    scores = engine.model.encode_texts(captions).numpy() @ engine.model.encode_images([again]).numpy()[0]
    own = np.array([caption == engine.gallery.snapshot.item(4).caption for caption in captions])
    assert found.rank_after_8bit == 1 + (scores[~own] >= scores[own].max()).sum()
    assert found.difference.size == found.spectrum.size == found.clean.size == (16, 16)


def test_closing_or_cancelling_stops_at_once(engine: SearchEngine) -> None:
    target, image = AttackTarget.of(engine), picture(engine, 4)
    generator = run(target, image, AttackRequest(steps=200), 4)
    next(generator)
    generator.close()
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    assert len(list(run(target, image, AttackRequest(steps=200), 4, cancelled))) == 3
    assert not [thread for thread in enumerate_threads() if thread.name == "attack"]


def test_searches_beside_an_attack_are_what_they_were(engine: SearchEngine) -> None:
    before = engine.search([Query(text="red disc"), Query(like=2)])
    target, image = AttackTarget.of(engine), picture(engine, 4)
    thread = Thread(target=lambda: list(run(target, image, AttackRequest(steps=60), 4)))
    thread.start()
    while thread.is_alive():
        engine.model.encode_texts(["green star"])
        assert engine.search([Query(text="red disc"), Query(like=2)]) == before
    thread.join()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threat": "gossip"}, "unknown"),
        ({"epsilon": 8.0}, "write 8/255, not 8"),
        ({"epsilon": 0.0}, "above 0"),
        ({"epsilon": float("nan")}, "above 0"),
        ({"steps": 0}, "steps"),
        ({"steps": 1000}, "steps"),
        ({"norm": "l7"}, "norm"),
    ],
)
def test_senseless_requests(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        AttackRequest(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_search_is_needed_and_the_picture_must_be_there(engine: SearchEngine) -> None:
    with pytest.raises(InputError, match="write the search"):
        attacked(engine, AttackRequest("gallery-promote"), item=COUNT)
    with pytest.raises(InputError, match="no longer in the gallery"):
        list(run(AttackTarget.of(engine), picture(engine, 4), AttackRequest(), 999))
