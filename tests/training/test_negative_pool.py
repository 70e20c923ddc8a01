from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.losses import Curriculum, InfoNCE, Loss, MaxOfHinges, NegativePool, SigmoidLoss, SumOfHinges
from training.models.similarity import SIMILARITIES, Similarity

IDS, POOL_IDS = torch.tensor([3, 1, 3, 7, 1]), torch.tensor([1, 5, 3, 9, 8, 8])


def curriculum(similarity: Similarity) -> Loss:
    loss = Curriculum(10, similarity)
    loss.advance(4)
    return loss


LOSSES = {
    "sum": SumOfHinges,
    "max": MaxOfHinges,
    "curriculum": curriculum,
    "infonce": lambda similarity: InfoNCE(similarity, temperature=0.3),
    "sigmoid": lambda similarity: SigmoidLoss(similarity, temperature=0.3),
}
losses = pytest.mark.parametrize("name", LOSSES)
similarities = pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)


def embeddings(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, captions = torch.randn(2, count, 4, dtype=torch.float64, generator=generator)
    normalize = torch.nn.functional.normalize
    return normalize(images).requires_grad_(), normalize(captions).requires_grad_()


@losses
@similarities
def test_a_batch_that_is_its_own_pool_has_the_loss_of_the_batch(name: str, similarity: Similarity) -> None:
    """Value and gradient, the part through the negatives included."""
    loss = LOSSES[name](similarity).double()
    images, captions = embeddings(6)
    ids = torch.arange(6) if name == "curriculum" else torch.tensor([3, 1, 3, 7, 1, 0])
    inside = loss(images, captions, ids)
    apart = loss.weighted(images, captions, ids, NegativePool(images, captions, ids), torch.ones(6))
    torch.testing.assert_close(apart.value, inside.value)
    torch.testing.assert_close(apart.statistics, inside.statistics)
    for found, expected in zip(
        torch.autograd.grad(apart.value, (images, captions)),
        torch.autograd.grad(inside.value, (images, captions)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def naive(name: str, loss: Loss, positive: Tensor, negatives: list[Tensor]) -> Tensor:
    """The cost of one anchor, one score at a time."""
    hinges = [(0.2 + score - positive).clamp(min=0) for score in negatives]
    total, largest = sum(hinges, positive.new_zeros(())), max(hinges, default=positive.new_zeros(()))
    if name == "sum":
        return total
    if name == "max":
        return largest
    if name == "curriculum":
        return 0.6 * total / max(1, len(hinges)) + 0.4 * largest
    scale = 1 / 0.3
    if name == "infonce":
        return (sum((score * scale).exp() for score in [positive, *negatives]) / (positive * scale).exp()).log() / 2
    logits = [-(positive * scale - 10), *(score * scale - 10 for score in negatives)]
    return sum(((1 + logit.exp()).log() for logit in logits), positive.new_zeros(())) / 2


@losses
@similarities
@pytest.mark.parametrize("alone", [False, True], ids=["negatives", "no negative"])
def test_each_pair_by_itself(name: str, similarity: Similarity, alone: bool) -> None:
    loss = LOSSES[name](similarity).double()
    images, captions = embeddings(5)
    pool_ids = torch.full((6,), 3) if alone else POOL_IDS
    pool = NegativePool(*embeddings(6, seed=1), pool_ids)
    costs, statistics = loss.pair_costs(images, captions, IDS, pool)
    assert all(math.isfinite(value) for value in statistics.floats().values())
    for b, cost in enumerate(costs):
        others = [m for m in range(6) if pool_ids[m] != IDS[b]]
        positive = similarity.pairs(images[b : b + 1], captions[b : b + 1])[0]
        over_captions = [similarity.scores(images[b : b + 1], pool.captions[m : m + 1])[0, 0] for m in others]
        over_images = [similarity.scores(pool.images[m : m + 1], captions[b : b + 1])[0, 0] for m in others]
        expected = naive(name, loss, positive, over_captions) + naive(name, loss, positive, over_images) + 0 * positive
        torch.testing.assert_close(cost, expected)
        inputs = images, captions
        wanted = torch.autograd.grad(expected, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for found, gradient in zip(torch.autograd.grad(cost, inputs, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(found, gradient)


@losses
def test_weights_multiply(name: str) -> None:
    loss = LOSSES[name](SIMILARITIES["cosine"]).double()
    batch, pool = (*embeddings(5), IDS), NegativePool(*embeddings(6, seed=1), POOL_IDS)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    costs = loss.pair_costs(*batch, pool)[0]
    expected = (costs * weights).sum() / (5 if loss.reduction == "mean" else 1)
    torch.testing.assert_close(loss.weighted(*batch, pool, weights).value, expected)
