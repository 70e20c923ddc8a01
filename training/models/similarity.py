"""How an image embedding and a caption embedding are compared: cosine, or the order similarity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Largest (images × captions × dimensions) difference tensor held at once: 16 MB in float32.
BLOCK_ELEMENTS = 2**22
# Elements of the (captions × dimensions) tile that one image is held against on a CPU: 0.5 MB, which stays in cache.
TILE_ELEMENTS = 2**17


def cosine_scores(images: Tensor, captions: Tensor) -> Tensor:
    """Cosine similarity of every image with every caption.

    Args:
        images: Unit-norm image embeddings ``(I, D)``; the model has normalised them.
        captions: Unit-norm caption embeddings ``(C, D)``.

    Returns:
        Scores ``(I, C)``; higher is more similar.
    """
    return images @ captions.T


def cosine_pairs(images: Tensor, captions: Tensor) -> Tensor:
    """Cosine similarity of row ``b`` with row ``b``: unit-norm ``(B, D)`` twice, to ``(B,)``."""
    return (images * captions).sum(-1)


def order_pairs(images: Tensor, captions: Tensor) -> Tensor:
    """Order similarity of row ``b`` with row ``b``: ``(B, D)`` twice, to ``(B,)``. See :func:`order_scores`.

    Leading dimensions broadcast.
    """
    # vector_norm has the subgradient 0 at 0, where the square root of a sum would give NaN.
    return torch.neg(torch.linalg.vector_norm((captions - images).relu(), dim=-1))


def order_scores(images: Tensor, captions: Tensor) -> Tensor:
    """Order similarity ``s(i, c) = -‖max(0, c - i)‖₂`` of every image with every caption.

    A caption is more general than its image, so it should be dominated by it in every coordinate; the score
    is minus the distance from that (Vendrov et al., *Order-Embeddings of Images and Language*, 2016, with
    the root that VSE++ takes of their penalty). The gradient is zero, not NaN, where a caption is dominated
    exactly.

    Captions are scored in blocks whose differences are recomputed in the backward pass, so that memory
    never grows with ``I x C x D``.

    Args:
        images: Image embeddings ``(I, D)``; usually their absolute values.
        captions: Caption embeddings ``(C, D)``.

    Returns:
        Scores ``(I, C)``, at most 0; higher is more similar.
    """
    if images.device.type == "cpu" and not torch.is_grad_enabled():
        return _order_scores_in_cache(images, captions)
    rows = max(1, BLOCK_ELEMENTS // max(1, images.numel()))
    return torch.cat(
        [
            checkpoint(order_pairs, images[:, None], block, use_reentrant=False, preserve_rng_state=False)
            for block in torch.split(captions, rows)
        ],
        dim=1,
    )


def _order_scores_in_cache(images: Tensor, captions: Tensor) -> Tensor:
    """:func:`order_scores` for evaluation: in place, a third of the time of the differentiable form."""
    scores = images.new_empty(len(images), len(captions))
    width = max(1, TILE_ELEMENTS // images.shape[1])
    for first in range(0, len(captions), width):
        tile = captions[first : first + width]  # (c, D)
        excess = torch.empty_like(tile)
        for row, image in enumerate(images):
            torch.sub(tile, image, out=excess).clamp_(min=0)
            scores[row, first : first + width] = torch.linalg.vector_norm(excess, dim=1)
    return scores.neg_()


def _sum_rows(table: Tensor, indices: Tensor, weights: Tensor, into: Tensor, count: int) -> Tensor:
    """``(count, D)``; row ``r`` is the sum of ``weights[e] * table[indices[e]]`` over all e with ``into[e] = r``."""
    ordered, order = into.sort()
    starts = torch.searchsorted(ordered, torch.arange(count, device=into.device))
    return F.embedding_bag(indices[order], table, starts, mode="sum", per_sample_weights=weights[order])


class _CosineEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, images: Tensor, captions: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(images, captions, rows, columns)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        images, captions, rows, columns = ctx.saved_tensors
        over_captions = _sum_rows(captions, columns, gradients[0], rows, len(images))
        over_images = _sum_rows(images, rows, gradients[0], columns, len(captions))
        return None, over_captions, over_images, None, None


def cosine_entries(scores: Tensor, images: Tensor, captions: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Give entries of the score matrix that are already known their gradient, at ``O((I + C) D)`` memory.

    The gradient of the whole matrix is zero but for these entries, so sums of a few rows do for a dense product.

    Args:
        scores: ``cosine_scores(images, captions)[rows, columns]``, ``(E,)``, without a graph.
        images: Unit-norm image embeddings ``(I, D)``.
        captions: Unit-norm caption embeddings ``(C, D)``.
        rows: int64 ``(E,)``.
        columns: int64 ``(E,)``.

    Returns:
        The same scores ``(E,)``, differentiable once with respect to both embeddings.
    """
    attached: Tensor = _CosineEntries.apply(scores, images, captions, rows, columns)
    return attached


def order_entries(scores: Tensor, images: Tensor, captions: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """As :func:`cosine_entries`; the differences are needed for the gradient, so the scores come anew."""
    return order_pairs(images.index_select(0, rows), captions.index_select(0, columns))


@dataclass(frozen=True)
class Similarity:
    """One similarity in its three forms.

    Attributes:
        name: Its key in :data:`SIMILARITIES`.
        scores: All against all, ``(I, D), (C, D) -> (I, C)``.
        pairs: Row against row, ``(B, D), (B, D) -> (B,)``; the diagonal of ``scores``.
        entries: Known entries of ``scores`` made differentiable; see :func:`cosine_entries`.
    """

    name: str
    scores: Callable[[Tensor, Tensor], Tensor]
    pairs: Callable[[Tensor, Tensor], Tensor]
    entries: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


COSINE = Similarity("cosine", cosine_scores, cosine_pairs, cosine_entries)
ORDER = Similarity("order", order_scores, order_pairs, order_entries)
SIMILARITIES = {similarity.name: similarity for similarity in (COSINE, ORDER)}
