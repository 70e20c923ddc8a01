"""One batch of pictures attacked at growing ε, and the smallest ε that breaks each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.robustness.attacks import Attacked, apgd, fgsm, pgd, square
from training.robustness.balls import Ball
from training.robustness.norms import LINF, Norm
from training.robustness.retrieval_threats import Loss, QueryImage, Threat

Method = Literal["apgd", "pgd", "fgsm", "square"]
TARGETS = 9


@dataclass(frozen=True)
class AttackSettings:
    """How hard to attack.

    Attributes:
        norm: Of the perturbation.
        method: ``apgd``, or a weaker one for comparison.
        steps: Most gradient steps (for ``square`` queries) per picture and ε; a picture whose searches have all left
            the first ten ranks (which, promoted, holds the first) makes only ``least`` of them.
        least: See ``steps``; None makes all steps.
        strong: Attack what still ranks first also by cross-entropy, DLR and nine targets, each with twice the steps,
            and by random squares.
        seed: Decides everything random.
        batch_size: Pictures per forward pass.
    """

    norm: Norm = LINF
    method: Method = "apgd"
    steps: int = 50
    least: int | None = 3
    strong: bool = False
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class Curve:
    """What became of n pictures, with up to P searches each, at every ε.

    Attributes:
        epsilons: Ascending, beginning with 0.
        points: For each ε the perturbed pictures ``(n, ...)``.
        ranks: int64 ``(E, n, P)``; -1 where a picture has fewer searches.
        rounded: The same after rounding the perturbed pictures to 8 bits, as an upload would.
        changed: int64 ``(2, E)``; how many pictures differ from the clean ones, before and after that rounding.
        violation: Largest excess over a ball or a box.
        flat: Pictures at which some gradient was zero.
        passes: Forward passes over single pictures, with or without a backward one.
    """

    epsilons: tuple[float, ...]
    points: list[Tensor]
    ranks: NDArray[np.int64]
    rounded: NDArray[np.int64]
    changed: NDArray[np.int64]
    violation: float
    flat: int
    passes: int


@torch.no_grad()
def embed_all(threat: Threat, images: Tensor, batch_size: int) -> Tensor:
    """Embeddings ``(n, D)``, always in the same batches, so that equal pictures get equal bits."""
    return torch.cat([threat.embed(part) for part in images.split(batch_size)])  # type: ignore[no-untyped-call]


def count_changed(points: Tensor, images: Tensor) -> int:
    """How many pictures differ from the clean ones in any bit."""
    return int((points != images).flatten(1).any(1).sum())


def attack_curve(threat: Threat, images: Tensor, epsilons: Sequence[float], settings: AttackSettings) -> Curve:
    """Attack at every ε, each begun at the perturbation found at the one below, scaled up, and never worse than it.

    Args:
        threat: To n pictures.
        images: The pictures ``(n, 3, S, S)`` in [0, 1].
        epsilons: Radii above 0, ascending.
        settings: How hard.
    """
    zero = embed_all(threat, images, settings.batch_size)
    points, ranks, rounded, changed = [images], [threat.ranks(zero)], [threat.ranks(zero)], [(0, 0)]
    violation, passes, flat = 0.0, 0, torch.zeros(len(images), dtype=torch.bool, device=images.device)
    before: Attacked | None = None
    below = 0.0
    for epsilon in epsilons:
        ball = Ball(settings.norm, epsilon)
        start = images if before is None else images + (before.points - images) * (epsilon / below)
        found = attack(threat, images, ball, settings, start)
        if before is not None:
            found = _stronger(found, before)
        found, extra = _insist(threat, images, ball, settings, found)
        passes += found.passes + extra
        flat |= found.flat
        violation = max(violation, float(found.violation.norm.max()), float(found.violation.box.max()))
        reached = threat.ranks(embed_all(threat, found.points, settings.batch_size))
        if before is not None:  # a higher margin is no reason to give back a first rank
            regained = threat.withstood(reached) & ~threat.withstood(ranks[-1])
            found = _mixed(found, before, torch.from_numpy(regained).to(images.device))
            reached = np.where(regained[:, None], ranks[-1], reached)
        points.append(found.points)
        ranks.append(reached)
        eight_bits = (found.points * 255).round() / 255
        rounded.append(threat.ranks(embed_all(threat, eight_bits, settings.batch_size)))
        changed.append((count_changed(found.points, images), count_changed(eight_bits, images)))
        before, below = found, epsilon
    radii = (0.0, *epsilons)
    counts = np.array(changed, dtype=np.int64).T
    return Curve(radii, points, np.stack(ranks), np.stack(rounded), counts, violation, int(flat.sum()), passes)


def attack(
    threat: Threat,
    images: Tensor,
    ball: Ball,
    settings: AttackSettings,
    start: Tensor | None = None,
    goal: int | None = None,
    loss: Loss = "margin",
    target: int = 0,
) -> Attacked:
    """The attack that the settings name, at one ε.

    Args:
        threat: To the pictures.
        images: ``(n, 3, S, S)`` in [0, 1].
        ball: Where they may go.
        settings: How hard.
        start: Where to begin; at random if it is left out.
        goal: See :meth:`Threat.objective`; the threat's hardest if it is left out.
        loss: As there.
        target: As there.
    """
    objective = threat.objective(loss, goal or threat.goal, target)
    seed, size, least = settings.seed, settings.batch_size, settings.least
    if settings.method == "fgsm":
        return fgsm(objective, images, ball, batch_size=size)
    if settings.method == "square":
        return square(objective, images, ball, settings.steps, seed=seed, batch_size=size)
    run = pgd if settings.method == "pgd" else apgd
    return run(objective, images, ball, settings.steps, start=start, least=least, seed=seed, batch_size=size)


def smallest_epsilon(
    threat: Threat, images: Tensor, curve: Curve, settings: AttackSettings, rounds: int = 6, steps: int = 4
) -> NDArray[np.float64]:
    """The smallest ε at which each picture's first search was seen to lose the first rank, by bisection.

    Between the largest ε of the curve that fails and the smallest that succeeds, each round halves the interval with
    a few APGD steps from the scaled-down perturbation. An upper bound of what would do.

    Args:
        threat: To n pictures.
        images: The pictures.
        curve: What :func:`attack_curve` found.
        settings: How hard.
        rounds: Halvings.
        steps: Gradient steps of each.

    Returns:
        float64 ``(n,)``: 0 where the clean picture does not rank first, inf where no ε of the curve breaks it.
    """
    lost = curve.ranks[..., 0] > 0  # (E, n)
    first = np.where(lost.any(0), lost.argmax(0), 0)
    radii = np.asarray(curve.epsilons)
    high = np.where(lost.any(0), radii[first], np.inf)
    rows = torch.from_numpy(np.flatnonzero(np.isfinite(high) & (high > 0))).to(images.device)
    if not len(rows):
        return high
    some, threatened = images[rows], threat.rows(rows)
    reached = torch.stack([curve.points[first[row]][row] for row in rows.tolist()])
    upper = torch.from_numpy(high).to(images)[rows]
    lower = torch.from_numpy(radii[first - 1]).to(images)[rows]
    for _ in range(rounds):
        middle = (lower + upper) / 2
        start = some + (reached - some) * (middle / upper).view(-1, 1, 1, 1)
        objective = threatened.objective("margin", 1)
        ball = Ball(settings.norm, middle)
        found = apgd(objective, some, ball, steps, start=start, least=0, batch_size=settings.batch_size)
        lower, upper = torch.where(found.done, lower, middle), torch.where(found.done, middle, upper)
        reached = torch.where(found.done.view(-1, 1, 1, 1), found.points, reached)
    high[rows.cpu().numpy()] = upper.double().cpu().numpy()
    return high


def _stronger(found: Attacked, before: Attacked) -> Attacked:
    """Keep what a smaller ball gave where that is stronger."""
    keep = (before.done & ~found.done) | ((before.done == found.done) & (before.loss > found.loss))
    return _mixed(found, before, keep)


def _mixed(found: Attacked, other: Attacked, keep: Tensor) -> Attacked:
    points = torch.where(keep.view(-1, *[1] * (found.points.ndim - 1)), other.points, found.points)
    loss, done = torch.where(keep, other.loss, found.loss), torch.where(keep, other.done, found.done)
    # Inside the smaller ball is inside the larger one, so the larger violation bounds either.
    violation = type(found.violation)(*map(torch.maximum, found.violation, other.violation))
    return Attacked(points, loss, done, found.trace, violation, found.flat | other.flat, found.passes)


def _insist(
    threat: Threat, images: Tensor, ball: Ball, settings: AttackSettings, found: Attacked
) -> tuple[Attacked, int]:
    """Attack once more, with the first rank alone as goal, what is still there; ``strong`` tries everything."""
    tries: list[tuple[Loss, int, Method]] = [("margin", 0, settings.method)]
    if settings.strong:
        if isinstance(threat, QueryImage):
            tries += [("ce", 0, "apgd"), ("dlr", 0, "apgd")]
            tries += [("targeted", target, "apgd") for target in range(TARGETS)]
        tries.append(("margin", 0, "square"))
    passes = 0
    for loss, target, method in tries:
        standing = threat.ranks(embed_all(threat, found.points, settings.batch_size))
        rows = torch.from_numpy(np.flatnonzero(threat.withstood(standing))).to(images.device)
        if not len(rows):
            break
        steps = 1000 if method == "square" else settings.steps * (2 if settings.strong else 1)
        harder = replace(settings, method=method, steps=steps, least=0, seed=settings.seed + 1 + target)
        again = attack(threat.rows(rows), images[rows], ball.rows(rows), harder, goal=1, loss=loss, target=target)
        passes += again.passes
        broken = rows[again.done]
        if not len(broken):
            continue
        found.points[broken] = again.points[again.done]
        with torch.no_grad():  # the hardest goal may be further off
            found.loss[broken], found.done[broken] = threat.objective("margin", threat.goal)(
                found.points[broken], broken
            )
        found.violation.norm[broken] = again.violation.norm[again.done]
        found.violation.box[broken] = again.violation.box[again.done]
    return found, passes
