"""Random text encoders in the form that ``hf:`` loads, with a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, PreTrainedConfig, PreTrainedModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "one", "my", "its"]
WORDS += [f"{kind}{number}" for kind in ("colour", "shape") for number in range(6)]


def save_tokenizer(folder: Path, words: list[str] = WORDS, **settings: Any) -> Path:
    """Write a tokenizer; a word's id is its place in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), **settings).save_pretrained(folder)
    return folder


def save_encoder(
    folder: Path, kind: type[PreTrainedModel] = BertModel, config: PreTrainedConfig | None = None, seed: int = 0
) -> Path:
    """Write an encoder of random weights, by default BERT's, 16 wide."""
    torch.manual_seed(seed)
    narrow = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    kind(config or BertConfig(vocab_size=len(WORDS), **narrow)).save_pretrained(folder)
    return folder
