from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

from training.errors import InputError
from training.models.config import ImageTowerConfig, TextTowerConfig
from training.models.image_tower import PixelBackbone, build_image_backbone
from training.models.similarity import ORDER
from training.models.text_tower import build_text_backbone
from training.models.tower import Tower

EFFICIENTNET, MOBILENET = "hf:timm/tf_efficientnet_lite0.in1k", "torchvision:mobilenet_v2"
MINILM = "hf:sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(autouse=True)
def _mirror(shared_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSE_MODELS", str(shared_models))


def image_tower(config: ImageTowerConfig, dim: int = 8) -> Tower:
    torch.manual_seed(0)
    return Tower(build_image_backbone(config), config, dim, absolute=False)


def pixels(size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize(("size", "cells"), [(32, 4), (64, 16), (96, 36), (50, 16)])
def test_the_small_cnn_takes_any_size(size: int, cells: int) -> None:
    tower = image_tower(ImageTowerConfig(size=size))
    assert tower.backbone.dim == 128 * cells
    assert tower(pixels(size)).shape == (2, 8)


@pytest.mark.parametrize(("encoder", "dim"), [(MOBILENET, 1280), (EFFICIENTNET, 1280), (f"{MOBILENET}@none", 1280)])
@pytest.mark.parametrize("pooling", ["mean", "mean+max", "gpo"])
def test_convolutional_networks_yield_a_grid(
    encoder: str, dim: int, pooling: Literal["mean", "mean+max", "gpo"]
) -> None:
    tower = image_tower(ImageTowerConfig(encoder=encoder, size=64, pooling=pooling))
    assert tower.backbone(pixels(64), None).values.shape == (2, 4, dim)
    torch.testing.assert_close(tower(pixels(64)).norm(dim=-1), torch.ones(2))


def test_pretrained_weights_are_really_loaded(shared_models: Path) -> None:
    from safetensors import safe_open

    for encoder, file, key in (
        (EFFICIENTNET, "tf_efficientnet_lite0.in1k/model.safetensors", "conv_stem.weight"),
        (MOBILENET, "mobilenet_v2/mobilenet_v2.safetensors", "features.0.0.weight"),
    ):
        with safe_open(str(shared_models / file), "pt") as weights:
            stem = weights.get_tensor(key).float()
        parameters = build_image_backbone(ImageTowerConfig(encoder=encoder)).parameters()
        torch.testing.assert_close(next(parameters), stem)


def test_transformers_of_torchvision_keep_their_width() -> None:
    config = ImageTowerConfig(encoder="torchvision:swin_t@none", size=64)
    assert build_image_backbone(config)(pixels(64), None).values.shape == (2, 4, 768)


def test_a_weights_file_may_be_named(tmp_path: Path, shared_models: Path) -> None:
    weights = shared_models / "mobilenet_v2" / "mobilenet_v2.safetensors"
    named = build_image_backbone(ImageTowerConfig(encoder=f"{MOBILENET}@{weights}"))
    found = build_image_backbone(ImageTowerConfig(encoder=MOBILENET))
    assert all(map(torch.equal, named.state_dict().values(), found.state_dict().values()))
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("cut", "other", "absent"):
        with pytest.raises(InputError, match=rf"^[^\n]*{name}[^\n]*$"):
            build_image_backbone(ImageTowerConfig(encoder=f"{MOBILENET}@{tmp_path}/{name}.safetensors"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random transformers: a ViT, a BERT, and a CLIP that holds both towers."""
    folder = tmp_path_factory.mktemp("tiny")
    narrow = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**narrow, "image_size": 32, "patch_size": 16}
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], resample=2)
    ViTModel(ViTConfig(**vision)).save_pretrained(folder / "vit")
    processor.save_pretrained(folder / "vit")
    BertModel(BertConfig(**narrow, vocab_size=50)).save_pretrained(folder / "bert")
    CLIPModel(CLIPConfig(text_config={**narrow, "vocab_size": 50}, vision_config=vision)).save_pretrained(
        folder / "clip"
    )
    processor.save_pretrained(folder / "clip")
    return folder


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_vision_transformers_bring_their_preprocessing(tiny: Path, name: str) -> None:
    tower = image_tower(ImageTowerConfig(encoder=f"hf:{tiny / name}"))
    assert isinstance(tower.backbone, PixelBackbone)
    own = tower.backbone.preprocessing
    assert (own.size, own.resize, own.mean, own.interpolation) == (32, 32, (0.1, 0.2, 0.3), "bilinear")
    assert tower.backbone(pixels(32), None).values.shape == (2, 5, 16)
    assert tower(pixels(32)).shape == (2, 8)


def test_a_size_that_the_network_cannot_take_is_refused(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"^hf:[^\n]*$"):
        build_image_backbone(ImageTowerConfig(encoder=f"hf:{tiny / 'vit'}", size=48))
    with pytest.raises(InputError, match="resize 32 is smaller"):
        build_image_backbone(ImageTowerConfig(size=64, resize=32))


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_text_encoders_ignore_padding(tiny: Path, name: str) -> None:
    backbone = build_text_backbone(TextTowerConfig(encoder=f"hf:{tiny / name}"), 16, 0).eval()
    ids = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    torch.testing.assert_close(backbone(ids, mask).values[0, :3], backbone(ids[:1, :3], None).values[0])


def test_half_precision_weights_are_loaded_as_float32() -> None:
    config = TextTowerConfig(encoder=MINILM)
    backbone = build_text_backbone(config, 384, 0)
    rebuilt = build_text_backbone(config, 384, 0, pretrained=False, architecture=backbone.architecture)
    assert {p.dtype for p in (*backbone.parameters(), *rebuilt.parameters())} == {torch.float32}


@pytest.mark.parametrize("pooling", ["mean", "max", "mean+max", "gpo"])
def test_precomputed_features_may_be_vectors_or_regions(pooling: Literal["mean", "max", "mean+max", "gpo"]) -> None:
    tower = image_tower(ImageTowerConfig(encoder="precomputed", feature_dim=6, pooling=pooling))
    regions = torch.randn(2, 5, 6)
    assert tower(regions).shape == (2, 8)
    vectors = regions[:, 0]
    torch.testing.assert_close(tower(vectors), tower(regions[:, :1]))


@pytest.mark.parametrize("encoder", ["small-cnn", MOBILENET])
def test_bytes_and_floats_agree_and_normalisation_is_inside(encoder: str) -> None:
    tower = image_tower(ImageTowerConfig(encoder=encoder, size=64)).eval()
    assert isinstance(tower.backbone, PixelBackbone)
    torch.testing.assert_close(tower(pixels(64)), tower(pixels(64) / 255))
    seen: list[torch.Tensor] = []
    tower.backbone.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower(pixels(64))
    own = tower.backbone.preprocessing
    byte = pixels(64)[1, 2, 3, 4].item()
    assert seen[0][1, 2, 3, 4].item() == pytest.approx((byte / 255 - own.mean[2]) / own.std[2], abs=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_pixels(frozen: bool) -> None:
    tower = image_tower(ImageTowerConfig(encoder=MOBILENET, size=64, frozen=frozen)).eval()
    values = (pixels(64) / 255).requires_grad_()
    tower(values)[:, 0].sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert (values.grad.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("encoder", [EFFICIENTNET, f"{MOBILENET}@none", "small-cnn"])
def test_training_keeps_the_batch_statistics_of_pretrained_backbones(encoder: str) -> None:
    tower = image_tower(ImageTowerConfig(encoder=encoder, size=64, head="mlp", hidden=4, dropout=0.5)).train()
    before = buffers(tower.backbone)
    tower(pixels(64)).sum().backward()
    after = buffers(tower.backbone)
    assert any("running_mean" in name for name in before)
    pretrained = encoder != "small-cnn"
    assert all(torch.equal(before[name], after[name]) for name in before) == pretrained
    assert tower.head.training
    assert all(module.training for module in tower.backbone.modules()) != pretrained
    assert all(p.grad is not None for p in tower.backbone.parameters())


def test_a_frozen_backbone_gets_no_gradients_and_its_head_does() -> None:
    tower = image_tower(ImageTowerConfig(encoder=MOBILENET, size=64, frozen=True)).train()
    features = tower.features(pixels(64)).values
    assert not features.requires_grad
    torch.autograd.backward(tower.project(features)[:, 0].sum())
    assert all(p.grad is None for p in tower.backbone.parameters())
    assert all(p.grad is not None for p in tower.head.parameters())
    assert tower.checksum == image_tower(tower.config).checksum  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "encoder",
    [
        "resnet",
        "hf:",
        "torchvision:",
        "torchvision:nonsense",
        "torchvision:mobilenet_v2@NOWHERE",
        "torchvision:shufflenet_v2_x0_5@none",
        "hf:nobody/nothing",
        "precomputed",
    ],
)
def test_unknown_image_encoders_are_refused_in_one_line(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSE_MODELS", str(tmp_path))
    with pytest.raises(InputError, match=rf"^[^\n]*{encoder}[^\n]*$"):
        build_image_backbone(ImageTowerConfig(encoder=encoder))


@pytest.mark.parametrize("encoder", ["lstm", "hf:", "hf:nobody/nothing"])
def test_unknown_text_encoders_are_refused_in_one_line(encoder: str) -> None:
    with pytest.raises(InputError, match=rf"^[^\n]*{encoder}[^\n]*$"):
        build_text_backbone(TextTowerConfig(encoder=encoder), 8, 10)


@pytest.mark.parametrize("encoder", ["small-cnn", f"{MOBILENET}@none"])
def test_random_weights_cannot_be_frozen(encoder: str) -> None:
    with pytest.raises(InputError, match="frozen"):
        image_tower(ImageTowerConfig(encoder=encoder, size=32, frozen=True))


def test_heads() -> None:
    config = ImageTowerConfig(encoder="precomputed", feature_dim=6, hidden=5)
    values = torch.randn(3, 6)
    with pytest.raises(InputError, match="add a head"):
        image_tower(replace(config, head="none"))
    none = image_tower(replace(config, head="none"), dim=6)
    torch.testing.assert_close(none(values), values / values.norm(dim=1, keepdim=True))

    linear = image_tower(config)
    layer = linear.head[1]  # type: ignore[index]
    expected = values @ layer.weight.T + layer.bias
    torch.testing.assert_close(linear(values), expected / expected.norm(dim=1, keepdim=True))
    assert layer.weight.abs().max() <= (6 / (6 + 8)) ** 0.5
    assert (layer.bias == 0).all()
    raw = image_tower(replace(config, normalise=False, normalise_features="l2"))
    torch.testing.assert_close(raw(values), (values / values.norm(dim=1, keepdim=True)) @ layer.weight.T)

    standard = image_tower(replace(config, normalise=False, normalise_features="standardise")).train()
    scaled = (values - values.mean(dim=0)) / (values.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(standard(values), scaled @ layer.weight.T)

    mlp = image_tower(replace(config, head="mlp"))
    assert [p.shape for p in mlp.head.parameters() if p.ndim > 1] == [(5, 6), (8, 5)]
    assert mlp(values).shape == (3, 8)


def test_order_embeddings_are_absolute() -> None:
    config = ImageTowerConfig(encoder="precomputed", feature_dim=6, head="none")
    values = torch.randn(3, 6)
    tower = Tower(build_image_backbone(config), config, 6, absolute=True)
    images = tower(values)
    torch.testing.assert_close(images, (values / values.norm(dim=1, keepdim=True)).abs())
    captions = images.flip(0)
    expected = [
        [-(sum(max(0.0, c - i) ** 2 for i, c in zip(x, y, strict=True)) ** 0.5) for y in captions.tolist()]
        for x in images.tolist()
    ]
    torch.testing.assert_close(ORDER.scores(images, captions), torch.tensor(expected), atol=1e-6, rtol=0)


def test_hidden_states_side_by_side(tiny: Path) -> None:
    narrow = image_tower(ImageTowerConfig(encoder=EFFICIENTNET, size=64)).backbone(pixels(64), None).values
    tower = image_tower(ImageTowerConfig(encoder=EFFICIENTNET, size=64, layers=(-1, -2), pooling="mean+max"))
    tokens = tower.backbone(pixels(64), None).values
    assert tokens.shape == (2, 4, 1280 + 320 + 112)
    torch.testing.assert_close(tokens[..., :1280], narrow)
    assert tower(pixels(64)).shape == (2, 8)

    text = build_text_backbone(TextTowerConfig(encoder=f"hf:{tiny / 'bert'}", layers=(0, 1)), 8, 0)
    states = text(torch.tensor([[1, 2, 3]]), None).values
    assert states.shape == (1, 3, 48)
    torch.testing.assert_close(states[..., :16], states[..., 32:])  # the last of one layer is layer 1
    assert not torch.equal(states[..., :16], states[..., 16:32])


@pytest.mark.parametrize("layers", [(7,), (-9,)])
def test_layers_that_are_not_there_are_refused(tiny: Path, layers: tuple[int, ...]) -> None:
    for encoder in (f"hf:{tiny / 'vit'}", EFFICIENTNET, "small-cnn"):
        with pytest.raises(InputError, match=r"^[^\n]*layers[^\n]*$"):
            build_image_backbone(ImageTowerConfig(encoder=encoder, layers=layers))
    for encoder in (f"hf:{tiny / 'bert'}", "gru"):
        with pytest.raises(InputError, match=r"^[^\n]*layers[^\n]*$"):
            build_text_backbone(TextTowerConfig(encoder=encoder, layers=layers), 8, 5)
