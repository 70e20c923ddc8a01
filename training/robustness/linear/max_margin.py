"""The most robust linear classifier there is: the largest margin in a norm, by convex optimisation.

A linear score ``f(x) = w · x`` keeps point n against every change of norm at most ε in the dual norm exactly if
``ε < y_n w · x_n / ‖w‖``. So the largest ε at which all points stay is the largest margin::

    max_w min_n y_n w · x_n / ‖w‖  =  min_q ‖Σ_n q_n y_n x_n‖_*,   q_n ≥ 0, Σ q_n = 1

The right-hand side, the distance of the convex hull from the origin, gives a bound from above for every q; it is 0 if
and only if the data are not separable. Both sides are computed here and their difference is reported.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.errors import InputError

Array = NDArray[np.float64]
Backend = Literal["auto", "cvxpy", "scipy"]
NORMS = ("l1", "l2", "linf", "fourier-l1")
INSEPARABLE = 1e-9
"""A largest margin below this share of the longest point is none."""
_CUTS, _GAP = 200, 1e-9


@dataclass(frozen=True)
class MaxMargin:
    """A solution.

    Attributes:
        w: float64 ``(d,)``, scaled so that ``min_n y_n w · x_n = 1``.
        margin: ``1 / ‖w‖``, which is also the largest ε, in the dual norm, at which every point can stay.
        gap: How far a larger margin than that cannot be, relative to it: from a dual point, whatever solver was used.
    """

    w: Tensor
    margin: float
    gap: float


def max_margin(x: Tensor, y: Tensor, norm: str, backend: Backend = "auto") -> MaxMargin:
    """The classifier with the largest margin in a norm of w.

    Args:
        x: Points ``(N, d)``.
        y: Labels -1 and 1 ``(N,)``.
        norm: ``l1``, ``l2``, ``linf``, or ``fourier-l1``, the sum of magnitudes of the orthonormal DFT.
        backend: ``cvxpy`` (Clarabel); ``scipy`` (linear programs, non-negative least squares, and for ``fourier-l1``
            linear programs with a cut for each phase that is met); ``auto`` takes cvxpy where it is installed.

    Raises:
        InputError: If the data are not separable, of one class, not finite or of wrong shapes; if the norm is unknown
            or the backend is not installed.
    """
    if norm not in NORMS:
        raise InputError(f"norm {norm!r} is unknown; choose from {', '.join(NORMS)}")
    signed = _signed(x, y)
    longest = float(np.linalg.norm(signed, axis=1).max())
    scaled = signed / longest  # solvers have absolute tolerances
    if backend == "auto":
        backend = "cvxpy" if find_spec("cvxpy") else "scipy"
    if not find_spec(backend):
        raise InputError(f"max_margin: {backend} is not installed; pip install 'vse[bias]'")
    w, q = (_by_cvxpy if backend == "cvxpy" else _by_scipy)(scaled, norm)
    upper = _dual_norm(q @ scaled, norm) if q is not None else 0.0
    least = float((scaled @ w).min()) if w is not None else 0.0
    lower = least / _norm(w, norm) if w is not None and least > 0 else 0.0
    if upper <= INSEPARABLE or lower <= INSEPARABLE:
        raise InputError(
            "the data are not separable by a line through the origin; take more dimensions or fewer points"
        )
    assert w is not None
    return MaxMargin(torch.from_numpy(w / least / longest), lower * longest, max(0.0, upper / lower - 1))


def item_margins(w: Tensor, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """``y_n w · x_n / ‖w‖``, float64 ``(N,)``: each point's largest ε in the dual norm; negative where it is wrong."""
    w = w.double()
    found: Tensor = y.double() * (x.double() @ w) / _norm(w.numpy(), norm)
    return found


def margin(w: Tensor, x: Tensor, y: Tensor, norm: str) -> float:
    """The smallest of :func:`item_margins`."""
    return float(item_margins(w, x, y, norm).min())


