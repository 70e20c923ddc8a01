"""Optimisers whose bias, not whose loss, decides how robust a linear classifier becomes.

On separable data the loss of ``f(x) = w · x`` has no minimum: every optimiser drives it to 0, and the geometry of
its steps decides the direction in which ``w`` grows. Steepest descent in a norm ends at the separator with the
largest margin in that norm (Gunasekar, Lee, Soudry, Srebro, *Characterizing Implicit Bias in Terms of
Optimization Geometry*, 2018, arXiv 1802.08246), which is the classifier most robust to attacks bounded in the dual
norm (Faghri et al., *Bridging the Gap Between Adversarial Robustness and Optimization Bias*, 2021, arXiv
2102.08868)::

    geometry   step                               maximises the margin   most robust to attacks in
    l2         gradient descent                   l2                     l2
    l1         coordinate descent, largest first  l1                     linf
    linf       sign descent                       linf                   l1

The margin is ``min_n y_n w · x_n / ‖w‖``, see :mod:`training.robustness.linear.max_margin`. Beside steepest descent
there are the ways to ask for that separator outright, a penalty (:func:`fista`) and adversarial training
(:func:`adversarial`), and :func:`adam` for reference. All is float64, full batch, without bias; none of the
functions tests whether the data are separable.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from training.errors import InputError
from training.robustness.linear.margin_norms import order, prox, steepest

Array = NDArray[np.float64]
Geometry = Literal["l2", "l1", "linf"]
Loss = Literal["exp", "logistic"]
# The order of the dual norm of each geometry, for numpy.
_DUAL_ORDER: dict[str, float] = {"l2": 2, "l1": math.inf, "linf": 1}

# Armijo's rule: the first step tried, how often it is halved, and the share of the predicted decrease it must give.
ARMIJO_START = 1000.0
ARMIJO_HALVINGS = 20
ARMIJO_SHARE = 1e-4
# From this margin on log(1 + exp(-m)) and exp(-m) agree to the last digit.
LOGISTIC_TAIL = 37.0
# Logarithm of the loss above which a fixed step on the exponential loss is not coming back.
DIVERGED = 300.0


class Path(NamedTuple):
    """Where an optimiser went.

    Attributes:
        w: float64 ``(d,)`` after the last step.
        recorded: ``w`` after the steps that were asked for, by their number, in ascending order.
    """

    w: Array
    recorded: dict[int, Array]


def signed_examples(x: ArrayLike, y: ArrayLike) -> Array:
    """The rows ``y_n x_n``: all that the loss of a linear score without bias sees of the data.

    Args:
        x: ``(N, d)``, anything that converts to float64.
        y: ``(N,)``, labels -1 and 1.

    Returns:
        float64 ``(N, d)``.

    Raises:
        InputError: If the shapes or labels are wrong, there is one class only, or x is 0 or not finite.
    """
    points, labels = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if points.ndim != 2 or not points.size:
        raise InputError(f"x: needs (N, d) with N and d at least 1, not {points.shape}")
    if labels.shape != points.shape[:1]:
        raise InputError(f"y: needs one label for each of {len(points)} rows of x, not {labels.shape}")
    if not (np.isfinite(points).all() and points.any()):
        raise InputError("x: must be finite, and not 0 everywhere")
    if set(labels.tolist()) != {-1, 1}:
        raise InputError("y: needs both of the labels -1 and 1, and no others")
    return points * labels[:, None]


def check_steps(steps: int, record: Collection[int] = ()) -> None:
    """Refuse, with an InputError, a negative number of steps and step numbers to record that are never reached."""
    if steps < 0:
        raise InputError(f"steps: must be at least 0, not {steps}")
    beyond = [step for step in record if not 0 <= step <= steps]
    if beyond:
        raise InputError(f"record: step {beyond[0]} is not between 0 and {steps}")


def _check_number(name: str, value: float, positive: bool) -> None:
    if not 0 <= value < math.inf or (positive and not value):
        raise InputError(f"{name}: must be {'positive' if positive else 'at least 0'} and finite, not {value}")


def log_loss(margins: Array, loss: Loss) -> tuple[float, Array]:
    """Logarithm of the mean loss of the margins ``m_n = y_n w · x_n``, and minus its gradient.

    ::

        exp:       L = mean exp(-m_n)             q_n = exp(-m_n) / (N L)
        logistic:  L = mean log(1 + exp(-m_n))    q_n = 1 / (1 + exp(m_n)) / (N L)

    The exponents are shifted by the smallest margin, so nothing overflows, and ``L`` may be far below what a
    float holds. For exp the ``q_n`` are the softmin weights: they sum to 1.

    Returns:
        ``log L`` and ``q = -d log L / dm``, like the margins float64 ``(N,)``.
    """
    smallest = float(margins.min())
    if loss == "logistic" and smallest < LOGISTIC_TAIL:
        losses = np.logaddexp(0.0, -margins)
        total = float(losses.sum())
        # 1 / (1 + exp(m)) = 1 - exp(-log(1 + exp(-m)))
        return math.log(total / len(margins)), -np.expm1(-losses) / total
    shifted = np.exp(smallest - margins)
    total = float(shifted.sum())
    return math.log(total / len(margins)) - smallest, shifted / total


def _steepest(g: Array, geometry: Geometry) -> Array:
    """The direction of :func:`descend`; its product with g is the square of the dual norm of g."""
    if geometry == "l2":
        return g
    if geometry == "linf":
        return float(np.abs(g).sum()) * np.sign(g)
    direction = np.zeros_like(g)
    largest = np.abs(g).argmax()
    direction[largest] = g[largest]
    return direction


def descend(
    x: ArrayLike,
    y: ArrayLike,
    geometry: Geometry,
    steps: int,
    step: Literal["normalised", "armijo"] | float = "normalised",
    record: Collection[int] = (),
    loss: Loss = "exp",
) -> Path:
    """Steepest descent from ``w = 0`` in one of three norms.

    With ``g = -∇ log L = Σ q_n y_n x_n`` (:func:`log_loss`) and ``B = max_n ‖x_n‖_*`` in the dual norm::

        w ← w + rate ‖g‖_* argmax_{‖s‖ = 1} g · s

        l2: w + rate g    l1: w + rate g_j e_j, j = argmax |g_j|    linf: w + rate ‖g‖₁ sign(g)

    The margin bias is proved for steps ``η ≤ 1 / (B² L)`` on the loss itself, which are ``rate ≤ 1 / B²`` here.

    * ``normalised``: ``rate = 1 / B²``, the longest of them. Use this: after 10⁴ steps the margin is within some
      3 % of the largest.
    * a number: ``η`` itself, ``rate = η L``. The steps shrink with the loss and the margin grows like ``log t``.
    * ``armijo``: ``η`` starts at 1000 and is halved, at most 20 times, until the loss falls by 1e-4 of what the
      gradient predicts; then it is cut to ``1 / (B² L)``.

    Args:
        x: ``(N, d)``, converted to float64.
        y: ``(N,)``, labels -1 and 1.
        geometry: Norm of the steps: l2 is gradient descent, l1 coordinate descent, linf sign descent.
        steps: Number of steps.
        step: Rule of the length.
        record: Numbers of the steps, from 0 to ``steps``, after which ``w`` is kept.
        loss: exp or logistic.

    Returns:
        The last and the recorded ``w``, float64 ``(d,)``.

    Raises:
        InputError: If the data, the names, the numbers of steps or the step are invalid, or a fixed step diverges.

    Example:
        >>> descend([[2.0, 1.0], [-2.0, 1.0]], [1, -1], "l1", steps=3).w.tolist()
        [1.5, 0.0]
    """
    signed = signed_examples(x, y)
    check_steps(steps, record)
    if geometry not in _DUAL_ORDER:
        raise InputError(f"geometry: {geometry!r} is unknown; use {', '.join(_DUAL_ORDER)}")
    if loss not in ("exp", "logistic"):
        raise InputError(f"loss: {loss!r} is unknown; use exp or logistic")
    if not isinstance(step, str):
        _check_number("step", step, positive=True)
    elif step not in ("normalised", "armijo"):
        raise InputError(f"step: {step!r} is unknown; use normalised, armijo or a number")
    longest = 1 / float(np.linalg.norm(signed, _DUAL_ORDER[geometry], axis=1).max()) ** 2
    w, margins = np.zeros(signed.shape[1]), np.zeros(len(signed))
    wanted, recorded = set(record), {}
    for number in range(steps + 1):
        if number in wanted:
            recorded[number] = w.copy()
        if number == steps:
            break
        log_value, q = log_loss(margins, loss)
        g = q @ signed
        direction = _steepest(g, geometry)
        change = signed @ direction
        if step == "normalised":
            rate = longest
        elif step == "armijo":
            rate, slope = ARMIJO_START * math.exp(log_value), float(g @ direction)
            for _ in range(ARMIJO_HALVINGS):
                decrease = ARMIJO_SHARE * rate * slope
                if decrease < 1 and log_loss(margins + rate * change, loss)[0] <= log_value + math.log1p(-decrease):
                    break
                rate /= 2
            rate = min(rate, longest)
        elif log_value > DIVERGED:
            raise InputError(f"step: {step} diverges within {number} steps; use a smaller one or normalised")
        else:
            rate = step * math.exp(log_value)
        w += rate * direction
        margins += rate * change
    return Path(w, recorded)


def _logistic_slopes(margins: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, margins)) / len(margins)


def fista(x: ArrayLike, y: ArrayLike, norm: str, lam: float, steps: int) -> Array:
    """Minimise ``mean log(1 + exp(-y_n w · x_n)) + lam ‖w‖`` by accelerated proximal gradient steps.

    Beck and Teboulle, *A fast iterative shrinkage-thresholding algorithm*, 2009. The step is ``4 N / σ²``, with σ the
    largest singular value of x. As ``lam`` tends to 0 the direction of the minimiser tends to that of the largest
    margin in the norm, but the smaller it is, the more steps it takes.

    Args:
        x: ``(N, d)``, converted to float64.
        y: ``(N,)``, labels -1 and 1.
        norm: l1, l2, linf, another lp or fourier-l1; none is squared.
        lam: Weight of the norm, at least 0.
        steps: Number of steps.

    Returns:
        float64 ``(d,)``; 0 where ``lam`` is too large for anything else.

    Raises:
        InputError: If the data, the norm, the weight or the number of steps are invalid.
    """
    signed = signed_examples(x, y)
    check_steps(steps)
    _check_number("lam", lam, positive=False)
    rate = 4 * len(signed) / float(np.linalg.norm(signed, 2)) ** 2
    w = ahead = np.zeros(signed.shape[1])
    momentum = 1.0
    for _ in range(steps):
        moved = ahead + rate * (_logistic_slopes(signed @ ahead) @ signed)
        previous, w = w, prox(torch.from_numpy(moved), rate * lam, norm).numpy()
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = w + (momentum - 1) / following * (w - previous)
        momentum = following
    return w


def adversarial(x: ArrayLike, y: ArrayLike, norm_of_attack: str, epsilon: float, steps: int) -> Array:
    """Adversarial training: gradient descent on the loss of the worst perturbed examples.

    For a linear score the worst case is known, ``-y_n epsilon s`` with ``s = argmax_{‖s‖ ≤ 1} w · s``, the same ``s``
    for all examples. With the exponential loss and loss-normalised steps::

        L = mean exp(-(y_n w · x_n - epsilon ‖w‖_*))
        w ← w + (Σ q_n y_n x_n - epsilon s) / B²,  q_n ∝ exp(-y_n w · x_n),  B = max_n ‖x_n‖₂

    An error of zero under the attack is reached if ``epsilon`` is below the largest margin in the dual norm, and
    cannot be above it; unlike :func:`descend` this has to be told.

    Args:
        x: ``(N, d)``, converted to float64.
        y: ``(N,)``, labels -1 and 1.
        norm_of_attack: Any of :mod:`training.robustness.linear.margin_norms`.
        epsilon: Radius of the attack, at least 0.
        steps: Number of steps.

    Returns:
        float64 ``(d,)``.

    Raises:
        InputError: If the data, the norm, the radius or the number of steps are invalid.
    """
    signed = signed_examples(x, y)
    check_steps(steps)
    order(norm_of_attack)
    _check_number("epsilon", epsilon, positive=False)
    rate = 1 / float(np.linalg.norm(signed, 2, axis=1).max()) ** 2
    w = np.zeros(signed.shape[1])
    for _ in range(steps):
        q = log_loss(signed @ w, "exp")[1]
        worst: Array = steepest(torch.from_numpy(w), norm_of_attack).numpy()
        w = w + rate * (q @ signed - epsilon * worst)
    return w


def adam(x: ArrayLike, y: ArrayLike, steps: int, lr: float) -> Array:
    """Adam on the mean logistic loss, for reference: no theorem above says which margin it maximises.

    Kingma and Ba, *Adam: a method for stochastic optimization*, 2015, with their constants .9, .999 and 1e-8.

    Args:
        x: ``(N, d)``, converted to float64.
        y: ``(N,)``, labels -1 and 1.
        steps: Number of steps.
        lr: Learning rate.

    Returns:
        float64 ``(d,)``.

    Raises:
        InputError: If the data, the number of steps or the rate are invalid.
    """
    signed = signed_examples(x, y)
    check_steps(steps)
    _check_number("lr", lr, positive=True)
    w, mean, square = (np.zeros(signed.shape[1]) for _ in range(3))
    for number in range(1, steps + 1):
        g = _logistic_slopes(signed @ w) @ signed
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g**2
        w = w + lr * (mean / (1 - 0.9**number)) / (np.sqrt(square / (1 - 0.999**number)) + 1e-8)
    return w
