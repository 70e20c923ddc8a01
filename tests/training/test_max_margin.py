from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.balls import Ball
from training.robustness.linear import max_margin as module
from training.robustness.linear.margin_norms import dual_measure, measure, prox
from training.robustness.linear.max_margin import NORMS, item_margins, margin, max_margin
from training.robustness.linear.study import draw
from training.robustness.norms import FOURIER_LINF, L1, L2, LINF, Norm

ALL = (*NORMS, "l1.1", "l1.5", "l3", "l10")
ATTACKS: dict[str, Norm] = {"l1": LINF, "l2": L2, "linf": L1, "fourier-l1": FOURIER_LINF}
norms = pytest.mark.parametrize("norm", ALL)
backends = pytest.mark.parametrize("backend", ["cvxpy", "scipy"])


def data(ratio: float = 4, seed: int = 0, dim: int = 30) -> tuple[Tensor, Tensor]:
    x, y = draw(dim, ratio, seed)
    return torch.from_numpy(x), torch.from_numpy(y)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@norms
@pytest.mark.parametrize("ratio", [1.5, 4, 10])
def test_both_backends_find_the_same_margin(norm: str, ratio: float) -> None:
    for seed in range(2):
        x, y = data(ratio, seed)
        one, other = (max_margin(x, y, norm, backend) for backend in ("cvxpy", "scipy"))  # type: ignore[arg-type]
        assert one.margin == pytest.approx(other.margin, rel=1e-6)
        assert max(one.gap, other.gap) < 1e-6
        for found in (one, other):
            assert margin(found.w, x, y, norm) == pytest.approx(found.margin, rel=1e-9)
            assert float((y * (x @ found.w)).min()) == pytest.approx(1)
            assert float(measure(found.w, norm)) == pytest.approx(1 / found.margin, rel=1e-9)


@backends
@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (80, (0.123, 0.865, 5.80, 0.109)),
        (50, (0.194, 1.269, 8.89, 0.164)),
        (25, (0.341, 1.826, 13.6, 0.261)),
        (12, (0.594, 3.18, 25.2, 0.546)),
        (6, (0.870, 4.25, 34.9, 0.708)),
        (3, (1.176, 5.37, 44.3, 1.052)),
    ],
)
def test_margins_of_an_independent_solution(count: int, expected: tuple[float, ...], backend: Any) -> None:
    """The study's data in 100 dimensions; values of a separate program, to three digits."""
    rng = np.random.default_rng(1)
    direction = rng.standard_normal(100)
    x = rng.standard_normal((count, 100))
    points, labels = torch.from_numpy(x), torch.from_numpy(np.sign(-x @ direction))
    for norm, value in zip(NORMS, expected, strict=True):
        found = max_margin(points, labels, norm, backend)
        assert found.margin == pytest.approx(value, rel=5e-3)
        assert found.gap < 1e-6


@backends
@norms
def test_two_opposite_points(norm: str, backend: Any) -> None:
    """With one point and its mirror image the margin is the dual norm of that point."""
    point = noise(8)
    found = max_margin(torch.stack([point, -point]), torch.tensor([1.0, -1.0]), norm, backend)
    assert found.margin == pytest.approx(float(dual_measure(point, norm)), rel=1e-7)


@backends
@norms
def test_two_points_on_axes(norm: str, backend: Any) -> None:
    """Of ``a e_1`` and ``-b e_2``, on either side, w is ``(1/a, 1/b)``."""
    if norm.startswith("fourier"):  # of two values the spectrum is their sum and their difference, over √2
        expected = 1 / (math.sqrt(2) * max(1 / 2, 1 / 5))
    else:
        expected = 1 / float(measure(torch.tensor([1 / 2, 1 / 5], dtype=torch.float64), norm))
    found = max_margin(torch.tensor([[2.0, 0], [0, -5]]), torch.tensor([1, -1]), norm, backend)
    assert found.margin == pytest.approx(expected, rel=1e-7)
    if norm in ("linf", "fourier-l1"):  # the larger entry alone counts, so the other is free
        assert found.w[0] == pytest.approx(1 / 2)
        assert 1 / 5 - 1e-6 <= float(found.w[1]) <= 1 / 2 + 1e-6
    else:
        torch.testing.assert_close(found.w, torch.tensor([1 / 2, 1 / 5], dtype=torch.float64), rtol=1e-5, atol=0)


