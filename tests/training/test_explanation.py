from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.models.explanation import Explanation, explain, overlay

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


def scaled(of: DualEncoder, features: torch.Tensor) -> torch.Tensor:
    """The embedding before it is scaled, over the length by which it will be."""
    raw = of.image_tower.head(features)
    if of.image_tower.absolute:
        raw = raw.abs()
    return raw / raw.norm(dim=-1, keepdim=True).detach()


def seen(found: Explanation) -> torch.Tensor:
    return torch.from_numpy(np.array(found.view)).permute(2, 0, 1)[None]


def test_shares_of_a_long_vector_and_the_bias_sum_to_the_dot_product(picture: Image.Image) -> None:
    """small-cnn's grid goes through a linear head: map, bias and an all-average grid make up the score, exactly."""
    of = model()
    torch.nn.init.normal_(of.image_tower.head[-1].bias)
    found = explain(of, picture, "a red disc")
    with torch.no_grad():
        grid = of.image_tower.backbone(seen(found), None)[0].view(1, 128, 3, 3)
        average = grid.mean((2, 3), keepdim=True).expand_as(grid).flatten(1)
        length = of.image_tower.head(grid.flatten(1)).norm()
        constant = of.image_tower.head(average) @ of.encode_texts(["a red disc"]).T / length
    assert found.heat.shape == (3, 3)
    assert found.heat.sum() + float(constant) == pytest.approx(found.score, abs=1e-5)


def test_shares_under_mean_pooling_are_what_each_patch_alone_would_score(picture: Image.Image) -> None:
    of = model(encoder="torchvision:resnet18@none", size=96)
    torch.nn.init.normal_(of.image_tower.head[-1].bias)
    found = explain(of, picture, "a red disc")
    with torch.no_grad():
        patches = of.image_tower.backbone(seen(found), None)[0][0]  # (9, F)
        dots = of.image_tower.head(patches) @ of.encode_texts(["a red disc"])[0]  # (9,)
        length = of.image_tower.head(patches.mean(0)).norm()
    np.testing.assert_allclose(found.heat.ravel(), (dots - dots.mean()) / (9 * length), atol=1e-5)
    assert float(dots.mean() / length) == pytest.approx(found.score, abs=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "order"])
def test_maps_equal_one_backward_pass_per_text(similarity: str, picture: Image.Image) -> None:
    of = model(similarity)
    text = "a blue square"
    found = explain(of, picture, text)
    maps = []
    for words in (text, "blue square", "a square", "a blue"):
        grid = of.image_tower.backbone(seen(found), None)[0].detach().view(1, 128, 3, 3).requires_grad_()
        of.similarity.pairs(scaled(of, grid.flatten(1)), of.encode_texts([words])).sum().backward()
        assert grid.grad is not None
        maps.append(((grid - grid.mean((2, 3), keepdim=True)) * grid.grad).sum(1)[0].detach().numpy())
    np.testing.assert_allclose(found.heat, maps[0], atol=1e-5)
    for n in range(3):
        np.testing.assert_allclose(found.word_heat[n], maps[0] - maps[n + 1], atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "order"])
@pytest.mark.parametrize("pooling", ["max", "mean+max", "gpo"])
def test_any_pooling_and_head(similarity: str, pooling: str, picture: Image.Image) -> None:
    of = model(similarity, encoder="torchvision:resnet18@none", size=96, pooling=pooling, head="mlp", hidden=16)
    found = explain(of, picture, "a red disc")
    direct = of.similarity.scores(of.encode_images([picture]), of.encode_texts(["a red disc"]))
    assert found.score == pytest.approx(float(direct), abs=1e-5)
    assert np.isfinite(found.word_heat).all()
    assert found.heat.any()


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


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(training: bool, picture: Image.Image) -> None:
    of = model().train(training)
    before = of.fingerprint()
    explain(of, picture, "a red disc")
    assert all(parameter.grad is None for parameter in of.parameters())
    assert all(module.training == training for module in of.modules())
    assert of.image_tower.config.normalise
    assert of.fingerprint() == before


def test_searches_at_the_same_time_do_not_disturb(picture: Image.Image) -> None:
    """Another thread's pictures go through the same layers between ours."""
    of = model()
    alone = explain(of, picture, "a red disc")
    others = [Image.new("RGB", (48, 48), (shade, 0, 0)) for shade in (0, 90, 250)]
    over = threading.Event()

    def search() -> None:
        while not over.is_set():
            of.encode_images(others)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        for _ in range(50):
            np.testing.assert_allclose(explain(of, picture, "a red disc").heat, alone.heat, atol=1e-5)
    finally:
        over.set()
        thread.join()


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


def test_class_tokens_are_no_patches(picture: Image.Image, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTModel(transformers.ViTConfig(image_size=48, patch_size=16, **sizes)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    of = model(encoder=f"hf:{tmp_path}", size=48)
    found = explain(of, picture, "a red disc")
    with torch.no_grad():
        tokens = of.image_tower.backbone(seen(found), None)[0][0]  # (1 + 9, F)
        raw = of.image_tower.head(tokens)
        dots = raw[1:] @ of.encode_texts(["a red disc"])[0]
    share = (dots - dots.mean()) / (10 * raw.mean(0).norm())
    np.testing.assert_allclose(found.heat, share.view(3, 3), atol=1e-5)


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
