from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import training
from training.data.text import HubTokenizer, WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import CONFIG_FILE, WEIGHTS_FILE, DualEncoder

CAPTIONS = ["a dog runs in the snow", "two dogs", "a cat sleeps on the red sofa near the window", "sky"]
EFFICIENTNET, MINILM = "hf:timm/tf_efficientnet_lite0.in1k", "hf:sentence-transformers/all-MiniLM-L6-v2"

SMALL = ModelConfig(ImageTowerConfig(size=32), TextTowerConfig(min_count=1, word_dim=6), dim=16)
FROZEN = ModelConfig(
    ImageTowerConfig(EFFICIENTNET, "gpo", size=64, frozen=True),
    TextTowerConfig(MINILM, "mean", head="mlp", hidden=8, frozen=True),
    dim=16,
    similarity="order",
    absolute=True,
)
FINE_TUNED = replace(FROZEN, image=replace(FROZEN.image, frozen=False), text=replace(FROZEN.text, frozen=False))


@pytest.fixture(autouse=True)
def _mirror(shared_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSE_MODELS", str(shared_models))


@pytest.fixture(scope="module")
def build(shared_models: Path) -> Callable[[ModelConfig], DualEncoder]:
    def build(config: ModelConfig) -> DualEncoder:
        torch.manual_seed(0)
        if config.text.encoder == "gru":
            return DualEncoder(config, WordTokenizer.fit(CAPTIONS, min_count=1))
        return DualEncoder(config, HubTokenizer.load(shared_models / "all-MiniLM-L6-v2"))

    return build


@pytest.fixture
def small(build: Callable[[ModelConfig], DualEncoder], tmp_path: Path) -> tuple[DualEncoder, Path]:
    model, directory = build(SMALL), tmp_path / "small"
    model.save_pretrained(directory, "the card")
    return model, directory


def pictures(count: int = 5) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)) for _ in range(count)]


def assert_equal_embeddings(a: DualEncoder, b: DualEncoder) -> None:
    assert torch.equal(a.encode_images(pictures()), b.encode_images(pictures()))
    assert torch.equal(a.encode_texts(CAPTIONS), b.encode_texts(CAPTIONS))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("config", [SMALL, FROZEN, FINE_TUNED], ids=["own", "frozen", "fine-tuned"])
def test_a_model_survives_saving(
    build: Callable[[ModelConfig], DualEncoder],
    config: ModelConfig,
    tmp_path: Path,
    shared_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(config)
    with torch.no_grad():  # not the pretrained weights any more
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "run")
    for path in (tmp_path / "run").glob("*.json"):
        assert str(shared_models) not in path.read_text(encoding="utf-8")
    if not config.image.frozen:
        monkeypatch.setenv("VSE_MODELS", str(tmp_path / "nothing here"))
    loaded = DualEncoder.from_pretrained(tmp_path / "run")
    assert loaded.config == config
    assert loaded.fingerprint() == model.fingerprint()
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert_equal_embeddings(model, loaded)


def test_frozen_backbones_are_named_not_copied(build: Callable[[ModelConfig], DualEncoder], tmp_path: Path) -> None:
    build(FROZEN).save_pretrained(tmp_path)
    assert not any(".backbone." in name for name in load_file(tmp_path / WEIGHTS_FILE))
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 200_000
    record = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert record["image"]["encoder"] == EFFICIENTNET
    assert set(record["frozen"]) == {"image", "text"}


def test_a_frozen_backbone_with_other_weights_is_refused(
    build: Callable[[ModelConfig], DualEncoder], tmp_path: Path, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(FROZEN, text=SMALL.text)
    build(config).save_pretrained(tmp_path / "run")
    mirror = tmp_path / "models" / "tf_efficientnet_lite0.in1k"
    shutil.copytree(shared_models / mirror.name, mirror)
    weights = load_file(mirror / "model.safetensors")
    weights["conv_stem.weight"][0, 0, 0, 0] += 1e-3
    save_file(weights, mirror / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("VSE_MODELS", str(mirror.parent))
    with pytest.raises(InputError, match=r"^[^\n]*config.json: [^\n]*other weights[^\n]*image tower[^\n]*$"):
        DualEncoder.from_pretrained(tmp_path / "run")
    monkeypatch.setenv("VSE_MODELS", str(tmp_path / "nothing here"))
    with pytest.raises(InputError, match=r"^hf:timm/tf_efficientnet_lite0.in1k: [^\n]*VSE_MODELS[^\n]*$"):
        DualEncoder.from_pretrained(tmp_path / "run")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / CONFIG_FILE
        record = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS_FILE)
        change(weights)
        save_file(weights, directory / WEIGHTS_FILE)

    return edit


def truncate(directory: Path) -> None:
    path = directory / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def other_vocabulary(directory: Path) -> None:
    WordTokenizer.fit([*CAPTIONS, CAPTIONS[0]], min_count=1).save(directory)  # as many words, other captions


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda directory: (directory / CONFIG_FILE).unlink(), CONFIG_FILE),
        (lambda directory: (directory / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
        (lambda directory: (directory / "vocabulary.json").unlink(), "vocabulary.json"),
        (lambda directory: (directory / CONFIG_FILE).write_text("{"), CONFIG_FILE),
        (lambda directory: (directory / CONFIG_FILE).write_text("[]"), CONFIG_FILE),
        (lambda directory: (directory / CONFIG_FILE).write_text("[" * 20_000), CONFIG_FILE),
        (lambda directory: (directory / CONFIG_FILE).write_text("9" * 5000), CONFIG_FILE),
        (lambda directory: (directory / CONFIG_FILE).write_bytes(b"\xff"), CONFIG_FILE),
        (edit_config(format=99), CONFIG_FILE),
        (edit_config(dim=None), CONFIG_FILE),
        (edit_config(dim="wide"), CONFIG_FILE),
        (edit_config(image={"colour": 1}), CONFIG_FILE),
        (edit_config(text={"pooling": "sum"}), CONFIG_FILE),
        (edit_config(similarity="taste"), CONFIG_FILE),
        (edit_config(dim=8), WEIGHTS_FILE),
        (truncate, WEIGHTS_FILE),
        (edit_weights(lambda weights: weights.popitem()), WEIGHTS_FILE),
        (edit_weights(lambda weights: weights.update(stranger=torch.zeros(1))), WEIGHTS_FILE),
        (other_vocabulary, "vocabulary.json"),
    ],
)
def test_damage_is_refused_by_the_name_of_the_file(
    small: tuple[DualEncoder, Path], damage: Callable[[Path], object], named: str
) -> None:
    directory = small[1]
    damage(directory)
    with pytest.raises(InputError, match=rf"^{re.escape(str(directory / named))}: [^\n]+$"):
        DualEncoder.from_pretrained(directory)


