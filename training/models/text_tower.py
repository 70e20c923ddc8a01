"""Text backbones: a word-level GRU, or any Hugging Face text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.data.padded import Padded
from training.data.text import HubTokenizer
from training.errors import InputError
from training.models.config import TextTowerConfig
from training.models.hub import first_line, locate, portable, quiet_transformers, unavailable
from training.models.tower import Backbone, evaluating, hidden_features


class WordGRU(Backbone):
    """Word embeddings and a one-layer unidirectional GRU, the text side of VSE++ (Faghri et al. 2018).

    Args:
        words: Vocabulary size.
        word_dim: Width of the word embeddings, initialised uniformly in ±0.1.
        dim: Width of the hidden state.
    """

    def __init__(self, words: int, word_dim: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.architecture = {"words": words}
        self.embedding = nn.Embedding(words, word_dim)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.gru = nn.GRU(word_dim, dim, batch_first=True)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Padded:
        """Ids ``(B, T)`` → hidden states ``(B, T, D)``.

        Padding stands at the end, where a unidirectional network has already read the caption; the states
        there are masked, so no packing is needed.
        """
        # cuDNN cannot differentiate a GRU in evaluation mode, which attacks and gradient sampling do.
        with torch.backends.cudnn.flags(enabled=self.training or not torch.is_grad_enabled()):
            states, _ = self.gru(self.embedding(values))
        return Padded(states, mask)


class HubText(Backbone):
    """A transformers text encoder; token features are its last hidden states, and those of ``layers``.

    Attributes:
        positions: Tokens that it has positions for; None where it has no such limit.
    """

    def __init__(self, network: nn.Module, config: Any, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.layers = layers
        own = getattr(config, "text_config", config)
        if any(not -own.num_hidden_layers - 1 <= layer <= own.num_hidden_layers for layer in layers):
            raise InputError(f"text.layers {layers}: the encoder has hidden states 0 to {own.num_hidden_layers}")
        self.positions: int | None = getattr(own, "max_position_embeddings", None)
        self.dim = int(own.hidden_size) * (1 + len(layers))
        self.architecture = {"config": portable(config)}

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Padded:
        """Ids ``(B, T)``, bool ``(B, T)`` → hidden states ``(B, T, F)``."""
        attention = torch.ones_like(values) if mask is None else mask.long()
        output = self.network(input_ids=values, attention_mask=attention, output_hidden_states=bool(self.layers))
        return Padded(hidden_features(output, self.layers), attention.bool())

    def check(self, name: str, tokenizer: HubTokenizer) -> None:
        """Encode the longest caption there can be, made of the largest id.

        Args:
            name: What errors call the encoder.
            tokenizer: Its ``max_tokens`` is lowered to what there are positions for.

        Raises:
            InputError: If that fails: the encoder is no encoder of text alone, or not this tokenizer's.
        """
        tokenizer.max_tokens = min(tokenizer.max_tokens, self.positions or tokenizer.max_tokens)
        count, largest = tokenizer.max_tokens, len(tokenizer) - 1
        try:
            with torch.no_grad(), evaluating(self):
                self(torch.full((1, count), largest))
        except Exception as error:  # libraries' networks raise whatever their code stumbles on
            raise InputError(
                f"{name}: cannot encode {count} tokens with ids up to {largest} ({first_line(error)}); lower "
                "text.max_tokens, restore the encoder's own tokenizer, or take an encoder of text alone"
            ) from None


def build_text_backbone(
    config: TextTowerConfig,
    dim: int,
    words: int,
    pretrained: bool = True,
    architecture: dict[str, Any] | None = None,
) -> Backbone:
    """The backbone that ``config.encoder`` names.

    Args:
        config: The text tower's configuration.
        dim: Width of the joint space; a GRU without a head has this many hidden units.
        words: Size of the word vocabulary, used by the GRU.
        pretrained: Load pretrained weights; False when a checkpoint supplies them.
        architecture: What :attr:`Backbone.architecture` was when the checkpoint was written.

    Raises:
        InputError: For an unknown name or weights that cannot be had.
    """
    kind, _, name = config.encoder.partition(":")
    if config.layers and kind != "hf":
        raise InputError(f"text.encoder {config.encoder}: has no hidden states to choose; leave out text.layers")
    if config.encoder == "gru":
        return WordGRU(words, config.word_dim, dim)
    if kind == "hf" and name:
        from transformers import AutoConfig, AutoModel

        quiet_transformers()
        where = locate(name)
        try:
            if pretrained or architecture is None:
                hub_config = AutoConfig.from_pretrained(where)
                model = AutoModel.from_pretrained(where, dtype=torch.float32, use_safetensors=True)
            else:
                hub_config = AutoConfig.for_model(**architecture["config"])
                model = AutoModel.from_config(hub_config, dtype=torch.float32)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            raise unavailable(config.encoder, error) from None
        return HubText(getattr(model, "text_model", model), hub_config, config.layers)
    raise InputError(f"text.encoder {config.encoder!r} is unknown; use gru or hf:REPO_OR_DIR")
