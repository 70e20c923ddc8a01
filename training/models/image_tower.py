"""Image backbones: a small CNN, any torchvision or Hugging Face network, or features computed elsewhere."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from training.data.padded import Padded
from training.errors import InputError
from training.models.config import ImageTowerConfig
from training.models.hub import locate, portable, quiet_transformers, unavailable
from training.models.tower import Backbone, hidden_features

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input: shorter side to ``resize``, centre ``size``, normalise."""

    size: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Refuses sizes that no picture is cut to, whoever has written them."""
        if not 0 < self.size <= self.resize <= 1 << 12:
            raise InputError(f"image size {self.size}, resize {self.resize}: must be positive, and at most {1 << 12}")


class PixelBackbone(Backbone):
    """A backbone that takes pixels and normalises them itself.

    Pixels enter as uint8 or as floats in [0, 1], so that whoever perturbs them works in pixel space.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, dim: int, preprocessing: Preprocessing, layers: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.dim = dim
        self.layers = layers
        self.preprocessing = preprocessing
        self.architecture = {"preprocessing": asdict(preprocessing)}
        self.register_buffer("mean", torch.tensor(preprocessing.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std)[:, None, None], persistent=False)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Padded:
        """Pixels uint8 or [0, 1] ``(B, 3, S, S)`` → grid tokens ``(B, T, F)``, or ``(B, F)`` without a grid."""
        pixels = values.float() / 255 if values.dtype == torch.uint8 else values
        pixels = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        tokens = self.network(pixels, output_hidden_states=True) if self.layers else self.network(pixels)
        if not isinstance(tokens, Tensor):
            tokens = hidden_features(tokens, self.layers)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)  # (B, F, h, w) -> (B, h w, F)
        return Padded(tokens)


class PrecomputedBackbone(Backbone):
    """Passes on features that were computed elsewhere."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.architecture = {"dim": dim}

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Padded:
        """``(B, F)`` or regions ``(B, T, F)``, unchanged."""
        return Padded(values, mask)


def small_cnn(side: int) -> tuple[nn.Module, int]:
    """Seven convolutions, 0.4 M parameters, and the width of their output for pictures of ``side`` pixels.

    The last 1/16 grid is laid out as one long vector rather than pooled: an average would forget what is
    left of what.
    """

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(inplace=True))
    network = nn.Sequential(stem, block(24, 48), block(48, 96), block(96, 128), nn.Flatten())
    return network, 128 * math.ceil(side / 16) ** 2


def _torchvision(name: str, pretrained: bool, config: ImageTowerConfig) -> PixelBackbone:
    """``NAME[@WEIGHTS]``; WEIGHTS is a torchvision weights name, ``none``, or a safetensors file."""
    import torchvision

    model_name, _, weights = name.partition("@")
    try:
        builder = torchvision.models.get_model_builder(model_name)
    except ValueError:
        raise InputError(
            f"torchvision:{name}: torchvision has no model {model_name!r}; see torchvision.models.list_models()"
        ) from None
    mirror = Path(locate(model_name))
    file = Path(weights) if weights.endswith(".safetensors") else mirror / f"{model_name}.safetensors"
    try:
        if not pretrained or weights == "none":
            model = builder(weights=None)
        elif file.is_file():
            model = builder(weights=None)
            model.load_state_dict(load_file(file))
        else:
            model = builder(weights=weights or "DEFAULT")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise unavailable(f"torchvision:{name}", error) from None
    if hasattr(model, "layer4"):  # ResNet and its relatives
        network: nn.Module = nn.Sequential(*list(model.children())[:-2])
    elif hasattr(model, "features"):
        network = model.features
        if hasattr(model, "permute"):  # Swin transformers keep features last
            network = nn.Sequential(network, model.norm, model.permute)
    else:
        raise InputError(f"torchvision:{name}: no convolutional grid to pool; take a convolutional network or hf:")
    with torch.no_grad():
        dim = network.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
    return PixelBackbone(network, dim, _resized(Preprocessing(224, 256, interpolation="bilinear"), config))


def _hub(name: str, architecture: dict[str, Any] | None, wanted: ImageTowerConfig, pretrained: bool) -> PixelBackbone:
    """Any vision network that transformers' AutoModel loads, timm's included; pictures are cut as it was trained."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    quiet_transformers()
    where = locate(name)
    try:
        if pretrained or architecture is None:
            config = AutoConfig.from_pretrained(where)
            model = AutoModel.from_pretrained(where, dtype=torch.float32, use_safetensors=True)
        else:
            config = AutoConfig.for_model(**architecture["config"])
            model = AutoModel.from_config(config, dtype=torch.float32)
        if architecture is None:
            preprocessing = _hub_preprocessing(config, where, AutoImageProcessor)
        else:
            preprocessing = Preprocessing(**architecture["preprocessing"])
        network = getattr(model, "vision_model", model)  # CLIP-like pairs hold both towers
        backbone = PixelBackbone(network, 0, _resized(preprocessing, wanted), wanted.layers)
        with torch.no_grad():
            size = backbone.preprocessing.size
            backbone.dim = backbone.eval()(torch.zeros(1, 3, size, size)).values.shape[-1]
    except InputError:
        raise
    except (IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"hf:{name}: size {wanted.size}, layers {wanted.layers}: {reason}; choose others") from None
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise unavailable(f"hf:{name}", error) from None
    backbone.architecture["config"] = portable(config)
    return backbone


