"""How far a query's features may be moved before a linear head retrieves something else: proofs, not attacks.

The head maps a query's pooled features ``f`` to ``u = W f + b`` and the gallery vectors ``v_j`` stay as they
are. The cosine divides the scores of one query by the common factor ``|u|``, which changes no ranking, so item p
is above item j exactly while ``(v_p - v_j) · (W f + b) > 0``: a linear classifier of ``f``. Its distance from the
decision boundary is known in closed form (Faghri, Gowal, Vasconcelos, Fleet, Pedregosa, Le Roux, *Bridging the
Gap Between Adversarial Robustness and Optimization Bias*, 2021, arXiv 2102.08868), in any norm with dual ``|·|_*``::

    eps(p beats j) = (v_p - v_j) · (W f + b) / |Wᵀ(v_p - v_j)|_*

All of this holds **in the feature space behind the backbone**, for a perturbed query and a gallery that is not.
Nothing is said about pixels or words: that takes a Lipschitz bound of the backbone, which is usually vacuous.
Nor about the order similarity, whose scores are not linear in ``u``.

What is certified is the head in exact arithmetic. Everything is computed in float64 and bounds on the rounding
are subtracted, so no radius is too large; the loss is some 1e-10 of the scale of the scores. Scores that float64
cannot tell apart count as tied. A model evaluated in float32 may still turn around pairs that lie 1e-6 apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.errors import InputError
from training.models.tower import Tower
from training.robustness.norms import Norm

# Rival items held against one own item at once: 1 MB of float64 at 3200 features, which stays in cache.
BLOCK_RIVALS = 32
# Queries whose scores with the whole gallery are held at once.
BLOCK_QUERIES = 256


class LinearHead(NamedTuple):
    """An affine map of pooled features, ``f -> W f + b``.

    Attributes:
        weight: ``(D, F)``.
        bias: ``(D,)``.
    """

    weight: Tensor
    bias: Tensor


class Certificate(NamedTuple):
    """What :func:`certify` proves of each query, on the CPU.

    Attributes:
        radii: float64 ``(Q,)``, in the units of the norm of the features; see :func:`certified_radii`.
        item: int64 ``(Q,)``; the own item that provably stays longest; -1 where none is retrieved at all.
        rival: int64 ``(Q,)``; the item that ends the proof by overtaking it; -1 where the radius is 0 or infinite.
    """

    radii: Tensor
    item: Tensor
    rival: Tensor


@torch.no_grad()
def linear_layer(tower: Tower) -> nn.Linear | None:
    """The last step of a linear head before normalisation; None where there is no head."""
    return next((module for module in tower.head.modules() if isinstance(module, nn.Linear)), None)


def linear_head(tower: Tower) -> LinearHead:
    """Fold what a tower does with pooled features, up to its final normalisation, into one affine map.

    In evaluation, dropout does nothing and standardisation is ``(f - mean) / sqrt(var + 1e-5)`` with the running
    statistics, whatever mode the tower is in. The backbone need not be frozen: after training its weights are
    fixed as well, and the map of the features it pools is the same. Only the features change with it, so
    certificates of two towers with different backbones do not compare.

    Args:
        tower: Its ``features`` are what the certificate perturbs.

    Returns:
        float64 ``(D, F)`` and ``(D,)`` on the CPU; ``normalize(W f + b)`` is ``tower.project(f)``.

    Raises:
        InputError: If the embeddings are no affine map of pooled features.
    """
    config = tower.config
    for crooked, name, mend in (
        (config.head == "mlp", "an mlp head", "train with head linear or none"),
        (config.pooling == "gpo", "gpo pooling", "train with a parameter-free pooling, such as mean"),
        (config.normalise_features == "l2", "l2-normalised features", "train with none or standardise"),
        (tower.absolute, "the absolute value of embeddings", "train with absolute off and the cosine"),
    ):
        if crooked:
            raise InputError(f"{config.encoder}: {name} is not linear and has no certificate; {mend}")
    linear = linear_layer(tower)
    width = tower.backbone.dim * (2 if config.pooling == "mean+max" else 1)
    weight = torch.eye(width, dtype=torch.float64) if linear is None else linear.weight.cpu().double()
    bias = weight.new_zeros(len(weight)) if linear is None else linear.bias.cpu().double()
    if tower.standardise is not None:
        mean, variance = tower.standardise.running_mean, tower.standardise.running_var
        assert mean is not None
        assert variance is not None
        weight = weight / (variance.cpu().double() + tower.standardise.eps).sqrt()
        bias = bias - weight @ mean.cpu().double()
    return LinearHead(weight, bias)


def certified_radii(
    head: LinearHead, features: Tensor, gallery: Tensor, own: Tensor, norm: Norm, k: int = 1
) -> Tensor:
    """How far each query's features may move with one of its own items still in the top k.

    The largest ``r`` for which the pairwise distances prove that under every perturbation of norm below ``r``
    at least one own item stays in the top k::

        r = max over own p of the k-th smallest over foreign j of eps(p beats j)

    Below the k-th smallest distance at most k - 1 rivals have overtaken p. With one own item and k = 1 this is
    exact: there is a perturbation of that norm beyond which the item is lost, :func:`critical_perturbation`.
    Otherwise it is a lower bound, since another own item may take over, and k rivals need not be able to
    overtake at once.

    Ties are pessimistic, as in :func:`~training.evaluation.ranks.retrieval_ranks`: the radius is 0 where no own
    item is above all but k - 1 foreign ones. It is infinite where a perturbation changes no deciding score, and
    where there are fewer than k foreign items.

    Most pairs are never formed: rivals come in the order of a lower bound of ``eps``, which follows from
    ``|Wᵀ(v_p - v_j)|_* <= |Wᵀ(v_p - c)|_* + |Wᵀ(v_j - c)|_*``, until no further one can matter.

    Args:
        head: Of the queries' tower; see :func:`linear_head`.
        features: ``(Q, F)``, the queries' pooled features.
        gallery: ``(G, D)`` embeddings of the items, of any length. ``gallery @ weight`` is held in float64.
        own: bool ``(Q, G)``; the items that are right for a query.
        norm: Measures perturbations of the features.
        k: Of R@k.

    Returns:
        float64 ``(Q,)`` on the CPU, in the units of the norm of the features.

    Raises:
        InputError: If shapes disagree, a value is not finite, a query has no own item, or k is not positive.
    """
    return certify(head, features, gallery, own, norm, k).radii


@torch.no_grad()
def certify(head: LinearHead, features: Tensor, gallery: Tensor, own: Tensor, norm: Norm, k: int = 1) -> Certificate:
    """:func:`certified_radii`, with the pair of items that decides each."""
    weight, bias, features, gallery = (x.detach().cpu().double() for x in (*head, features, gallery))
    own = own.cpu()
    _check(LinearHead(weight, bias), features, gallery, own, k)
    pairs = _Pairs(weight, gallery, norm)
    certificates = [
        _certify_one(pairs, low, high, mine, k)
        for some, mine_of_some in zip(
            torch.split(features, BLOCK_QUERIES), torch.split(own, BLOCK_QUERIES), strict=True
        )
        for low, high, mine in zip(*_scores(weight, bias, some, gallery), mine_of_some, strict=True)
    ]
    radii = torch.tensor([radius for radius, _, _ in certificates], dtype=torch.float64)
    return Certificate(
        radii,
        torch.tensor([item for _, item, _ in certificates], dtype=torch.int64),
        torch.tensor([rival for _, _, rival in certificates], dtype=torch.int64),
    )


def certified_recall(radii: Tensor, epsilons: Sequence[float]) -> Tensor:
    """Fraction of queries that no perturbation of norm up to ε can make miss.

    Args:
        radii: ``(Q,)``, of :func:`certified_radii`; its k makes this R@k.
        epsilons: E norms of perturbations, in the units of the radii. At 0 it is the ordinary R@k.

    Returns:
        float64 ``(E,)``, in [0, 1].

    Raises:
        InputError: If there is no query, or an epsilon is negative.
    """
    if not len(radii) or not all(epsilon >= 0 for epsilon in epsilons):
        raise InputError(f"recall of {len(radii)} queries at {list(epsilons)}; give queries and norms of at least 0")
    return (radii > radii.new_tensor(epsilons)[:, None]).double().mean(dim=1)


@torch.no_grad()
def critical_perturbation(head: LinearHead, gallery: Tensor, certificate: Certificate, norm: Norm) -> Tensor:
    """The smallest perturbation that makes the deciding rival level with the deciding own item.

    ``r · s`` with the steepest unit direction s of ``Wᵀ(v_j - v_p)``. With one own item and k = 1, anything
    longer loses the query.

    Args:
        head: As given to :func:`certify`.
        gallery: As given to :func:`certify`.
        certificate: What that returned.
        norm: As given to :func:`certify`.

    Returns:
        float64 ``(Q, F)`` on the CPU, of norm ``certificate.radii``; zero where the radius is 0 or infinite.
    """
    weight, gallery = head.weight.detach().cpu().double(), gallery.detach().cpu().double()
    decided = certificate.rival >= 0
    towards = gallery[certificate.rival[decided]] - gallery[certificate.item[decided]]
    perturbation = weight.new_zeros(len(decided), weight.shape[1])
    perturbation[decided] = certificate.radii[decided, None] * norm.steepest(towards @ weight)
    return perturbation


def _check(head: LinearHead, features: Tensor, gallery: Tensor, own: Tensor, k: int) -> None:
    """Refuse what :func:`certified_radii` says it refuses."""
    wanted = f"weight (D, F) = {tuple(head.weight.shape)}, features (Q, F), gallery (G, D), bool own (Q, G)"
    dim, width = head.weight.shape
    shapes = (features.shape[1:], gallery.shape[1:], own.shape) == ((width,), (dim,), (len(features), len(gallery)))
    if not shapes or own.dtype != torch.bool:
        raise InputError(
            f"features are {tuple(features.shape)}, gallery {tuple(gallery.shape)}, own {tuple(own.shape)} "
            f"{own.dtype}; give {wanted}"
        )
    if k < 1:
        raise InputError(f"k: {k} is not positive; R@k counts from 1")
    for name, values in (("head", head.weight), ("head", head.bias), ("features", features), ("gallery", gallery)):
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name}: a value is not finite; the model has diverged")
    if alone := (~own.any(dim=1)).nonzero().flatten().tolist():
        raise InputError(f"query {alone[0]} has no own item ({len(alone)} such queries); leave it out")


def _rounding(weight: Tensor) -> float:
    """Relative error of sums over both widths, with room for the few operations around them."""
    return 4 * sum(weight.shape) * torch.finfo(torch.float64).eps


def _scores(weight: Tensor, bias: Tensor, features: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds ``(Q, G)`` from below and above that hold the exact ``v_j · (W f + b)``."""
    scores = (features @ weight.T + bias) @ gallery.T
    magnitudes = (features.abs() @ weight.abs().T + bias.abs()) @ gallery.abs().T
    rounding = _rounding(weight) * magnitudes
    return scores - rounding, scores + rounding