@norms
def test_nothing_random_does_better(norm: str) -> None:
    x, y = data()
    best = max_margin(x, y, norm)
    for seed in range(200):
        near = best.w + 0.1 * best.w.norm() * noise(30, seed=seed) / 30**0.5
        assert margin(near, x, y, norm) <= best.margin * (1 + 1e-6)


@backends
@norms
def test_scaling_the_data_scales_the_margin(norm: str, backend: Any) -> None:
    x, y = data()
    found = max_margin(x, y, norm, backend)
    for scale in (1e-6, 1e4):
        scaled = max_margin(scale * x, y, norm, backend)
        assert scaled.margin == pytest.approx(scale * found.margin, rel=1e-6)
        assert scaled.gap < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_the_attack_in_the_dual_norm_succeeds_right_at_the_margin(norm: str) -> None:
    x, y = data()
    w = max_margin(x, y, norm).w
    pictures, gradients = x.view(-1, 1, 1, 30), (-y[:, None] * w).view(-1, 1, 1, 30)
    for n, epsilon in enumerate(item_margins(w, x, y, norm).tolist()):
        for share, stays in ((0.999, True), (1.001, False)):
            ball = Ball(ATTACKS[norm], share * epsilon, -math.inf, math.inf)
            at = slice(n, n + 1)
            moved = ball.project(ball.step(pictures[at], pictures[at], gradients[at], 2 * ball.epsilon), pictures[at])
            assert (float(y[n] * (moved.view(30) @ w)) > 0) is stays
            assert float(dual_measure(moved.view(30) - x[n], norm)) <= share * epsilon * (1 + 1e-9)


@backends
@norms
def test_small_margins_keep_their_digits(norm: str, backend: Any) -> None:
    for height in (1e-3, 1e-6, 1e-8):
        x = torch.tensor([[1.0, height], [1.0, -height]], dtype=torch.float64)
        found = max_margin(x, torch.tensor([1, -1]), norm, backend)
        expected = height / math.sqrt(2) if norm.startswith("fourier") else height
        assert found.margin == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", ["fourier-l1", "l1.1", "l1.5", "l3", "l10"])
def test_the_interior_point_method_takes_hard_data(norm: str) -> None:
    """Columns of zeros, ties, and coordinates or points that differ by magnitudes."""
    for seed in (1, 13, 52, 61):  # what rounding does to the steps depends on the machine
        x, y = (torch.from_numpy(one) for one in draw(100, 33, seed))
        for jitter in (0, 1e-15):
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            assert max_margin(x.round() * (1 + jitter * noise), y, norm, "scipy").gap < 1e-6
    x, y = (torch.from_numpy(one) for one in draw(100, 33, 1))
    assert max_margin(x * torch.logspace(-2, 2, 100), y, norm, "scipy").gap < 1e-6


@pytest.mark.parametrize(("norm", "dim", "ratio"), [("l1.5", 20, 1 / 15), ("l10", 30, 0.75), ("fourier-l1", 30, 0.75)])
def test_coordinates_may_differ_by_six_magnitudes(norm: str, dim: int, ratio: float) -> None:
    x, y = data(ratio, 2, dim)
    assert max_margin(x * torch.logspace(-3, 3, dim), y, norm, "scipy").gap < 1e-6


