"""The measurements behind the checks: small attacks whose outcome is known, or known to be ordered."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training.robustness import checks
from training.robustness.attacks import Attacked, Value, apgd
from training.robustness.balls import Ball
from training.robustness.checks import Check
from training.robustness.curves import AttackSettings, Method, attack, embed_all
from training.robustness.norms import L1, LINF, FourierLInf, Norm
from training.robustness.retrieval_threats import QueryImage
from training.robustness.summary import percent

LARGE = 64 / 255
"""ε at which every search must fail, in ℓ∞."""
SHORT = 10
"""Steps of attacks that are only compared with each other."""


@dataclass(frozen=True)
class Trials:
    """Checks of the attack on a few queries.

    Attributes:
        threat: ``query-image`` by n queries.
        images: Their pictures ``(n, 3, S, S)`` in [0, 1].
        tower: The image tower, whose noisy copy is the transfer attack's surrogate.
        settings: The attack that is on trial.
        epsilon: The radius at which.
    """

    threat: QueryImage
    images: Tensor
    tower: nn.Module
    settings: AttackSettings
    epsilon: float

    def run(self) -> list[Check]:
        """Checks 3 to 5 and 10 to 12."""
        return [
            self.large_radius(),
            *self.order(),
            self.repeat(),
            planted(self.threat, self.images, Ball(self.settings.norm, self.epsilon), self.settings),
            closed_form(self.settings.norm),
        ]

    def _attack(self, steps: int, method: Method = "apgd", threat: QueryImage | None = None) -> Attacked:
        settings = replace(self.settings, method=method, steps=steps, least=None)  # losses are to be compared
        start = self.images if method == "apgd" else None
        ball = Ball(self.settings.norm, self.epsilon)
        return attack(threat or self.threat, self.images, ball, settings, start, goal=1)

    def _broken(self, points: Tensor) -> int:
        """How many of the queries do not rank first."""
        ranks = self.threat.ranks(embed_all(self.threat, points, self.settings.batch_size))
        return int((ranks > 0).sum())

    def large_radius(self) -> Check:
        """Check 3; other norms get the radius that holds the ℓ∞ ball's corner, or a perturbation of its energy."""
        norm, corner = self.settings.norm, torch.full_like(self.images[:1], LARGE)
        radius = LARGE if norm is LINF else float(norm.measure(corner)[0])
        if isinstance(norm, FourierLInf):  # the corner is one frequency, which the band may not hold
            noise = torch.randn(corner.shape, generator=torch.Generator().manual_seed(self.settings.seed))
            radius = LARGE / float(norm.steepest(noise).square().mean().sqrt())
        settings = replace(self.settings, method="apgd", steps=20, least=0)
        found = attack(self.threat, self.images, Ball(self.settings.norm, radius), settings, self.images, goal=1)
        chance = percent(int(self.threat.own.sum()), self.threat.own.numel())
        r1 = percent(len(self.images) - self._broken(found.points), len(self.images))
        return checks.large_radius_breaks_everything(r1, chance, radius, len(self.images))

    def order(self) -> list[Check]:
        """Checks 4 and 5."""
        fgsm, pgd, own = self._attack(1, "fgsm"), self._attack(SHORT, "pgd"), self._attack(SHORT)
        surrogate = noisy_copy(self.tower, self.settings.seed)
        transfer = self._attack(SHORT, threat=replace(self.threat, embed=surrogate))
        ball = Ball(self.settings.norm, self.epsilon)
        noise = ball.random(self.images, torch.Generator().manual_seed(self.settings.seed))
        tried = fgsm.points, pgd.points, own.points, transfer.points, noise
        one, ten, adaptive, others, random = (percent(self._broken(of), len(self.images)) for of in tried)
        losses = float(fgsm.loss.mean()), float(pgd.loss.mean()), float(own.loss.mean())
        return [
            checks.stronger_attacks_do_more(one, ten, adaptive, losses),
            checks.white_box_does_most(adaptive, others, random),
        ]

    def repeat(self) -> Check:
        """Check 10."""
        first, second = (embed_all(self.threat, self.images, self.settings.batch_size) for _ in range(2))
        return checks.forward_repeats(float((first - second).abs().max()))

    def persistence(self, standing: Tensor, hits: int, survivors: int) -> list[Check]:
        """Checks 6, 7 and 13, on searches that the attack did not break.

        Args:
            standing: Indices into the threat of those that are tried again.
            hits: Searches that the clean pictures win.
            survivors: Those that were not broken; what breaks in the sample is scaled up to them.
        """
        threat, images = self.threat.rows(standing), self.images[standing]
        ball = Ball(self.settings.norm, self.epsilon)

        def gain(tries: list[AttackSettings]) -> float:
            left = torch.arange(len(images), device=images.device)
            for settings in tries:
                if len(left):
                    found = attack(threat.rows(left), images[left], ball, settings, goal=1)
                    left = left[~found.done]
            broken = len(images) - len(left)
            return 100 * broken / max(len(images), 1) * survivors / max(hits, 1)

        plain = replace(self.settings, least=0)
        longer = gain([replace(plain, steps=2 * plain.steps)])
        restarts = gain([replace(plain, seed=plain.seed + restart) for restart in range(1, 5)])
        squares = gain([replace(plain, method="square", steps=100)])
        tried = len(images)
        return [
            checks.more_steps_add_little(longer, tried),
            checks.restarts_add_little(restarts, tried),
            checks.random_search_adds_nothing(squares, tried),
        ]


