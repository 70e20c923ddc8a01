from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from training.data.batches import Features, Inputs, Pixels, Tokens
from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.data.text import HubTokenizer
from training.errors import InputError
from training.models import features as module
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.models.features import cached_features, corpus_inputs, encode_corpus, feature_key

CONFIG = ModelConfig(
    ImageTowerConfig("torchvision:mobilenet_v2", size=32, frozen=True),
    TextTowerConfig("hf:random/tiny-bert", "mean", head="linear", frozen=True),
    dim=8,
)


@pytest.fixture(scope="module")
def mirror(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared models and a small random text encoder."""
    folder = tmp_path_factory.mktemp("models")
    for path in shared_models.iterdir():
        (folder / path.name).symlink_to(path)
    narrow = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    BertModel(narrow).save_pretrained(folder / "tiny-bert")
    return folder


@pytest.fixture(autouse=True)
def _environment(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSE_MODELS", str(mirror))
    monkeypatch.setenv("VSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus("scenes:20", "train")


def build(config: ModelConfig = CONFIG) -> DualEncoder:
    torch.manual_seed(0)
    words = Path(os.environ["VSE_MODELS"]) / "all-MiniLM-L6-v2"
    return DualEncoder(config, HubTokenizer.load(words, config.text.max_tokens))


def pooled_by(pooling: Any) -> ModelConfig:
    return replace(CONFIG, image=replace(CONFIG.image, pooling=pooling), text=replace(CONFIG.text, pooling=pooling))


def raw_inputs(model: DualEncoder, corpus: Corpus, side: str) -> Inputs:
    return Tokens(corpus.captions, model.tokenizer) if side == "text" else Pixels(corpus.images, model.transform())


class Passes:
    """Counts the rows that go through a backbone, and stops it after some."""

    def __init__(self, model: DualEncoder, side: str, limit: float = float("inf")) -> None:
        self.rows, self.limit = 0, limit
        getattr(model, f"{side}_tower").backbone.register_forward_pre_hook(self)

    def __call__(self, backbone: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.rows + len(inputs[0]) > self.limit:
            raise KeyboardInterrupt
        self.rows += len(inputs[0])


def rows(features: Features) -> torch.Tensor:
    return features.fetch(np.arange(len(features)), None).values


def assert_equals_half_precision(cached: torch.Tensor, direct: torch.Tensor) -> None:
    torch.testing.assert_close(cached, direct, atol=2e-3 * direct.abs().max().item(), rtol=2e-3)


@pytest.mark.parametrize("pooling", ["mean", "mean+max", "gpo"])
@pytest.mark.parametrize("side", ["image", "text"])
def test_cached_features_are_those_that_would_be_computed(corpus: Corpus, pooling: str, side: str) -> None:
    model = build(pooled_by(pooling)).eval()
    tower = model.image_tower if side == "image" else model.text_tower
    cached, past_backbone = corpus_inputs(model, corpus, side)
    assert past_backbone
    assert isinstance(cached, Features)
    assert isinstance(cached._values, np.memmap)
    assert cached._values.dtype == np.float16

    chosen, raw = np.array([7, 0, 12]), raw_inputs(model, corpus, side)
    with torch.no_grad():
        expected, expected_mask = tower.features(*raw.fetch(chosen, None))
        values, mask = cached.fetch(chosen, None)
        if expected_mask is not None:
            assert mask is not None
            assert torch.equal(mask, expected_mask)
            values, expected = values[mask], expected[expected_mask]
        assert_equals_half_precision(values, expected)
        direct = tower(*raw.fetch(chosen, None))
        torch.testing.assert_close(tower.project(*cached.fetch(chosen, None)), direct, atol=3e-3, rtol=0)


def test_a_second_call_computes_and_decodes_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    first = encode_corpus(model, corpus)
    image_passes, text_passes = Passes(model, "image"), Passes(model, "text")
    monkeypatch.setattr("training.data.formats.scenes.Scene.load", lambda scene: pytest.fail("decoded again"))
    second = encode_corpus(model, corpus)
    assert image_passes.rows == text_passes.rows == 0
    assert all(map(torch.equal, first, second))
    assert [len(part) for part in first] == [len(corpus.image_ids), len(corpus)]


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_a_killed_computation_goes_on_where_it_stopped(
    corpus: Corpus, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    model = build(pooled_by(pooling))
    inputs, tower = raw_inputs(model, corpus, "text"), model.text_tower
    call: dict[str, Any] = {"label": "captions", "batch_size": 4}
    whole = cached_features(tower, inputs, root=tmp_path / "whole", **call)

    interrupted = build(pooled_by(pooling))
    passes = Passes(interrupted, "text", limit=35)
    with pytest.raises(KeyboardInterrupt):
        cached_features(interrupted.text_tower, inputs, root=tmp_path / "cut", **call)
    (progress,) = (tmp_path / "cut").glob("*/progress.json")
    assert list(json.loads(progress.read_text())["checksums"]) == ["0", "1", "2"]

    passes.rows, passes.limit = 0, float("inf")
    resumed = cached_features(interrupted.text_tower, inputs, root=tmp_path / "cut", **call)
    assert passes.rows == len(corpus) - 30
    assert np.array_equal(resumed._values, whole._values)
    assert torch.equal(rows(resumed), rows(whole))


def test_of_two_computations_at_once_one_waits_for_the_other(corpus: Corpus) -> None:
    model = build()
    passes = Passes(model, "text")
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(corpus_inputs, model, corpus, "text") for _ in range(2)]
    first, second = (future.result()[0].fetch(np.arange(len(corpus)), None).values for future in both)
    assert passes.rows == len(corpus), "each row once"
    assert torch.equal(first, second)


def test_whatever_changes_features_is_cached_apart(corpus: Corpus) -> None:
    cache, few = Path(os.environ["VSE_CACHE"]) / "features", corpus.subset(range(3))

    def entries_added(image: dict[str, Any], text: dict[str, Any], corpus: Corpus = few, dim: int = 8) -> int:
        before = len(list(cache.glob("*")))
        encode_corpus(build(ModelConfig(replace(CONFIG.image, **image), replace(CONFIG.text, **text), dim)), corpus)
        return len(list(cache.glob("*"))) - before

    assert entries_added({}, {}) == 2
    assert entries_added({"size": 64}, {"max_tokens": 8}) == 2
    assert entries_added({"resize": 40}, {"pooling": "max"}) == 2
    assert entries_added({"pooling": "gpo"}, {"pooling": "gpo"}) == 2
    assert entries_added({"encoder": "hf:timm/tf_efficientnet_lite0.in1k"}, {}) == 1
    assert entries_added({}, {"layers": (0,)}) == 1
    assert entries_added({}, {}, corpus.subset(range(1, 4))) == 2
    reworded = replace(few, captions=[caption + " indeed" for caption in few.captions])
    assert entries_added({}, {}, reworded) == 1, "the pictures are the same"
    assert entries_added({"head": "mlp"}, {"normalise": False}, dim=4) == 0, "what comes after the backbone"


def test_the_key_follows_weights_normalisation_and_rows() -> None:
    tower = build().image_tower
    x, y = Features(np.zeros((1, 2)), fingerprint="x"), Features(np.zeros((1, 2)), fingerprint="y")
    key = feature_key(tower, x)
    assert key == feature_key(build().image_tower, x) != feature_key(tower, y)
    tower.backbone.architecture["preprocessing"]["mean"] = (0.0, 0.0, 0.0)
    assert key != feature_key(tower, x)
    other = build().image_tower
    other.checksum = "sha256:other"
    assert key != feature_key(other, x)


def test_caching_leaves_the_head_in_training_mode(corpus: Corpus) -> None:
    model = build().train()
    before = [m.training for m in model.modules()]
    corpus_inputs(model, corpus, "image")
    assert [m.training for m in model.modules()] == before


def test_only_a_frozen_tower_without_augmentation_is_cached(corpus: Corpus) -> None:
    assert not corpus_inputs(build(), corpus, "image", augment="crop")[1]
    thawed = build(replace(CONFIG, image=replace(CONFIG.image, frozen=False)))
    assert not corpus_inputs(thawed, corpus, "image")[1]
    assert not Path(os.environ["VSE_CACHE"]).exists()


def test_features_and_pictures_do_not_mix(corpus: Corpus) -> None:
    values = np.random.default_rng(0).standard_normal((len(corpus.image_ids), 3, 6), dtype=np.float32)
    regions = replace(corpus, images=(), features=values)
    with pytest.raises(InputError, match=r"^[^\n]*holds features 6 wide, the model takes pictures$"):
        corpus_inputs(build(), regions, "image")

    def taking(width: int) -> DualEncoder:
        return build(replace(CONFIG, image=ImageTowerConfig("precomputed", feature_dim=width)))

    with pytest.raises(InputError, match=r"^[^\n]*6 wide, the model takes features 7 wide$"):
        corpus_inputs(taking(7), regions, "image")
    with pytest.raises(InputError, match="cannot encode pictures"):
        corpus_inputs(taking(6), corpus, "image")
    model = taking(6)
    images, _ = encode_corpus(model, regions)
    with torch.no_grad():
        torch.testing.assert_close(images, model.eval().image_tower(torch.from_numpy(values)))
