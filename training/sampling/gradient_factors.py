"""Per-item gradients in factored form, so that a matrix of items by parameters is never held.

For a layer that is linear in its weight, the gradient of item b is a sum of outer products over positions t,
``g_b = Σ_t Δ_bt ⊗ A_bt``: A is what enters the layer and Δ the loss gradient at what leaves it. Lengths, inner
products and random projections of gradients follow from A and Δ alone (Faghri et al., *A Study of Gradient
Variance in Deep Learning*, 2020, arXiv 2007.04532, appendix; Goodfellow, *Efficient Per-Example Gradient
Computations*, 2015, for lengths).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_ELEMENTS = 2**24  # of the explicit gradients of a few items


@dataclass(frozen=True)
class Factors:
    """Gradients of B items with respect to the weight, and bias, of one layer.

    Attributes:
        inputs: A, ``(B, T, i)``; for an embedding int64 ids ``(B, T)``, each a one-hot row of width V.
        deltas: Δ, ``(B, T, o)``, of the *sum* of the items' losses: a mean over the batch would scale all by 1/B.
        bias: The layer has a bias: each A goes on with a 1, and each gradient with Σ_t Δ_bt.
    """

    inputs: Tensor
    deltas: Tensor
    bias: bool = False

    def first(self, count: int) -> Factors:
        """Of the first ``count`` items alone."""
        return Factors(self.inputs[:count], self.deltas[:count], self.bias)

    def products(self, other: Factors) -> Tensor:
        """``<g_b, h_c>`` with the gradients of other items in the same layer, ``(B, C)``."""
        if self.inputs.is_floating_point():
            inputs = torch.einsum("bti,csi->btcs", self.inputs, other.inputs) + self.bias
        else:
            inputs = (self.inputs[:, :, None, None] == other.inputs).to(self.deltas.dtype)  # (B, T, C, S)
        return (inputs * torch.einsum("bto,cso->btcs", self.deltas, other.deltas)).sum(dim=(1, 3))

    def squared_norms(self) -> Tensor:
        """``|g_b|²``, ``(B,)``, the cheaper way: by all pairs of positions, or by explicit gradients."""
        positions, outputs = self.deltas.shape[1:]
        width = self.inputs.shape[-1] if self.inputs.is_floating_point() else 0
        if width and positions * (width + outputs) > width * outputs:
            return torch.cat([block.square().sum(dim=(1, 2)) for block in self._explicit()])
        if self.inputs.is_floating_point():
            inputs = self.inputs @ self.inputs.mT + self.bias  # (B, T, T)
        else:
            inputs = (self.inputs[:, :, None] == self.inputs[:, None]).to(self.deltas.dtype)
        return (inputs * (self.deltas @ self.deltas.mT)).sum(dim=(1, 2))

    def dots(self, centers: Tensor) -> Tensor:
        """``<g_b, C_k>`` with K full gradients.

        Args:
            centers: ``(K, o, i)``; one column more if there is a bias, ``(K, o, V)`` for an embedding.

        Returns:
            ``(B, K)``.
        """
        if not self.inputs.is_floating_point():
            return torch.einsum("kobt,bto->bk", centers[:, :, self.inputs], self.deltas)
        return torch.cat([block.flatten(1) @ centers.flatten(1).T for block in self._explicit()])

    def _explicit(self) -> Iterator[Tensor]:
        """The gradients themselves, ``(b, o, i)``, a few items at a time."""
        inputs = F.pad(self.inputs, (0, 1), value=1.0) if self.bias else self.inputs
        rows = max(1, BLOCK_ELEMENTS // (inputs.shape[-1] * self.deltas.shape[-1]))
        for a, delta in zip(torch.split(inputs, rows), torch.split(self.deltas, rows), strict=True):
            yield delta.mT @ a


class GradientSketch:
    """Short vectors whose inner products are those of gradients, in expectation.

    ``φ_b = m^(-1/2) Σ_t (R A_bt) ∘ (S Δ_bt)`` with independent random signs R ``(m, i)`` and S ``(m, o)`` has
    ``E <φ_b, φ_c> = <g_b, g_c>``; the error falls as ``m^(-1/2)``, as that of a dense projection would. Layers
    have signs of their own, so the sum of their sketches stands for all their parameters together.

    Args:
        size: Length m of a sketch.
        seed: Decides the signs. Sketches are comparable only under the same seed and the same layers.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self._signs: dict[tuple[int, int, int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, layers: Sequence[Factors]) -> Tensor:
        """Sketches ``(B, m)`` of the same B items' gradients in several layers."""
        sketches = []
        for number, layer in enumerate(layers):
            inputs, deltas = layer.inputs, layer.deltas
            if inputs.is_floating_point():
                inputs = inputs.to(deltas.dtype)
                signs = self._signed(number, 0, inputs.shape[-1] + layer.bias, deltas)
                left = inputs @ signs[: inputs.shape[-1]]  # (B, T, m)
                if layer.bias:
                    left = left + signs[-1]
            else:
                words = 1 << int(inputs.max()).bit_length()  # a few sizes, however many words a batch has
                left = self._signed(number, 0, words, deltas)[inputs]
            sketches.append((left * (deltas @ self._signed(number, 1, deltas.shape[-1], deltas))).sum(dim=1))
        total: Tensor = torch.stack(sketches).sum(dim=0) * self.size**-0.5
        return total

    def _signed(self, layer: int, side: int, width: int, like: Tensor) -> Tensor:
        """Random signs ``(width, m)``; a wider matrix begins with the rows of a narrower one."""
        key = layer, side, width, like.device, like.dtype
        if key not in self._signs:
            generator = torch.Generator().manual_seed((self.seed * 1009 + layer) * 2 + side)
            bits = torch.randint(2, (width, self.size), generator=generator)
            self._signs[key] = (bits * 2 - 1).to(like.device, like.dtype)
        return self._signs[key]


class FactorRecorder:
    """Records A and Δ of layers during one forward and backward pass, inside a ``with`` block.

    The loss must be a sum over items in which no item's cost passes through another's activations: batch norm
    in training mode mixes items. A layer that is used more than once adds positions.

    Args:
        layers: Linear, over any number of positions; Conv2d with zero padding and one group; Embedding.

    Raises:
        ValueError: For other layers.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with FactorRecorder([layer]) as recorder:
        ...     layer(torch.eye(3)).square().sum().backward()
        >>> recorder.factors()[0].squared_norms().shape
        torch.Size([3])
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            plain = isinstance(layer, nn.Linear | nn.Embedding)
            if isinstance(layer, nn.Conv2d):
                plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
            if not plain:
                raise ValueError(f"no factors for {layer}; use Linear, Embedding, or Conv2d with zeros around it")
        self.layers = layers
        self._calls: dict[nn.Module, list[tuple[Tensor, list[Tensor]]]] = {layer: [] for layer in layers}

    def __enter__(self) -> FactorRecorder:
        self._handles = [layer.register_forward_hook(self._record) for layer in self.layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            deltas: list[Tensor] = []
            output.register_hook(deltas.append)  # type: ignore[no-untyped-call]  # sees the gradient even if the output is changed in place
            self._calls[layer].append((arguments[0].detach(), deltas))

    def factors(self) -> list[Factors]:
        """One entry a layer, after the backward pass.

        Raises:
            ValueError: If a layer took no part in it.
        """
        found = []
        for layer, calls in self._calls.items():
            parts = [_factors(layer, inputs, deltas[0]) for inputs, deltas in calls if deltas]
            if not parts:
                raise ValueError(f"{layer}: took no part in the loss")
            inputs, deltas = (torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("inputs", "deltas"))
            found.append(Factors(inputs, deltas, parts[0].bias))
        return found


def record_factors(layers: Sequence[nn.Module], costs: Callable[[], Tensor]) -> list[Factors]:
    """Factors of the gradients of each of ``costs() -> (B,)``; parameters' ``grad`` stays as it is.

    Args:
        layers: As of :class:`FactorRecorder`, with weights that require a gradient.
        costs: Runs the model on B items; the cost of each must depend on that item alone.
    """
    # Any parameter of a layer makes the backward pass reach its output; that of a bias costs no product.
    reached: list[Tensor] = [layer.weight if getattr(layer, "bias", None) is None else layer.bias for layer in layers]  # type: ignore[misc]
    with FactorRecorder(layers) as recorder:
        torch.autograd.grad(costs().sum(), reached)
    return recorder.factors()


def _factors(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> Factors:
    batch = len(deltas)
    if isinstance(layer, nn.Embedding):
        ids, deltas = inputs.reshape(batch, -1), deltas.reshape(batch, -1, deltas.shape[-1])
        if layer.padding_idx is not None:
            deltas = deltas * (ids != layer.padding_idx)[..., None]
        return Factors(ids, deltas)
    bias = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        return Factors(patches.mT, deltas.flatten(2).mT, bias)  # (B, h w, C k k), (B, h w, o)
    return Factors(inputs.reshape(batch, -1, inputs.shape[-1]), deltas.reshape(batch, -1, deltas.shape[-1]), bias)


class Projected(NamedTuple):
    """One side of some pairs, before and after its linear head.

    Attributes:
        features: What enters the head, ``(N, i)``.
        outputs: What leaves it, ``(N, D)``, before it is scaled to unit length.
    """

    features: Tensor
    outputs: Tensor


@torch.no_grad()
def hinge_factors(
    images: Projected,
    captions: Projected,
    image_ids: Tensor,
    pool_images: Projected,
    pool_captions: Projected,
    pool_ids: Tensor,
    margin: float = 0.2,
    through_pool: bool = True,
) -> tuple[Factors, Factors]:
    """Factors of both heads under max of hinges against a fixed pool, in closed form: no graph, one product a side.

    Pair b costs ``[a + max_j u_b·q_j - u_b·v_b]₊ + [a + max_i p_i·v_b - u_b·v_b]₊`` with unit embeddings u, v of
    the pair and p, q of the pool. With r, c whether the hinges are active, P_x = (I - x xᵀ) / |z_x| the gradient of
    scaling to unit length, and j, i the hardest negatives, the gradient at the image head's outputs is
    ``P(r (q_j - v_b) - c v_b)`` for the pair and ``P(c v_b)`` for the pool's image i; the caption side mirrors
    this. So each head's gradient has rank two, or one if the pool carries no gradient.

    Args:
        images: ``(B, i)`` and ``(B, D)``.
        captions: ``(B, i')`` and ``(B, D)``.
        image_ids: int64 ``(B,)``; members of the pool with the same id are no negatives.
        pool_images: ``(M, i)`` and ``(M, D)``.
        pool_captions: ``(M, i')`` and ``(M, D)``.
        pool_ids: int64 ``(M,)``.
        margin: ``a``.
        through_pool: Also the part that reaches the head through the hardest negative.

    Returns:
        Factors of the image head and of the caption head; T is 2, or 1 without the pool's part.
    """
    u, v, p, q = (F.normalize(side.outputs, dim=-1) for side in (images, captions, pool_images, pool_captions))
    same = image_ids[:, None] == pool_ids
    positive = (u * v).sum(dim=-1)
    over_captions, j = (u @ q.T).masked_fill(same, -torch.inf).max(dim=1)
    over_images, i = (v @ p.T).masked_fill(same, -torch.inf).max(dim=1)
    r = (over_captions + margin > positive).to(u.dtype)[:, None]
    c = (over_images + margin > positive).to(u.dtype)[:, None]

    def factors(own: Projected, delta: Tensor, pool: Projected, hardest: Tensor, pool_delta: Tensor) -> Factors:
        inputs, deltas = own.features[:, None], _through_unit_length(own.outputs, delta)[:, None]
        if through_pool:
            beside = _through_unit_length(pool.outputs[hardest], pool_delta)
            inputs = torch.stack([own.features, pool.features[hardest]], dim=1)  # (B, 2, i)
            deltas = torch.cat([deltas, beside[:, None]], dim=1)  # (B, 2, D)
        return Factors(inputs, deltas)

    return (
        factors(images, r * (q[j] - v) - c * v, pool_images, i, c * v),
        factors(captions, c * (p[i] - u) - r * u, pool_captions, j, r * u),
    )


def _through_unit_length(outputs: Tensor, gradients: Tensor) -> Tensor:
    """Gradient at z of a loss with the given gradient at z / |z|: ``(I - x xᵀ) g / |z|``, ``(B, D)``."""
    lengths = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True)
    unit = outputs / lengths
    radial = unit * (unit * gradients).sum(dim=-1, keepdim=True)
    return torch.div(gradients - radial, lengths)
