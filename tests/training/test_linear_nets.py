from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.errors import InputError
from training.robustness.linear.linear_nets import ConvLinear, DeepLinear, Linear, LinearNet, train
from training.robustness.linear.max_margin import margin, max_margin
from training.robustness.linear.steepest_descent import descend
from training.robustness.linear.study import draw

Array = NDArray[np.float64]
DEPTHS = (1, 2, 3, 4)
KINDS: tuple[Callable[..., LinearNet], ...] = (ConvLinear, DeepLinear)
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def problem(ratio: float, seed: int, width: int = 100) -> tuple[Array, Array]:
    """The study's data."""
    return draw(width, ratio, seed)


def randomised(model: LinearNet, seed: int = 0) -> LinearNet:
    """With a last layer that is not 0."""
    torch.nn.init.normal_(model.layers[-1], generator=torch.Generator().manual_seed(seed))
    return model


def gain(model: LinearNet) -> float:
    """What the step is divided by, from the definition."""
    *hidden, last = [layer.detach().numpy() for layer in model.layers]
    if isinstance(model, ConvLinear):
        spectra = np.fft.fft(np.stack([*hidden, last]), norm="ortho")
        return sum(
            float(np.abs(np.delete(spectra, index, 0).prod(0)).max() ** 2) if hidden else 1.0
            for index in range(len(spectra))
        )
    total, product = 0.0, np.eye(len(last))
    for index, matrix in enumerate(hidden):
        behind = last
        for later in reversed(hidden[index + 1 :]):
            behind = behind @ later
        singular = np.linalg.svd(product, compute_uv=False)
        total += behind @ behind * ((singular**8).sum() ** 0.25 if index else 1.0)
        product = matrix @ product
    return float(total + ((np.linalg.svd(product, compute_uv=False) ** 8).sum() ** 0.25 if hidden else 1.0))


def naive(model: LinearNet, x: Array, y: Array, steps: int) -> None:
    """Training by automatic differentiation of the forward pass."""
    rate = 1 / np.square(x).sum(1).max()
    for _ in range(steps):
        margins = torch.from_numpy(y) * model(torch.from_numpy(x))
        gradients = torch.autograd.grad(torch.logsumexp(-margins, 0), list(model.layers))
        step = rate / gain(model)
        with torch.no_grad():
            for layer, gradient in zip(model.layers, gradients, strict=True):
                layer -= step * gradient


@pytest.mark.parametrize("width", [1, 2, 7, 10])
@pytest.mark.parametrize("depth", DEPTHS)
@kinds
def test_the_network_is_its_end_to_end_weight(kind: Callable[..., LinearNet], depth: int, width: int) -> None:
    model = randomised(kind(width, depth, seed=3))
    assert len(model.layers) == depth
    x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores, w = model(x), model.end_to_end()
    assert scores.shape == (5,)
    assert scores.dtype == w.dtype == torch.float64
    torch.testing.assert_close(scores, x @ w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x[:1]), scores[:1])
    # The same function of the layers, too.
    cotangent = x[0]
    by_scores = torch.autograd.grad(model(cotangent[None]).sum(), list(model.layers))
    by_weight = torch.autograd.grad(cotangent @ w, list(model.layers))
    torch.testing.assert_close(by_scores, by_weight, rtol=1e-10, atol=1e-12)


def test_linear() -> None:
    model = Linear(3)
    torch.testing.assert_close(model.end_to_end(), torch.zeros(3, dtype=torch.float64))
    randomised(model)
    torch.testing.assert_close(model.end_to_end(), model.layers[0].detach())


def test_convolution_is_circular_correlation() -> None:
    model = randomised(ConvLinear(6, 3, seed=1))
    x = np.random.default_rng(0).standard_normal(6)
    z = x
    for layer in list(model.layers)[:-1]:
        kernel = layer.detach().numpy()
        z = np.array([kernel @ np.roll(z, -k) for k in range(6)]) / np.sqrt(6)
    expected = model.layers[-1].detach().numpy() @ z
    assert model(torch.from_numpy(x)[None]).item() == pytest.approx(expected)