def prox(v: Tensor, lam: float, norm: str) -> Tensor:
    """``argmin_u ½ ‖u - v‖₂² + lam ‖u‖`` for float64 ``(d,)``.

    Soft threshold for ``l1``, of the spectrum's magnitudes for ``fourier-l1``; block shrinkage for ``l2``; by Moreau's
    decomposition, v less its projection on the l1 ball of radius lam, for ``linf``.

    Raises:
        InputError: If the norm is unknown.
    """
    if norm == "l1":
        return v.sign() * (v.abs() - lam).clamp(min=0)
    if norm == "l2":
        length: Tensor = torch.linalg.vector_norm(v)
        return v * (1 - lam / length.clamp(min=1e-300)).clamp(min=0)
    if norm == "linf":
        return v - _on_l1_ball(v, lam)
    if norm == "fourier-l1":
        spectrum = torch.fft.rfft(v, norm="ortho")
        kept = (1 - lam / spectrum.abs().clamp(min=1e-300)).clamp(min=0)
        shrunk: Tensor = torch.fft.irfft(spectrum * kept, n=len(v), norm="ortho")
        return shrunk
    raise InputError(f"norm {norm!r} is unknown; choose from {', '.join(NORMS)}")


def _on_l1_ball(v: Tensor, radius: float) -> Tensor:
    if float(v.abs().sum()) <= radius:
        return v
    ordered = v.abs().sort(descending=True).values
    thresholds = (ordered.cumsum(0) - radius) / torch.arange(1, len(v) + 1, dtype=v.dtype)
    last = int((ordered > thresholds).sum()) - 1
    return v.sign() * (v.abs() - thresholds[max(last, 0)].clamp(min=0)).clamp(min=0)


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


def _spectrum(w: Array) -> NDArray[np.complex128]:
    return np.fft.fft(w, norm="ortho")


def _norm(w: Array, norm: str) -> float:
    if norm == "fourier-l1":
        return float(np.abs(_spectrum(w)).sum())
    return float(np.linalg.norm(w, {"l1": 1, "l2": 2, "linf": np.inf}[norm]))


def _dual_norm(v: Array, norm: str) -> float:
    if norm == "fourier-l1":
        return float(np.abs(_spectrum(v)).max())
    return float(np.linalg.norm(v, {"l1": np.inf, "l2": 2, "linf": 1}[norm]))


