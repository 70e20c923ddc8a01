"""Spectra against radial frequency, beside a loop over every frequency with exact edges."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from training.robustness import summary
from training.robustness.spectrum import radial_mean, radial_spectrum


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def naive(delta: Tensor, bins: int) -> tuple[list[float], list[float]]:
    """Frequency by frequency; |ω|² is rational, so a bin's edges are compared exactly."""
    height, width = delta.shape[-2:]
    magnitudes = np.abs(np.fft.fft2(delta.numpy())) / math.sqrt(height * width)
    found: list[list[float]] = [[] for _ in range(bins)]
    for u in range(height):
        for v in range(width):
            square = Fraction(2 * min(u, height - u), height) ** 2 + Fraction(2 * min(v, width - v), width) ** 2
            place = max(n for n in range(bins) if 2 * Fraction(n, bins) ** 2 <= square)
            found[place] += magnitudes[..., u, v].ravel().tolist()
    kept = [place for place in range(bins) if found[place]]
    centres = [(place + 0.5) * math.sqrt(2) / bins for place in kept]
    return centres, [math.fsum(found[place]) / len(found[place]) for place in kept]


@pytest.mark.parametrize("bins", [1, 6, 24])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 7, 7), (3, 6, 9), (2, 1, 9, 6), (1, 1, 32, 32), (2, 16, 1)])
def test_agrees_with_a_loop_over_the_plane(shape: tuple[int, ...], bins: int) -> None:
    delta = draw(*shape)
    radius, mean = radial_spectrum(delta, bins)
    centres, expected = naive(delta, bins)
    np.testing.assert_allclose(radius, centres, rtol=1e-12)
    np.testing.assert_allclose(mean, expected, rtol=1e-12)


@pytest.mark.parametrize("width", [16, 17])
def test_a_wave_is_two_frequencies(width: int) -> None:
    """``a cos(2π k x / W)`` has magnitude ``a √(HW) / 2`` at k and at its mirror image, and nothing elsewhere."""
    columns = torch.arange(width, dtype=torch.float64)
    wave = (0.3 * torch.cos(2 * math.pi * 3 * columns / width)).expand(1, 12, width)
    ones = radial_mean(torch.ones(12, width))
    radius, mean = radial_spectrum(wave)
    torch.testing.assert_close(ones.mean, torch.ones_like(mean))
    place = int((radius - 6 / width).abs().argmin())
    down, across = torch.fft.fftfreq(12, 0.5), torch.fft.fftfreq(width, 0.5)
    members = ((torch.hypot(down[:, None], across) - radius[place]).abs() <= math.sqrt(2) / 48).sum()
    assert float(mean[place]) == pytest.approx(2 * 0.3 * math.sqrt(12 * width) / 2 / int(members))
    assert mean.sum() - mean[place] < 1e-12


def test_chunks_weigh_as_many_pictures_as_they_have() -> None:
    delta = draw(5, 3, 8, 8).float()
    parts = [[[of.tolist() for of in radial_spectrum(e * part)] for e in (0, 2)] for part in delta.split([2, 3])]
    found = summary.spectrum(parts, [2, 3])
    radius, mean = radial_spectrum(2 * delta)
    assert found["radius"] == radius.tolist()
    np.testing.assert_allclose(found["amplitude"], [np.zeros(len(mean)), mean], rtol=1e-12)