def test_what_is_no_model_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for name in (file, tmp_path, tmp_path / "absent", "nobody/nothing", "no/such/name"):
        with pytest.raises(InputError, match=rf"^{re.escape(str(name))}[^\n]*$"):
            DualEncoder.from_pretrained(name)


def test_a_write_that_fails_leaves_the_old_model(
    small: tuple[DualEncoder, Path], build: Callable[[ModelConfig], DualEncoder]
) -> None:
    model, directory = small
    before = contents(directory)
    other = build(replace(SMALL, dim=8))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # room for all but the weights
    try:
        with pytest.raises(OSError, match=str(directory)):
            other.save_pretrained(directory, "another card")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(directory) == before
    assert_equal_embeddings(DualEncoder.from_pretrained(directory), model)


def test_a_card_is_kept_until_there_is_a_new_one(small: tuple[DualEncoder, Path]) -> None:
    model, directory = small
    model.save_pretrained(directory)
    assert (directory / "README.md").read_text() == "the card"
    model.save_pretrained(directory, "newer")
    assert (directory / "README.md").read_text() == "newer"


def test_encoding_restores_the_mode_of_each_module(small: tuple[DualEncoder, Path]) -> None:
    model = small[0]
    model.train()
    model.image_tower.backbone.eval()
    before = [module.training for module in model.modules()]
    model.encode_texts(CAPTIONS)
    with pytest.raises(ZeroDivisionError):
        model.encode_images([type("Broken", (), {"load": lambda self: 1 / 0})()])
    model.image_tower.backbone.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.encode_images(pictures())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("config", [SMALL, FROZEN], ids=["own", "frozen"])
def test_the_batch_size_does_not_change_embeddings(
    build: Callable[[ModelConfig], DualEncoder], config: ModelConfig
) -> None:
    model = build(config).train()
    images, texts = pictures(), CAPTIONS
    whole = model.encode_images(images), model.encode_texts(texts)
    for embeddings, count in zip(whole, (len(images), len(texts)), strict=True):
        assert embeddings.shape == (count, config.dim)
        assert embeddings.dtype == torch.float32
    for size in (1, 2):
        torch.testing.assert_close(model.encode_images(images, size), whole[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_texts(texts, size), whole[1], atol=1e-5, rtol=0)


def test_embeddings_may_enter_a_differentiated_score(small: tuple[DualEncoder, Path]) -> None:
    texts = small[0].encode_texts(CAPTIONS)
    images = torch.randn(2, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(small[0].similarity.scores(images, texts).sum(), images)
    torch.testing.assert_close(gradient, texts.sum(dim=0).expand(2, -1))


def test_nothing_gives_no_rows_and_an_empty_query_is_refused(small: tuple[DualEncoder, Path]) -> None:
    model = small[0]
    assert model.encode_images([]).shape == model.encode_texts([]).shape == (0, 16)
    for text in ("", " \n"):
        with pytest.raises(InputError, match="empty"):
            model.encode_texts(["fine", text])


def test_a_model_of_features_cannot_see_pictures(build: Callable[[ModelConfig], DualEncoder]) -> None:
    model = build(replace(SMALL, image=ImageTowerConfig("precomputed", feature_dim=5)))
    with pytest.raises(InputError, match="precomputed features"):
        model.encode_images(pictures())


def test_nothing_unpickles() -> None:
    root = Path(training.__file__).parents[1]
    sources = [path for wing in ("training", "index", "vse_app") for path in (root / wing).rglob("*.py")]
    assert sources
    for path in sources:
        code = path.read_text(encoding="utf-8")
        for forbidden in ("import pickle", "pickle.load", "torch.load(", "joblib", "allow_pickle=True"):
            assert forbidden not in code, path
        for call in re.findall(r"np\.load\((?:[^()]|\([^()]*\))*\)", code):
            assert "allow_pickle=False" in call, f"{path}: {call}"
        for call in re.findall(r"AutoModel\.from_pretrained\([^()]*\)", code):
            assert "use_safetensors=True" in call, f"{path}: {call}"
