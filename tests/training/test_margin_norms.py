"""Norms of linear classifiers: what they are, what is dual to them, and every identity between them."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.linear import margin_norms
from training.robustness.linear.margin_norms import conjugate, dual_measure, measure, order, project, prox, steepest
from training.robustness.norms import FOURIER_LINF

PLAIN = ("l1", "l1.1", "l1.5", "l2", "l3", "l10", "linf")
ALL = (*PLAIN, *(f"fourier-{name}" for name in ("l1", "l1.5", "l2", "l3", "linf")))
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1", "l1.5": "l3", "l3": "l1.5"}
DUAL |= {f"fourier-{name}": f"fourier-{dual}" for name, dual in DUAL.items()}
norms = pytest.mark.parametrize("norm", ALL)
# Vectors, and pictures of even and odd height and width, which are one vector.
shapes = pytest.mark.parametrize("shape", [(9,), (10,), (4, 3), (3, 5), (2, 4)])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inner(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (a * b).flatten(-len(shape)).sum(-1)


def of_rows(v: Tensor, norm: str, p: float, dims: int) -> Tensor:
    """The norm as it is defined, of each row."""
    if norm.startswith("fourier"):
        v = torch.fft.fft2(v, norm="ortho") if dims == 2 else torch.fft.fft(v, norm="ortho")
    v = v.flatten(-dims)
    return v.abs().amax(-1) if p == math.inf else v.abs().pow(p).sum(-1) ** (1 / p)


@norms
@shapes
def test_sizes_and_duals(norm: str, shape: tuple[int, ...]) -> None:
    (p, _), dims, v = order(norm), len(shape), noise(5, *shape)
    torch.testing.assert_close(measure(v, norm, dims), of_rows(v, norm, p, dims))
    torch.testing.assert_close(dual_measure(v, norm, dims), of_rows(v, norm, conjugate(p), dims))


@norms
@shapes
def test_the_steepest_direction_attains_the_dual_norm(norm: str, shape: tuple[int, ...]) -> None:
    dims, v = len(shape), noise(5, *shape)
    found = steepest(v, norm, dims)
    torch.testing.assert_close(measure(found, norm, dims), torch.ones(5).double())
    torch.testing.assert_close(inner(v, found, shape), dual_measure(v, norm, dims))
    for others in (noise(1000, 1, *shape, seed=1), found + 0.1 * noise(1000, 1, *shape, seed=2)):
        reached = inner(v, others, shape) / measure(others, norm, dims)  # (1000, 5)
        assert (reached <= dual_measure(v, norm, dims) * (1 + 1e-12)).all()
    assert not steepest(torch.zeros(shape), norm, dims).any()


def test_steepest_directions_are_the_formulas() -> None:
    v = noise(10)
    torch.testing.assert_close(steepest(v, "linf"), v.sign())
    torch.testing.assert_close(steepest(v, "l2"), v / v.norm())
    torch.testing.assert_close(steepest(v, "l3"), v.sign() * v.abs() ** 0.5 / v.abs().pow(1.5).sum() ** (1 / 3))
    assert steepest(v, "l1").nonzero().flatten().tolist() == [int(v.abs().argmax())]
    spectrum = torch.fft.fft(v, norm="ortho")
    phases = torch.fft.fft(steepest(v, "fourier-linf"), norm="ortho")
    torch.testing.assert_close(phases, spectrum / spectrum.abs())
    wave = torch.fft.fft(steepest(v, "fourier-l1"), norm="ortho").abs()
    largest = int(spectrum.abs()[:6].argmax())
    assert 0 < largest < 5  # it has a mirror image
    expected = torch.zeros(10, dtype=torch.float64)
    expected[[largest, 10 - largest]] = 0.5
    torch.testing.assert_close(wave, expected)


@norms
@shapes
def test_projection_is_the_nearest_point(norm: str, shape: tuple[int, ...]) -> None:
    dims = len(shape)
    x = noise(4, *shape) * torch.tensor([0.01, 1, 5, 1e4], dtype=torch.float64).view(4, *[1] * dims)
    y = noise(4, *shape, seed=1)
    nearest, others = project(x, 0.7, norm, dims), project(y, 0.7, norm, dims)
    assert (measure(nearest, norm, dims) <= 0.7 * (1 + 1e-9)).all()
    torch.testing.assert_close(project(nearest, 0.7, norm, dims), nearest)
    torch.testing.assert_close(nearest[0], x[0])
    # The hyperplane through it supports the ball.
    reach = 0.7 * dual_measure(x - nearest, norm, dims)
    torch.testing.assert_close(inner(x - nearest, nearest, shape), reach, rtol=1e-8, atol=1e-9)
    assert ((nearest - others).flatten(1).norm(dim=-1) <= (x - y).flatten(1).norm(dim=-1) + 1e-9).all()
    assert (project(x, 0.0, norm, dims) == 0).all()


@norms
@shapes
def test_prox_minimises_what_it_should(norm: str, shape: tuple[int, ...]) -> None:
    dims, v = len(shape), noise(*shape)
    for lam in (0.0, 0.1, 1.0, 50.0):
        u = prox(v, lam, norm, dims)
        scales = torch.tensor([1e-3, 0.1, 1.0]).view(3, 1, *[1] * dims)
        others = u + scales * noise(3, 50, *shape, seed=1)
        cost = 0.5 * (u - v).square().sum() + lam * measure(u, norm, dims)
        assert (cost <= 0.5 * inner(others - v, others - v, shape) + lam * measure(others, norm, dims) + 1e-9).all()
        # ``v - u`` is λ times a subgradient: in the dual ball, and in phase with u.
        assert float(dual_measure(v - u, norm, dims)) <= lam * (1 + 1e-9)
        assert float(inner(v - u, u, shape)) == pytest.approx(lam * float(measure(u, norm, dims)), abs=1e-9)


@pytest.mark.parametrize("norm", DUAL)
@shapes
def test_moreau_and_distances(norm: str, shape: tuple[int, ...]) -> None:
    dims, v, other = len(shape), noise(3, *shape), noise(3, *shape, seed=1)
    torch.testing.assert_close(prox(v, 0.8, norm, dims) + project(v, 0.8, DUAL[norm], dims), v)
    apart = prox(v, 0.8, norm, dims) - prox(other, 0.8, norm, dims)
    assert (apart.flatten(1).norm(dim=-1) <= (v - other).flatten(1).norm(dim=-1) + 1e-9).all()


def test_prox_is_the_formula() -> None:
    v, lam = noise(9), 0.8
    soft = v.sign() * (v.abs() - lam).clamp(min=0)
    torch.testing.assert_close(prox(v, lam, "l1"), soft)
    torch.testing.assert_close(prox(v, lam, "l2"), v * (1 - lam / v.norm()).clamp(min=0))
    spectrum = torch.fft.fft(v, norm="ortho")
    shrunk = spectrum * (1 - lam / spectrum.abs()).clamp(min=0)
    torch.testing.assert_close(torch.fft.fft(prox(v, lam, "fourier-l1"), norm="ortho"), shrunk)
    for norm in ALL:
        assert (prox(torch.zeros(9), lam, norm) == 0).all()
        with pytest.raises(InputError, match="at least 0"):
            prox(v, -1, norm)


@norms
def test_rows_and_pictures(norm: str) -> None:
    v = noise(2, 3, 4, 5)
    for act in (lambda v, dims=1: prox(v, 0.8, norm, dims), lambda v, dims=1: steepest(v, norm, dims)):
        batched = act(v)
        torch.testing.assert_close(batched[1, 2, 3], act(v[1, 2, 3]))
        assert act(v.float()).dtype == torch.float32
        torch.testing.assert_close(act(v.float()).double(), batched, rtol=0, atol=1e-5)
        pictures = act(v, dims=2)
        assert pictures.shape == v.shape
        torch.testing.assert_close(pictures[1, 2], act(v[1, 2], dims=2))
        if not norm.startswith("fourier"):
            torch.testing.assert_close(pictures.flatten(-2), act(v.flatten(-2)))


def test_they_agree_with_the_norms_of_attacks_on_pictures() -> None:
    v = noise(3, 1, 6, 7)
    torch.testing.assert_close(dual_measure(v, "fourier-l1", 2)[:, 0], FOURIER_LINF.measure(v))
    torch.testing.assert_close(measure(v, "fourier-l1", 2)[:, 0], FOURIER_LINF.dual(v))
    torch.testing.assert_close(project(v, 0.3, "fourier-linf", 2), FOURIER_LINF.project(v, 0.3))
    torch.testing.assert_close(steepest(v, "fourier-linf", 2), FOURIER_LINF.steepest(v))


def test_examples() -> None:
    assert doctest.testmod(margin_norms).failed == 0