def _hub_preprocessing(config: Any, where: str, processors: Any) -> Preprocessing:
    timm = getattr(config, "pretrained_cfg", None)
    if timm:
        size = int(timm["input_size"][-1])
        return Preprocessing(
            size=size,
            resize=round(size / timm.get("crop_pct", 1.0)),
            mean=tuple(timm["mean"]),
            std=tuple(timm["std"]),
            interpolation="bilinear" if timm.get("interpolation") == "bilinear" else "bicubic",
        )
    processor = processors.from_pretrained(where, use_fast=False)
    wanted = processor.size or {}
    crop = getattr(processor, "crop_size", None) or wanted
    size = int(crop.get("height") or crop.get("shortest_edge") or 224)
    return Preprocessing(
        size=size,
        resize=int(wanted.get("shortest_edge") or wanted.get("height") or size),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        interpolation="bilinear" if int(processor.resample or 3) == 2 else "bicubic",
    )


def _resized(own: Preprocessing, config: ImageTowerConfig) -> Preprocessing:
    """Apply the input size that the configuration asks for."""
    size = config.size or own.size
    resize = config.resize or (size if config.size else own.resize)
    if resize < size:
        raise InputError(f"image.resize {resize} is smaller than image.size {size}; make it at least as large")
    return replace(own, size=size, resize=resize)


def build_image_backbone(
    config: ImageTowerConfig, pretrained: bool = True, architecture: dict[str, Any] | None = None
) -> Backbone:
    """The backbone that ``config.encoder`` names.

    Args:
        config: The image tower's configuration.
        pretrained: Load pretrained weights; False when a checkpoint supplies them.
        architecture: What :attr:`Backbone.architecture` was when the checkpoint was written.

    Raises:
        InputError: For an unknown name or weights that cannot be had.
    """
    kind, _, name = config.encoder.partition(":")
    if config.layers and kind != "hf":
        raise InputError(f"image.encoder {config.encoder}: has no hidden states to choose; leave out image.layers")
    if config.encoder == "small-cnn":
        preprocessing = _resized(Preprocessing(64, 64, (0.5,) * 3, (0.25,) * 3, "bilinear"), config)
        return PixelBackbone(*small_cnn(preprocessing.size), preprocessing)
    if config.encoder == "precomputed":
        if config.feature_dim < 1:
            raise InputError("image.encoder precomputed: image.feature_dim must be the width of the features")
        return PrecomputedBackbone(config.feature_dim)
    if kind == "torchvision" and name:
        return _torchvision(name, pretrained, config)
    if kind == "hf" and name:
        return _hub(name, architecture, config, pretrained)
    raise InputError(
        f"image.encoder {config.encoder!r} is unknown; use small-cnn, torchvision:NAME, hf:REPO_OR_DIR or precomputed"
    )
