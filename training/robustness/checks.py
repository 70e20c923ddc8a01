"""Fourteen signs that an attack is broken; a model that only seems robust fails at least one of them.

They follow the advice of Carlini et al., *On Evaluating Adversarial Robustness* (2019), the flags that AutoAttack
raises, and the active test of Zimmermann et al., *Increasing Confidence in Adversarial Robustness Evaluations* (2022).
Each function judges numbers that were measured elsewhere, and says in a sentence what it found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from training.robustness.attacks import TOLERANCE

WEAKER = 1.0
"""Percentage points by which a stronger attack may fall behind a weaker one."""
SHORT = 0.05
"""Share of PGD's mean loss by which APGD may fall short of it in as few steps as these, where both break all."""
GAIN = 2.0
"""Percentage points that twice the steps, or five starts, may add to the attack's success."""
BLACK_BOX_GAIN = 0.2
"""Percentage points that random search may add."""
CLOSED_FORM = 0.999
"""Share of the worst case of a linear encoder that has to be reached."""
PLANTED = 99.0
"""Percent of planted adversarial pictures that have to be found."""


@dataclass(frozen=True)
class Check:
    """A verdict.

    Attributes:
        number: Its place in the list, 1 to 14.
        name: What is asked for.
        passed: Whether it holds.
        explanation: What was measured, in plain words.
    """

    number: int
    name: str
    passed: bool
    explanation: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'} {self.number:2} {self.name}: {self.explanation}"


def zero_changes_nothing(clean: NDArray[np.int64], zero: NDArray[np.int64]) -> Check:
    """1: an attack with ε = 0 gives the clean ranks, bit for bit."""
    moved = int((clean != zero).sum())
    return Check(1, "ε = 0 changes nothing", moved == 0, f"{moved} of {clean.size} ranks differ")


def success_grows(epsilons: Sequence[float], rates: Sequence[float]) -> Check:
    """2: a larger ball does not help the defender; rates are percentages of broken searches."""
    drop = max([0.0, *(a - b for a, b in pairwise(rates))])
    shown = ", ".join(f"{rate:.1f}" for rate in rates)
    passed = drop <= WEAKER
    return Check(2, "success grows with ε", passed, f"{shown} % at {len(epsilons)} radii; largest fall {drop:.1f}")


def large_radius_breaks_everything(r1: float, chance: float, epsilon: float, count: int) -> Check:
    """3: where a picture can become almost any other, R@1 (percent) is down to chance, or one lucky query."""
    limit = max(chance, 0.0)
    text = f"R@1 {r1:.1f} % at ε = {epsilon:.3g} on {count} queries; chance is {chance:.2g} %"
    return Check(3, "a large ε breaks everything", r1 <= limit, text)


def stronger_attacks_do_more(fgsm: float, pgd: float, apgd: float, losses: tuple[float, float, float]) -> Check:
    """4: one step ≤ ten steps ≤ ten adaptive steps, in percent broken; mean losses break a tie at 0 or 100 %."""
    tied = fgsm == pgd == apgd and apgd in (0.0, 100.0)
    passed = fgsm <= pgd + WEAKER and pgd <= apgd + WEAKER
    if tied:
        passed = losses[0] <= losses[1] and losses[1] <= losses[2] + SHORT * abs(losses[1])
    text = f"FGSM {fgsm:.1f}, PGD {pgd:.1f}, APGD {apgd:.1f} %; mean margins " + ", ".join(f"{x:.3f}" for x in losses)
    return Check(4, "APGD ≥ PGD ≥ FGSM", passed, text)


def white_box_does_most(white: float, transfer: float, noise: float) -> Check:
    """5: the model's own gradients ≥ those of a perturbed copy of it ≥ random noise, in percent broken."""
    passed = transfer <= white + WEAKER and noise <= transfer + WEAKER
    text = f"own gradients {white:.1f}, those of a copy with noisy weights {transfer:.1f}, random noise {noise:.1f} %"
    return Check(5, "white box ≥ transfer ≥ noise", passed, text)


def more_steps_add_little(gain: float, tried: int) -> Check:
    """6: twice the steps add less than two points of success."""
    text = f"twice the steps add {gain:.1f} points of success ({tried} unbroken searches tried)"
    return Check(6, "the attack has converged", gain < GAIN, text)


def restarts_add_little(gain: float, tried: int) -> Check:
    """7: four more random starts add less than two points of success."""
    text = f"four random starts add {gain:.1f} points of success ({tried} unbroken searches tried)"
    return Check(7, "no start matters", gain < GAIN, text)


def gradients_are_alive(flat: int, count: int) -> Check:
    """8: no picture without gradient. A loss or gradient that is not finite stops the attack itself."""
    text = f"{flat} of {count} pictures met a zero gradient; none met a NaN"
    return Check(8, "gradients are alive", flat == 0, text)


def perturbations_stay_inside(violation: float) -> Check:
    """9: every perturbed picture is in [0, 1] and in its ball, to 1e-6."""
    text = f"largest violation of a ball or of [0, 1]: {violation:.1e}"
    return Check(9, "perturbations stay inside", violation <= TOLERANCE, text)


def forward_repeats(largest: float) -> Check:
    """10: the same picture twice gives the same embedding; a random model needs another evaluation."""
    return Check(10, "the model is deterministic", largest == 0, f"two passes differ by at most {largest:.1e}")


def planted_pictures_are_found(found: int, planted: int) -> Check:
    """11: a direction is planted that makes a known picture inside the ball win; the attack has to find such a one."""
    rate = 100 * found / planted if planted else 0.0
    return Check(11, "planted weaknesses are found", rate >= PLANTED, f"{found} of {planted} found ({rate:.1f} %)")


def closed_form_is_reached(share: float, norm: str) -> Check:
    """12: on a linear encoder the worst case is ε times the dual norm of the weights; the attack comes that far."""
    text = f"{100 * share:.2f} % of the worst case of linear encoders in {norm}, at least"
    return Check(12, "linear encoders: worst case reached", share >= CLOSED_FORM, text)


def random_search_adds_nothing(gain: float, tried: int) -> Check:
    """13: an attack without gradients does not succeed where gradients failed; if it does, they are masked."""
    text = f"square search adds {gain:.1f} points of success ({tried} unbroken searches tried)"
    return Check(13, "random search adds nothing", gain <= BLACK_BOX_GAIN, text)


def threats_change_something(unchanged: Mapping[str, Sequence[str]]) -> Check:
    """14: what changes no picture and no caption measures nothing, however robust the model then looks.

    Args:
        unchanged: For each threat the levels at which it changed nothing.
    """
    idle = [f"{threat} ({', '.join(levels)})" for threat, levels in unchanged.items() if levels]
    text = f"nothing was changed by {'; '.join(idle)}" if idle else f"{', '.join(unchanged)}: something at every level"
    return Check(14, "every threat changes something", not idle, text)
