"""Norms of perturbations: duals, steepest directions, and projections on their balls."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.spectrum import radial_frequency

# Rounds of alternating projections; what is still violated after them is mended by scaling.
DYKSTRA_ROUNDS = 50
# Box violation, in units of the pixels, that ends the rounds.
DYKSTRA_TOLERANCE = 1e-7
# Rounds in which a band-limited perturbation is pushed into the box after that.
PUSH_ROUNDS = 100
# Points may exceed the radius, or band-limited ones the box, by this much: rounding of float32.
ROUNDING = 5e-7
# Largest coefficient outside the band that counts as rounding, absolute or relative to the largest inside.
BAND_TOLERANCE = 1e-6
# Radial frequency, in units of Nyquist, from which the limits of fourier-linf/f fall.
KNEE = 1 / 16


def per_row(value: Tensor | float, x: Tensor) -> Tensor:
    """A scalar or ``(B,)`` as ``(1, 1, ...)`` or ``(B, 1, ...)``, to broadcast against ``x``."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def clip(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Coordinate by coordinate between the limits."""
    return torch.minimum(torch.maximum(x, lower), upper)


def _farthest(x: Tensor) -> Tensor:
    """Largest absolute value of each row: ``(B, ...)`` to ``(B,)``."""
    return x.abs().flatten(1).amax(1)


