from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.losses import InfoNCE, SigmoidLoss
from training.models.similarity import SIMILARITIES, Similarity

similarities = pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
batches = pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [4, 1, 4, 2, 1], [6, 6, 6, 6, 6]])
kinds = pytest.mark.parametrize("kind", [InfoNCE, SigmoidLoss])


def embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    normalize = torch.nn.functional.normalize
    return normalize(images).requires_grad_(), normalize(captions).requires_grad_()


def naive_infonce(scores: Tensor, ids: list[int], scale: Tensor) -> Tensor:
    batch, total = range(len(ids)), scores.new_zeros(())
    for b in batch:
        rivals = [j for j in batch if j == b or ids[j] != ids[b]]
        for row in (scores[b], scores[:, b]):
            total = total - (scale * row[b] - torch.stack([scale * row[j] for j in rivals]).exp().sum().log())
    return total / (2 * len(ids))


def naive_sigmoid(scores: Tensor, ids: list[int], scale: Tensor, bias: Tensor) -> Tensor:
    batch, total = range(len(ids)), scores.new_zeros(())
    for i in batch:
        for j in batch:
            if i == j or ids[i] != ids[j]:
                label = 1 if i == j else -1
                total = total - (1 / (1 + (-label * (scale * scores[i, j] + bias)).exp())).log()
    return total / len(ids)


@similarities
@batches
@kinds
def test_value_and_gradient_are_those_of_the_loops(
    kind: type[InfoNCE | SigmoidLoss], similarity: Similarity, ids: list[int]
) -> None:
    images, captions = embeddings()
    loss = kind(similarity, temperature=0.5).double()
    value = loss(images, captions, torch.tensor(ids)).value
    scores = torch.stack([similarity.pairs(image.expand_as(captions), captions) for image in images])
    scale = (-loss.log_temperature).exp()
    if isinstance(loss, SigmoidLoss):
        naive = naive_sigmoid(scores, ids, scale, loss.bias)
    else:
        naive = naive_infonce(scores, ids, scale)
    torch.testing.assert_close(value, naive)
    inputs = (images, captions, *loss.parameters())
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(naive, inputs))


def test_infonce_of_equal_embeddings_is_the_log_of_the_batch_size() -> None:
    same = torch.full((6, 4), 0.5)
    assert InfoNCE()(same, same, torch.arange(6)).value.item() == pytest.approx(math.log(6))


def test_sigmoid_loss_of_equal_embeddings() -> None:
    same = torch.full((6, 4), 0.5)  # all scores 1, all logits 1 / 0.1 - 10 = 0
    assert SigmoidLoss()(same, same, torch.arange(6)).value.item() == pytest.approx(6 * math.log(2))


@kinds
def test_statistics_count_the_anchors_whose_negative_wins(kind: type[InfoNCE | SigmoidLoss]) -> None:
    images, captions = torch.eye(3), torch.eye(3)[[1, 0, 2]]  # the first two captions exchanged
    statistics = kind()(images, captions, torch.arange(3)).statistics.floats()
    expected = {"positive": 1 / 3, "hardest": 2 / 3, "active": 2 / 3, "spread": math.sqrt(2) / 3}
    assert statistics == pytest.approx(expected)


@kinds
def test_temperature_stops_at_its_bound_and_can_leave_it(kind: type[InfoNCE | SigmoidLoss]) -> None:
    images, captions = embeddings()
    loss = kind()
    loss.log_temperature.data.fill_(-20)
    torch.autograd.backward(loss(images, captions, torch.arange(5)).value)
    assert loss.log_temperature.item() == pytest.approx(math.log(0.01))
    assert loss.log_temperature.grad is not None
    assert loss.log_temperature.grad != 0


@kinds
def test_a_fixed_temperature_is_not_trained(kind: type[InfoNCE | SigmoidLoss]) -> None:
    images, captions = embeddings()
    loss = kind(temperature=0.2, learnable=False)
    torch.autograd.backward(loss(images, captions, torch.arange(5)).value)
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert loss.log_temperature.exp().item() == pytest.approx(0.2)


@kinds
def test_bfloat16_is_scored_in_float32(kind: type[InfoNCE | SigmoidLoss]) -> None:
    images, captions = (tensor.detach().bfloat16().requires_grad_() for tensor in embeddings())
    loss = kind()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(images, captions, torch.arange(5)).value
    torch.testing.assert_close(value, loss(images.float(), captions.float(), torch.arange(5)).value)
    torch.autograd.backward(value)
    assert images.grad is not None
    assert images.grad.isfinite().all()


@kinds
def test_a_temperature_below_the_bound_is_refused(kind: type[InfoNCE | SigmoidLoss]) -> None:
    with pytest.raises(InputError, match="temperature"):
        kind(temperature=0.001)