def _by_cvxpy(signed: Array, norm: str) -> tuple[Array | None, Array | None]:
    """w and q, both of the primal problem ``min ‖w‖`` with every point on its side of 1."""
    import cvxpy

    w: Any = cvxpy.Variable(signed.shape[1])
    if norm == "fourier-l1":
        basis = np.fft.fft(np.eye(signed.shape[1]), norm="ortho")
        parts = cvxpy.vstack([basis.real @ w, basis.imag @ w])
        objective = cvxpy.sum(cvxpy.norm(parts, 2, axis=0))
    else:
        objective = cvxpy.norm(w, {"l1": 1, "l2": 2, "linf": "inf"}[norm])
    sides = signed @ w >= 1
    problem = cvxpy.Problem(cvxpy.Minimize(objective), [sides])
    tight = {f"tol_{kind}": 1e-12 for kind in ("feas", "gap_abs", "gap_rel")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of inaccurate solutions; how good this one is will be computed from it
        problem.solve(solver=cvxpy.CLARABEL, **tight)
    if w.value is None or sides.dual_value is None or not problem.status.startswith("optimal"):
        return None, None
    weights = np.maximum(np.asarray(sides.dual_value, np.float64), 0)
    return np.asarray(w.value, np.float64), weights / weights.sum()


def _by_scipy(signed: Array, norm: str) -> tuple[Array | None, Array | None]:
    if norm == "l2":
        return _least_distance(signed)
    return _cutting_planes(signed) if norm == "fourier-l1" else _linear_program(signed, norm)


def _least_distance(signed: Array) -> tuple[Array, Array]:
    """The point of the convex hull nearest to the origin, by non-negative least squares.

    ``min ‖[Aᵀ; 1ᵀ] r - [0; 1]‖²`` over r ≥ 0 is solved by a multiple of it (Lawson and Hanson, *Solving Least Squares
    Problems*, chapter 23).
    """
    from scipy.optimize import nnls

    rows = np.vstack([signed.T, np.ones(len(signed))])
    weights = nnls(rows, np.append(np.zeros(signed.shape[1]), 1.0), maxiter=100 * len(signed))[0]
    q = weights / weights.sum()
    return q @ signed, q


def _linear_program(signed: Array, norm: str) -> tuple[Array | None, Array | None]:
    """``min ‖w‖`` as it stands, for ``l1`` with w in two halves and for ``linf`` with a bound on every entry."""
    from scipy.optimize import linprog

    count, dim = signed.shape
    if norm == "l1":
        found = linprog(np.ones(2 * dim), A_ub=np.hstack([-signed, signed]), b_ub=-np.ones(count), method="highs")
    else:
        sides = np.hstack([-signed, np.zeros((count, 1))])
        bounds = np.vstack([np.hstack([sign * np.eye(dim), -np.ones((dim, 1))]) for sign in (1, -1)])
        found = linprog(
            np.append(np.zeros(dim), 1.0),
            A_ub=np.vstack([sides, bounds]),
            b_ub=np.append(-np.ones(count), np.zeros(2 * dim)),
            bounds=(None, None),
            method="highs",
        )
    if found.status != 0:
        return None, None
    w = found.x[:dim] - found.x[dim:] if norm == "l1" else found.x[:dim]
    weights = np.maximum(-found.ineqlin.marginals[:count], 0)
    return w, weights / weights.sum()


def _cutting_planes(signed: Array) -> tuple[Array | None, Array | None]:
    """``min t`` with ``c · Aᵀq ≤ t`` for cosines c of Fourier-l1 norm 1; the multipliers of these make up w.

    The cosines that ``Aᵀq`` is in phase with are added, and those without a multiplier left out, until none is
    violated (Kelley, *The cutting-plane method for solving convex programs*, 1960).
    """
    from scipy.optimize import linprog

    count = len(signed)
    cuts = np.vstack([_waves(row) for row in signed[:4]])
    best_w: Array | None = None
    best_q: Array | None = None
    highest, least = -np.inf, np.inf
    for _ in range(_CUTS):
        found = linprog(  # over q, then t
            np.append(np.zeros(count), 1.0),
            A_ub=np.column_stack([cuts @ signed.T, -np.ones(len(cuts))]),
            b_ub=np.zeros(len(cuts)),
            A_eq=np.append(np.ones(count), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * count + [(0, None)],
            method="highs",
        )
        if found.status != 0:
            break
        q = np.maximum(found.x[:-1], 0)
        q /= q.sum()
        multipliers = -found.ineqlin.marginals
        w = multipliers @ cuts
        reached = _dual_norm(q @ signed, "fourier-l1")
        margin = float((signed @ w).min()) / max(_norm(w, "fourier-l1"), 1e-300)
        if margin > highest:
            best_w, highest = w, margin
        if reached < least:
            best_q, least = q, reached
        if least - highest <= _GAP * least or least <= INSEPARABLE:
            break
        cuts = np.vstack([cuts[multipliers > 0], _waves(q @ signed)])
    return best_w, best_q


def _waves(v: Array) -> Array:
    """Cosines of Fourier-l1 norm 1, one per frequency and in phase with v: their products with v are ``|v̂|``."""
    spectrum = np.fft.rfft(v, norm="ortho")
    phases = np.exp(1j * np.angle(spectrum))
    n = len(v)
    waves = np.zeros((len(spectrum), len(spectrum)), np.complex128)
    np.fill_diagonal(waves, phases)
    # irfft adds mirror images, so each carries half; the first, and the last of an even n, have none.
    alone = np.zeros(len(spectrum), bool)
    alone[0] = True
    alone[-1] = alone[-1] or n % 2 == 0
    return np.fft.irfft(np.where(alone[:, None], waves, waves / 2), n=n, norm="ortho")
