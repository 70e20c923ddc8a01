from __future__ import annotations

import doctest
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.errors import InputError
from training.robustness.linear import steepest_descent
from training.robustness.linear.max_margin import margin, max_margin
from training.robustness.linear.steepest_descent import Geometry, Loss, adam, adversarial, descend, fista, log_loss
from training.robustness.linear.study import draw

Array = NDArray[np.float64]
GEOMETRIES: tuple[Geometry, ...] = ("l2", "l1", "linf")
NORMS = (*GEOMETRIES, "fourier-l1")
# The norm of the margin that decides the robustness to an attack.
DUALS = {"linf": "l1", "l2": "l2", "l1": "linf", "fourier-linf": "fourier-l1"}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
losses = pytest.mark.parametrize("loss", ["exp", "logistic"])


@cache
def problem(ratio: float, seed: int, width: int = 100) -> tuple[Array, Array]:
    """The study's data."""
    return draw(width, ratio, seed)


@cache
def largest_margin(ratio: float, seed: int, norm: str) -> float:
    x, y = map(torch.from_numpy, problem(ratio, seed))
    return max_margin(x, y, norm).margin


def fraction(w: Array, ratio: float, seed: int, norm: str) -> float:
    x, y = map(torch.from_numpy, problem(ratio, seed))
    return margin(torch.from_numpy(w), x, y, norm) / largest_margin(ratio, seed, norm)


@cache
def descended(ratio: float, seed: int, geometry: Geometry) -> Array:
    return descend(*problem(ratio, seed), geometry, 10_000).w


def measure(v: Array, norm: str) -> float:
    spectrum = np.fft.fft(v, norm="ortho") if norm.startswith("fourier") else v
    return float(np.linalg.norm(spectrum, {"1": 1, "2": 2, "f": math.inf}[norm[-1]]))


def torch_loss(w: torch.Tensor, x: Array, y: Array, loss: str) -> torch.Tensor:
    margins = torch.from_numpy(y) * (torch.from_numpy(x) @ w)
    return margins.neg().exp().mean() if loss == "exp" else torch.nn.functional.softplus(-margins).mean()


def naive(x: Array, y: Array, geometry: Geometry, steps: int, step: str | float, loss: str) -> Array:
    """Steepest descent as it is defined, on the loss and not on its logarithm."""
    bound = max(measure(row, DUALS[geometry]) for row in x)
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        value = torch_loss(w, x, y, loss)
        (gradient,) = torch.autograd.grad(value, w)
        largest = gradient.abs() == gradient.abs().max()
        direction = {
            "l2": -gradient,
            "l1": -gradient * largest,
            "linf": -gradient.abs().sum() * gradient.sign(),
        }[geometry]
        cap = 1 / (bound**2 * value.item())
        length = cap if step == "normalised" else step
        if step == "armijo":
            length, slope = 1000.0, measure(gradient.numpy(), DUALS[geometry])
            for _ in range(20):
                if torch_loss(w + length * direction, x, y, loss) <= value - 1e-4 * length * slope**2:
                    break
                length /= 2
            length = min(length, cap)
        assert not isinstance(length, str)
        w = (w + length * direction).detach().requires_grad_()
    return w.detach().numpy()


@losses
@pytest.mark.parametrize("step", ["normalised", "armijo", 1e-3, 0.02])
@geometries
def test_steps_are_those_of_the_definition(geometry: Geometry, step: Any, loss: Loss) -> None:
    x, y = problem(2, 0, 20)
    # A fixed step this long on the l1 norm of the gradient would diverge.
    step = step / 10 if geometry == "linf" and not isinstance(step, str) else step
    expected = naive(x, y, geometry, 30, step, loss)
    np.testing.assert_allclose(descend(x, y, geometry, 30, step, loss=loss).w, expected, rtol=1e-9, atol=1e-12)


@geometries
def test_directions_are_steepest(geometry: Geometry) -> None:
    x, y = problem(4, 0)
    direction = descend(x, y, geometry, 1).w
    gradient = (y[:, None] * x).mean(0)
    unit = direction / measure(direction, geometry)
    assert gradient @ unit == pytest.approx(measure(gradient, DUALS[geometry]))
    for other in np.random.default_rng(1).standard_normal((1000, 100)):
        assert gradient @ other / measure(other, geometry) <= gradient @ unit


