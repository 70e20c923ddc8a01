"""From a set of token or grid features to one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def _masked(tokens: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], fill)


def mean_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens: ``(B, T, F)``, bool ``(B, T)`` → ``(B, F)``."""
    if mask is None:
        return tokens.mean(dim=1)
    return _masked(tokens, mask, 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def max_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Maximum over the valid tokens: ``(B, T, F)``, bool ``(B, T)`` → ``(B, F)``."""
    return _masked(tokens, mask, -math.inf).amax(dim=1)


def mean_max_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean and maximum side by side: ``(B, T, F)`` → ``(B, 2F)``."""
    return torch.cat([mean_pool(tokens, mask), max_pool(tokens, mask)], dim=-1)


def last_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The last valid token, the state of a unidirectional recurrent network: ``(B, T, F)`` → ``(B, F)``."""
    if mask is None:
        return tokens[:, -1]
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(dim=1) - 1]


PARAMETER_FREE = {"mean": mean_pool, "max": max_pool, "mean+max": mean_max_pool, "last": last_pool}


class GeneralizedPooling(nn.Module):
    """Generalized pooling operator, GPO (Chen et al., CVPR 2021, §3).

    Every feature is sorted over the tokens in descending order and averaged with weights that depend on
    the position and on the number of tokens alone: ``v_f = Σ_k θ(k, T) · sort(x_f)_k``. A bidirectional GRU
    over sinusoidal position codes generates θ, so mean (θ = 1/T) and max (θ = δ_1) are special cases.

    Args:
        dim: Width of the position codes and of the GRU.
    """

    frequencies: Tensor

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True, bidirectional=True)
        self.score = nn.Linear(dim, 1, bias=False)
        frequencies = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def weights(self, lengths: Tensor, longest: int) -> Tensor:
        """θ for sets of the given sizes: int64 ``(B,)`` → ``(B, longest)``, rows summing to one."""
        sizes, inverse = torch.unique(lengths, return_inverse=True)
        angles = torch.arange(longest, device=lengths.device)[:, None] * self.frequencies  # (T, dim / 2)
        codes = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (T, dim)
        packed = nn.utils.rnn.pack_padded_sequence(
            codes.expand(len(sizes), -1, -1), sizes.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
        both = states.view(*states.shape[:2], 2, -1).mean(dim=-2)  # (S, T, dim)
        scores = self.score(both).squeeze(-1)  # (S, T)
        beyond = torch.arange(longest, device=lengths.device) >= sizes[:, None]
        theta: Tensor = scores.masked_fill(beyond, -math.inf).softmax(dim=-1)[inverse]
        return theta

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, T, F)``, bool ``(B, T)`` → ``(B, F)``."""
        batch, longest = tokens.shape[:2]
        lengths = mask.sum(dim=1) if mask is not None else torch.full((batch,), longest, device=tokens.device)
        ranked = _masked(tokens, mask, -math.inf).sort(dim=1, descending=True).values
        ranked = ranked.masked_fill(torch.isneginf(ranked), 0.0)
        return torch.einsum("bt,btf->bf", self.weights(lengths, longest).to(ranked.dtype), ranked)
