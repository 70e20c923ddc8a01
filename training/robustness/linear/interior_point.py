"""An interior-point method for small convex problems, of which a bound is known that says when to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_STEPS = 200
_SHORTEST = 1e-12
# Added, one after the other, to a unit diagonal until a step makes progress: rounding may point it elsewhere.
_DAMPING = (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


class Terms(NamedTuple):
    """Of ``min f(z)`` with ``c(z) ≥ 0``, f convex and c concave, at a point and multipliers λ.

    Attributes:
        gradient: ∇f, ``(n,)``.
        hessian: ∇²(f - λ·c), ``(n, n)``.
        sides: c, ``(m,)``.
        jacobian: Of c, ``(m, n)``.
    """

    gradient: Array
    hessian: Array
    sides: Array
    jacobian: Array


def minimise(
    terms: Callable[[Array, Array], Terms], z: Array, sides: int, solved: Callable[[Array, Array], bool]
) -> None:
    """Newton's method on the relaxed optimality conditions ``∇f = Jᵀλ``, ``λ c = aim -> 0``.

    Boyd and Vandenberghe, *Convex Optimization*, section 11.7.

    Args:
        terms: At a point and its multipliers.
        z: Where to start, ``c(z) > 0``.
        sides: Number m of constraints.
        solved: Is given every point and its multipliers; true ends. So does a step that cannot make progress.
    """
    first = terms(z, np.zeros(sides))
    # Equal ones, of the size that balances the gradient best.
    pull = first.jacobian.sum(axis=0)
    multipliers = np.full(sides, abs(float(first.gradient @ pull)) / float(pull @ pull))
    for _ in range(_STEPS):
        now = terms(z, multipliers)
        aim = 0.1 * float(now.sides @ multipliers) / sides
        ratios = multipliers / now.sides
        matrix = now.hessian + (now.jacobian.T * ratios) @ now.jacobian
        # Second derivatives may differ by magnitudes; what is small must not be taken for singular.
        diagonal = matrix.diagonal()
        unit = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
        slope = now.jacobian.T @ (aim / now.sides) - now.gradient
        error = _residual(now, multipliers, aim)
        scaled = unit[:, None] * matrix * unit
        for damping in _DAMPING:
            dz = unit * np.linalg.lstsq(scaled + damping * np.eye(len(unit)), unit * slope)[0]
            change = aim / now.sides - multipliers - ratios * (now.jacobian @ dz)
            falling = change < 0
            step = min(1.0, 0.99 * float((-multipliers[falling] / change[falling]).min(initial=np.inf)))
            while step > _SHORTEST:
                ahead = multipliers + step * change
                there = terms(z + step * dz, ahead)
                if (there.sides > 0).all() and _residual(there, ahead, aim) <= (1 - 0.01 * step) * error:
                    break
                step /= 2
            if step > _SHORTEST:
                break
        z, multipliers = z + step * dz, multipliers + step * change
        if solved(z, multipliers) or step <= _SHORTEST:
            return


def _residual(now: Terms, multipliers: Array, aim: float) -> float:
    stationary = now.gradient - now.jacobian.T @ multipliers
    return float(np.linalg.norm(np.append(stationary, multipliers * now.sides - aim)))
