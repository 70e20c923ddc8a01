"""Variable-length rows in one rectangular tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Rows of unequal length, padded at the end.

    Attributes:
        values: ``(B, T, ...)`` for sequences (token ids, token or region features), or any ``(B, ...)``
            when every row is complete (pixels, pooled features).
        mask: bool ``(B, T)``, True where a value is real; None when all are.
    """

    values: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> Padded:
        """The same rows on another device."""
        return Padded(self.values.to(device), None if self.mask is None else self.mask.to(device))


def pad(rows: Sequence[Tensor]) -> Padded:
    """Stack rows ``(T_b, ...)`` into ``(B, max T_b, ...)``; the mask is omitted when all lengths agree."""
    lengths = torch.tensor([len(row) for row in rows])
    if bool((lengths == lengths[0]).all()):
        return Padded(torch.stack(list(rows)))
    values = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (B, T, ...)
    return Padded(values, torch.arange(values.shape[1]) < lengths[:, None])