class _Pairs:
    """Upper bounds on ``|Wᵀ(v_p - v_j)|_*``, what the score of p over j changes by in the unit ball.

    Attributes:
        reach: float64 ``(G,)``; ``reach[p] + reach[j]`` is never below :meth:`rates`.
    """

    def __init__(self, weight: Tensor, gallery: Tensor, norm: Norm) -> None:
        self.norm = norm
        self.gallery = gallery
        rounding = _rounding(weight)
        self.rows = norm.dual(weight) * (1 + rounding)  # (D,)
        self.images = gallery @ weight  # (G, F)
        self.noise = rounding * (gallery.abs() @ self.rows)  # (G,), of self.images, in the dual norm
        centre = self.images.mean(dim=0)
        spread = [norm.dual(some - centre) for some in torch.split(self.images, BLOCK_RIVALS)]
        # The margin is for rounding: a bound that errs by one bit would leave out a pair that decides.
        self.reach = torch.cat(spread) * (1 + 1e-9) + 2 * self.noise

    def rates(self, item: int, rivals: Tensor) -> Tensor:
        """``(R,)`` bounds for one item and rivals int64 ``(R,)``, true whatever the rounding."""
        direct = self.norm.dual(self.images[item] - self.images.index_select(0, rivals))
        # The triangle inequality is exact where the difference of the images drowns in their rounding: for
        # copies of one item, and for items that differ only where the head is zero.
        triangle = (self.gallery[item] - self.gallery[rivals]).abs() @ self.rows
        return torch.minimum(direct + self.noise[item] + self.noise[rivals], triangle)


