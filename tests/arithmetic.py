"""A pytest plugin: other arithmetics than this processor's own; see ``make test-arithmetic``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.models.dual_encoder import DualEncoder

LAST_BITS = 1e-6
"""Relative size of a change to initial weights: what some operations in another order amount to."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--flush-denormals", action="store_true", help="treat numbers below 1e-38 as zero")
    parser.addoption("--other-bits", type=int, metavar="SEED", help="begin every model with other last bits")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--flush-denormals"):
        torch.set_flush_denormal(True)
    seed = config.getoption("--other-bits")
    if seed is not None:
        DualEncoder.__init__ = with_other_bits(DualEncoder.__init__, seed)  # type: ignore[method-assign]


def with_other_bits(initialise: Callable[..., None], seed: int) -> Callable[..., None]:
    """``DualEncoder.__init__`` with its trainable weights moved a little, the same way each time."""

    def moved(self: DualEncoder, *arguments: Any, **named: Any) -> None:
        initialise(self, *arguments, **named)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter *= 1 + LAST_BITS * torch.randn(parameter.shape, generator=noise)

    return moved
