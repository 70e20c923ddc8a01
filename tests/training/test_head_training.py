"""A linear image head trained anew: out of the model and back into it, and what chooses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from audited import draw, train
from torch import Tensor

from training.data.formats import load_corpus
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.robustness.linear import head_training
from training.robustness.linear.head_training import HeadPairs, HeadRecipe, TrainedHead
from training.robustness.linear.retrieval_heads import evaluate_head, train_head

TOWERS = ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8, min_count=1), dim=16)
STANDARDISED = replace(TOWERS, image=replace(TOWERS.image, normalise_features="standardise"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("pictures") / "pictures")


def a_model(data: str, out: Path, model: ModelConfig = TOWERS) -> DualEncoder:
    return DualEncoder.from_pretrained(train(data, out, model=model), "cpu")


@pytest.mark.parametrize("config", [TOWERS, STANDARDISED])
def test_heads_come_out_of_a_model_and_go_back_in(data: str, tmp_path: Path, config: ModelConfig) -> None:
    model, corpus = a_model(data, tmp_path / "run", config), load_corpus(data, "all")
    pairs = head_training.image_pairs(model, corpus)
    mean, std = pairs.moments()
    features = pairs.standardised(mean, std).features.double()
    weight, bias = head_training.current_head(model, mean, std)
    images, captions = encode_corpus(model, corpus)
    torch.testing.assert_close(F.normalize(features @ weight.T + bias, dim=1).float(), images)
    torch.testing.assert_close(captions, pairs.gallery)

    new = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (1.0, 1e12):
        head_training.set_head(model, scale * new, mean, std)
        model.save_pretrained(tmp_path / "new")
        again = DualEncoder.from_pretrained(tmp_path / "new", "cpu")
        images = encode_corpus(again, corpus)[0]
        torch.testing.assert_close(images, F.normalize(features @ new.T, dim=1).float(), rtol=1e-4, atol=1e-5)
        kept, none = head_training.current_head(again, mean, std)
        torch.testing.assert_close(kept / kept.norm(), new / new.norm(), rtol=1e-4, atol=1e-6)
        assert none.abs().max() < 1e-4 * kept.norm()


def a_problem(images: int = 60, width: int = 30, dim: int = 8) -> tuple[HeadPairs, HeadPairs]:
    """Captions are noisy linear images of the features, two for each."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, width, generator=generator)
    names = features @ torch.randn(width, dim, generator=generator) / width**0.5
    owner = torch.arange(images).repeat(2)
    gallery = F.normalize(names[owner] + 0.3 * torch.randn(2 * images, dim, generator=generator), dim=1)
    return HeadPairs(features, gallery, owner).held_out(0)


def test_images_keep_their_captions() -> None:
    pairs = HeadPairs(torch.arange(4.0)[:, None], torch.arange(8.0)[:, None], torch.tensor([3, 2, 1, 0, 0, 1, 2, 3]))
    some = pairs.images(torch.tensor([2, 0]))
    assert some.features.flatten().tolist() == [2, 0]
    assert some.gallery.flatten().tolist() == [1, 6, 3, 4]
    assert some.owner.tolist() == [0, 0, 1, 1]
    assert pairs.images(torch.tensor([1]), captions=1).gallery.flatten().tolist() == [2]
    with pytest.raises(InputError, match="4 images are too few"):
        pairs.held_out(0)


def test_held_out_images_choose_the_steps() -> None:
    pairs, held = a_problem()
    assert (len(pairs.features), len(held.features)) == (54, 6)
    seen: list[int] = []
    chosen = head_training.train(HeadRecipe(steps=24, batch=20), pairs, held, seed=3, progress=seen.append)
    assert seen == list(range(1, 25))
    found: dict[int, float] = {}

    def look(number: int, weight: Tensor) -> None:
        if number % 3 == 0:
            found[number] = head_training.clean_recall(weight, held)

    train_head(*pairs, steps=24, batch=20, seed=3, observe=look)
    assert chosen.steps == max(found, key=lambda number: found[number])
    assert evaluate_head(chosen.weight, *held).clean == max(found.values())


@pytest.mark.parametrize("attack", ["linf", "l2", "l1"])
def test_the_penalty_with_most_certified_recall_is_chosen(attack: str) -> None:
    pairs, held = a_problem()
    plain = head_training.train(HeadRecipe(), pairs, held).weight
    recipe = HeadRecipe("gradient", "margin", attack)
    heads = [head_training.train(replace(recipe, shares=(share,)), pairs, held, plain) for share in recipe.shares]
    radius = head_training.radii_kept(evaluate_head(plain, *held).radii[attack])[0]

    def certified(head: TrainedHead) -> float:
        return float((evaluate_head(head.weight, *held).radii[attack] > radius).double().mean())

    chosen = head_training.train(recipe, pairs, held, plain)
    assert certified(chosen) == max(map(certified, heads))
    assert chosen.share in recipe.shares


def test_a_share_of_one_weighs_the_penalty_of_plain_descent_like_a_unit_of_loss() -> None:
    pairs, held = a_problem()
    plain = head_training.train(HeadRecipe(), pairs, held).weight
    for regularizer, attack, norm in (("l2", "l2", plain.norm()), ("l1", "linf", plain.abs().sum())):
        assert head_training.penalty(plain, HeadRecipe("gradient", regularizer, attack), pairs) == pytest.approx(
            float(norm), rel=1e-5
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": "order"}, "order similarity is not linear"),
        ({"image": ImageTowerConfig(size=16, head="mlp")}, "an mlp head is not linear"),
        ({"image": ImageTowerConfig(size=16, head="none"), "dim": 128}, "has no head to train"),
    ],
)
def test_models_without_a_linear_head_are_refused(
    data: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = a_model(data, tmp_path / "run", replace(TOWERS, **change))
    with pytest.raises(InputError, match=message):
        head_training.image_pairs(model, load_corpus(data, "all"))
