from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.models.explanation import explain, overlay

WORDS = ["a red disc", "a blue square above a ring"]


def model(similarity: str = "cosine", **image: object) -> DualEncoder:
    torch.manual_seed(0)
    tower = ImageTowerConfig(**({"encoder": "small-cnn", "size": 48, "head": "linear"} | image))  # type: ignore[arg-type]
    config = ModelConfig(
        image=tower, text=TextTowerConfig(word_dim=8), dim=8, similarity=similarity, absolute=similarity == "order"
    )
    made = DualEncoder(config, WordTokenizer(WORDS, min_count=1, source="test"))
    for module in made.modules():  # batch norms that do something
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
    return made.eval()


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def test_the_score_is_that_of_the_search(picture: Image.Image) -> None:
    of = model()
    found = explain(of, picture, "a red disc")
    direct = of.encode_images([picture]).numpy() @ of.encode_texts(["a red disc"]).numpy().T
    assert found.score == pytest.approx(float(direct[0, 0]), abs=1e-5)
    assert found.words == ("a", "red", "disc")


def test_words_weigh_what_leaving_them_out_costs(picture: Image.Image) -> None:
    of = model()
    found = explain(of, picture, "a blue square")
    image = of.encode_images([picture])
    for n, rest in enumerate(("blue square", "a square", "a blue")):
        lost = found.score - float(of.similarity.scores(image, of.encode_texts([rest])))
        assert found.word_weights[n] == pytest.approx(lost, abs=1e-5)
    alone = explain(of, picture, "disc")
    assert alone.word_weights == pytest.approx([alone.score])


def test_shares_of_a_linear_tower_sum_to_what_the_patches_add(picture: Image.Image) -> None:
    """small-cnn's grid goes through a linear head: the map sums to the change against an all-average grid, exactly."""
    of = model()
    of.image_tower.config = ImageTowerConfig(**(vars(of.image_tower.config) | {"normalise": False}))
    found = explain(of, picture, "a red disc")
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(found.view)).permute(2, 0, 1)[None]
        grid = of.image_tower.backbone(pixels, None)[0].view(1, 128, 3, 3)
        flat = grid.mean((2, 3), keepdim=True).expand_as(grid).reshape(1, -1)
        text = of.encode_texts(["a red disc"])
        change = (of.image_tower.project(grid.flatten(1)) - of.image_tower.project(flat)) @ text.T
    assert found.heat.shape == (3, 3)
    assert found.heat.sum() == pytest.approx(float(change), abs=1e-4)


@pytest.mark.parametrize("similarity", ["cosine", "order"])
def test_maps_equal_one_backward_pass_per_text(similarity: str, picture: Image.Image) -> None:
    of = model(similarity)
    text = "a blue square"
    found = explain(of, picture, text)
    pixels = torch.from_numpy(np.array(found.view)).permute(2, 0, 1)[None]
    maps = []
    for words in (text, "blue square", "a square", "a blue"):
        grid = of.image_tower.backbone(pixels, None)[0].detach().view(1, 128, 3, 3).requires_grad_()
        embedding = of.image_tower.project(grid.flatten(1))
        of.similarity.pairs(embedding, of.encode_texts([words])).sum().backward()
        assert grid.grad is not None
        maps.append(((grid - grid.mean((2, 3), keepdim=True)) * grid.grad).sum(1)[0].detach().numpy())
    np.testing.assert_allclose(found.heat, maps[0], atol=1e-5)
    for n in range(3):
        np.testing.assert_allclose(found.word_heat[n], maps[0] - maps[n + 1], atol=1e-5)


def test_the_patch_with_the_evidence_is_found() -> None:
    """The head reads one channel of one patch alone, along the text."""
    of = model()
    text = of.encode_texts(["a red disc"])[0]
    head = of.image_tower.head[-1]
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[32:, :16] = 255
    with torch.no_grad():
        grid = of.image_tower.backbone(torch.from_numpy(pixels).permute(2, 0, 1)[None], None)[0].view(128, 3, 3)
        channel = int((grid[:, 2, 0] - grid.mean((1, 2))).argmax())
        weight = torch.zeros(8, 128, 3, 3)
        weight[:, channel, 2, 0] = text
        head.weight.copy_(weight.flatten(1))
        head.bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(0)))
    found = explain(of, Image.fromarray(pixels), "a red disc")
    assert np.unravel_index(int(found.heat.argmax()), (3, 3)) == (2, 0)


def test_what_cannot_be_explained(picture: Image.Image) -> None:
    with pytest.raises(InputError, match="no words"):
        explain(model(), picture, " ")
    with pytest.raises(InputError, match="precomputed features"):
        explain(model(encoder="precomputed", feature_dim=4), picture, "disc")
    with pytest.raises(InputError, match="no square grid"):
        explain(model(size=16), picture, "disc")


def test_nothing_is_left_behind(picture: Image.Image) -> None:
    of = model()
    explain(of, picture, "a red disc")
    assert all(parameter.grad is None for parameter in of.parameters())
    assert not of.training
    assert not of.image_tower.backbone.network[-1]._forward_pre_hooks


def test_a_hub_network_with_several_layers(
    picture: Image.Image, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSE_MODELS", str(shared_models))
    of = model(
        encoder="hf:timm/tf_efficientnet_lite0.in1k",
        size=64,
        frozen=True,
        layers=(-1, -2),
        pooling="mean+max",
        normalise_features="standardise",
    )
    found = explain(of, picture, "a blue square")
    assert (found.heat.shape, found.word_heat.shape) == ((2, 2), (3, 2, 2))
    assert found.heat.any()


def test_overlay_is_bright_where_the_heat_is() -> None:
    view = Image.new("RGB", (32, 32), (100, 100, 100))
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0], heat[3, 3] = 2, -5
    shown = overlay(view, heat, 128)
    assert shown.size == (128, 128)
    pixels = np.asarray(shown).astype(int)
    assert pixels[8, 8].sum() > 300 > pixels[120, 120].sum()
    assert shown.tobytes() == overlay(view, heat, 128).tobytes()
    assert np.asarray(overlay(view, 0 * heat)).max() < 60
