from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.linear.max_margin import NORMS, item_margins, margin, max_margin, prox
from training.robustness.linear.study import draw

DUAL = {
    "l1": lambda v: v.abs().max(),
    "l2": lambda v: v.norm(),
    "linf": lambda v: v.abs().sum(),
    "fourier-l1": lambda v: torch.fft.fft(v, norm="ortho").abs().max(),
}
OPPOSITE = {"l1": "linf", "linf": "l1", "l2": "l2"}
norms = pytest.mark.parametrize("norm", NORMS)


def data(ratio: float = 4, seed: int = 0, dim: int = 30) -> tuple[Tensor, Tensor]:
    x, y = draw(dim, ratio, seed)
    return torch.from_numpy(x), torch.from_numpy(y)


@norms
@pytest.mark.parametrize("ratio", [1.5, 4, 10])
def test_both_backends_find_the_same_margin(norm: str, ratio: float) -> None:
    for seed in range(2):
        x, y = data(ratio, seed)
        one, other = (max_margin(x, y, norm, backend) for backend in ("cvxpy", "scipy"))  # type: ignore[arg-type]
        assert one.margin == pytest.approx(other.margin, rel=1e-6)
        assert max(one.gap, other.gap) < 2e-6
        for found in (one, other):
            assert margin(found.w, x, y, norm) == pytest.approx(found.margin, rel=1e-9)
            assert float((y * (x @ found.w)).min()) == pytest.approx(1)


@norms
def test_two_opposite_points(norm: str) -> None:
    """With one point and its mirror image the margin is the dual norm of that point."""
    point = torch.from_numpy(np.random.default_rng(0).standard_normal(8))
    found = max_margin(torch.stack([point, -point]), torch.tensor([1.0, -1.0]), norm)
    assert found.margin == pytest.approx(float(DUAL[norm](point)), rel=1e-7)


@norms
def test_nothing_random_does_better(norm: str) -> None:
    x, y = data()
    best = max_margin(x, y, norm)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        near = best.w + 0.1 * best.w.norm() * torch.randn(30, generator=generator, dtype=torch.float64) / 30**0.5
        assert margin(near, x, y, norm) <= best.margin * (1 + 1e-6)


@norms
def test_scaling_the_data_scales_the_margin(norm: str) -> None:
    x, y = data()
    assert max_margin(1e4 * x, y, norm).margin == pytest.approx(1e4 * max_margin(x, y, norm).margin, rel=1e-6)


def test_a_point_is_lost_right_at_its_margin() -> None:
    """The worst change in the dual norm of l1, which is linf, is ε times the signs of w."""
    x, y = data()
    w = max_margin(x, y, "l1").w
    for n, epsilon in enumerate(item_margins(w, x, y, "l1").tolist()):
        for share, stays in ((0.999, True), (1.001, False)):
            moved = x[n] - y[n] * share * epsilon * w.sign()
            assert (float(y[n] * (moved @ w)) > 0) is stays


@pytest.mark.parametrize("backend", ["cvxpy", "scipy"])
@norms
def test_inseparable_data_are_refused(norm: str, backend: Any) -> None:
    x, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 1.0, -1.0])
    with pytest.raises(InputError, match="not separable"):
        max_margin(x.double(), y.double(), norm, backend)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0], "only one class"),
        ([[1.0, float("nan")], [3.0, 4.0]], [1.0, -1.0], "NaN"),
        ([[1.0, 2.0], [3.0, 4.0]], [1.0, 0.0], "labels are -1 and 1"),
        ([[1.0, 2.0], [3.0, 4.0]], [1.0], "give"),
        ([[0.0, 0.0], [3.0, 4.0]], [1.0, -1.0], "origin"),
        ([[1.0, 1.0], [2.0, 2.0]], [1.0, -1.0], "not separable"),  # rank 1, both on one side
    ],
)
def test_bad_data(x: list[list[float]], y: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        max_margin(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64), "l2")
    assert "\n" not in str(caught.value)


def test_unknown_norm_and_missing_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    with pytest.raises(InputError, match="choose from l1"):
        max_margin(x, y, "l7")
    monkeypatch.setattr("training.robustness.linear.max_margin.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"vse\[bias\]"):
        max_margin(x, y, "l1")
    assert importlib.util.find_spec("scipy")


@norms
def test_prox_minimises_what_it_should(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for lam in (0.1, 1.0, 50.0):
        v = torch.randn(9, generator=generator, dtype=torch.float64)

        def cost(u: Tensor, v: Tensor = v, lam: float = lam) -> float:
            size = torch.fft.fft(u, norm="ortho").abs().sum() if norm == "fourier-l1" else DUAL[OPPOSITE[norm]](u)
            return float(0.5 * (u - v).square().sum() + lam * size)

        u = prox(v, lam, norm)
        for scale in (1e-3, 0.1, 1.0):
            for _ in range(50):
                other = u + scale * torch.randn(9, generator=generator, dtype=torch.float64)
                assert cost(u) <= cost(other) + 1e-9