@kinds
def test_initialisation(kind: Callable[..., LinearNet]) -> None:
    model, same, other = kind(9, 3, seed=1, scale=0.5), kind(9, 3, seed=1, scale=0.5), kind(9, 3, seed=2)
    torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not torch.equal(model.layers[0], other.layers[0])
    for layer in list(model.layers)[:-1]:
        torch.testing.assert_close(layer.norm(dim=0), torch.full_like(layer[0], 0.5))
    assert not model.layers[-1].any()


@pytest.mark.parametrize("depth", DEPTHS)
@kinds
def test_training_steps_are_those_of_automatic_differentiation(kind: Callable[..., LinearNet], depth: int) -> None:
    x, y = problem(2, 0, 21)
    trained, reference = kind(21, depth), kind(21, depth)
    train(trained, x, y, 25)
    naive(reference, x, y, 25)
    for ours, theirs in zip(trained.layers, reference.layers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("depth", DEPTHS)
@kinds
def test_resumed_training_continues(kind: Callable[..., LinearNet], depth: int) -> None:
    x, y = problem(4, 1, 40)
    whole, parts = kind(40, depth), kind(40, depth)
    recorded = train(whole, x, y, 60, record=(60, 0, 20))
    assert len(recorded) == 3
    np.testing.assert_array_equal(recorded[0], 0)
    train(parts, x, y, 20)
    np.testing.assert_allclose(recorded[1], parts.end_to_end().detach().numpy(), rtol=1e-9, atol=1e-12)
    resumed = train(parts, x, y, 40, record=(40,))[0]
    np.testing.assert_allclose(resumed, recorded[2], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(resumed, parts.end_to_end().detach().numpy(), rtol=1e-9, atol=1e-12)
    again = kind(40, depth)
    np.testing.assert_array_equal(train(again, x, y, 60, record=(60,))[0], recorded[2])


@pytest.mark.parametrize("model", [Linear(100), ConvLinear(100, 1), DeepLinear(100, 1)])
def test_one_layer_is_gradient_descent(model: LinearNet) -> None:
    x, y = problem(4, 0)
    w = train(model, x, y, 200, record=(200,))[0]
    np.testing.assert_allclose(w, descend(x, y, "l2", 200).w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4])
@kinds
def test_the_loss_falls_in_every_step(kind: Callable[..., LinearNet], depth: int) -> None:
    x, y = problem(2, 0, 50)
    recorded = train(kind(50, depth), x, y, 300, record=range(301))
    losses = [np.logaddexp.reduce(-y * (x @ w)) for w in recorded]
    assert (np.diff(losses) < 0).all()


def fraction(w: Array, ratio: float, norm: str) -> float:
    """The margin on the problem of seed 1, in parts of the largest one."""
    x, y = map(torch.from_numpy, problem(ratio, 1))
    return margin(torch.from_numpy(w), x, y, norm) / max_margin(x, y, norm).margin


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_convolution_is_biased_to_a_sparse_spectrum(ratio: float) -> None:
    x, y = problem(ratio, 1)
    plain = fraction(descend(x, y, "l2", 10_000).w, ratio, "fourier-l1")
    for seed in range(2):
        w = train(ConvLinear(100, seed=seed), x, y, 10_000, record=(10_000,))[0]
        assert plain + 0.1 < fraction(w, ratio, "fourier-l1") < 1 + 1e-6


@pytest.mark.parametrize("depth", [2, 3])
def test_full_connection_keeps_the_bias_of_gradient_descent(depth: int) -> None:
    w = train(DeepLinear(100, depth), *problem(8, 1), 3000, record=(3000,))[0]
    assert 0.95 < fraction(w, 8, "l2") < 1 + 1e-6


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: ConvLinear(0), "width and depth: must be at least 1, not 0 and 2"),
        (lambda: DeepLinear(4, 0), "width and depth: must be at least 1, not 4 and 0"),
        (lambda: ConvLinear(4, scale=0), "scale: must be positive and finite, not 0"),
        (lambda: train(Linear(3), np.eye(4), [1, -1, 1, -1], 1), "x: has width 4, the model 3"),
        (lambda: train(Linear(4), np.eye(4), [1, 1, 1, 1], 1), "y: needs both of the labels"),
        (lambda: train(Linear(4), np.eye(4), [1, -1, 1, -1], 1, (2,)), "record: step 2 is not between 0 and 1"),
    ],
)
def test_invalid_input(call: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        call()