@losses
def test_log_loss(loss: Loss) -> None:
    margins = torch.linspace(-20, 20, 9, dtype=torch.float64, requires_grad=True)
    # 40 as well: the logistic loss is computed differently there.
    for shift in (0.0, 40.0):
        moved = margins + shift
        value = (moved.neg().exp() if loss == "exp" else torch.log1p(moved.neg().exp())).mean().log()
        (gradient,) = torch.autograd.grad(value, margins)
        found, weights = log_loss(moved.detach().numpy(), loss)
        assert found == pytest.approx(value.item(), rel=1e-12)
        np.testing.assert_allclose(weights, -gradient.numpy(), rtol=1e-12)


@losses
def test_extreme_margins_do_not_overflow(loss: Loss) -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        value, weights = log_loss(np.array([1e4, 1e5]), loss)
        assert (value, *weights) == pytest.approx((-1e4 - math.log(2), 1, 0))
        value, weights = log_loss(np.array([-1e4, 1e5]), loss)
        assert value == pytest.approx(1e4 - math.log(2) if loss == "exp" else math.log(5e3))


@geometries
def test_recorded_steps_are_where_shorter_runs_end(geometry: Geometry) -> None:
    x, y = problem(4, 1)
    path = descend(x, y, geometry, 50, record=(50, 0, 20))
    assert list(path.recorded) == [0, 20, 50]
    np.testing.assert_array_equal(path.recorded[0], np.zeros(100))
    np.testing.assert_array_equal(path.recorded[20], descend(x, y, geometry, 20).w)
    np.testing.assert_array_equal(path.recorded[50], path.w)


@pytest.mark.parametrize("step", ["normalised", "armijo"])
@geometries
def test_the_loss_falls_in_every_step(geometry: Geometry, step: Any) -> None:
    x, y = problem(1.25, 0)
    path = descend(x, y, geometry, 200, step, record=range(201))
    values = [log_loss(y * (x @ w), "exp")[0] for w in path.recorded.values()]
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", [2, 4, 8, 16, 32])
def test_each_geometry_finds_the_largest_margin_of_its_own_norm(ratio: float, seed: int) -> None:
    for geometry in GEOMETRIES:
        w = descended(ratio, seed, geometry)
        own = fraction(w, ratio, seed, geometry)
        assert 0.95 < own < 1 + 1e-6
        for norm in NORMS:
            if norm != geometry and ratio >= 4:
                assert fraction(w, ratio, seed, norm) <= own - 0.1


def test_what_a_mismatch_costs_grows_with_the_dimension() -> None:
    fractions = [fraction(descended(ratio, 1, "l2"), ratio, 1, "l1") for ratio in (1.25, 2, 4, 8, 16, 32)]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] - fractions[-1] > 0.25


def test_normalised_steps_are_worth_more_than_fixed_ones() -> None:
    w = descend(*problem(2, 1), "l2", 3000, 1.0, loss="logistic").w
    assert fraction(w, 2, 1, "l2") < 0.93 < fraction(descend(*problem(2, 1), "l2", 3000).w, 2, 1, "l2")


def test_a_fixed_step_that_diverges_is_refused() -> None:
    with pytest.raises(InputError, match=r"10\.0 diverges within \d steps"):
        descend(*problem(2, 1), "l2", 1000, 10.0)


@pytest.mark.parametrize("norm", NORMS)
def test_fista_is_optimal(norm: str) -> None:
    x, y = problem(2, 0, 40)
    lam = 0.02 if norm != "linf" else 0.2
    w = fista(x, y, norm, lam, 3000)
    gradient = (y / (1 + np.exp(y * (x @ w)))) @ x / len(x)
    # lam times a subgradient of the norm: of dual norm lam, and attained in w.
    dual = {"l1": "linf", "l2": "l2", "linf": "l1", "fourier-l1": "fourier-linf"}[norm]
    assert measure(gradient, dual) == pytest.approx(lam, rel=1e-5)
    assert gradient @ w == pytest.approx(lam * measure(w, norm), rel=1e-5)
    heavy = 1.01 * measure((y @ x) / (2 * len(x)), dual)
    np.testing.assert_allclose(fista(x, y, norm, heavy, 100), 0, atol=1e-12)


def test_a_lighter_penalty_comes_closer_to_the_largest_margin() -> None:
    fractions = [fraction(fista(*problem(8, 1), "l1", lam, 2000), 8, 1, "l1") for lam in (1e-1, 1e-2, 1e-3)]
    assert fractions[0] + 0.1 < fractions[1] < fractions[2] < 0.98


