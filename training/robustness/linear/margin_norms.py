"""Norms of linear classifiers by name: size, dual, steepest direction, projection on the ball, proximal operator.

A name is ``lp`` with p from 1 on, such as ``l1``, ``l1.5`` or ``l2``, or ``linf``; ``fourier-`` before it means the
magnitudes of the spectrum, all frequencies of the orthonormal DFT, mirrored ones twice. Everything acts on the last
dimension, or the last ``dims`` together, of real tensors, and on each of the leading ones alone::

    ‖v‖ = (Σ_i |v_i|^p)^(1/p)          or of F v, complex
    ‖v‖_* = max_{‖u‖ ≤ 1} <u, v>       1/p + 1/q = 1, both Fourier or neither
    v = prox_{λ‖·‖}(v) + P_{‖·‖_* ≤ λ}(v)      (Moreau)

:mod:`training.robustness.norms` has those of perturbations of pictures, with boxes and bands.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from training.errors import InputError

# Newton steps of a coordinate, and halvings of the multiplier's interval: enough for float64.
_NEWTON, _HALVINGS = 60, 100


def order(norm: str) -> tuple[float, bool]:
    """p of a norm, infinity for ``linf``, and whether it is one of the spectrum.

    Raises:
        InputError: If there is no such norm.

    Example:
        >>> order("l1.5"), order("fourier-linf")
        ((1.5, False), (inf, True))
    """
    found = re.fullmatch(r"(fourier-)?l(inf|\d+(?:\.\d+)?)", norm)
    p = float(found[2]) if found else 0.0
    if not found or p < 1:
        raise InputError(f"norm {norm!r} is unknown; use linf or lp with p >= 1, such as l1 or l1.5, or fourier-l1")
    return p, bool(found[1])


def conjugate(p: float) -> float:
    """q with 1/p + 1/q = 1."""
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def measure(v: Tensor, norm: str, dims: int = 1) -> Tensor:
    """``‖v‖``: ``(..., d)`` to ``(...)``.

    Raises:
        InputError: If the norm is unknown.
    """
    p, fourier = order(norm)
    return _size(_coefficients(v, fourier, dims).abs(), p)


def dual_measure(v: Tensor, norm: str, dims: int = 1) -> Tensor:
    """``‖v‖_*``: ``(..., d)`` to ``(...)``; see :func:`measure`."""
    p, fourier = order(norm)
    return _size(_coefficients(v, fourier, dims).abs(), conjugate(p))


def steepest(v: Tensor, norm: str, dims: int = 1) -> Tensor:
    """``argmax_{‖u‖ ≤ 1} <v, u>``, which attains the dual norm; like ``v``, and 0 where ``v`` is 0.

    Coefficients keep their phase and have the magnitudes ``(|v_i| / ‖v‖_q)^(q-1)``: all 1 for ``linf``, all of it at
    the largest for ``l1``. For ``fourier-l1`` that is a wave, which a real signal has at a frequency and its mirror.

    Raises:
        InputError: If the norm is unknown.
    """
    p, fourier = order(norm)
    coefficients = _coefficients(v.double(), fourier, dims)
    magnitudes = coefficients.abs()
    if p == 1:
        kept = torch.zeros_like(magnitudes).scatter(-1, magnitudes.argmax(-1, keepdim=True), 1.0)
    else:
        shares = magnitudes / _size(magnitudes, conjugate(p))[..., None].clamp(min=1e-300)
        kept = shares ** (conjugate(p) - 1)
    return _signal(coefficients.sgn() * kept, v, fourier, dims)


def project(v: Tensor, radius: float, norm: str, dims: int = 1) -> Tensor:
    """The nearest point, in Euclidean distance, with ``‖u‖ <= radius``; like ``v``.

    The DFT is unitary, so magnitudes are projected and phases kept.

    Args:
        v: ``(..., d)``, float32 or float64.
        radius: At least 0.
        norm: Its name.
        dims: Number of dimensions at the end that make up one vector; the DFT is over them.

    Raises:
        InputError: If the norm is unknown or the radius negative.
    """
    p, fourier = order(norm)
    return _projected(v, radius, p, fourier, dims)


def prox(v: Tensor, lam: float, norm: str, dims: int = 1) -> Tensor:
    """``argmin_u ½ ‖u - v‖₂² + lam ‖u‖``; like ``v``.

    By Moreau's decomposition v less its projection on the dual ball of radius lam. That is a soft threshold for
    ``l1``, of complex magnitudes for ``fourier-l1``, and block shrinkage for ``l2``.

    Args:
        v: ``(..., d)``, float32 or float64.
        lam: At least 0.
        norm: Its name.
        dims: See :func:`project`.

    Raises:
        InputError: If the norm is unknown or lam negative.
    """
    p, fourier = order(norm)
    return v - _projected(v, lam, conjugate(p), fourier, dims)


def _coefficients(v: Tensor, fourier: bool, dims: int) -> Tensor:
    """One vector per row, ``(..., d)``."""
    if fourier:
        v = torch.fft.fftn(v, dim=tuple(range(-dims, 0)), norm="ortho")
    return v.flatten(-dims)


def _signal(coefficients: Tensor, like: Tensor, fourier: bool, dims: int) -> Tensor:
    """Inverse of :func:`_coefficients` for real signals: mirrored coefficients become the conjugates of each other."""
    signal = coefficients.reshape(like.shape)
    if fourier:
        signal = torch.fft.ifftn(signal, dim=tuple(range(-dims, 0)), norm="ortho").real
    return signal.to(like.dtype)


def _size(magnitudes: Tensor, p: float) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(magnitudes, ord=p, dim=-1)
    return size


def _projected(v: Tensor, radius: float, p: float, fourier: bool, dims: int) -> Tensor:
    if not radius >= 0:
        raise InputError(f"radius or weight {radius}: is at least 0")
    if p == math.inf and not fourier:
        return v.clamp(-radius, radius)
    coefficients = _coefficients(v.double(), fourier, dims)
    magnitudes = coefficients.abs()
    if p == math.inf:
        kept = magnitudes.clamp(max=radius)
    elif p == 2:
        kept = magnitudes * (radius / _size(magnitudes, 2)[..., None].clamp(min=1e-300)).clamp(max=1)
    else:
        nearest = _on_l1_ball(magnitudes, radius) if p == 1 else _on_lp_ball(magnitudes, radius, p)
        kept = torch.where((_size(magnitudes, p) <= radius)[..., None], magnitudes, nearest)
    return _signal(coefficients.sgn() * kept, v, fourier, dims)


def _on_l1_ball(magnitudes: Tensor, radius: float) -> Tensor:
    """Soft threshold, found by sorting (Duchi et al., *Efficient projections onto the l1-ball*, 2008)."""
    ordered = magnitudes.sort(dim=-1, descending=True).values
    counts = torch.arange(1, ordered.shape[-1] + 1, dtype=ordered.dtype, device=ordered.device)
    thresholds = (ordered.cumsum(-1) - radius) / counts
    last = (ordered > thresholds).sum(-1, keepdim=True).clamp(min=1) - 1
    return (magnitudes - thresholds.gather(-1, last)).clamp(min=0)


def _on_lp_ball(magnitudes: Tensor, radius: float, p: float) -> Tensor:
    """``u + μ u^{p-1} = a`` in each coordinate, the size of u being the radius: bisection on μ."""
    largest = magnitudes.amax(-1, keepdim=True).clamp(min=1e-300)
    a, limit = magnitudes / largest, (radius / largest).clamp(min=1e-150)
    # At this μ no coordinate exceeds an equal share of the radius.
    high = ((magnitudes.shape[-1] ** (1 / p) / limit) ** (p - 1)).clamp(max=1e300)
    low = torch.zeros_like(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = _size(_shrunk(a, middle, p), p)[..., None] <= limit
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return _shrunk(a, high, p) * largest * (radius > 0)


def _shrunk(a: Tensor, mu: Tensor, p: float) -> Tensor:
    """The root u of ``u + μ u^{p-1} = a`` with a in [0, 1].

    Written for t = u, or ``u^{p-1}`` below p = 2, the left side is convex, so Newton's method descends to the root
    from any point above it.
    """
    first, second = (1.0, p - 1) if p >= 2 else (1 / (p - 1), 1.0)
    t = torch.minimum(a ** (1 / first), (a / mu.clamp(min=1e-300)) ** (1 / second))
    for _ in range(_NEWTON):
        slope = first * t ** (first - 1) + mu * second * t ** (second - 1)
        before, t = t, (t - (t**first + mu * t**second - a) / slope.clamp(min=1e-300)).clamp(min=0)
        if (before - t <= 1e-15 * before).all():
            break
    return t**first
