"""The ball that a perturbed example may not leave, cut with the box of valid pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.norms import ROUNDING, L1Norm, LInfNorm, Norm, clip, per_row


class Violation(NamedTuple):
    """How far points break the constraints of a ball, float64 ``(B,)`` each; 0 where they hold.

    Attributes:
        norm: Excess of the norm over epsilon.
        box: Largest distance of a coordinate from the box.
    """

    norm: Tensor
    box: Tensor


@dataclass(frozen=True)
class Ball:
    """All points within epsilon of a centre, cut with the box ``[low, high]``.

    Points and centres are ``(B, ...)``, float32 or float64; centres lie in the box. Projected points satisfy
    both constraints to 1e-6, absolutely.

    Attributes:
        norm: The norm of the perturbation.
        epsilon: Its limit, in the units of the points, one or ``(B,)``; a number means something else in every norm.
        low: Least value of a coordinate; ``-inf`` for features.
        high: Greatest value; ``inf`` for features.

    Raises:
        InputError: If epsilon is negative or not finite, or the box is empty.
    """

    norm: Norm
    epsilon: float | Tensor
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        least, most = (min(e), max(e)) if (e := torch.as_tensor(self.epsilon).flatten().tolist()) else (0.0, 0.0)
        if not (math.isfinite(most) and least >= 0):
            raise InputError(f"epsilon: {self.epsilon} is not a finite number of at least 0")
        if not self.low < self.high:
            raise InputError(f"box: low {self.low} is not below high {self.high}")

    def rows(self, rows: Tensor) -> Ball:
        """The balls of some examples, where each has a radius of its own."""
        return replace(self, epsilon=self.epsilon[rows]) if isinstance(self.epsilon, Tensor) else self

    def project(self, points: Tensor, centres: Tensor) -> Tensor:
        """The nearest points that satisfy both constraints.

        Exact for linf, l2 and l1; for the Fourier norms see :meth:`FourierLInf.project_in_box`.
        """
        if not len(centres):
            return centres.clone()
        if isinstance(self.norm, LInfNorm):
            epsilon = per_row(self.epsilon, centres)
            lower = (centres - epsilon).clamp(min=self.low)
            return clip(points, lower, (centres + epsilon).clamp(max=self.high))
        if not isinstance(self.epsilon, Tensor) and self.epsilon == 0:
            return centres.clone()
        if self.low == -math.inf and self.high == math.inf:
            return centres + self.norm.project(points - centres, self.epsilon)
        lower, upper = (self.low - centres).clamp(max=0), (self.high - centres).clamp(min=0)
        change = self.norm.project_in_box(points - centres, self.epsilon, lower, upper)
        margin = 1e-7
        while True:
            # What counts is the norm of the stored point, and the sum is rounded. At a margin of 1 the change is 0.
            nearest = (centres + change).clamp(self.low, self.high)
            norms = self.norm.measure(nearest.double() - centres.double())
            over = norms > self.epsilon + ROUNDING
            if not over.any() or margin > 1:
                return nearest
            scale = (1 - margin) * self.epsilon / norms
            change = change * per_row(scale.where(over, 1), change)
            margin *= 10

    def violation(self, points: Tensor, centres: Tensor) -> Violation:
        """What the points, as they are stored, break; see :class:`Violation`."""
        exact = points.double()
        norm = (self.norm.measure(exact - centres.double()) - self.epsilon).clamp(min=0)
        box = torch.maximum(self.low - exact, exact - self.high).clamp(min=0).flatten(1).amax(1)
        return Violation(norm, box)

    def random(self, centres: Tensor, generator: torch.Generator) -> Tensor:
        """Random starts: Gaussian noise of standard deviation epsilon, projected; equal for equal generators."""
        noise = torch.randn(centres.shape, generator=generator, device=generator.device, dtype=centres.dtype)
        return self.project(centres + per_row(self.epsilon, centres) * noise.to(centres.device), centres)

    def step(self, points: Tensor, centres: Tensor, gradient: Tensor, length: Tensor | float) -> Tensor:
        """Points after a step of ascent, not yet projected.

        It goes along the steepest direction, but in l1 towards the maximiser of the linearised loss over ball and box
        (a Frank-Wolfe step, ``length / epsilon`` of the way at most all of it): pixels have little room, and a
        Euclidean projection on the l1 ball would undo most of a steepest step.

        Args:
            points: ``(B, ...)``, in the ball.
            centres: Of the balls.
            gradient: Of what is to grow, like ``points``.
            length: Length in the norm; scalar or ``(B,)``.
        """
        if not isinstance(self.norm, L1Norm):
            return points + per_row(length, points) * self.norm.steepest(gradient)
        best = centres + self.norm.ascend(gradient, self.epsilon, centres - self.low, self.high - centres)
        radius = torch.as_tensor(self.epsilon).to(points).clamp(min=torch.finfo(points.dtype).tiny)
        share = (torch.as_tensor(length).to(points) / radius).clamp(max=1)
        return points + per_row(share, points) * (best - points)