def test_a_gap_does_not_trust_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a solution what is left is the l2 classifier, and a gap that says how good it is."""
    x, y = data()
    true = max_margin(x, y, "l1")
    monkeypatch.setattr(module, "_by_cvxpy", lambda *_: None)
    found = max_margin(x, y, "l1", "cvxpy")
    assert 0.05 < true.margin / found.margin - 1 <= found.gap
    assert margin(found.w, x, y, "l1") == pytest.approx(found.margin)


@backends
@norms
def test_inseparable_data_are_refused(norm: str, backend: Any) -> None:
    x, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 1.0, -1.0])
    with pytest.raises(InputError, match=r"not separable.*weighted mean of 2 points"):
        max_margin(x.double(), y.double(), norm, backend)
    with pytest.raises(InputError, match="not separable"):  # by less than rounding could tell
        max_margin(torch.tensor([[1, 1e-11], [1, -1e-11]]).double(), torch.tensor([1, -1]), norm, backend)


@backends
@norms
def test_points_may_repeat_and_span_less_than_the_space(norm: str, backend: Any) -> None:
    x = noise(6, 3) @ noise(3, 20, seed=1)  # rank 3
    y = (x @ noise(20, seed=2)).sign()
    assert set(y.tolist()) == {-1, 1}
    once = max_margin(x, y, norm, backend)
    twice = max_margin(x.repeat(2, 1), y.repeat(2), norm, backend)
    assert twice.margin == pytest.approx(once.margin, rel=1e-8)
    assert max(once.gap, twice.gap) < 1e-8


def test_random_labels_are_separable_for_few_points_only() -> None:
    for seed in range(20):
        x, y = noise(200, 30, seed=seed), noise(200, seed=seed + 100).sign()
        with pytest.raises(InputError, match="not separable"):
            max_margin(x, y, "l2", "scipy")
        assert max_margin(x[:15], y[:15], "l2", "scipy").margin > 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0], "only one class"),
        ([[1.0, 2.0]], [-1.0], "only one class"),
        ([[1.0, float("nan")], [3.0, 4.0]], [1.0, -1.0], "NaN"),
        ([[1.0, float("inf")], [3.0, 4.0]], [1.0, -1.0], "NaN"),
        ([[1.0, 2.0], [3.0, 4.0]], [1.0, float("nan")], "NaN"),
        ([[1.0, 2.0], [3.0, 4.0]], [1.0, 0.0], "labels are -1 and 1"),
        ([[1.0, 2.0], [3.0, 4.0]], [1.0], "give"),
        ([1.0, 2.0], [1.0, -1.0], "give"),
        ([], [], "give"),
        ([[0.0, 0.0], [3.0, 4.0]], [1.0, -1.0], "origin"),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, -1.0], "not separable"),
        ([[1.0, 1.0], [2.0, 2.0]], [1.0, -1.0], "not separable"),  # rank 1, both on one side
    ],
)
def test_bad_data(x: list[list[float]], y: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        max_margin(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64), "l2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "l0.5", "l", "L2", "linfinity", "fourier", "l-1", "l1.", "lnan", "l2\n"])
def test_unknown_norms(name: str) -> None:
    x, y = data()
    for use in (lambda: max_margin(x, y, name), lambda: margin(x[0], x, y, name), lambda: prox(x, 1, name)):
        with pytest.raises(InputError, match="is unknown; use linf or lp"):
            use()


def test_unknown_backends_and_missing_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    with pytest.raises(InputError, match="use fourier-l1"):
        max_margin(x, y, "fourier-linf")
    with pytest.raises(InputError, match="backend 'numpy' is unknown; use auto, cvxpy, scipy"):
        max_margin(x, y, "l1", "numpy")  # type: ignore[arg-type]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "cvxpy" else importlib.util.find_spec(name))
    assert max_margin(x, y, "l1").margin == max_margin(x, y, "l1", "scipy").margin
    with pytest.raises(InputError, match=r"cvxpy is not installed; pip install 'vse-app\[cvxpy\]'"):
        max_margin(x, y, "l1", "cvxpy")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"scipy is not installed; pip install 'vse-app\[bias\]'"):
        max_margin(x, y, "l1")


def test_margins_of_any_classifier() -> None:
    x, y = data()
    w = noise(30)
    torch.testing.assert_close(item_margins(w, x, y, "l1"), y * (x @ w) / w.abs().sum())
    assert margin(w, x, y, "l1") == pytest.approx(margin(7 * w, x, y, "l1"))
    assert margin(-max_margin(x, y, "l1").w, x, y, "l1") < 0
    assert margin(torch.zeros(30), x, y, "l1") == 0
    with pytest.raises(InputError, match="give"):
        margin(w[1:], x, y, "l1")