class Norm(ABC):
    """A norm of the rows of a real float32 or float64 tensor ``(B, ...)``, over all dimensions but the first.

    Attributes:
        name: What :func:`parse_norm` reads and reports print.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """The norm of each row: ``(B, ...)`` to ``(B,)``."""

    @abstractmethod
    def dual(self, g: Tensor) -> Tensor:
        """The dual norm ``max <g, s>`` over ``‖s‖ <= 1``: ``(B, ...)`` to ``(B,)``."""

    @abstractmethod
    def steepest(self, g: Tensor) -> Tensor:
        """The maximiser ``s`` of ``<g, s>`` with ``‖s‖ = 1``; 0, like ``g``, in rows that are 0."""

    @abstractmethod
    def project(self, x: Tensor, radius: Tensor | float) -> Tensor:
        """The nearest point, in Euclidean distance, of norm at most ``radius``, a scalar or ``(B,)``."""

    @abstractmethod
    def project_in_box(self, x: Tensor, radius: Tensor | float, lower: Tensor, upper: Tensor) -> Tensor:
        """The point nearest to ``x`` in both the ball about 0 and a box that holds 0.

        Args:
            x: ``(B, ...)``.
            radius: Radius of the ball, a scalar or ``(B,)``.
            lower: Lower limits of the box, at most 0, like ``x``.
            upper: Upper limits, at least 0, like ``x``.
        """


class LInfNorm(Norm):
    """Largest absolute value; its dual is the l1 norm."""

    name = "linf"

    def measure(self, x: Tensor) -> Tensor:
        """See :class:`Norm`."""
        return _farthest(x)

    def dual(self, g: Tensor) -> Tensor:
        """See :class:`Norm`."""
        return g.abs().flatten(1).sum(1)

    def steepest(self, g: Tensor) -> Tensor:
        """``sign(g)``."""
        return g.sign()

    def project(self, x: Tensor, radius: Tensor | float) -> Tensor:
        """Clips."""
        limit = per_row(radius, x)
        return clip(x, -limit, limit)

    def project_in_box(self, x: Tensor, radius: Tensor | float, lower: Tensor, upper: Tensor) -> Tensor:
        """Clips twice; see :meth:`Norm.project_in_box`."""
        return clip(self.project(x, radius), lower, upper)


class _Thresholded(Norm):
    """A norm whose proximal operator acts on every coordinate alone.

    The projection on ball and box is then that operator followed by clipping, with the multiplier at which
    the norm is the radius (the Karush-Kuhn-Tucker conditions); the norm is monotone in it, so bisection
    finds it.
    """

    @abstractmethod
    def shrink(self, x: Tensor, share: Tensor) -> Tensor:
        """The proximal operator by what it leaves: ``share`` ``(B, 1, ...)`` runs from 0, nothing, to 1, ``x``."""

    def project_in_box(self, x: Tensor, radius: Tensor | float, lower: Tensor, upper: Tensor) -> Tensor:
        """Exact, to the resolution of the dtype; see the class and :meth:`Norm.project_in_box`."""
        inside = self.measure(clip(x, lower, upper)) <= radius
        low = per_row(inside, x)
        high = torch.ones_like(low)
        while True:
            middle = (low + high) / 2
            if ((middle == low) | (middle == high) | (high < 1e-12)).all():
                return clip(self.shrink(x, low), lower, upper)
            fits = per_row(self.measure(clip(self.shrink(x, middle), lower, upper)) <= radius, x) > 0
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)


class L2Norm(_Thresholded):
    """Euclidean norm; its own dual."""

    name = "l2"

    def measure(self, x: Tensor) -> Tensor:
        """See :class:`Norm`."""
        flat, info = x.flatten(1), torch.finfo(x.dtype)
        norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
        # Squares of small entries underflow, and those of large ones overflow: there the largest becomes 1 first.
        far = ~((norms > math.sqrt(info.tiny) / info.eps) & (norms < math.inf))
        if far.any():
            largest = _farthest(flat[far]).clamp(min=info.tiny)
            norms[far] = largest * torch.linalg.vector_norm(flat[far] / largest[:, None], dim=1)
        return norms

    def dual(self, g: Tensor) -> Tensor:
        """See :class:`Norm`."""
        return self.measure(g)

    def steepest(self, g: Tensor) -> Tensor:
        """``g / ‖g‖₂``."""
        return g / per_row(self.measure(g).clamp(min=torch.finfo(g.dtype).tiny), g)

    def project(self, x: Tensor, radius: Tensor | float) -> Tensor:
        """``x min(1, radius / ‖x‖₂)``."""
        norms = per_row(self.measure(x).clamp(min=torch.finfo(x.dtype).tiny), x)
        return x * (per_row(radius, x) / norms).clamp(max=1)

    def shrink(self, x: Tensor, share: Tensor) -> Tensor:
        """``x / (1 + multiplier)``."""
        return x * share


class L1Norm(_Thresholded):
    """Sum of absolute values; its dual is the linf norm."""

    name = "l1"

    def measure(self, x: Tensor) -> Tensor:
        """See :class:`Norm`."""
        return x.abs().flatten(1).sum(1)

    def dual(self, g: Tensor) -> Tensor:
        """See :class:`Norm`."""
        return _farthest(g)

    def steepest(self, g: Tensor) -> Tensor:
        """The sign of the largest ``|g|`` of a row, at one coordinate."""
        flat = g.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(g)

    def ascend(self, gradient: Tensor, length: Tensor | float, room_below: Tensor, room_above: Tensor) -> Tensor:
        """The maximiser of ``<g, s>`` over ``‖s‖₁ <= length`` within the room.

        Coordinates are moved as far as they may, in the order of ``|g|``, until the length is spent (Croce and
        Hein, *Mind the box: l1-APGD for sparse adversarial attacks on image classifiers*, 2021). A pixel has a
        room of at most 1, so the step without a box would move one pixel and leave the pictures.
        """
        flat = gradient.flatten(1)
        limit = per_row(length, flat)
        order = flat.abs().argsort(dim=1, descending=True)
        room = torch.where(gradient > 0, room_above, room_below).flatten(1).clamp(min=0)
        # Infinite room is cut to the length, so that sums stay finite.
        room = torch.minimum(room, limit).where(flat != 0, 0).gather(1, order)
        spent = room.cumsum(1, dtype=torch.float64).to(room.dtype).roll(1, dims=1)
        spent[:, 0] = 0
        moves = torch.minimum(room, (limit - spent).clamp(min=0))
        return (torch.zeros_like(flat).scatter(1, order, moves) * flat.sign()).view_as(gradient)

    def project(self, x: Tensor, radius: Tensor | float) -> Tensor:
        """Soft threshold, found by sorting (Duchi et al., *Efficient projections onto the l1-ball*, 2008)."""
        ordered = x.abs().flatten(1).sort(dim=1, descending=True).values
        excess = ordered.cumsum(1, dtype=torch.float64) - per_row(radius, ordered)
        thresholds = (excess / torch.arange(1, ordered.shape[1] + 1, device=x.device)).to(x.dtype)
        last = (ordered > thresholds).sum(1, keepdim=True).clamp(min=1) - 1
        threshold = per_row(thresholds.gather(1, last).clamp(min=0), x)
        return x.sign() * (x.abs() - threshold).clamp(min=0)

    def shrink(self, x: Tensor, share: Tensor) -> Tensor:
        """Soft threshold at ``(1 - share) max |x|``."""
        threshold = (1 - share) * per_row(_farthest(x), x)
        return x - clip(x, -threshold, threshold)


def one_over_f(radius: Tensor) -> Tensor:
    """The profile of ``fourier-linf/f``: ``min(1, w0 / ω)``, with w0 = :data:`KNEE`.

    Amplitudes of natural pictures fall as ``1/f`` (Field, *Relations between the statistics of natural images and the
    response properties of cortical cells*, 1987). That w0 is a share of Nyquist and not a cycle per picture keeps the
    profile a function of ω alone, the same in pictures of every size, and the smallest share, 1/23, above rounding.

    Args:
        radius: Radial frequencies, 1 at Nyquist.

    Returns:
        Shares of ε, like ``radius``.
    """
    return (KNEE / radius).clamp(max=1)


class FourierLInf(Norm):
    """Largest magnitude of the spectrum: the orthonormal 2-D DFT over the last two dimensions, per channel.

    Its dual over real pictures is the l1 norm of the spectrum. A band allows some frequencies only: a picture
    with other frequencies, beyond rounding (:data:`BAND_TOLERANCE`), has an infinite norm, the projection
    removes them, and the dual norm and the steepest direction do without them. A profile allows some more than others:
    magnitudes are divided by it, so that in the ball of radius ε frequency ω reaches ``ε · profile(ω)``.

    Args:
        band: Lowest and highest radial frequency allowed, both inclusive, as fractions of the Nyquist
            frequency, half a cycle per pixel; corners of the spectrum reach √2. None for all frequencies.
        profile: Radial frequencies, in the same unit, to positive shares of ε, as :func:`one_over_f`. None for 1
            everywhere.

    Raises:
        InputError: If not ``0 <= low < high``; later, if an input is not ``(B, ..., H, W)``, or so small that none of
            its frequencies lies in the band.
    """

    def __init__(
        self, band: tuple[float, float] | None = None, profile: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.band, self.profile = band, profile
        self.name = "fourier-linf/f" if profile is one_over_f else "fourier-linf"
        if band is not None:
            low, high = (np.format_float_positional(limit, trim="-") for limit in band)
            self.name += f"[{low},{high}]"
        self.name += "" if profile in (None, one_over_f) else " with a profile"
        if band is not None and not 0 <= band[0] < band[1]:
            raise InputError(f"{self.name}: a band is [low,high] with 0 <= low < high, in units of Nyquist")

    def _spectrum(self, x: Tensor) -> Tensor:
        """Half of the spectrum of a real picture, complex ``(B, ..., H, W // 2 + 1)``; the rest mirrors it."""
        if x.dim() < 3:
            raise InputError(f"{self.name}: needs pictures (B, ..., H, W), not {tuple(x.shape)}")
        if not len(x):  # which the transform refuses
            return torch.complex(x, x)[..., : x.shape[-1] // 2 + 1]
        spectrum: Tensor = torch.fft.rfft2(x, norm="ortho")
        return spectrum

    def _picture(self, spectrum: Tensor, like: Tensor) -> Tensor:
        """Inverse of :meth:`_spectrum`; ``like`` says whether the width is even."""
        picture: Tensor = torch.fft.irfft2(spectrum, s=like.shape[-2:], norm="ortho")
        return picture

    def shares(self, radius: Tensor) -> Tensor:
        """The shares of ε that radial frequencies, 1 at Nyquist, may have, like ``radius``; 0 outside the band."""
        low, high = self.band or (0.0, math.inf)
        shares = torch.ones_like(radius) if self.profile is None else self.profile(radius)
        return shares.where((low <= radius) & (radius <= high), 0)

    def _shares(self, x: Tensor) -> Tensor:
        """Those of the frequencies of :meth:`_spectrum`, ``(H, W // 2 + 1)``."""
        height, width = x.shape[-2:]
        shares = self.shares(radial_frequency(height, width, x.device)[:, : width // 2 + 1])
        if not shares.any():
            raise InputError(f"{self.name}: no frequency of {height} × {width} pixels lies in the band")
        return shares.to(x.dtype)

    def measure(self, x: Tensor) -> Tensor:
        """See :class:`Norm`."""
        magnitudes, shares = self._spectrum(x).abs(), self._shares(x)
        inside = (magnitudes / shares).where(shares > 0, 0).flatten(1).amax(1)
        if self.band is None:
            return inside
        outside = magnitudes.where(shares == 0, 0).flatten(1).amax(1)
        return inside.where(outside <= BAND_TOLERANCE * inside.clamp(min=1), math.inf)

    def dual(self, g: Tensor) -> Tensor:
        """See :class:`Norm`."""
        magnitudes = self._spectrum(g).abs() * self._shares(g)
        # Every column but the first and, at even widths, the last stands for its mirror image too.
        mirrored = magnitudes[..., 1 : (g.shape[-1] + 1) // 2]
        return magnitudes.flatten(1).sum(1) + mirrored.flatten(1).sum(1)

    def steepest(self, g: Tensor) -> Tensor:
        """Every frequency at its share, with the phase of ``g``."""
        phases = self._spectrum(g).sgn() * self._shares(g)
        return self._picture(phases, g)

    def project(self, x: Tensor, radius: Tensor | float) -> Tensor:
        """Clips the magnitudes and keeps the phases."""
        spectrum = self._spectrum(x)
        magnitudes = spectrum.abs().clamp(min=torch.finfo(x.dtype).tiny)
        kept = (per_row(radius, x) * self._shares(x) / magnitudes).clamp(max=1)
        return self._picture(spectrum * kept, x)

    def project_in_box(self, x: Tensor, radius: Tensor | float, lower: Tensor, upper: Tensor) -> Tensor:
        """Dykstra's alternating projections; see :meth:`Norm.project_in_box`.

        Boyle and Dykstra, *A method for finding projections onto the intersection of convex sets in Hilbert
        spaces*, 1986. A row still outside the box after :data:`DYKSTRA_ROUNDS` rounds is clipped and then
        scaled into the ball; the box holds 0, so that scaling does not leave it.

        Clipping would leave the band, though. With a band, rows outside are pushed past the limits they break
        for at most :data:`PUSH_ROUNDS` rounds, and then scaled into the box, to :data:`ROUNDING`. Pixels that
        are 0 or 1 already can make such a perturbation small, or 0: few band-limited ones respect them all.
        """
        found = self.project(x, radius)
        ball_correction, box_correction = x - found, torch.zeros_like(x)
        for _ in range(DYKSTRA_ROUNDS):
            outside = _farthest(found - clip(found, lower, upper)) > DYKSTRA_TOLERANCE
            if not outside.any():
                break
            boxed = clip(found + box_correction, lower, upper)
            box_correction += found - boxed
            corrected = boxed + ball_correction
            # Finished rows keep their point: what a row becomes does not depend on the others.
            found = torch.where(per_row(outside, x) > 0, self.project(corrected, radius), found)
            ball_correction = corrected - found
        if self.band is None:
            boxed = clip(found, lower, upper)
            return boxed * per_row(radius / self.measure(boxed).clamp(min=radius), x)
        for _ in range(PUSH_ROUNDS):
            excess = found - clip(found, lower, upper)
            outside = _farthest(excess) > DYKSTRA_TOLERANCE
            if not outside.any():
                break
            pushed = found - excess - per_row(radius, x) / 4 * excess.sign()
            found = torch.where(per_row(outside, x) > 0, self.project(pushed, radius), found)
        room = torch.where(found > 0, upper, -lower) + ROUNDING
        return found * per_row((room / found.abs()).flatten(1).amin(1).clamp(max=1), x)


LINF, L2, L1, FOURIER_LINF = LInfNorm(), L2Norm(), L1Norm(), FourierLInf()
_NORMS: dict[str, Norm] = {norm.name: norm for norm in (LINF, L2, L1, FOURIER_LINF)}
_FOURIER = re.compile(r"fourier-linf(/f)?(?:\[(\d*\.?\d+), *(\d*\.?\d+)\])?")


def check_radius(norm: str, epsilon: float) -> None:
    """Refuse a radius that is not above 0, or that grey levels were meant by: pixels go from 0 to 1.

    Raises:
        InputError: If so, or if the norm is unknown.
    """
    parse_norm(norm)
    if not 0 < epsilon < math.inf:
        raise InputError(f"ε = {epsilon}: give a number above 0")
    if norm == LINF.name and epsilon > 1:
        raise InputError(f"ε = {epsilon:g}: pixels go from 0 to 1, so must ε; write 8/255, not 8")


def parse_norm(name: str) -> Norm:
    """The norm of a name, as :attr:`Norm.name` gives it.

    Raises:
        InputError: If there is none, or its band is empty.

    Example:
        >>> parse_norm("fourier-linf/f[0,0.25]").band
        (0.0, 0.25)
    """
    if name in _NORMS:
        return _NORMS[name]
    found = _FOURIER.fullmatch(name)
    if found is None:
        raise InputError(
            f"norm: {name!r} is unknown; use {', '.join(_NORMS)}, fourier-linf/f, or one of the last two "
            "in a band, as fourier-linf[low,high]"
        )
    return FourierLInf((float(found[2]), float(found[3])) if found[2] else None, one_over_f if found[1] else None)