@pytest.mark.parametrize("attack", DUALS)
def test_adversarial_steps_follow_the_loss_of_the_worst_case(attack: str) -> None:
    x, y = problem(2, 0, 20)
    w = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    for number in range(20):
        norm = (
            torch.fft.fft(w, norm="ortho").abs().sum() if attack.startswith("f") else w.norm(float(DUALS[attack][1:]))
        )
        # The norms have no gradient at 0; there the perturbation is 0 as well.
        margins = torch.from_numpy(y) * (torch.from_numpy(x) @ w) - (0.1 * norm if number else 0)
        (gradient,) = torch.autograd.grad(margins.neg().exp().mean().log(), w)
        w = (w - gradient / np.square(x).sum(1).max()).detach().requires_grad_()
    np.testing.assert_allclose(adversarial(x, y, attack, 0.1, 20), w.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [2, 8])
@pytest.mark.parametrize("attack", DUALS)
def test_adversarial_training_needs_a_radius_that_can_be_reached(attack: str, ratio: float) -> None:
    x, y = problem(ratio, 1)
    norm = DUALS[attack]
    best = largest_margin(ratio, 1, norm)
    # The tighter the radius, the more steps; linf needs the fewest and goes closest.
    for share, reached in ((0.9 if attack == "linf" or ratio == 8 else 0.75, True), (1.1, False)):
        w = adversarial(x, y, attack, share * best, 10_000 if attack == "linf" else 5000)
        assert bool((y * (x @ w) > share * best * measure(w, norm)).all()) is reached
        assert (fraction(w, ratio, 1, norm) > 0.75) is reached


def test_without_radius_adversarial_training_is_gradient_descent() -> None:
    x, y = problem(4, 0)
    np.testing.assert_allclose(adversarial(x, y, "linf", 0, 100), descend(x, y, "l2", 100).w, rtol=1e-10)


def test_adam() -> None:
    x, y = problem(2, 0, 20)
    w = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([w], lr=0.03)
    for _ in range(50):
        optimiser.zero_grad()
        torch_loss(w, x, y, "logistic").backward()
        optimiser.step()
    np.testing.assert_allclose(adam(x, y, 50, 0.03), w.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": np.ones(4)}, r"x: needs \(N, d\)"),
        ({"x": np.ones((4, 0))}, r"x: needs \(N, d\)"),
        ({"x": np.full((4, 2), np.nan)}, "x: must be finite, and not 0 everywhere"),
        ({"x": np.zeros((4, 2))}, "x: must be finite, and not 0 everywhere"),
        ({"y": [1, -1]}, "y: needs one label for each of 4 rows"),
        ({"y": [0, 1, 1, 0]}, "y: needs both of the labels"),
        ({"y": [1, np.nan, 1, -1]}, "y: needs both of the labels"),
        ({"y": [1, 1, 1, 1]}, "y: needs both of the labels"),
        ({"steps": -1}, "steps: must be at least 0, not -1"),
    ],
)
def test_invalid_data(change: dict[str, Any], complaint: str) -> None:
    given: dict[str, Any] = {"x": np.eye(4), "y": [1, -1, 1, -1], "steps": 1} | change
    for call in (
        lambda: descend(given["x"], given["y"], "l2", given["steps"]),
        lambda: fista(given["x"], given["y"], "l1", 0.1, given["steps"]),
        lambda: adversarial(given["x"], given["y"], "linf", 0.1, given["steps"]),
        lambda: adam(given["x"], given["y"], given["steps"], 0.1),
    ):
        with pytest.raises(InputError, match=complaint):
            call()


def test_invalid_options() -> None:
    x, y = problem(2, 0, 20)
    name: Any = "l0.5"
    for complaint, call in (
        ("geometry: 'l0.5' is unknown; use l2, l1, linf", lambda: descend(x, y, name, 1)),
        ("step: 'l0.5' is unknown", lambda: descend(x, y, "l2", 1, name)),
        ("step: must be positive and finite, not nan", lambda: descend(x, y, "l2", 1, math.nan)),
        ("loss: 'l0.5' is unknown", lambda: descend(x, y, "l2", 1, loss=name)),
        ("record: step 2 is not between 0 and 1", lambda: descend(x, y, "l2", 1, record=(1, 2))),
        ("norm 'l0.5' is unknown", lambda: adversarial(x, y, name, 0.1, 1)),
        ("epsilon: must be at least 0 and finite, not -1", lambda: adversarial(x, y, "linf", -1, 1)),
        ("lam: must be at least 0 and finite, not -1", lambda: fista(x, y, "l1", -1, 1)),
        ("lr: must be positive and finite, not 0", lambda: adam(x, y, 1, 0)),
        ("l0.5", lambda: fista(x, y, name, 0.1, 1)),
    ):
        with pytest.raises(InputError, match=complaint):
            call()


def test_documentation() -> None:
    assert doctest.testmod(steepest_descent).failed == 0
