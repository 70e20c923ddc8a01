"""Train the linear image head of a run anew, so that more of its recall is certified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from training.data.corpus import Corpus
from training.errors import InputError
from training.evaluation.ranks import retrieval_ranks
from training.models.dual_encoder import DualEncoder
from training.models.features import corpus_inputs, encode_corpus
from training.models.tower import evaluating
from training.robustness.certificates import linear_head, linear_layer
from training.robustness.linear.retrieval_heads import check_settings, evaluate_head, train_head
from training.robustness.norms import L1, L2, LINF, Norm

ATTACKS: dict[str, Norm] = {norm.name: norm for norm in (LINF, L2, L1)}
# Of the training images this share, and at most so many, choose the number of steps and the penalty.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 500
# A head is looked at so many times in training.
LOOKS = 8
# Pictures whose features are computed at a time.
BLOCK = 256
# Pairs of captions that estimate what a penalty is.
PAIRS = 2000


class HeadPairs(NamedTuple):
    """Pooled features ``(N, F)``, caption vectors ``(G, D)``, and the row a caption describes, int64 ``(G,)``."""

    features: Tensor
    gallery: Tensor
    owner: Tensor

    def images(self, rows: Tensor, captions: int | None = None) -> HeadPairs:
        """Some of the images, with the first few of their captions."""
        chosen = [(self.owner == row).nonzero().flatten()[:captions] for row in rows.tolist()]
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(of) for of in chosen]))
        return HeadPairs(self.features[rows], self.gallery[torch.cat(chosen)], owner.to(self.owner))

    def to(self, device: torch.device) -> HeadPairs:
        """The same on another device."""
        return HeadPairs(*(part.to(device) for part in self))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(F,)`` of the features, the latter never 0."""
        return self.features.mean(dim=0), self.features.std(dim=0).clamp(min=1e-6)

    def standardised(self, mean: Tensor, std: Tensor) -> HeadPairs:
        """With features in standard deviations from the mean."""
        return self._replace(features=(self.features - mean) / std)

    def held_out(self, seed: int) -> tuple[HeadPairs, HeadPairs]:
        """Images to train on and, drawn at random, those that choose."""
        order = torch.randperm(len(self.features), generator=torch.Generator().manual_seed(seed))
        held = min(int(HELD_OUT_SHARE * len(order)), MOST_HELD_OUT)
        if held < 2:
            raise InputError(f"{len(order)} images are too few to choose a head by; give 20 or more")
        return self.images(order[held:]), self.images(order[:held])


def image_pairs(model: DualEncoder, corpus: Corpus) -> HeadPairs:
    """What a linear image head is trained on: pooled features of the pictures, and the captions' embeddings.

    Returns:
        float32 on the CPU.

    Raises:
        InputError: If the model compares by something else than the cosine, its embeddings are no affine map of
            pooled features, or it has no head.
    """
    if model.similarity.name != "cosine":
        raise InputError(f"the {model.similarity.name} similarity is not linear in the embedding; use a cosine model")
    linear_head(model.image_tower)
    _linear(model)
    inputs, cached = corpus_inputs(model, corpus, "image")
    features = []
    with torch.no_grad(), evaluating(model):
        for start in trange(0, len(inputs), BLOCK, desc="features", unit="block", delay=2, leave=False):
            rows = inputs.fetch(np.arange(start, min(start + BLOCK, len(inputs))), None)
            some = rows if cached else model.image_tower.features(*rows.to(model.device))
            features.append(some.values.float().cpu())
    return HeadPairs(torch.cat(features), encode_corpus(model, corpus)[1], torch.as_tensor(corpus.owner))


def _linear(model: DualEncoder) -> nn.Linear:
    if (linear := linear_layer(model.image_tower)) is not None:
        return linear
    raise InputError(f"{model.config.image.encoder}: the image tower has no head to train; train with head linear")


