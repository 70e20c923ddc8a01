"""Text encoders of the hub whose limits, weights or kinds do not fit: one line before training, or a run that ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hub import WORDS, save_encoder, save_tokenizer
from tiny_runs import assert_same_run
from transformers import BartConfig, BartModel, BertConfig, BertModel, T5Config, T5Model

from training.config import Config
from training.data.text import HubTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.trainer import Trainer

BART = BartConfig(
    vocab_size=len(WORDS),
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    max_position_embeddings=80,
)
T5 = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def bert(**settings: Any) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(**{"vocab_size": len(WORDS), **sizes, **settings})


def build(folder: Path, **text: Any) -> DualEncoder:
    settings = TextTowerConfig(f"hf:{folder}", "mean", head="linear", **text)
    config = ModelConfig(ImageTowerConfig("precomputed", feature_dim=4), settings, dim=8)
    return DualEncoder(config, HubTokenizer.load(folder, settings.max_tokens))


def test_weights_that_share_memory_are_saved_and_resumed(config: Config, tmp_path: Path, one_thread: None) -> None:
    folder = save_tokenizer(save_encoder(tmp_path / "bart", BartModel, BART))
    text = TextTowerConfig(f"hf:{folder}", "mean", head="linear")
    config = replace(config, model=replace(config.model, text=text))
    whole = replace(config, out=str(tmp_path / "whole"))
    Trainer(whole).fit()
    Trainer(config).fit(epochs=1)
    Trainer(config, resume=True).fit()
    assert_same_run(Path(config.out), Path(whole.out))
    loaded = DualEncoder.from_pretrained(config.out, "cpu")
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(
        DualEncoder.from_pretrained(again, "cpu").encode_texts(["a colour1"]), loaded.encode_texts(["a colour1"])
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_captions_are_cut_to_the_encoder_s_positions(frozen: bool, tmp_path: Path) -> None:
    folder = save_tokenizer(save_encoder(tmp_path / "bert", BertModel, bert(max_position_embeddings=12)))
    model = build(folder, frozen=frozen)
    assert model.tokenizer.max_tokens == 12
    long = model.encode_texts(["my " * 500, "my " * 10])
    assert torch.allclose(long[0], long[1])
    model.save_pretrained(tmp_path / "saved")
    assert DualEncoder.from_pretrained(tmp_path / "saved", "cpu").tokenizer.max_tokens == 12


@pytest.mark.parametrize(
    ("kind", "encoder", "words", "told"),
    [
        (T5Model, T5, WORDS, "take an encoder of text alone"),
        (BertModel, bert(vocab_size=len(WORDS) - 1), WORDS, f"ids up to {len(WORDS) - 1}"),
        (BertModel, bert(), [*WORDS, "more", "words"], "restore the encoder's own tokenizer"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_that_cannot_encode_captions_is_named_before_training(
    kind: Any, encoder: Any, words: list[str], told: str, frozen: bool, tmp_path: Path
) -> None:
    folder = save_tokenizer(save_encoder(tmp_path / "encoder", kind, encoder), words)
    with pytest.raises(InputError, match=rf"^hf:{folder}: cannot encode [^\n]*{told}[^\n]*$"):
        build(folder, frozen=frozen)


def test_looking_at_the_limits_draws_no_random_number(tmp_path: Path) -> None:
    folder = save_tokenizer(save_encoder(tmp_path / "bert", BertModel, bert(hidden_dropout_prob=0.5)))
    model = build(folder)
    before = torch.get_rng_state()
    model.text_tower.backbone.check("", model.tokenizer)  # type: ignore[operator,arg-type]
    assert torch.equal(torch.get_rng_state(), before)
