"""Gradient attacks and a black-box one: FGSM, PGD, APGD and a Square-style random search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.balls import Ball, Violation

TOLERANCE = 1e-6
"""How far a returned point may leave its ball (relative to a radius above one) or its box."""


class Value(NamedTuple):
    """What an attack has reached at some points.

    Attributes:
        loss: ``(b,)``; the attack makes it larger.
        done: bool ``(b,)``; the goal is reached.
    """

    loss: Tensor
    done: Tensor


class Objective(Protocol):
    """What an attack is after, example by example.

    The network behind it must be in evaluation mode and in float32 or float64: dropout, batch statistics and half
    precision give gradients that point elsewhere, and a model that looks robust.
    """

    def __call__(self, points: Tensor, rows: Tensor) -> Value:
        """Value of ``points`` ``(b, ...)``, perturbed versions of the examples ``rows``, int64 ``(b,)``."""
        ...


@dataclass(frozen=True)
class Attacked:
    """The outcome of an attack on B examples.

    Attributes:
        points: The best points found, like the examples.
        loss: ``(B,)`` loss there.
        done: bool ``(B,)``; whether the goal is reached there.
        trace: ``(steps + 1, B)`` best loss so far, beginning with the start; constant once an example has stopped.
        violation: How far each point leaves its ball and its box; at most :data:`TOLERANCE`.
        flat: bool ``(B,)``; some gradient on the way was zero in every coordinate.
        passes: Forward passes over single examples, with or without a backward one.
    """

    points: Tensor
    loss: Tensor
    done: Tensor
    trace: Tensor
    violation: Violation
    flat: Tensor
    passes: int


class _Search:
    """Evaluates points, remembers the best of each example and which examples are still worth a step.

    Reaching the goal comes before a higher loss: what is returned is the strongest of the points that reached it.
    """

    def __init__(
        self, objective: Objective, centres: Tensor, ball: Ball, start: Tensor, least: int | None, batch_size: int
    ) -> None:
        outside = float(torch.maximum(ball.low - centres, centres - ball.high).max()) if centres.numel() else 0.0
        if not outside <= TOLERANCE:
            raise InputError(
                f"the examples leave [{ball.low:g}, {ball.high:g}] by {outside:.3g}; attack pixels in [0, 1], "
                "before normalisation"
            )
        self.objective, self.centres, self.ball = objective, centres, ball
        self.least, self.batch_size = least, batch_size
        self.points, self.gradient = start.clone(), torch.zeros_like(centres)
        self.loss = centres.new_full((len(centres),), -torch.inf)
        self.done = torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
        self.flat = self.done.clone()
        self.active = torch.arange(len(centres), device=centres.device)
        self.trace: list[Tensor] = []
        self.passes = 0

    def evaluate(self, points: Tensor, gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient and whether an example got better, at ``points`` of the active examples.

        Raises:
            InputError: If the loss is not finite, or does not depend on the points.
        """
        rows, losses, gradients, done = self.active, [], [], []
        if not len(rows):
            self.trace.append(self.loss.clone())
            return self.loss, self.gradient, self.done
        for first in range(0, len(rows), self.batch_size):
            part, some = rows[first : first + self.batch_size], points[first : first + self.batch_size]
            some = some.detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                value = self.objective(some, part)
            if gradient and not value.loss.requires_grad:
                raise InputError("the tower is not differentiable with respect to its input; attack it with square")
            slope = torch.autograd.grad(value.loss.sum(), some)[0] if gradient else torch.zeros_like(some)
            losses.append(value.loss.detach())
            gradients.append(slope)
            done.append(value.done)
        loss, slope, reached = torch.cat(losses), torch.cat(gradients), torch.cat(done)
        self.passes += len(rows)
        if not bool(torch.isfinite(loss).all()) or not bool(torch.isfinite(slope).all()):
            bad = int(rows[~torch.isfinite(loss)][:1]) if not bool(torch.isfinite(loss).all()) else int(rows[0])
            raise InputError(f"the loss or its gradient is not finite near example {bad}; the model has diverged")
        if gradient:
            self.flat[rows] |= (slope.flatten(1) == 0).all(dim=1)
        was_done, was_loss = self.done[rows], self.loss[rows]
        better = (reached & ~was_done) | ((reached == was_done) & (loss > was_loss))
        improved = rows[better]
        self.points[improved], self.gradient[improved] = points[better], slope[better]
        self.loss[improved], self.done[improved] = loss[better], reached[better]
        self.trace.append(self.loss.clone())
        return loss, slope, better

    def rest(self, step: int) -> Tensor:
        """Drop examples that have reached their goal and have made ``least`` steps; which active ones stay."""
        stay = torch.ones_like(self.active, dtype=torch.bool)
        if self.least is not None and step >= self.least:
            stay = ~self.done[self.active]
        self.active = self.active[stay]
        return stay

    def result(self, steps: int) -> Attacked:
        """What was found. Raises :class:`RuntimeError` if a point is not where it may be: a bug, not bad luck."""
        violation = self.ball.violation(self.points, self.centres)
        radius = torch.as_tensor(self.ball.epsilon, dtype=torch.float64, device=self.centres.device).clamp(min=1)
        worst = max(float((violation.norm / radius).max()), float(violation.box.max())) if len(self.loss) else 0.0
        if not worst <= TOLERANCE:
            raise RuntimeError(f"an attack left its {self.ball.norm.name} ball or its box by {worst:.3g}")
        self.trace.extend([self.trace[-1]] * (steps + 1 - len(self.trace)))
        trace = torch.stack(self.trace)
        return Attacked(self.points, self.loss, self.done, trace, violation, self.flat, self.passes)


