"""How much a mini-batch gradient varies, and whether a sampler's is unbiased.

The published "normalised variance" divides by a mean that was estimated from the same draws, so that pure
noise scores above one (1.125 with ten draws). The estimators here are unbiased, or ratios of unbiased ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.sampling.clustering import Floats, Labels


@dataclass(frozen=True)
class VarianceReport:
    """The variance of a gradient estimate over independent draws of the batch.

    Attributes:
        draws: Number of draws n.
        variance: ``V = E|g - E g|²``, summed over coordinates; unbiased.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        mean_square: ``|E g|²``, from two disjoint halves; unbiased, so it can be below 0.
        normalised: ``V / (V + |E g|²)``, from 0, no noise, to 1, nothing but noise.
        noise_scale: ``B V / |E g|²``, the batch size at which noise and signal are equal (McCandlish et al.,
            *An Empirical Model of Large-Batch Training*, 2018); infinite where no signal is seen.
        layers: ``V`` of each layer.
    """

    draws: int
    variance: float
    low: float
    high: float
    mean_square: float
    normalised: float
    noise_scale: float
    layers: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """By name, with an infinite noise scale as null."""
        return {**asdict(self), "noise_scale": self.noise_scale if np.isfinite(self.noise_scale) else None}


class GradientVariance:
    """Collects gradients of independent batches at fixed weights, keeping three of them in memory.

    Args:
        batch_size: Items per batch B, for the noise scale.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._count = 0
        self._mean: list[Tensor] = []
        self._scatter: list[float] = []  # Σ |g - mean|² per layer, by Welford's recurrence
        self._halves: list[list[Tensor]] = [[], []]  # sums of the draws with even and with odd numbers
        self._even: list[Tensor] = []  # the latest draw with an even number
        self._pairs: list[float] = []  # |g - g'|² / 2 of consecutive draws: each is an estimate of V

    def add(self, gradients: Iterable[Tensor]) -> None:
        """Take the gradient of one more batch, a tensor per layer of any shape; summed in float64."""
        layers = [gradient.detach().to(torch.float64).flatten() for gradient in gradients]
        if not self._mean:
            self._mean = [torch.zeros_like(layer) for layer in layers]
            self._halves = [[torch.zeros_like(layer) for layer in layers] for _ in range(2)]
            self._scatter = [0.0] * len(layers)
        odd = self._count % 2
        self._count += 1
        for number, layer in enumerate(layers):
            deviation = layer - self._mean[number]
            self._mean[number] += deviation / self._count
            self._scatter[number] += float(deviation @ (layer - self._mean[number]))
            self._halves[odd][number] += layer
        if odd:
            self._pairs.append(sum(float((a - b).square().sum()) for a, b in zip(self._even, layers, strict=True)) / 2)
        self._even = layers

    def report(self, resamples: int = 1000, seed: int = 0) -> VarianceReport:
        """The estimates.

        Args:
            resamples: Bootstrap resamples.
            seed: Decides them.

        Raises:
            ValueError: With fewer than four draws; 50 or more are advised.
        """
        n = self._count
        if n < 4:
            raise ValueError(f"{n} draws are too few to estimate a variance; take 50")
        layers = tuple(scatter / (n - 1) for scatter in self._scatter)
        variance = sum(layers)
        even, odd = self._halves
        product = sum(float(a @ b) for a, b in zip(even, odd, strict=True))
        mean_square = product / (((n + 1) // 2) * (n // 2))
        signal = max(mean_square, 0.0)
        pairs = np.array(self._pairs)
        chosen = np.random.default_rng(seed).integers(len(pairs), size=(resamples, len(pairs)))
        relative = np.percentile(pairs[chosen].mean(axis=1), [2.5, 97.5]) / max(pairs.mean(), 1e-300)
        return VarianceReport(
            draws=n,
            variance=variance,
            low=float(variance * relative[0]),
            high=float(variance * relative[1]),
            mean_square=mean_square,
            normalised=variance / (variance + signal) if variance > 0 else 0.0,
            noise_scale=self.batch_size * variance / signal if signal > 0 else float("inf"),
            layers=layers,
        )


class Bias(NamedTuple):
    """``|E g - E g'|²`` of two gradient estimates, unbiased, with its standard error."""

    square: float
    error: float

    @property
    def significant(self) -> bool:
        """More than three standard errors above zero."""
        return self.square > 3 * self.error


def gradient_bias(candidate: Callable[[], Tensor], reference: Callable[[], Tensor], draws: int = 50) -> Bias:
    """Test whether two samplers have the same mean gradient.

    With independent differences ``d = g - g'``, the product of two of them has the mean ``|E d|²``; ``draws / 2``
    such products give the estimate and its standard error.

    Args:
        candidate: Returns the flat gradient ``(P,)`` of a fresh batch of one sampler, at fixed weights.
        reference: The same of the other.
        draws: Batches of each, an even number of 4 or more.
    """
    products = []
    for _ in range(draws // 2):
        first, second = ((candidate() - reference()).double() for _ in range(2))
        products.append(float(first @ second))
    return Bias(float(np.mean(products)), float(np.std(products, ddof=1) / np.sqrt(len(products))))


class SampledGain(NamedTuple):
    """What a sampler's own draws say about it, per item drawn.

    Attributes:
        sampler: B times the variance of the sampler's mean gradient.
        uniform: The same of uniform batches.
    """

    sampler: float
    uniform: float

    @property
    def ratio(self) -> float:
        """Below 1 the sampler varies less; 1 where nothing varies."""
        return self.sampler / self.uniform if self.uniform > 0 else 1.0


def sampled_gain(gradients: Floats, weights: Floats, strata: Labels, expected: Floats, batches: int) -> SampledGain:
    """Estimate both variances from a few fresh draws of a stratified sampler.

    A stratum adds, for each of its items, the variance of its weighted gradients, and as often as its expected
    count ``c`` is rounded up or down the square of their mean: ``f (1 - f) |m|²`` with the fraction f of c, where
    means count from the common one, since the sum of the counts is fixed. The scatter of all items, which
    uniform batches have, is ``E|g|² - |E g|²`` under the weights. A stratum drawn once is put together with the
    others that were.

    Args:
        gradients: Per-item gradients or sketches, ``(n, m)``; several batches together.
        weights: ``(n,)``, of the draws.
        strata: int64 ``(n,)``, from 0 to K - 1.
        expected: ``c``, expected draws from each stratum in a batch, ``(K,)``.
        batches: Number of batches.
    """
    n = len(gradients)
    weighted = gradients.astype(np.float64) * weights[:, None]  # (n, m)
    counts = np.bincount(strata, minlength=len(expected))
    strata = np.where(counts[strata] > 1, strata, len(counts))
    fractions = np.append(expected % 1, 0)
    common = weighted.mean(axis=0)
    within, rounding = 0.0, 0.0
    for stratum in np.unique(strata):
        chosen = weighted[strata == stratum]
        mean = chosen.mean(axis=0)
        variance = float(np.square(chosen - mean).sum()) / max(len(chosen) - 1, 1)
        within += len(chosen) * variance
        spread = fractions[stratum] * (1 - fractions[stratum])
        rounding += spread * (float(np.square(mean - common).sum()) - variance / len(chosen))
    square = float((weights * np.square(gradients, dtype=np.float64).sum(axis=1)).sum())
    # |E g|² without the terms of an item with itself, which would add the variance to it.
    mean_square = np.square(weighted.sum(axis=0)).sum() - np.square(weighted).sum()
    uniform = max(square / n - float(mean_square) / (n * (n - 1)), 0.0)
    return SampledGain(float(within + batches * max(rounding, 0.0)) / n, uniform)


def batch_variance(gradients: Floats, weights: Floats, strata: Labels, expected: Floats) -> float:
    """Variance of the weighted mean gradient of a batch, from the gradients of all items.

    Stratum k with the expected count ``c_k``, whose items are drawn with probabilities inverse to their weights,
    adds ``c_k`` times the variance of its weighted gradients and what rounding does, as in :func:`sampled_gain`;
    all over B². Draws with replacement: a shuffle varies a little less, by ``(N - B) / (N - 1)`` for uniform batches.

    Args:
        gradients: ``(N, m)``.
        weights: ``(N,)``; their inverses add up to N in the mean.
        strata: int64 ``(N,)``.
        expected: ``c``, ``(K,)``, with the sum B.
    """
    size = expected.sum()
    draws = size / (len(weights) * weights)  # expected, of each item
    count = len(expected)
    squares = np.bincount(
        strata, draws * np.square(weights) * np.square(gradients, dtype=np.float64).sum(axis=1), count
    )
    member = np.zeros((count, len(weights)))
    member[strata, np.arange(len(weights))] = draws * weights
    means = member @ gradients.astype(np.float64) / expected[:, None]  # (K, m)
    within = squares - expected * np.square(means).sum(axis=1)
    fractions = expected % 1
    spread = np.square(means - expected @ means / size).sum(axis=1)
    return float((within.sum() + (fractions * (1 - fractions)) @ spread) / size**2)