def _distances(margins: Tensor, rates: Tensor) -> Tensor:
    """Margin over rate, infinite where the rate is 0; but 0, not negative or NaN, without a margin."""
    return (margins / rates).where(margins > 0, 0.0)


def _certify_one(pairs: _Pairs, low: Tensor, high: Tensor, own: Tensor, k: int) -> tuple[float, int, int]:
    """Radius, own item and rival of one query, from bounds ``(G,)`` on its scores and bool own ``(G,)``."""
    foreign = (~own).nonzero().flatten()
    best = (0.0, -1, -1)
    items = own.nonzero().flatten()
    for item in items[low[items].argsort(descending=True)].tolist():
        margins = low[item] - high[foreign]
        if int((margins <= 0).sum()) >= k:
            break  # and the items after it score lower still
        if len(foreign) < k:
            return math.inf, item, -1
        least, order = _distances(margins, pairs.reach[item] + pairs.reach[foreign]).sort()
        distances = torch.empty_like(least)
        for start in range(0, len(order), max(k, BLOCK_RIVALS)):
            some = order[start : (stop := start + max(k, BLOCK_RIVALS))]
            distances[start:stop] = _distances(margins[some], pairs.rates(item, foreign[some]))
            radius, position = (float(x) for x in distances[:stop].kthvalue(k))
            if radius <= best[0] or (stop < len(order) and least[stop] >= radius):
                break
        if radius > best[0]:
            best = (radius, item, -1 if math.isinf(radius) else int(foreign[order[int(position)]]))
    return best
