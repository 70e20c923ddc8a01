"""The spectrum of perturbations against radial frequency, 1 at Nyquist, half a cycle per pixel; corners reach √2."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 24


class Radial(NamedTuple):
    """Means over K bins of radial frequency.

    Attributes:
        radius: float64 ``(K,)``; centres of the bins.
        mean: float64 ``(K,)``.
    """

    radius: Tensor
    mean: Tensor


def radial_frequency(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """``|ω|`` at every place of a picture's 2-D DFT, as :func:`torch.fft.fft2` orders it; float64 ``(H, W)``."""
    down, across = (torch.fft.fftfreq(n, 0.5, dtype=torch.float64, device=device) for n in (height, width))
    return torch.hypot(down[:, None], across)


def radial_mean(plane: Tensor, bins: int = BINS) -> Radial:
    """Means of what is known at every frequency over those whose ``|ω|`` lies in the same bin.

    Args:
        plane: ``(H, W)``, all of it: a frequency and its mirror image count as the two that they are.
        bins: Into how many equal parts ``[0, √2]`` is cut; K of them hold a frequency, in small pictures not all.

    Returns:
        On the CPU.
    """
    width = math.sqrt(2) / bins
    # Diagonal frequencies lie on edges, and belong above them: rounding must not decide.
    places = (radial_frequency(*plane.shape) / width + 1e-9).long().clamp(max=bins - 1).flatten()
    counts = places.bincount(minlength=bins)
    sums = places.bincount(plane.double().cpu().flatten(), minlength=bins)
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * width
    kept = counts > 0
    return Radial(centres[kept], (sums / counts)[kept])


def radial_spectrum(delta: Tensor, bins: int = BINS) -> Radial:
    """Mean of ``|DFT(δ)|``, orthonormal, over pictures, channels and the frequencies of each bin.

    Args:
        delta: Perturbations, real ``(..., C, H, W)``.
        bins: As :func:`radial_mean` has it.

    Returns:
        On the CPU.
    """
    return radial_mean(torch.fft.fft2(delta.double(), norm="ortho").abs().flatten(0, -3).mean(0), bins)
