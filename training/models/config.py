"""What a dual encoder is made of. Imports nothing heavy, so the command line can read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Pooling = Literal["mean", "max", "mean+max", "last", "gpo"]
Head = Literal["none", "linear", "mlp"]
FeatureNorm = Literal["none", "l2", "standardise"]


@dataclass(frozen=True)
class TowerConfig:
    """One tower: backbone, pooling over its tokens, projection head."""

    encoder: str = ""
    """The backbone."""
    pooling: Pooling = "mean"
    """How tokens become one vector."""
    head: Head = "linear"
    """Projection into the joint space; with none the backbone's width is the joint one."""
    hidden: int = 1024
    """Width of the hidden layer of an mlp head."""
    dropout: float = 0.0
    """Dropout before every linear layer of the head."""
    frozen: bool = False
    """Keep the backbone as it is: stored by name and checksum, its features cached."""
    normalise_features: FeatureNorm = "none"
    """Pooled features before the head: l2 as VSE++ does with ResNet, or each standardised over the data."""
    normalise: bool = True
    """l2-normalise embeddings; VSE0 (Faghri et al. 2018) leaves the image side as it is."""
    layers: tuple[int, ...] = ()
    """hf: indices of earlier hidden states, 0 the first, whose features are laid beside the last one's."""


@dataclass(frozen=True)
class ImageTowerConfig(TowerConfig):
    """The image tower."""

    encoder: str = "small-cnn"
    """small-cnn, torchvision:NAME[@WEIGHTS], hf:REPO_OR_DIR, or precomputed."""
    size: int = 0
    """Side of the square input in pixels; 0 is the backbone's own (64 for small-cnn)."""
    resize: int = 0
    """Length of the shorter side before the centre crop; 0 is the backbone's own, or size if that is given."""
    feature_dim: int = 0
    """Width of precomputed features; 0 takes it from the data."""


@dataclass(frozen=True)
class TextTowerConfig(TowerConfig):
    """The text tower."""

    encoder: str = "gru"
    """gru, or hf:REPO_OR_DIR."""
    pooling: Pooling = "last"
    """How tokens become one vector."""
    head: Head = "none"
    """Projection into the joint space; with none the backbone's width is the joint one."""
    max_tokens: int = 64
    """Longer captions are cut."""
    min_count: int = 4
    """gru: words seen less often in the training captions become <unk>."""
    word_dim: int = 300
    """gru: width of the word embeddings."""


@dataclass(frozen=True)
class ModelConfig:
    """A dual encoder."""

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    dim: int = 1024
    """Width of the joint space."""
    similarity: Literal["cosine", "order"] = "cosine"
    """How an image and a caption are compared."""
    absolute: bool = False
    """Take the absolute value of embeddings, as order embeddings do (Vendrov et al. 2016)."""
