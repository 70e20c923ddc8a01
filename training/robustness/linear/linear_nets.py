"""Deep networks that compute a linear function: the architecture, too, decides which separator is found.

Every network here equals ``f(x) = w · x`` with ``w`` from :meth:`LinearNet.end_to_end`, so its margins and
certificates are exact. Gradient descent on the weights of its layers, though, is not gradient descent on ``w``:
fully connected layers keep the l2 bias, and full-width circular convolutions followed by a linear layer are biased
to a small ``‖F w‖_{2 / depth}``, for two layers to the largest margin in the l1 norm of the spectrum (Gunasekar, Lee,
Soudry, Srebro, *Implicit Bias of Gradient Descent on Linear Convolutional Networks*, 2018, arXiv 1806.00468). Those
are then most robust to attacks bounded in ``‖F δ‖_∞`` (Faghri et al., 2021, arXiv 2102.08868). That bias sets in with
the logarithm of the number of steps, and the more slowly the deeper the network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import reduce

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from training.errors import InputError
from training.robustness.linear.steepest_descent import Array, check_steps, log_loss, signed_examples


class _Spectra:
    """Convolutions under training; the DFT is unitary, so gradient steps are the same on the spectra."""

    def __init__(self, layers: list[Array]) -> None:
        self._width = len(layers[0])
        # The real DFT holds half of the spectrum, which is all of it.
        self._spectra: list[NDArray[np.complex128]] = [np.fft.rfft(layer, norm="ortho") for layer in layers]

    def end_to_end(self) -> Array:
        return np.fft.irfft(reduce(np.multiply, self._spectra), n=self._width, norm="ortho")

    def ascend(self, g: Array, rate: float) -> None:
        spectra, ones = self._spectra, np.ones_like(self._spectra[0])
        others = [reduce(np.multiply, spectra[:k] + spectra[k + 1 :] or [ones]) for k in range(len(spectra))]
        rate /= sum(float(np.abs(other).max()) ** 2 for other in others)
        change = rate * np.fft.rfft(g, norm="ortho")
        self._spectra = [layer + other.conj() * change for layer, other in zip(spectra, others, strict=True)]

    def arrays(self) -> list[Array]:
        return [np.fft.irfft(layer, n=self._width, norm="ortho") for layer in self._spectra]


class _Matrices:
    def __init__(self, layers: list[Array]) -> None:
        *self._hidden, self._last = (layer.copy() for layer in layers)

    def _behind(self) -> list[Array]:
        """The gradient of ``f`` in its input, and in the output of every layer but the last."""
        behind = [self._last]
        for matrix in reversed(self._hidden):
            behind.insert(0, behind[0] @ matrix)
        return behind

    def end_to_end(self) -> Array:
        return self._behind()[0].copy()

    def ascend(self, g: Array, rate: float) -> None:
        behind, before, bounds = self._behind()[1:], [g], [1.0]
        product = np.eye(len(g))
        for matrix in self._hidden:
            before.append(matrix @ before[-1])
            product = matrix @ product
            # The 8-norm of the singular values is a bound of the largest, and needs no decomposition.
            gram = product.T @ product
            bounds.append(float(np.linalg.norm(gram @ gram)) ** 0.5)
        rate /= bounds[-1] + sum(float(b @ b) * bound for b, bound in zip(behind, bounds, strict=False))
        for matrix, b, a in zip(self._hidden, behind, before, strict=False):
            matrix += rate * np.outer(b, a)
        self._last += rate * before[-1]

    def arrays(self) -> list[Array]:
        return [*self._hidden, self._last]


class LinearNet(nn.Module, ABC):
    """Layers without activation, in float64; the last one has one output.

    Args:
        width: d, of the input and of every layer but the last.
        depth: Number of layers L; 1 is ``f(x) = w · x``.
        seed: Of the initial layers.
        scale: Norm of the Gaussian filters, or columns, with which all layers but the last start. It starts at 0.

    Attributes:
        layers: The weights, the first layer first; the last is ``(d,)``.

    Raises:
        InputError: If width, depth or scale are not positive.
    """

    # Dimensions of the weights of a layer, and what moves them: torch on vectors this short is mostly overhead.
    _order: int
    _trained: type[_Spectra] | type[_Matrices]

    def __init__(self, width: int, depth: int = 2, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise InputError(f"width and depth: must be at least 1, not {width} and {depth}")
        if not 0 < scale < math.inf:
            raise InputError(f"scale: must be positive and finite, not {scale}")
        shape = (depth - 1, *[width] * self._order)
        drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        hidden = scale * nn.functional.normalize(drawn, dim=1)
        self.layers = nn.ParameterList([*hidden, torch.zeros(width, dtype=torch.float64)])

    def forward(self, x: Tensor) -> Tensor:
        """Layer by layer: float64 ``(B, d)`` to ``(B,)``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self._apply_layer(layer, x)
        scores: Tensor = x @ last
        return scores

    def end_to_end(self) -> Tensor:
        """The ``w`` with ``f(x) = w · x``: float64 ``(d,)``, differentiable in the layers."""
        *hidden, last = self.layers
        w: Tensor = last
        for layer in reversed(hidden):
            w = self._transposed(layer, w)
        # With one layer it would be the parameter itself.
        return w.view_as(w)

    @abstractmethod
    def _apply_layer(self, layer: Tensor, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _transposed(self, layer: Tensor, w: Tensor) -> Tensor: ...


class ConvLinear(LinearNet):
    """Circular convolutions over the full width, then a linear layer; see :class:`LinearNet`.

    With filters ``f_1 .. f_{L-1}`` and last layer ``v``, each convolution being the cross-correlation
    ``z_k ← Σ_j f_j z_{k + j mod d} / √d``; in the spectra of the orthonormal DFT (hats)::

        ẑ ← conj(f̂) ẑ        f(x) = v · z = w · x        ŵ = v̂ Π f̂
    """

    _order, _trained = 1, _Spectra

    def _apply_layer(self, layer: Tensor, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(layer, norm="ortho").conj() * torch.fft.rfft(x, norm="ortho")
        z: Tensor = torch.fft.irfft(spectrum, n=len(layer), norm="ortho")
        return z

    def _transposed(self, layer: Tensor, w: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(layer, norm="ortho") * torch.fft.rfft(w, norm="ortho")
        convolved: Tensor = torch.fft.irfft(spectrum, n=len(layer), norm="ortho")
        return convolved


class DeepLinear(LinearNet):
    """Fully connected layers, ``f(x) = v · W_{L-1} … W_1 x``; see :class:`LinearNet`."""

    _order, _trained = 2, _Matrices

    def _apply_layer(self, layer: Tensor, x: Tensor) -> Tensor:
        return x @ layer.T

    def _transposed(self, layer: Tensor, w: Tensor) -> Tensor:
        return w @ layer


class Linear(ConvLinear):
    """``f(x) = w · x``, from ``w = 0``; ``width`` is d."""

    def __init__(self, width: int) -> None:
        super().__init__(width, depth=1)


def train(model: LinearNet, x: ArrayLike, y: ArrayLike, steps: int, record: Collection[int] = ()) -> list[Array]:
    """Loss-normalised gradient descent on the layers, with the exponential loss, starting where they are.

    With ``g = -∇_w log mean exp(-y_n w · x_n)``, ``B = max_n ‖x_n‖₂`` and J the derivative of ``w`` in the layers θ::

        θ ← θ + Jᵀ g / (B² K),  K ≥ ‖J‖²

    To first order ``w`` then moves no further than by a step on ``w`` itself. For convolutions, K is
    ``Σ_k max_ω |Π_{j≠k} f̂_j(ω)|²``: ``max |f̂_1|² + max |f̂_2|²`` for two layers.

    Args:
        model: Trained in place.
        x: ``(N, d)``, converted to float64.
        y: ``(N,)``, labels -1 and 1.
        steps: Number of steps.
        record: Numbers of the steps, from 0 to ``steps``, after which ``w`` is kept.

    Returns:
        The end-to-end ``w`` after the recorded steps, in ascending order, float64 ``(d,)`` each.

    Raises:
        InputError: If the data or the numbers of steps are invalid, or x is not as wide as the model.
    """
    signed = signed_examples(x, y)
    check_steps(steps, record)
    if signed.shape[1] != len(model.layers[-1]):
        raise InputError(f"x: has width {signed.shape[1]}, the model {len(model.layers[-1])}")
    rate = 1 / float(np.linalg.norm(signed, 2, axis=1).max()) ** 2
    trained = model._trained([layer.detach().numpy() for layer in model.layers])
    wanted, recorded = set(record), []
    for number in range(steps + 1):
        w = trained.end_to_end()
        if number in wanted:
            recorded.append(w)
        if number < steps:
            trained.ascend(log_loss(signed @ w, "exp")[1] @ signed, rate)
    with torch.no_grad():
        for layer, array in zip(model.layers, trained.arrays(), strict=True):
            layer.copy_(torch.from_numpy(array))
    return recorded
