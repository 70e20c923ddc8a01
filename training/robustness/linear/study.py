"""The study: does the optimiser, the regulariser or the architecture decide how robust a linear classifier is?

Synthetic data of Faghri et al. (arXiv 2102.08868): ``x ~ N(0, I)`` in d dimensions, labels from a random direction, N
points with d / N from barely to amply over-parametrised. Everything is compared with the largest margin there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from training.errors import InputError
from training.robustness.linear.linear_nets import ConvLinear, train
from training.robustness.linear.max_margin import item_margins, margin, max_margin
from training.robustness.linear.steepest_descent import Array, adam, adversarial, descend, fista

ATTACKS = {"l1": "linf", "l2": "l2", "linf": "l1", "fourier-l1": "fourier-linf"}
"""Norms of the margin, and the attacks that it resists."""
OPTIMISERS = {"coordinate descent": "l1", "gradient descent": "l2", "sign descent": "linf"}
"""Steepest descents, and the norm in which each is one; its margin is what it maximises."""
NET = "convolutions, two layers"
ADAM = "Adam"


@dataclass(frozen=True)
class StudyConfig:
    """What is run.

    Attributes:
        dim: Dimensions d.
        ratios: d / N.
        seeds: Number of data sets per ratio.
        steps: Of the optimisers.
        net_ratios: Ratios at which convolutional nets are trained.
        net_steps: Steps of these; their bias shows late.
        weights: λ of the regularised loss, at ``sweep_ratios``.
        shares: ε of adversarial training, as shares of the largest possible one, at ``sweep_ratios``.
        sweep_ratios: Ratios of both sweeps.
        sweep_steps: Steps of both.

    Raises:
        InputError: If a number is not positive.
    """

    dim: int = 100
    ratios: tuple[float, ...] = (1.25, 2, 4, 8, 16, 32)
    seeds: int = 3
    steps: int = 10_000
    net_ratios: tuple[float, ...] = (2, 8, 32)
    net_steps: int = 100_000
    weights: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    shares: tuple[float, ...] = (0, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3)
    sweep_ratios: tuple[float, ...] = (2, 8, 32)
    sweep_steps: int = 20_000

    def __post_init__(self) -> None:
        numbers = (self.dim, self.seeds, self.steps, self.net_steps, self.sweep_steps, *self.ratios, *self.net_ratios)
        if min(numbers) <= 0:
            raise InputError("bias: dimensions, ratios, seeds and steps must be above 0")


QUICK = StudyConfig(
    ratios=(2, 8, 32), seeds=1, steps=3000, net_ratios=(8, 32), net_steps=10_000, sweep_ratios=(8,), sweep_steps=4000
)
"""Under a minute on two cores."""


def draw(dim: int, ratio: float, seed: int) -> tuple[Array, Array]:
    """Points ``(N, d)`` and labels ±1 ``(N,)``, N = d / ratio; separable by the direction that made the labels."""
    random = np.random.default_rng(seed)
    direction = random.standard_normal(dim)
    x = random.standard_normal((max(2, int(dim / ratio)), dim))
    y = np.sign(x @ direction)
    if abs(y.sum()) == len(y):  # a handful of points may fall on one side
        x[0], y[0] = -x[0], -y[0]
    return x, y


class Study:
    """Runs the parts one after the other.

    Args:
        config: What to run.
        progress: Told the part, what is done of it, and of how much.
    """

    def __init__(self, config: StudyConfig, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
        self.config, self.progress = config, progress
        self._cases: dict[tuple[float, int], _Case] = {}

    def run(self) -> dict[str, Any]:
        """Everything, as one JSON-ready record: the config and a list of rows per part."""
        parts = {
            "margins": self._margins,
            "nets": self._nets,
            "regularisers": self._regularisers,
            "adversarial": self._adversarial,
        }
        return {"config": asdict(self.config)} | {name: list(part()) for name, part in parts.items()}

    def _margins(self) -> Iterator[dict[str, Any]]:
        """Each optimiser's margin in each norm, as a share of the largest, and the errors of the points it leaves."""
        for case in self._all("optimisers", self.config.ratios):
            yield case.row("reference", None) | {"margins": case.references}
            for name, geometry in OPTIMISERS.items():
                yield case.row(name, descend(case.x, case.y, geometry, self.config.steps).w)  # type: ignore[arg-type]
            yield case.row(ADAM, adam(case.x, case.y, self.config.steps, 1e-2))

    def _nets(self) -> Iterator[dict[str, Any]]:
        """A net of two circular convolutions beside one layer, for the same number of steps."""
        for case in self._all("nets", self.config.net_ratios):
            net = ConvLinear(self.config.dim, 2, seed=case.seed)
            yield case.row(NET, train(net, case.x, case.y, self.config.net_steps, [self.config.net_steps])[-1])
            yield case.row("gradient descent", descend(case.x, case.y, "l2", self.config.net_steps).w)

    def _regularisers(self) -> Iterator[dict[str, Any]]:
        """The logistic loss with a penalty on the norm that resists ℓ∞."""
        for case in self._all("regularisers", self.config.sweep_ratios):
            for weight in self.config.weights:
                w = fista(case.x, case.y, "l1", weight, self.config.sweep_steps)
                yield case.row(f"λ = {weight:g}", w) | {"weight": weight}

    def _adversarial(self) -> Iterator[dict[str, Any]]:
        """Training on the worst pictures within ε in ℓ∞, and how many points are lost at that ε."""
        for case in self._all("adversarial training", self.config.sweep_ratios):
            for share in self.config.shares:
                epsilon = share * case.references["l1"]
                w = adversarial(case.x, case.y, "linf", epsilon, self.config.sweep_steps)
                lost = float((case.items(w, "l1") <= epsilon).mean())
                yield case.row(f"ε = {share:g} ε*", w) | {"share": share, "robust_error": lost}

    def _all(self, part: str, ratios: tuple[float, ...]) -> Iterator[_Case]:
        wanted = [(ratio, seed) for ratio in ratios for seed in range(self.config.seeds)]
        for done, key in enumerate(wanted):
            self.progress(part, done, len(wanted))
            if key not in self._cases:
                self._cases[key] = _Case(self.config.dim, *key)
            yield self._cases[key]
        self.progress(part, len(wanted), len(wanted))


class _Case:
    """One data set with its largest margins."""

    def __init__(self, dim: int, ratio: float, seed: int) -> None:
        self.ratio, self.seed = ratio, seed
        self.x, self.y = draw(dim, ratio, seed)
        self._tensors = torch.from_numpy(self.x), torch.from_numpy(self.y)
        self.references = {norm: max_margin(*self._tensors, norm).margin for norm in ATTACKS}

    def items(self, w: Array, norm: str) -> Array:
        """Each point's own margin: the ε at which it is lost."""
        found: Array = item_margins(torch.from_numpy(w), *self._tensors, norm).numpy()
        return found

    def row(self, name: str, w: Array | None) -> dict[str, Any]:
        """Margins as shares of the largest; and for attacks of 0 to 2 ε*, the share of points that stay."""
        row: dict[str, Any] = {"ratio": self.ratio, "seed": self.seed, "points": len(self.x), "name": name}
        if w is None:
            return row
        shares = {norm: margin(torch.from_numpy(w), *self._tensors, norm) / of for norm, of in self.references.items()}
        radii = np.linspace(0, 2, 41)
        stay = {
            norm: [float((self.items(w, norm) > radius * of).mean()) for radius in radii]
            for norm, of in self.references.items()
        }
        return row | {"shares": shares, "stay": stay}
