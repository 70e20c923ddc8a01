"""The most robust linear classifier there is: the largest margin in a norm, by convex optimisation.

A linear score ``f(x) = w · x`` keeps point n against every change of norm at most ε in the dual norm exactly if
``ε < y_n w · x_n / ‖w‖``. So the largest ε at which all points stay is the largest margin::

    max_w min_n y_n w · x_n / ‖w‖  =  min_q ‖Σ_n q_n y_n x_n‖_*,   q_n ≥ 0, Σ q_n = 1

The right-hand side, the distance of the convex hull of the ``y_n x_n`` from the origin, gives a bound from above for
every q; it is 0 if and only if the data are not separable. Both sides are computed here, whatever a solver says of
itself, and their difference is reported.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.errors import InputError
from training.robustness.linear.interior_point import Terms, minimise
from training.robustness.linear.margin_norms import conjugate, dual_measure, measure, order

Array = NDArray[np.float64]
Backend = Literal["auto", "cvxpy", "scipy"]
NORMS = ("l1", "l2", "linf", "fourier-l1")
"""Those whose margins have a name among attacks; :func:`max_margin` takes others, too."""
INSEPARABLE = 1e-9
"""A largest margin below this share of the longest point is none."""
_INSTALL = {"cvxpy": "pip install 'vse-app[cvxpy]'", "scipy": "pip install 'vse-app[bias]'"}
# Relative gap that ends the interior-point method.
_GAP = 1e-11


@dataclass(frozen=True)
class MaxMargin:
    """A solution.

    Attributes:
        w: float64 ``(d,)``, scaled so that ``min_n y_n w · x_n = 1``.
        margin: ``1 / ‖w‖``, which is also the largest ε, in the dual norm, at which every point can stay.
        gap: How far a larger margin than that cannot be, relative to it: from a dual point q of its own, whatever
            solver was used.
    """

    w: Tensor
    margin: float
    gap: float


class _Best:
    """The best classifier and the best convex combination among those that solvers gave, of any positive scale."""

    def __init__(self, signed: Array, norm: str) -> None:
        self._signed, self._norm = signed, norm
        self.w, self.lower = np.zeros(signed.shape[1]), -math.inf
        self.q, self.upper = np.ones(len(signed)), math.inf

    def offer(self, w: Array, q: Array) -> bool:
        """Says whether the gap is closed."""
        size = float(measure(torch.from_numpy(w), self._norm))
        lower = float((self._signed @ w).min()) / size if 0 < size < math.inf else -math.inf
        if lower > self.lower:
            self.w, self.lower = w, lower
        q = np.maximum(q, 0)
        total = float(q.sum())
        if 0 < total < math.inf:
            upper = float(dual_measure(torch.from_numpy(q / total @ self._signed), self._norm))
            if upper < self.upper:
                self.q, self.upper = q, upper
        return self.upper - self.lower <= _GAP * self.upper


def max_margin(x: Tensor, y: Tensor, norm: str, backend: Backend = "auto") -> MaxMargin:
    """The classifier without bias that has the largest margin in a norm of w.

    Args:
        x: Points ``(N, d)``.
        y: Labels -1 and 1 ``(N,)``.
        norm: ``linf``, ``lp`` with p from 1 on, such as ``l1`` or ``l1.5``, or ``fourier-l1``, the sum of magnitudes
            of the orthonormal DFT.
        backend: ``cvxpy`` (Clarabel); ``scipy`` (linear programs for ``l1`` and ``linf``, non-negative least squares
            for ``l2``, an interior-point method for the others, sure up to p = 10); ``auto`` takes cvxpy where it is
            installed.

    Raises:
        InputError: If the data are not separable, of one class, not finite or of wrong shapes; if the norm is unknown
            or the backend is not installed.
    """
    p, fourier = order(norm)
    if fourier and p != 1:
        raise InputError(f"max_margin: {norm} has no solver; of the norms of the spectrum use fourier-l1")
    if backend not in ("auto", *_INSTALL):
        raise InputError(f"max_margin: backend {backend!r} is unknown; use auto, {', '.join(_INSTALL)}")
    signed = _signed(x, y)
    if backend == "auto":
        backend = "cvxpy" if find_spec("cvxpy") else "scipy"
    for needed in {"scipy", backend}:
        if not find_spec(needed):
            raise InputError(f"max_margin: {needed} is not installed; {_INSTALL[needed]}")
    longest = float(np.linalg.norm(signed, axis=1).max())
    scaled = signed / longest  # solvers have absolute tolerances
    # Separable or not does not depend on the norm, and both are proved: by w, or by the weights of a mean that is 0.
    nearest = _least_distance(scaled)
    if nearest.lower <= INSEPARABLE:
        used = int((nearest.q > 0).sum())
        raise InputError(
            f"the data are not separable by a plane through the origin: a weighted mean of {used} points y x has"
            f" {nearest.upper:.0e} of the length of the longest; take more dimensions or fewer points"
        )
    best = _Best(scaled, norm)
    best.offer(nearest.w, nearest.q)
    if backend == "cvxpy":
        _by_cvxpy(scaled, p, fourier, best)
    elif fourier:
        _spectral(scaled, best)
    elif p in (1, math.inf):
        _linear_program(scaled, p, best)
    elif p != 2:
        _smooth(scaled, p, best)
    w = best.w / (scaled @ best.w).min() / longest
    return MaxMargin(torch.from_numpy(w), best.lower * longest, max(0.0, best.upper / best.lower - 1))


def item_margins(w: Tensor, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """``y_n w · x_n / ‖w‖``, float64 ``(N,)``: each point's largest ε in the dual norm; negative where it is wrong.

    Args:
        w: ``(d,)``; the margins of 0 are 0.
        x: ``(N, d)``.
        y: -1 and 1, ``(N,)``.
        norm: Of w, as in :func:`max_margin`, or any of :mod:`training.robustness.linear.margin_norms`.

    Raises:
        InputError: If the shapes disagree or the norm is unknown.
    """
    if x.dim() != 2 or y.shape != x.shape[:1] or w.shape != x.shape[1:]:
        raise InputError(
            f"margin: w {tuple(w.shape)}, x {tuple(x.shape)}, y {tuple(y.shape)}; give (d,), (N, d), (N,)"
        )
    w = w.double()
    found: Tensor = y.double() * (x.double() @ w) / measure(w, norm).clamp(min=torch.finfo(w.dtype).tiny)
    return found


def margin(w: Tensor, x: Tensor, y: Tensor, norm: str) -> float:
    """The smallest of :func:`item_margins`."""
    return float(item_margins(w, x, y, norm).min())


def _signed(x: Tensor, y: Tensor) -> Array:
    points, labels = (np.asarray(one, np.float64) for one in (x, y))
    if points.ndim != 2 or labels.shape != points.shape[:1] or not points.size:
        raise InputError(f"max_margin: points {points.shape} and labels {labels.shape}; give (N, d) and (N,)")
    if not (np.isfinite(points).all() and np.isfinite(labels).all()):
        raise InputError("max_margin: the data hold NaN or infinity; remove those points")
    if not (np.abs(labels) == 1).all():
        raise InputError("max_margin: labels are -1 and 1; recode them")
    if abs(labels.sum()) == len(labels):
        raise InputError("max_margin: there is only one class; add points of the other")
    signed: Array = labels[:, None] * points
    if not signed.any(axis=1).all():
        raise InputError("the data are not separable: a point is the origin; remove it")
    return signed


def _least_distance(signed: Array) -> _Best:
    """The point of the convex hull nearest to the origin, by non-negative least squares.

    ``min ‖[Aᵀ; 1ᵀ] r - [0; 1]‖²`` over r ≥ 0 is solved by a multiple of it (Lawson and Hanson, *Solving Least Squares
    Problems*, chapter 23).
    """
    from scipy.optimize import nnls

    rows = np.vstack([signed.T, np.ones(len(signed))])
    q = nnls(rows, np.append(np.zeros(signed.shape[1]), 1.0), maxiter=100 * sum(signed.shape))[0]
    best = _Best(signed, "l2")
    best.offer(q @ signed, q)
    # The squares above lose half of the digits of small margins; the points that support the margin give them back.
    support = q > 0
    polished = np.linalg.lstsq(signed[support], np.ones(int(support.sum())))[0]
    weights = np.zeros_like(q)
    weights[support] = np.linalg.lstsq(signed[support].T, polished)[0]
    best.offer(polished, weights)
    return best


def _by_cvxpy(signed: Array, p: float, fourier: bool, best: _Best) -> None:
    """``min ‖w‖`` with every point on its side of 1."""
    import cvxpy

    w: Any = cvxpy.Variable(signed.shape[1])
    if fourier:
        basis = np.fft.fft(np.eye(signed.shape[1]), norm="ortho")
        parts = cvxpy.vstack([basis.real @ w, basis.imag @ w])
        objective = cvxpy.sum(cvxpy.norm(parts, 2, axis=0))
    else:
        objective = cvxpy.norm(w, "inf" if p == math.inf else p)
    sides = signed @ w >= 1
    problem = cvxpy.Problem(cvxpy.Minimize(objective), [sides])
    tight = {f"tol_{kind}": 1e-12 for kind in ("feas", "gap_abs", "gap_rel")}
    # How good a solution is will be computed from it, so one that is called inaccurate may do.
    with warnings.catch_warnings(), suppress(cvxpy.error.SolverError):
        warnings.simplefilter("ignore")
        problem.solve(solver=cvxpy.CLARABEL, **tight)
    if w.value is not None and sides.dual_value is not None:
        best.offer(np.asarray(w.value, np.float64), np.asarray(sides.dual_value, np.float64))


def _linear_program(signed: Array, p: float, best: _Best) -> None:
    """``min Σu`` with ``-u ≤ w ≤ u`` and every point on its side of 1; for ``linf`` all entries share one u."""
    from scipy.optimize import linprog

    count, dim = signed.shape
    one = np.eye(dim)
    limits = one if p == 1 else np.ones((dim, 1))
    found = linprog(
        np.append(np.zeros(dim), np.ones(limits.shape[1])),
        A_ub=np.block([[-signed, np.zeros((count, limits.shape[1]))], [one, -limits], [-one, -limits]]),
        b_ub=np.append(-np.ones(count), np.zeros(2 * dim)),
        bounds=(None, None),
        method="highs",
    )
    if found.status == 0:
        best.offer(found.x[:dim], -found.ineqlin.marginals[:count])


def _smooth(signed: Array, p: float, best: _Best) -> None:
    """``min ‖w‖_p² / 2`` with every point on its side of 1, or its dual ``min ‖Aᵀq‖_r² / 2 - Σq``, 1/p + 1/r = 1.

    Whichever has the exponent of at least 2, since the other's second derivatives are infinite at 0.
    """
    r = conjugate(p)
    near = best
    if p > 3 or r > 3:  # high powers are hard to start at, so by way of lower ones
        lower = p / 1.4 if p > 3 else conjugate(r / 1.4)
        near = _Best(signed, f"l{lower}")
        near.offer(best.w, best.q)
        _smooth(signed, lower, near)
    start = near.w / (signed @ near.w).min()
    signed = signed * np.abs(start).max()  # so that entries of w are near 1
    if p >= 2:

        def primal(w: Array, multipliers: Array) -> Terms:
            return Terms(*_half_square(w, p), signed @ w - 1, signed)

        minimise(primal, 2 * start / np.abs(start).max(), len(signed), best.offer)
    else:

        def dual(q: Array, multipliers: Array) -> Terms:
            gradient, hessian = _half_square(q @ signed, r)
            return Terms(signed @ gradient - 1, signed @ hessian @ signed.T, q, np.eye(len(q)))

        def solved(q: Array, multipliers: Array) -> bool:
            return best.offer(_half_square(q @ signed, r)[0], q)

        minimise(dual, _inside(signed, near.q, f"l{p}"), len(signed), solved)


def _half_square(v: Array, p: float) -> tuple[Array, Array]:
    """Gradient and second derivatives of ``‖v‖_p² / 2``, p ≥ 2."""
    largest = max(float(np.abs(v).max()), 1e-300)
    size = largest * float(np.linalg.norm(v / largest, p))
    unit = v / size
    powers = np.abs(unit) ** (p - 2)
    slope = powers * unit
    return size * slope, (p - 1) * np.diag(powers) - (p - 2) * np.outer(slope, slope)


def _spectral(signed: Array, best: _Best) -> None:
    """``max Σq`` with ``|F Aᵀq|² ≤ 1`` at every frequency and q ≥ 0; the multipliers of the former make up w."""
    count, dim = signed.shape
    spectra = np.fft.fft(signed, norm="ortho")

    def terms(q: Array, multipliers: Array) -> Terms:
        spectrum = q @ spectra
        jacobian = np.vstack([-2 * (spectrum.conj() * spectra).real.T, np.eye(count)])
        curvature = 2 * ((spectra * multipliers[:dim]) @ spectra.conj().T).real
        return Terms(-np.ones(count), curvature, np.append(1 - np.abs(spectrum) ** 2, q), jacobian)

    def solved(q: Array, multipliers: Array) -> bool:
        return best.offer(np.fft.ifft(multipliers[:dim] * (q @ spectra), norm="ortho").real, q)

    minimise(terms, _inside(signed, best.q, "fourier-l1"), dim + count, solved)


def _inside(signed: Array, q: Array, norm: str) -> Array:
    """Positive weights near q whose combination has a dual norm of a half."""
    q = q / q.sum()
    small = min(0.1, float(np.linalg.norm(q @ signed) / np.linalg.norm(signed.mean(axis=0))))
    q = q + small / len(q)
    scaled: Array = q / (2 * float(dual_measure(torch.from_numpy(q @ signed), norm)))
    return scaled