def fgsm(objective: Objective, centres: Tensor, ball: Ball, *, batch_size: int = 16) -> Attacked:
    """One step of the full radius along the gradient (Goodfellow et al., 2015), in any norm."""
    return pgd(objective, centres, ball, 1, step_size=1.0, start=centres, batch_size=batch_size)


def pgd(
    objective: Objective,
    centres: Tensor,
    ball: Ball,
    steps: int = 10,
    *,
    step_size: float = 0.25,
    start: Tensor | None = None,
    least: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Attacked:
    """Projected gradient ascent with steps of fixed length (Madry et al., 2018).

    Args:
        objective: What to maximise.
        centres: The examples ``(B, ...)``, float32 or float64, inside the ball's box; there may be none.
        ball: Where perturbed examples may lie.
        steps: Gradient steps; each costs a forward and a backward pass, and the last point a forward pass.
        step_size: Length of a step as a fraction of the radius.
        start: Where to begin ``(B, ...)``; by default at a random point of the ball.
        least: Stop an example after this many steps once its goal is reached; None makes all steps.
        seed: Decides the random start.
        batch_size: Examples per forward pass.

    Raises:
        InputError: For examples of another dtype or outside the box, or a loss that is not finite or not
            differentiable.
    """
    points = _begin(centres, ball, start, seed)
    search = _Search(objective, centres, ball, points, least, batch_size)
    for step in range(steps):
        _, gradient, _ = search.evaluate(points)
        stay = search.rest(step)
        if not len(search.active):
            return search.result(steps)
        near = ball.rows(search.active)
        moved = near.step(points[stay], centres[search.active], gradient[stay], step_size * near.epsilon)
        points = near.project(moved, centres[search.active])
    search.evaluate(points, gradient=False)
    return search.result(steps)


def apgd(
    objective: Objective,
    centres: Tensor,
    ball: Ball,
    steps: int = 50,
    *,
    start: Tensor | None = None,
    least: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Attacked:
    """Auto-PGD: momentum, and a step size that halves when progress stalls (Croce and Hein, 2020, algorithm 1).

    The first step is twice the radius long. At checkpoints, 22 % of the steps apart at first and then ever closer,
    an example halves its step and returns to its best point if fewer than 75 % of the steps since the last one
    raised the loss, or if neither the step nor the best loss has changed since.

    Args and Raises: as :func:`pgd`.
    """
    x = _begin(centres, ball, start, seed)
    search = _Search(objective, centres, ball, x, least, batch_size)
    loss, gradient, _ = search.evaluate(x)
    x, last, gradient = x.clone(), x.clone(), gradient.clone()
    length = 2 * torch.as_tensor(ball.epsilon, dtype=x.dtype, device=x.device).expand(len(x)).clone()
    rises, halved = torch.zeros_like(loss), torch.zeros_like(search.done)
    best_before, checkpoints = search.loss.clone(), _checkpoints(steps)
    since = 0
    for step in range(steps):
        search.rest(step)
        a = search.active
        if not len(a):
            break
        near, here, centre = ball.rows(a), x[a], centres[a]
        z = near.project(near.step(here, centre, gradient[a], length[a]), centre)
        if step:  # momentum: the last move carries on
            z = near.project(here + 0.75 * (z - here) + 0.25 * (here - last[a]), centre)
        new_loss, new_gradient, _ = search.evaluate(z)
        last[a], x[a], gradient[a] = here, z, new_gradient
        rises[a] += (new_loss > loss[a]).to(rises.dtype)
        loss[a] = new_loss
        if step + 1 in checkpoints:
            period, since = step + 1 - since, step + 1
            stalled = (rises < 0.75 * period) | (~halved & (search.loss <= best_before))
            length = torch.where(stalled, length / 2, length)
            x[stalled], gradient[stalled] = search.points[stalled], search.gradient[stalled]
            loss[stalled] = search.loss[stalled]
            rises, halved, best_before = torch.zeros_like(rises), stalled, search.loss.clone()
    return search.result(steps)


def square(
    objective: Objective,
    centres: Tensor,
    ball: Ball,
    queries: int = 1000,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Attacked:
    """Random search over square patches, after Square Attack (Andriushchenko et al., 2020); needs no gradient.

    Begins with vertical stripes at the edge of the ball. Each query repaints one square, with one sign per channel,
    projects on the ball, and keeps it if the loss rises. The share of pixels repainted falls from 0.3 as in the
    paper's schedule. An example stops when its goal is reached.

    Args:
        objective: Called without gradients.
        centres: Pictures ``(B, C, H, W)``.
        ball: Where perturbed pictures may lie; in norms other than ℓ∞ a square is as high as its radius allows.
        queries: Forward passes per picture.
        start: Where to begin; by default at the stripes.
        seed: Decides all squares; the same for every picture.
        batch_size: Pictures per forward pass.

    Raises:
        InputError: As :func:`pgd`.
    """
    generator = torch.Generator().manual_seed(seed)
    count, channels, height, width = centres.shape

    def signs(*shape: int) -> Tensor:
        return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(centres)

    def painted(base: Tensor, near: Ball, centre: Tensor, top: int, left: int, side: int, sign: Tensor) -> Tensor:
        delta = base - centre
        pattern = torch.zeros_like(delta)
        pattern[..., top : top + side, left : left + side] = sign
        size = near.norm.measure(pattern).clamp(min=1e-12)
        height = (torch.as_tensor(near.epsilon).to(centre) / size)[:, None, None, None]
        delta = torch.where(pattern != 0, height * pattern, delta)
        return near.project(centre + delta, centre)

    _check_dtype(centres)
    if start is None:
        stripes = signs(1, channels, 1, width).expand(count, channels, height, width)
        size = ball.norm.measure(stripes)
        radius = (torch.as_tensor(ball.epsilon).to(centres) / size)[:, None, None, None]
        start = ball.project(centres + radius * stripes, centres)
    search = _Search(objective, centres, ball, start, 0, batch_size)
    search.evaluate(start, gradient=False)
    for query in range(1, queries):
        search.rest(query)
        a = search.active
        if not len(a):
            break
        side = max(1, round((_square_share(query, queries) * height * width) ** 0.5))
        side = min(side, height, width)
        top = int(torch.randint(0, height - side + 1, (), generator=generator))
        left = int(torch.randint(0, width - side + 1, (), generator=generator))
        sign = signs(1, channels, 1, 1)
        search.evaluate(painted(search.points[a], ball.rows(a), centres[a], top, left, side, sign), gradient=False)
    return search.result(max(queries - 1, 0))


def _check_dtype(centres: Tensor) -> None:
    if centres.dtype not in (torch.float32, torch.float64):
        raise InputError(f"attacks run in float32 or float64, not {centres.dtype}; divide 8-bit pixels by 255")


def _begin(centres: Tensor, ball: Ball, start: Tensor | None, seed: int) -> Tensor:
    _check_dtype(centres)
    if start is not None:
        return ball.project(start, centres)
    return ball.random(centres, torch.Generator().manual_seed(seed))


def _checkpoints(steps: int) -> set[int]:
    """Steps at which APGD looks back: p₀ = 0, p₁ = 0.22, pⱼ₊₁ = pⱼ + max(pⱼ - pⱼ₋₁ - 0.03, 0.06)."""
    found, last, now = set(), 0.0, 0.22
    while now <= 1:
        found.add(max(1, round(now * steps)))
        last, now = now, now + max(now - last - 0.03, 0.06)
    return found


def _square_share(query: int, queries: int) -> float:
    """Share of the pixels in a square, halved at the published points of a schedule of 10,000 queries."""
    position = 10_000 * query / queries
    halvings = sum(position > point for point in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return 0.3 * 0.5**halvings