def noisy_copy(tower: nn.Module, seed: int, share: float = 0.1) -> nn.Module:
    """A surrogate: every weight gets Gaussian noise of a tenth of its tensor's standard deviation."""
    twin = copy.deepcopy(tower)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.numel() > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(share * weight.std() * noise)
    return twin


def planted(threat: QueryImage, images: Tensor, ball: Ball, settings: AttackSettings) -> Check:
    """Check 11: a caption is planted that only pictures along a random perturbation of the query can bring to the top.

    Each query gets one more competitor, whose score is linear in the query's embedding. Clean, it stays as far below
    the query's best caption as at a random corner of the ball it lies above it; so a successful picture exists.
    Only the planted competitor counts.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(images.shape, generator=generator).to(images)
    corners = ball.project(ball.step(images, images, noise, ball.epsilon), images)
    clean, there = (embed_all(threat, points, settings.batch_size) for points in (images, corners))
    ways = there - clean  # (n, D)
    squares = ways.square().sum(1).clamp(min=1e-20)

    def at(points: Tensor, rows: Tensor) -> Value:
        # 0 at the clean picture, 1 at the planted one; to win takes nine tenths of that.
        progress = ((threat.embed(points) - clean[rows]) * ways[rows]).sum(1) / squares[rows]
        return Value(progress, progress >= 0.9)

    found = apgd(at, images, ball, settings.steps, start=images, least=0, batch_size=settings.batch_size)
    return checks.planted_pictures_are_found(int(found.done.sum()), len(images))


def closed_form(norm: Norm, seed: int = 0) -> Check:
    """Check 12: APGD against linear encoders in float64, on pictures grey enough not to meet the box, and in ℓ∞ and ℓ1
    also on pictures that do.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    grey = 0.4 + 0.2 * torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    full = torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64)

    def at(points: Tensor, rows: Tensor) -> Value:
        return Value((points * weights[rows]).flatten(1).sum(1), torch.zeros(len(rows), dtype=torch.bool))

    shares = []
    radius = 0.2 if norm is L1 else 1 / 255
    for images, epsilon in ((grey, radius), (full, 16 / 255 if norm is LINF else 4.0)):
        if images is full and norm not in (LINF, L1):
            continue
        found = apgd(at, images, Ball(norm, epsilon), 50, start=images)
        gained = found.loss - (images * weights).flatten(1).sum(1)
        shares.append(gained / _best(norm, images, weights, epsilon))
    return checks.closed_form_is_reached(float(torch.cat(shares).min()), norm.name)


def _best(norm: Norm, images: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    """The largest ``<w, δ>`` in the ball and the box: exact for ℓ∞ and ℓ1, elsewhere where the box is far."""
    room = torch.where(weights > 0, 1 - images, images).flatten(1)
    size = weights.abs().flatten(1)
    if norm is LINF:
        return (size * room.clamp(max=epsilon)).sum(1)
    if norm is L1:  # fill the steepest pixels first
        steep, order = size.sort(dim=1, descending=True)
        room = room.gather(1, order)
        spent = (room.cumsum(1) - room).clamp(max=epsilon)
        return (steep * torch.minimum(room, epsilon - spent)).sum(1)
    return epsilon * norm.dual(weights)
