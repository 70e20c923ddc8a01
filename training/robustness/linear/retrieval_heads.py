r"""Linear retrieval heads whose optimiser, or penalty, is chosen for the attack they should withstand.

The head maps pooled image features ``f`` to ``u = W f``, without a bias since the theory has none; the captions'
vectors ``v_j`` are fixed. Caption p of an image beats caption j of another exactly while ``(v_p - v_j) · W f > 0``:
a binary linear classifier with the weights W of the matrix ``Z = (v_p - v_j) fᵀ``. The loss is a monotone one of its
margins, with the exponential tail that implicit biases need (a hinge stops where they begin)::

    m_ipj = (v_p - v_j) · W f_i = <W, Z_ipj>
    L     = mean over p of log(1 + Σ_j exp(-m_ipj)),  i the image of p, j the captions of all other images

That is InfoNCE without a temperature, which W absorbs. Where all pairs are separated it becomes ``mean Σ exp(-m)``,
the exponential loss of the examples Z. Steepest descent in a norm of the matrix then maximises ``min m / ‖W‖`` in
that norm (Gunasekar et al., 2018, arXiv 1802.08246)::

    optimizer    norm of W, of the steps   direction for g = -∇L        dual norm of Z = d δᵀ   for attacks in
    gradient     l2 (Frobenius)            g / ‖g‖₂                     ‖d‖₂ ‖δ‖₂               l2
    sign         linf, entries             sign(g)                      ‖d‖₁ ‖δ‖₁               l1
    coordinate   l1, entries               ± the entry of largest |g|   ‖d‖∞ ‖δ‖∞               linf
    spectral     largest singular value    U Vᵀ of g = U S Vᵀ           ‖d‖₂ ‖δ‖₂               l2
    rows         largest l1 of a row       ± one entry in each row      ‖d‖₁ ‖δ‖∞               linf

A query whose features move by δ moves Z by ``d δᵀ``, ``d = v_p - v_j``, whose dual norm is a product. So the margin
bounds the certificate of :mod:`training.robustness.certificates`, with the norms of that row of the table::

    eps(p beats j) = m / ‖Wᵀd‖_*  >=  m / (‖W‖ ‖d‖)

The left side counts and the right side is what the optimiser maximises. The bound is tightest where ``‖W‖`` is the
operator norm of ``d -> Wᵀd``, as for sign, spectral and rows; gradient and coordinate descent guard against more moves
of Z than features can make. The penalty ``margin`` addresses the left side itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.errors import InputError
from training.robustness.certificates import LinearHead, certified_radii, certified_recall
from training.robustness.norms import L1, L2, LINF, Norm

HEAD_OPTIMIZERS = ("gradient", "sign", "coordinate", "spectral", "rows")
HEAD_REGULARIZERS = ("none", "l1", "l2", "linf", "margin")

_ENTRYWISE: dict[str, Norm] = {"gradient": L2, "sign": LINF, "coordinate": L1}
# Of the factors of the dual norm of an example, captions' side and features' side, where they are not both l2.
_FACTORS = {"sign": (L1, L1), "coordinate": (LINF, LINF), "rows": (L1, LINF)}
# A penalty, by the attack whose dual norm it is: its proximal operator is what the projection on their ball leaves.
ATTACK_OF_PENALTY: dict[str, Norm] = {"l1": LINF, "l2": L2, "linf": L1}
# Pairs of captions that stand for all of them in the margin penalty of one step.
MARGIN_PAIRS = 256
# Singular values below this share of the largest drown in the rounding of float64, as the Gram matrix squares them.
RANK_TOLERANCE = 1e-6
# Below this, log(log(1 + exp(x))) is x to the last digit of float32, and exp(x) may underflow.
LOGISTIC_TAIL = -20.0
# A line search begins with twice the last step, the first time with this times the longest proven step, and halves it
# until the loss falls by at least this share of what its slope promises; for a parabola 1/2 is exactly at its minimum.
LONGEST_STEP, ARMIJO_SHARE = 2.0**30, 0.5


def steepest_step(gradient: Tensor, optimizer: str) -> tuple[Tensor, Tensor]:
    """The unit step that gains most on a matrix, in the norm of an optimiser.

    Args:
        gradient: ``(D, F)``; the ascent direction ``g``.
        optimizer: One of :data:`HEAD_OPTIMIZERS`; see the module for its norm.

    Returns:
        ``argmax <g, s>`` over ``‖s‖ <= 1``, ``(D, F)``, and the value there, the dual norm of ``g``, 0-d.

    Raises:
        InputError: If the optimiser is unknown.
    """
    if optimizer in _ENTRYWISE:
        norm = _ENTRYWISE[optimizer]
        return norm.steepest(gradient[None])[0], norm.dual(gradient[None])[0]
    _known("optimizer", optimizer, HEAD_OPTIMIZERS)
    if optimizer == "rows":
        return L1.steepest(gradient), L1.dual(gradient).sum()
    # The eigenvectors of the smaller Gram matrix are several times faster than the singular value decomposition.
    wide = gradient.shape[0] <= gradient.shape[1]
    rows = (gradient if wide else gradient.T).double()
    squares, left = torch.linalg.eigh(rows @ rows.T)
    values = squares.clamp(min=0).sqrt()
    noise = max(gradient.shape) * torch.finfo(gradient.dtype).eps  # of the gradient, were it of lower rank
    kept = values > max(RANK_TOLERANCE, noise) * values[-1]
    step = (left[:, kept] / values[kept]) @ left[:, kept].T @ rows
    return (step if wide else step.T).to(gradient.dtype), values[kept].sum().to(gradient.dtype)


def ranking_loss(weight: Tensor, features: Tensor, gallery: Tensor, owner: Tensor) -> tuple[float, Tensor]:
    """Logarithm of the loss of the module, and its gradient, which does not vanish with the loss.

    With ``x_p = log Σ_j exp(s_ij) - s_ip`` the loss is ``L = mean softplus(x_p)``, and::

        ∂ log L / ∂ s_ip = -q_p,   q_p = sigmoid(x_p) / Σ softplus(x)
        ∂ log L / ∂ s_ij = Σ over own p of q_p · softmax over foreign j of s_ij

    Args:
        weight: ``(D, F)``.
        features: ``(N, F)``.
        gallery: ``(G, D)``.
        owner: int64 ``(G,)``; the row of the image that a caption describes.

    Returns:
        ``log L`` and ``∇ log L``, ``(D, F)``.
    """
    return _ranking_loss((features @ weight.T) @ gallery.T, features, gallery, owner)


def _ranking_loss(scores: Tensor, features: Tensor, gallery: Tensor, owner: Tensor) -> tuple[float, Tensor]:
    """:func:`ranking_loss` from scores ``(N, G)``, which it overwrites."""
    own = owner, torch.arange(len(gallery), device=gallery.device)
    excess, rivals, logs = _losses(scores, own)
    total = torch.logsumexp(logs, dim=0)
    q = (F.logsigmoid(excess) - total).exp()  # (G,)
    mass = q.new_zeros(len(features)).index_add(0, owner, q)
    slopes = scores.sub_(rivals[:, None]).exp_().mul_(mass[:, None])  # own captions are 0
    slopes[own] = -q
    return float(total) - math.log(len(gallery)), (slopes @ gallery).T @ features


def _losses(scores: Tensor, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``x_p`` ``(G,)``, ``log Σ_j exp(s_ij)`` ``(N,)`` and ``log softplus(x_p)`` ``(G,)``; own scores become -inf."""
    positive = scores[own]
    scores[own] = -math.inf
    rivals = torch.logsumexp(scores, dim=1)
    excess = rivals[own[0]] - positive
    logs = torch.where(excess < LOGISTIC_TAIL, excess, F.softplus(excess.clamp(min=LOGISTIC_TAIL)).log())
    return excess, rivals, logs