def current_head(model: DualEncoder, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``(D, F)`` and bias ``(D,)``, float64, of the head that a model has, on standardised features."""
    head = linear_head(model.image_tower)
    return head.weight * std, head.bias + head.weight @ mean.double()


@torch.no_grad()
def set_head(model: DualEncoder, weight: Tensor, mean: Tensor, std: Tensor) -> None:
    """Give a model the head ``W (f - mean) / std``, ``W`` being ``(D, F)``, in the place of its own."""
    tower, linear = model.image_tower, _linear(model)
    weight, bias = weight.double().cpu() / std, -(weight.double().cpu() / std) @ mean.double()
    weight, bias = weight / weight.norm(), bias / weight.norm()  # the cosine does not see it; float32 might overflow
    if (standardise := tower.standardise) is not None:
        inner, variance = standardise.running_mean, standardise.running_var
        assert inner is not None
        assert variance is not None
        bias = bias + weight @ inner.cpu().double()
        weight = weight * (variance.cpu().double() + standardise.eps).sqrt()
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


@dataclass(frozen=True)
class HeadRecipe:
    """How a head is trained; see :func:`~training.robustness.linear.retrieval_heads.train_head`.

    Attributes:
        optimizer: One of :data:`~training.robustness.linear.retrieval_heads.HEAD_OPTIMIZERS`.
        regularizer: One of :data:`~training.robustness.linear.retrieval_heads.HEAD_REGULARIZERS`.
        attack: Name of the norm to withstand: linf, l2 or l1.
        shares: Weights tried for the penalty: 1 makes it, for the head of plain gradient descent, as large as what
            one unit adds to the logarithm of the loss.
        steps: At most so many.
        batch: Images in a batch.

    Raises:
        InputError: If a name is unknown, a number out of range, or the optimiser has no steps for the penalty.
    """

    optimizer: str = "gradient"
    regularizer: str = "none"
    attack: str = "l2"
    shares: tuple[float, ...] = (0.3, 1.0, 3.0)
    steps: int = 100
    batch: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps {self.steps}: give at least 1")
        for share in self.shares or (-1.0,):
            check_settings(self.optimizer, self.regularizer, share, self.steps, self.batch)


class TrainedHead(NamedTuple):
    """A head ``(D, F)``, and what was chosen for it."""

    weight: Tensor
    steps: int
    share: float


def train(
    recipe: HeadRecipe,
    pairs: HeadPairs,
    held: HeadPairs,
    plain: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    early_stopping: bool = True,
) -> TrainedHead:
    """A head with the number of steps that finds most held-out images and, if penalised, the best weight of those.

    Best is the penalty with which most held-out R@1 is certified in the norm of the attack, at the radius where
    ``plain`` keeps half of its own.

    Args:
        recipe: What to do.
        pairs: Standardised features; to train on.
        held: To choose by.
        plain: The head of gradient descent without a penalty, ``(D, F)``, that scales and judges a penalty.
        seed: Decides the batches.
        progress: Called with the number of each step.
        early_stopping: Without it, all steps are taken.
    """
    fit = partial(_train, recipe, pairs, held, seed, progress, LOOKS if early_stopping else 1)
    if recipe.regularizer == "none":
        return fit(0.0, 0.0)
    assert plain is not None, "a penalty is weighed against plain gradient descent"
    unit = 1 / penalty(plain, recipe, pairs)
    radius = radii_kept(evaluate_head(plain, *held).radii[recipe.attack])[:1]

    def certified(head: TrainedHead) -> float:
        return float(evaluate_head(head.weight, *held).curve(recipe.attack, radius))

    heads = [fit(share * unit, share) for share in recipe.shares]
    return heads[0] if len(heads) == 1 else max(heads, key=certified)


def _train(
    recipe: HeadRecipe,
    pairs: HeadPairs,
    held: HeadPairs,
    seed: int,
    progress: Callable[[int], None] | None,
    looks: int,
    lam: float,
    share: float,
) -> TrainedHead:
    best: list[tuple[float, TrainedHead]] = []

    def look(number: int, weight: Tensor) -> None:
        if number % max(recipe.steps // looks, 1) == 0 or number == recipe.steps:
            found = clean_recall(weight, held)
            if not best or found > best[0][0]:
                best[:] = [(found, TrainedHead(weight.clone(), number, share))]
        if progress:
            progress(number)

    settings: dict[str, Any] = {"steps": recipe.steps, "batch": recipe.batch, "seed": seed, "observe": look}
    train_head(*pairs, recipe.optimizer, recipe.regularizer, lam, ATTACKS[recipe.attack], **settings)
    return best[0][1]


def penalty(weight: Tensor, recipe: HeadRecipe, pairs: HeadPairs) -> float:
    """What a penalty of weight 1 is for a head."""
    apart = (pairs.gallery - pairs.gallery.roll(len(pairs.gallery) // 2, 0))[:PAIRS]
    rows = apart @ weight if recipe.regularizer == "margin" else weight[None]
    return float(ATTACKS[recipe.attack].dual(rows).mean())


def clean_recall(weight: Tensor, pairs: HeadPairs) -> float:
    """R@1 in [0, 1], without the care for ties that :func:`evaluate_head` takes."""
    best = (pairs.features @ weight.T @ pairs.gallery.T).argmax(dim=1)
    return float((pairs.owner[best] == torch.arange(len(best), device=best.device)).double().mean())


def text_recall(weight: Tensor, pairs: HeadPairs, bias: Tensor | float = 0.0) -> float:
    """R@1 in [0, 1] of captions as queries, for whom images are compared by the cosine; ties pessimistic."""
    images = F.normalize(pairs.features.double().cpu() @ weight.double().cpu().T + bias, dim=1)
    ranks = retrieval_ranks(images, pairs.gallery.double().cpu(), pairs.owner.cpu())
    return float((ranks.t2i == 0).mean())


def radii_kept(radii: Tensor, kept: tuple[float, ...] = (0.5, 0.25)) -> list[float]:
    """The radii at which shares of the hits are still certified; 0 without a hit."""
    hits = radii[radii > 0]
    return [float(hits.quantile(1 - share)) if len(hits) else 0.0 for share in kept]
