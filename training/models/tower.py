"""One tower: backbone → pooling → head → normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.padded import Padded
from training.errors import InputError
from training.models.config import TowerConfig
from training.models.hub import checksum
from training.models.pooling import PARAMETER_FREE, GeneralizedPooling


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Backbone(nn.Module):
    """Turns an input into token features.

    Attributes:
        dim: Width F of a token.
        architecture: What is needed beside the name to rebuild the module without its pretrained weights.
    """

    dim: int
    architecture: dict[str, Any]

    def forward(self, values: Tensor, mask: Tensor | None) -> Padded:
        """Input rows → tokens ``(B, T, F)`` with their mask."""
        raise NotImplementedError


def hidden_features(output: Any, layers: Sequence[int]) -> Tensor:
    """The last hidden state of a transformers model with those of ``layers`` beside it, feature by feature.

    Earlier layers keep what the last one has given up: single words, local shapes. A finer grid is averaged
    down to that of the last layer.

    Args:
        output: Holds ``last_hidden_state``, tokens ``(B, T, F)`` or a grid ``(B, F, h, w)``, and ``hidden_states``.
        layers: Indices into ``hidden_states``; none leaves the last hidden state as it is.
    """
    last: Tensor = output.last_hidden_state
    beside = [output.hidden_states[layer] for layer in layers]
    if last.ndim == 4:
        height, width = last.shape[-2:]
        return torch.cat([last, *(F.adaptive_avg_pool2d(grid, (height, width)) for grid in beside)], dim=1)
    return torch.cat([last, *beside], dim=-1)


class Tower(nn.Module):
    """Encodes one side of the pairs into the joint space.

    :meth:`features` is everything up to the first trainable layer of a frozen tower, and therefore what
    is worth caching; :meth:`project` is the rest.
    """

    def __init__(self, backbone: Backbone, config: TowerConfig, dim: int, absolute: bool) -> None:
        super().__init__()
        self.config = config
        self.absolute = absolute
        self.backbone = backbone
        self.pooling = GeneralizedPooling() if config.pooling == "gpo" else None
        width = backbone.dim * (2 if config.pooling == "mean+max" else 1)
        if config.head == "none" and width != dim:
            raise InputError(f"{config.encoder}: features are {width} wide, the joint space {dim}; add a head")
        # Means beside maxima differ in scale, and what all pictures share is larger than what tells them apart.
        standardise = config.normalise_features == "standardise"
        self.standardise = nn.BatchNorm1d(width, affine=False) if standardise else None
        self.head = build_head(config, width, dim)
        self.checksum: str | None = None
        if config.frozen:
            if config.encoder in ("small-cnn", "gru") or config.encoder.endswith("@none"):
                raise InputError(f"{config.encoder}: has no pretrained weights to freeze; leave out frozen")
            self.backbone.requires_grad_(False)
            self.checksum = checksum(backbone)

    def train(self, mode: bool = True) -> Tower:
        """Switch heads and own encoders; pretrained backbones keep batch norm and dropout in evaluation.

        Batch statistics of a small, correlated batch would otherwise replace those of ImageNet.
        """
        super().train(mode)
        if self.config.frozen or ":" in self.config.encoder:
            self.backbone.eval()
        return self

    def features(self, values: Tensor, mask: Tensor | None = None) -> Padded:
        """Backbone and parameter-free pooling: ``(B, F)``, or tokens ``(B, T, F)`` for GPO.

        A frozen backbone is differentiated only where ``values`` are, as when pixels are perturbed.
        """
        wanted = not self.config.frozen or values.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            tokens, token_mask = self.backbone(values, mask)
        if tokens.ndim == 2:
            tokens = tokens[:, None]  # a single vector is a set of one
        if self.pooling is not None:
            return Padded(tokens, token_mask)
        return Padded(PARAMETER_FREE[self.config.pooling](tokens, token_mask))

    def project(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features → embeddings ``(B, D)``, unit length if the configuration says so."""
        if self.pooling is not None:
            features = self.pooling(features, mask)
        if self.standardise is not None:
            features = self.standardise(features)
        elif self.config.normalise_features == "l2":
            features = F.normalize(features, dim=-1)
        embeddings: Tensor = self.head(features)
        if self.config.normalise:
            embeddings = F.normalize(embeddings.float(), dim=-1)
        return embeddings.abs() if self.absolute else embeddings

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Inputs → embeddings ``(B, D)``."""
        return self.project(*self.features(values, mask))


def build_head(config: TowerConfig, width: int, dim: int) -> nn.Module:
    """``none``, a linear map with the initialisation of VSE++ (uniform ±√6/√(fan_in + fan_out)), or an MLP."""
    if config.head == "none":
        return nn.Identity()
    last = nn.Linear(width if config.head == "linear" else config.hidden, dim)
    nn.init.xavier_uniform_(last.weight)
    nn.init.zeros_(last.bias)
    if config.head == "linear":
        return nn.Sequential(nn.Dropout(config.dropout), last)
    return nn.Sequential(
        nn.Dropout(config.dropout),
        nn.Linear(width, config.hidden, bias=False),
        nn.BatchNorm1d(config.hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(config.dropout),
        last,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