def margin_penalty(weight: Tensor, differences: Tensor, attack: Norm) -> tuple[float, Tensor]:
    """``mean_m ‖Wᵀ d_m‖_*``, what an attack of norm 1 gains on an average pair, and a subgradient.

    Args:
        weight: ``(D, F)``.
        differences: ``(M, D)``; ``d = v_p - v_j``.
        attack: Its dual norm is taken.

    Returns:
        The mean and ``mean_m d_m s_mᵀ``, ``(D, F)``, with ``s_m`` the steepest unit step of the attack.
    """
    images = differences @ weight
    return float(attack.dual(images).mean()), differences.T @ attack.steepest(images) / len(images)


def train_head(
    features: Tensor,
    gallery: Tensor,
    owner: Tensor,
    optimizer: str = "gradient",
    regularizer: str = "none",
    lam: float = 0.0,
    attack: Norm = L2,
    steps: int = 100,
    rate: float | None = None,
    batch: int = 1000,
    seed: int = 0,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Train ``u = W f`` from ``W = 0`` by loss-normalised steepest descent.

    With ``g = -∇ log L`` of :func:`ranking_loss`, and B a bound on the dual norm of the examples Z::

        W ← W + rate / B² · ‖g‖_* · argmax_{‖s‖ <= 1} <g, s>

    ``rate = 1`` is the longest step for which the bias is proved on separable data, and far too short to fit
    thousands of captions. The default is Armijo's line search: half of the decrease of L that its slope promises
    (:data:`ARMIJO_SHARE`), so that optimisers compare without a step size to choose. Proofs are for full batches.
    Noise averages out in gradient descent, but sign and coordinate descent see only the sign or the place of an
    entry, so batches should be as large as time allows. All captions of the images of a batch are in it.

    Penalties are added to ``log L``: ``lam ‖W‖`` of all entries, by proximal gradient steps, or for ``margin``
    ``lam`` times :func:`margin_penalty` on random pairs of the batch, by subgradients. The penalty that suits an
    attack is its dual norm: l1 for linf, l2 for l2, linf for l1.

    Args:
        features: ``(N, F)``, pooled and standardised; the unit of the certificate is then a standard deviation.
        gallery: ``(G, D)``, caption vectors.
        owner: int64 ``(G,)``; the row in ``features`` that a caption describes. Every row has a caption.
        optimizer: One of :data:`HEAD_OPTIMIZERS`.
        regularizer: One of :data:`HEAD_REGULARIZERS`; l1, l2 and linf go with the gradient optimiser.
        lam: Weight of the penalty, at least 0.
        attack: That the ``margin`` penalty is for.
        steps: Number of steps.
        rate: Length of the steps; None searches each.
        batch: Images in a batch; all if there are no more.
        seed: Decides batches and pairs.
        observe: Called after each step with its number, from 1, and W, which it must not keep.

    Returns:
        ``(D, F)``, of the dtype and on the device of the features.

    Raises:
        InputError: If shapes disagree, a value is not finite, a name is unknown or a number out of range, or
            training diverges.

    Example:
        >>> train_head(torch.eye(2), torch.eye(2), torch.arange(2), "sign", steps=1).sign()
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    gallery, owner = gallery.to(features), owner.to(features.device)
    _check(features, gallery, owner)
    check_settings(optimizer, regularizer, lam, steps, batch)
    if rate is not None and not 0 < rate < math.inf:
        raise InputError(f"rate {rate}: give a length above 0, or None")
    proven = _largest_example(features, gallery, optimizer) ** -2
    unit = proven * (LONGEST_STEP if rate is None else rate)
    generator = torch.Generator().manual_seed(seed)
    weight = features.new_zeros(gallery.shape[1], features.shape[1])
    batches = _batches(features, gallery, owner, batch, generator)
    for number, (rows, some, mine) in enumerate(itertools.islice(batches, steps), 1):
        apart = _differences(some, mine, generator) if regularizer == "margin" else some[:0]
        scores = (rows @ weight.T) @ some.T
        value, slope = _ranking_loss(scores.clone(), rows, some, mine)
        penalty = 0.0
        if len(apart):
            penalty, towards_less = margin_penalty(weight, apart, attack)
            slope += lam * towards_less
        direction, length = steepest_step(-slope, optimizer)
        step = length * direction
        if rate is None:
            along = (rows @ step.T) @ some.T, apart @ step
            rise = partial(_rise, (value, penalty), mine, (scores, apart @ weight), along, lam, attack)
            unit = _line_search(rise, float(length) ** 2, unit if number == 1 else 2 * unit, proven)
        weight += unit * step
        if regularizer in ATTACK_OF_PENALTY:
            weight -= ATTACK_OF_PENALTY[regularizer].project(weight[None], unit * lam)[0]
        if not math.isfinite(weight.sum()):
            raise InputError(f"rate: {rate} diverges at step {number} of {optimizer} descent; use a smaller one")
        if observe:
            observe(number, weight)
    return weight


def check_settings(optimizer: str, regularizer: str, lam: float, steps: int, batch: int) -> None:
    """Refuse what :func:`train_head` cannot do, whatever the data. Raises :class:`InputError`."""
    _known("optimizer", optimizer, HEAD_OPTIMIZERS)
    _known("regularizer", regularizer, HEAD_REGULARIZERS)
    if regularizer in ATTACK_OF_PENALTY and optimizer != "gradient":
        raise InputError(f"regularizer: {regularizer} has steps for optimizer gradient only, not {optimizer}")
    if not (0 <= lam < math.inf and steps >= 0 and batch >= 2):
        raise InputError(f"penalty {lam}, steps {steps}, batch {batch}: give >= 0, >= 0 and >= 2")


def _batches(
    features: Tensor, gallery: Tensor, owner: Tensor, batch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Without end: images in random order, each once in an epoch, with all of their captions."""
    order = torch.randperm(0)
    while True:
        if len(features) <= batch:
            yield features, gallery, owner
            continue
        if len(order) < batch:
            order = torch.randperm(len(features), generator=generator)
        chosen, order = order[:batch].to(features.device), order[batch:]
        place = owner.new_full((len(features),), -1)
        place[chosen] = torch.arange(batch, device=features.device)
        inside = place[owner] >= 0
        yield features[chosen], gallery[inside], place[owner[inside]]


def _differences(gallery: Tensor, owner: Tensor, generator: torch.Generator) -> Tensor:
    """``v_p - v_j`` of random captions of different images."""
    first, second = torch.randint(len(gallery), (2, MARGIN_PAIRS), generator=generator).to(gallery.device)
    return (gallery[first] - gallery[second])[owner[first] != owner[second]]


def _rise(
    before: tuple[float, float],
    owner: Tensor,
    at: tuple[Tensor, Tensor],
    along: tuple[Tensor, Tensor],
    lam: float,
    attack: Norm,
    t: float,
) -> float:
    """What a step of length t adds to ``L / L(0)`` and to the penalty, from scores and from images of differences.

    ``before`` is ``log L(0)`` and the penalty there.
    """
    own = owner, torch.arange(len(owner), device=owner.device)
    logs = _losses(at[0] + t * along[0], own)[2]
    grown = float(torch.logsumexp(logs, dim=0)) - math.log(len(owner)) - before[0]
    rise = math.expm1(grown) if grown < 1 else math.inf  # and NaN, beyond what a float holds, is no descent either
    if len(at[1]):
        rise += lam * (float(attack.dual(at[1] + t * along[1]).mean()) - before[1])
    return rise


def _line_search(rise: Callable[[float], float], slope: float, start: float, least: float) -> float:
    """The first t of start, start / 2, … with ``rise(t) <= -ARMIJO_SHARE · t · slope`` (Armijo, 1966), or the least.

    The loss alone falls enough at the longest proven step, but a penalty may have a kink in the way.
    """
    t = start
    while t > least and not rise(t) <= -ARMIJO_SHARE * t * slope:
        t /= 2
    return max(t, least)


class HeadEvaluation(NamedTuple):
    """How a head retrieves and what is proved of it.

    Attributes:
        clean: R@1 in [0, 1], ties pessimistic.
        radii: For linf, l2 and l1 the certified radii float64 ``(N,)`` of the queries.
    """

    clean: float
    radii: dict[str, Tensor]

    def curve(self, norm: str, epsilons: Sequence[float]) -> Tensor:
        """Certified R@1 under perturbations up to ε, float64 ``(E,)`` in [0, 1]."""
        return certified_recall(self.radii[norm], epsilons)


def evaluate_head(
    weight: Tensor, features: Tensor, gallery: Tensor, owner: Tensor, bias: Tensor | None = None
) -> HeadEvaluation:
    """Clean R@1, and certified radii of all images as queries; multiples of W give the same.

    Args:
        weight: ``(D, F)``.
        features: ``(N, F)``, prepared as for training.
        gallery: ``(G, D)``.
        owner: int64 ``(G,)``; the row in ``features`` that a caption describes.
        bias: ``(D,)``; of heads that were trained elsewhere.

    Raises:
        InputError: If shapes disagree, a value is not finite, or an image has no caption.
    """
    _check(features, gallery, owner)
    own = owner.cpu() == torch.arange(len(features))[:, None]
    head = LinearHead(weight, weight.new_zeros(len(weight)) if bias is None else bias)
    radii = {norm.name: certified_radii(head, features, gallery, own, norm) for norm in (LINF, L2, L1)}
    return HeadEvaluation(float((radii["l2"] > 0).double().mean()), radii)


def _known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name}: {value!r} is unknown; use {', '.join(known)}")


def _check(features: Tensor, gallery: Tensor, owner: Tensor) -> None:
    """Refuse what :func:`train_head` and :func:`evaluate_head` cannot work with."""
    if features.ndim != 2 or gallery.ndim != 2 or owner.shape != gallery.shape[:1] or owner.dtype != torch.int64:
        raise InputError(
            f"features are {tuple(features.shape)}, gallery {tuple(gallery.shape)}, owner {tuple(owner.shape)} "
            f"{owner.dtype}; give (N, F), (G, D) and int64 (G,)"
        )
    for name, values in (("features", features), ("gallery", gallery)):
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name}: a value is not finite; leave such rows out")
    described = set(owner.tolist())
    if len(features) < 2 or described != set(range(len(features))):
        raise InputError(
            f"owner: {len(described)} rows of {len(features)} are described; give 2 or more, each of them"
        )


def _largest_example(features: Tensor, gallery: Tensor, optimizer: str) -> float:
    """A bound on the dual norm of the examples Z in the norm of an optimiser; see the module."""
    captions, images = _FACTORS.get(optimizer, (L2, L2))
    spread = 2 * float(captions.measure(gallery - gallery.mean(dim=0)).max())
    return max(spread * float(images.measure(features).max()), torch.finfo(features.dtype).tiny)
