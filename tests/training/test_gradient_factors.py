from __future__ import annotations

import doctest
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.losses import MaxOfHinges, NegativePool
from training.sampling import gradient_factors
from training.sampling.gradient_factors import (
    FactorRecorder,
    Factors,
    GradientSketch,
    Projected,
    hinge_factors,
    record_factors,
)

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Tokenwise(nn.Module):
    """An embedding and a linear map over every position."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=padding_idx)
        self.linear = nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embedding(ids)).tanh().sum(dim=1)  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer, used two times, changed in place in between."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.linear(x), inplace=True))  # type: ignore[no-any-return]


def conv(*arguments: int, **settings: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(2, 3, *arguments, **settings), nn.ReLU(inplace=True), nn.Flatten())


IDS = torch.tensor([[0, 3, 3, 1], [6, 2, 0, 0], [5, 5, 5, 5], [1, 2, 3, 4]])
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)), torch.randn(4, 6)),
    "linear, one position": (lambda: nn.Linear(6, 5), torch.randn(4, 1, 6)),
    "token-wise linear": (lambda: nn.Linear(6, 5), torch.randn(4, 3, 6)),
    "token-wise linear, more positions than width": (lambda: nn.Linear(3, 2), torch.randn(4, 9, 3)),
    "linear on a grid": (lambda: nn.Linear(3, 2), torch.randn(4, 2, 3, 3)),
    "conv": (conv(3), torch.randn(4, 2, 6, 5)),
    "conv, strided": (conv(3, stride=2, padding=1), torch.randn(4, 2, 7, 6)),
    "conv, dilated": (conv(2, dilation=2, padding=2), torch.randn(4, 2, 6, 6)),
    "conv, no bias": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 2), bias=False), nn.Flatten()),
        torch.randn(4, 2, 5, 5),
    ),
    "embedding and linear": (Tokenwise, IDS),
    "embedding with padding": (lambda: Tokenwise(padding_idx=0), IDS),
    "shared layer": (Twice, torch.randn(4, 6)),
}


def build(name: str) -> tuple[nn.Module, list[nn.Module], Tensor]:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model = make().double()
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return (
        model,
        [m for m in model.modules() if isinstance(m, kinds)],
        inputs.to(inputs.dtype if inputs.dtype == torch.long else torch.float64),
    )


def costs(outputs: Tensor) -> Tensor:
    """One cost an item, curved, so that gradients differ."""
    return (outputs.flatten(1).square() * torch.linspace(0.5, 2, outputs.flatten(1).shape[1])).sum(dim=1)


def naive_gradients(model: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    """By autograd, one item at a time: ``(B, o, i)``, the bias as one more column, an embedding turned."""
    rows = []
    for item in range(len(inputs)):
        cost = costs(model(inputs[item : item + 1])).sum()
        parts = torch.autograd.grad(cost, list(layer.parameters()))
        weight = parts[0].T if isinstance(layer, nn.Embedding) else parts[0].flatten(1)
        rows.append(torch.cat([weight, *(bias[:, None] for bias in parts[1:])], dim=1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_norms_and_products_equal_autograd(name: str) -> None:
    model, layers, inputs = build(name)
    recorded = record_factors(layers, lambda: costs(model(inputs)))
    for layer, factors in zip(layers, recorded, strict=True):
        gradients = naive_gradients(model, layer, inputs)
        flat = gradients.flatten(1)
        torch.testing.assert_close(factors.squared_norms(), flat.square().sum(dim=1), **TOLERANCE)
        first, last = (Factors(factors.inputs[s], factors.deltas[s], factors.bias) for s in (slice(3), slice(1, None)))
        torch.testing.assert_close(first.products(last), flat[:3] @ flat[1:].T, **TOLERANCE)
        centers = torch.randn(6, *gradients.shape[1:], dtype=torch.float64)
        torch.testing.assert_close(factors.dots(centers), flat @ centers.flatten(1).T, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_sketches_are_projections_of_the_gradients(name: str) -> None:
    """The same signs applied to explicit gradients give the same sketch."""
    model, layers, inputs = build(name)
    sketch = GradientSketch(8, seed=3)
    expected = torch.zeros(len(inputs), 8, dtype=torch.float64)
    for number, layer in enumerate(layers):
        gradients = naive_gradients(model, layer, inputs)
        left = sketch._signed(number, 0, gradients.shape[2], gradients)
        right = sketch._signed(number, 1, gradients.shape[1], gradients)
        expected += torch.einsum("boi,im,om->bm", gradients, left, right) / 8**0.5
    found = sketch(record_factors(layers, lambda: costs(model(inputs))))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(("size", "bound"), [(64, 0.16), (1024, 0.04)])
def test_sketches_keep_inner_products(size: int, bound: float) -> None:
    torch.manual_seed(0)
    layers = [Factors(torch.randn(50, 3, 40), torch.randn(50, 3, 30), bias=True) for _ in range(2)]
    exact = torch.stack([layer.products(layer) for layer in layers]).sum(dim=0)
    lengths = exact.diagonal().sqrt()
    errors = []
    for seed in range(10):
        sketches = GradientSketch(size, seed)(layers)
        errors.append((sketches @ sketches.T - exact) / (lengths[:, None] * lengths))
    assert torch.stack(errors).abs().mean() < bound
    assert torch.stack(errors).mean(dim=0).abs().mean() < bound / 2  # unbiased: the mean over seeds errs less


def test_recording_leaves_parameters_alone_and_backward_works_beside_it() -> None:
    model, layers, inputs = build("linear")
    record_factors(layers, lambda: costs(model(inputs)))
    assert all(p.grad is None for p in model.parameters())
    with FactorRecorder(layers) as recorder:
        costs(model(inputs)).sum().backward()
    summed = naive_gradients(model, layers[0], inputs).sum(dim=0)
    torch.testing.assert_close(layers[0].weight.grad, summed[:, :-1])
    assert len(recorder.factors()) == 2
    model(inputs)  # hooks are gone
    assert len(recorder.factors()[0].inputs) == len(inputs)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same"), nn.GRU(3, 3), nn.BatchNorm1d(3)]
)
def test_other_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="no factors"):
        FactorRecorder([layer])


def test_a_layer_without_part_in_the_loss_is_named() -> None:
    layers = nn.Linear(2, 2), nn.Linear(2, 3)
    with FactorRecorder(layers) as recorder:
        layers[0](torch.eye(2)).sum().backward()
    with pytest.raises(ValueError, match="out_features=3"):
        recorder.factors()


class TestHingeHeads:
    IDS, POOL_IDS = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([9, 0, 1, 8, 7, 2, 6])

    def sides(self, seed: int) -> tuple[nn.Linear, nn.Linear, list[Tensor]]:
        torch.manual_seed(seed)
        heads = nn.Linear(6, 4, bias=False).double(), nn.Linear(5, 4, bias=False).double()
        rows = [torch.randn(n, d, dtype=torch.float64) for n in (5, 7) for d in (6, 5)]
        return *heads, rows

    @pytest.mark.parametrize("through_pool", [True, False])
    @pytest.mark.parametrize("margin", [0.05, 0.5])
    @pytest.mark.parametrize("seed", range(3))
    def test_closed_form_equals_autograd(self, through_pool: bool, margin: float, seed: int) -> None:
        image_head, text_head, (x, y, pool_x, pool_y) = self.sides(seed)
        loss = MaxOfHinges(margin=margin)

        def unit(head: nn.Linear, features: Tensor) -> Tensor:
            return F.normalize(head(features), dim=-1)

        pool = NegativePool(unit(image_head, pool_x), unit(text_head, pool_y), self.POOL_IDS)
        if not through_pool:
            pool = NegativePool(pool.images.detach(), pool.captions.detach(), self.POOL_IDS)
        each = loss.pair_costs(unit(image_head, x), unit(text_head, y), self.IDS, pool)[0]
        weights = image_head.weight, text_head.weight
        by_item = [torch.autograd.grad(cost, weights, retain_graph=True) for cost in each]
        projected = [
            Projected(f, head(f)) for f, head in zip((x, y, pool_x, pool_y), (image_head, text_head) * 2, strict=True)
        ]
        images, captions, pool_images, pool_captions = projected
        found = hinge_factors(
            images, captions, self.IDS, pool_images, pool_captions, self.POOL_IDS, margin, through_pool
        )
        for factors, gradients in zip(found, zip(*by_item, strict=True), strict=True):
            assert factors.deltas.shape[1] == 1 + through_pool
            explicit = torch.stack(gradients)
            torch.testing.assert_close(factors.deltas.mT @ factors.inputs, explicit, **TOLERANCE)
            torch.testing.assert_close(factors.squared_norms(), explicit.square().sum(dim=(1, 2)), **TOLERANCE)
        assert sum(float(f.squared_norms().sum()) for f in found) > 0

    def test_anchors_sum_to_the_gradient_of_a_batch(self) -> None:
        """The batch as its own pool is max of hinges within the batch."""
        image_head, text_head, (x, y, *_) = self.sides(0)
        value = MaxOfHinges()(F.normalize(image_head(x), dim=-1), F.normalize(text_head(y), dim=-1), self.IDS).value
        expected = torch.autograd.grad(value, (image_head.weight, text_head.weight))
        sides = Projected(x, image_head(x)), Projected(y, text_head(y))
        found = hinge_factors(*sides, self.IDS, *sides, self.IDS)
        for factors, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close((factors.deltas.mT @ factors.inputs).sum(dim=0), gradient, **TOLERANCE)


def test_examples_in_the_documentation_run() -> None:
    assert doctest.testmod(gradient_factors).failed == 0
