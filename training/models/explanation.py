"""Why a picture is near a text: which words count, and where in the picture they are seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from training.models.image_tower import PixelBackbone
from training.models.pooling import PARAMETER_FREE
from training.models.tower import Tower, evaluating

_SPECIAL_TOKENS = 8  # class and register tokens stand before the patches
_WARM = np.array([255.0, 176.0, 32.0])
_DIM, _TINT = 0.4, 0.45


@dataclass(frozen=True)
class Explanation:
    """What a score is made of.

    Attributes:
        words: The words of the text, W of them.
        score: Similarity of picture and text.
        word_weights: float32 ``(W,)``; how far the score falls when a word is left out. A single word has the score.
        heat: float32 ``(h, w)``; what each patch adds to the score, beyond what an average patch would.
        word_heat: float32 ``(W, h, w)``; what each patch adds to a word's weight.
        view: The picture as the model sees it.
    """

    words: tuple[str, ...]
    score: float
    word_weights: NDArray[np.float32]
    heat: NDArray[np.float32]
    word_heat: NDArray[np.float32]
    view: Image.Image


def explain(model: DualEncoder, image: Image.Image, text: str) -> Explanation:
    """Explain the similarity of a picture and a text.

    Words are left out one at a time, exactly. Patches are credited to first order: the gradient of the score with
    respect to a patch's features before pooling, times what sets these apart from the picture's average patch
    (gradient × input with a baseline). The length by which the embedding is divided is held fixed: its gradient takes
    from a patch what points along the embedding, which is what the patch shares with the rest of the picture. With
    mean pooling and a linear head this is the exact share of each patch in the score; maxima credit the patch that
    holds them. One forward pass of the image tower, and a backward pass through pooling and head alone.

    Args:
        model: Its image tower must see pixels and end in a grid of patches.
        image: The picture.
        text: At least one word.

    Raises:
        InputError: If there are no words, or the tower keeps no grid.
    """
    words = text.split()
    if not words:
        raise InputError("explain: there are no words; write at least one")
    tower, similarity = model.image_tower, model.similarity
    view = model.transform()(image.convert("RGB"), None)  # uint8 (3, S, S)
    others = [" ".join(words[:n] + words[n + 1 :]) for n in range(len(words))] if len(words) > 1 else []
    texts = model.encode_texts([text, *others]).to(model.device)  # (W + 1, D)
    with evaluating(tower):
        with torch.no_grad():
            tokens, embed = _patches(tower, view[None].to(model.device))
        side = _side(tokens.shape[1])
        with torch.enable_grad():
            tokens = tokens.detach().requires_grad_()
            embedding = embed(tokens)  # (1, D)
            if tower.config.normalise:
                embedding = embedding / embedding.detach().norm().clamp_min(1e-12)
            point = embedding.detach().expand_as(texts).clone().requires_grad_()
            scores = similarity.pairs(point, texts)  # (W + 1,)
            slopes = torch.autograd.grad(scores.sum(), point)[0]  # (W + 1, D)
            gradients = torch.autograd.grad(embedding, tokens, slopes[:, None], is_grads_batched=True)[0][:, 0]
    patches = slice(tokens.shape[1] - side * side, None)
    features = tokens.detach()[0, patches]
    shares = (gradients[:, patches] * (features - features.mean(0))).sum(-1).view(-1, side, side).float().cpu().numpy()
    values = scores.detach().float().cpu().numpy()
    weights = values[0] - values[1:] if others else values
    return Explanation(
        words=tuple(words),
        score=float(values[0]),
        word_weights=weights,
        heat=shares[0],
        word_heat=shares[0] - shares[1:] if others else shares[:1],
        view=Image.fromarray(view.permute(1, 2, 0).numpy()),
    )


def overlay(view: Image.Image, heat: NDArray[np.float32], side: int = 384) -> Image.Image:
    """The picture, bright and warm where the heat is positive, dim elsewhere; ``side`` pixels square.

    A patch is shown with its neighbours' mean, because its features come from a wider part of the picture than it
    covers.
    """
    around = np.lib.stride_tricks.sliding_window_view(np.pad(heat, 1, mode="edge"), (3, 3)).mean((-2, -1))  # (h, w)
    strength = np.clip(around / max(float(around.max()), 1e-12), 0, 1).astype(np.float32)
    smooth = Image.fromarray(strength).resize((side, side), Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(smooth), 0, 1)[..., None]  # (side, side, 1)
    pixels = np.asarray(view.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    shown = pixels * (_DIM + (1 - _DIM) * share) * (1 - _TINT * share) + _WARM * _TINT * share
    return Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))


def _patches(tower: Tower, pixels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features of the patches ``(1, T, F)``, and the way from there to the embedding ``(1, D)``, its length kept."""
    backbone, unscaled = tower.backbone, copy(tower)
    unscaled.config = replace(tower.config, normalise=False)
    pool = PARAMETER_FREE.get(tower.config.pooling)

    def pooled(tokens: Tensor) -> Tensor:
        return unscaled.project(pool(tokens, None) if pool else tokens)

    if (
        isinstance(backbone, PixelBackbone)
        and isinstance(network := backbone.network, nn.Sequential)
        and isinstance(network[-1], nn.Flatten)
    ):
        # The same layers but the last: a hook would also hear what other threads encode meanwhile.
        grid = PixelBackbone(network[:-1], backbone.dim, backbone.preprocessing).to(pixels.device)
        # One long vector, channel by channel.
        return grid(pixels).values, lambda patches: pooled(patches.transpose(1, 2).flatten(1)[:, None])
    return backbone(pixels, None)[0], pooled


def _side(tokens: int) -> int:
    """Side of the square grid among so many tokens, a few special ones before it."""
    side = math.isqrt(tokens)
    if side < 2 or tokens - side * side > _SPECIAL_TOKENS:
        raise InputError("explain: the image tower keeps no square grid of patches; take one that pools a grid")
    return side
