"""Natural corruptions of pictures at five severities, after ImageNet-C.

The kinds and most parameters follow Hendrycks & Dietterich (*Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations*, 2019); the pictures are not bit-equal to theirs, and each function says where it
departs. Severities are ordered: on natural pictures the mean squared distance to the clean picture grows from each to
the next.

Their parameters are meant for 224 x 224 pixels. Lengths (radii of blurs, the grain of snow and fog, blocks,
displacements) are multiplied by the shorter side / 224, so that a picture of another size looks alike. Those of
Gaussian and defocus blur and of blocks stop at a length below which nothing would change. Noise is drawn for each
pixel and JPEG has blocks of 8 pixels whatever the size, so these two kinds look stronger on a smaller picture.

Each function takes one picture ``(3, H, W)``, float32 in [0, 1], H and W at least 8; the severity 1..5; and a
generator on the CPU, wherever the picture is, so that devices agree up to rounding. It returns a new picture that may
leave [0, 1] slightly: :func:`corrupt` clips it. Nothing here is meant to be differentiated.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training.errors import InputError

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
"""``(picture, severity, generator)`` to the corrupted picture; see the module."""

# The shortest side in pixels. From here on every kernel reaches less far than a side, as reflection requires.
MIN_SIDE = 8


def _scale(image: Tensor) -> float:
    """Pixels of this picture to one pixel of a 224 x 224 picture."""
    return min(image.shape[-2:]) / 224


def _gaussian(sigma: float) -> Tensor:
    """Kernel ``(k, k)`` of a Gaussian with standard deviation ``sigma`` pixels, cut at 4 of them; sums to 1."""
    reach = math.ceil(4 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return torch.outer(line, line) / line.sum() ** 2


def _disk(radius: float) -> Tensor:
    """Kernel ``(k, k)`` of a disk whose edge falls from 1 to 0 over the pixel around ``radius``; sums to 1."""
    reach = math.ceil(radius)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = (radius + 0.5 - torch.hypot(offsets[:, None], offsets)).clamp(0, 1)
    return kernel / kernel.sum()


def _streak(length: float, sigma: float, angle: float) -> Tensor:
    """Kernel ``(k, k)`` of a line from the centre that fades as half a Gaussian; sums to 1.

    Args:
        length: Of the line, in pixels.
        sigma: Of the Gaussian, in pixels.
        angle: In degrees, from rightwards (0) to upwards (90).
    """
    along = torch.linspace(0, length, math.ceil(length) + 1)  # (S,), at most a pixel apart
    weights = torch.exp(-0.5 * (along / sigma) ** 2)
    reach = math.ceil(length) + 1
    cells = torch.arange(-reach, reach + 1)
    # Each sample is shared bilinearly among the four pixels around it.
    across = (1 - (along[:, None] * math.cos(math.radians(angle)) - cells).abs()).clamp(min=0)  # (S, k)
    down = (1 - (along[:, None] * -math.sin(math.radians(angle)) - cells).abs()).clamp(min=0)
    return down.T @ (weights[:, None] * across) / weights.sum()


def _convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolution with reflected edges, by FFT: the time does not grow with the kernel.

    Args:
        image: ``(C, H, W)``.
        kernel: ``(k, l)``, both odd and below ``2H`` and ``2W``: what becomes of a single bright pixel.

    Returns:
        ``(C, H, W)``, on the device of the image.
    """
    (height, width), (tall, wide) = image.shape[-2:], kernel.shape
    padded = F.pad(image, (wide // 2, wide // 2, tall // 2, tall // 2), mode="reflect")
    # Multiples of 32 have fast transforms. What wraps around falls on the margin, which is cut off.
    size = [-(-side // 32) * 32 for side in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel.to(image.device), s=size)
    smeared: Tensor = torch.fft.irfft2(spectrum, s=size)
    return smeared[:, tall - 1 : tall - 1 + height, wide - 1 : wide - 1 + width]


def _warp(image: Tensor, shift: Tensor) -> Tensor:
    """Takes each pixel from ``shift`` pixels away, bilinearly, reflecting at the edges.

    Args:
        image: ``(C, H, W)``, sides at least 2.
        shift: ``(2, H, W)`` in pixels, rightwards and downwards.
    """
    height, width = image.shape[-2:]
    x = torch.arange(width, device=image.device) + shift[0]
    y = torch.arange(height, device=image.device)[:, None] + shift[1]
    grid = torch.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], dim=-1)  # (H, W, 2)
    return F.grid_sample(image[None], grid[None], padding_mode="reflection", align_corners=True)[0]


def _enlarge(image: Tensor, factor: float) -> Tensor:
    """The centre of the picture enlarged ``factor`` >= 1 times and cut to the old size."""
    height, width = image.shape[-2:]
    x = torch.arange(width, device=image.device) - (width - 1) / 2
    y = torch.arange(height, device=image.device) - (height - 1) / 2
    return _warp(image, torch.stack(torch.meshgrid(x, y, indexing="xy")) * (1 / factor - 1))


def _clouds(size: torch.Size, decay: float, generator: torch.Generator) -> Tensor:
    """Fractal noise ``(H, W)`` from a square that spans [0, 1]: octaves whose amplitude falls by ``decay`` each."""
    side = max(size)
    total = torch.zeros(side, side)
    for octave in range(1, 9):
        cells = torch.rand(1, 1, 2**octave + 1, 2**octave + 1, generator=generator)
        total += decay**-octave * F.interpolate(cells, (side, side), mode="bilinear", align_corners=True)[0, 0]
    total -= total.min()
    return (total / total.max())[: size[0], : size[1]]


def _block_means(side: int, blocks: int) -> Tensor:
    """Matrix ``(side, side)`` that sets each of ``side`` pixels to the mean of its block."""
    block = (2 * torch.arange(side) + 1) * blocks // (2 * side)  # by the pixel's centre, in whole numbers
    same = (block[:, None] == block).float()
    return same / same.sum(dim=1, keepdim=True)


def gaussian_noise(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Adds normal noise of the same strength everywhere."""
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return image + sigma * torch.randn(image.shape, generator=generator).to(image.device)


def shot_noise(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Counts photons: Poisson, with so many in a white pixel."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return torch.poisson(image.cpu() * photons, generator=generator).to(image.device) / photons


def impulse_noise(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Sets a share of all values to 0 or 1, half of them each ("salt and pepper")."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw = torch.rand(image.shape, generator=generator).to(image.device)
    return torch.where(draw < share, (draw < share / 2).float(), image)


def speckle_noise(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Adds normal noise in proportion to the value."""
    sigma = (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]
    return image * (1 + sigma * torch.randn(image.shape, generator=generator).to(image.device))


def gaussian_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blurs with a Gaussian, on small pictures that of CIFAR-10-C. Draws nothing."""
    sigma, least = ((1, 0.4), (2, 0.6), (3, 0.7), (4, 0.8), (6, 1))[severity - 1]
    return _convolve(image, _gaussian(max(sigma * _scale(image), least)))


def defocus_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blurs with a disk, its edge one pixel soft where theirs is smoothed by a Gaussian. Draws nothing."""
    radius, least = ((3, 0.6), (4, 0.7), (6, 0.8), (8, 1), (10, 1.5))[severity - 1]  # up to half a pixel is a point
    return _convolve(image, _disk(max(radius * _scale(image), least)))


def motion_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Smears to one side, at most 45 degrees from the horizontal; fractions of a pixel where theirs are rounded."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    angle, scale = 90 * float(torch.rand((), generator=generator)) - 45, _scale(image)
    return _convolve(image, _streak(2 * radius * scale, sigma * scale, angle))


def zoom_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Averages the picture with enlargements of it. Draws nothing."""
    step, count = ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))[severity - 1]
    total = 2 * image  # itself, and enlarged once
    for index in range(1, count):
        total += _enlarge(image, 1 + index * step)
    return total / (count + 1)


def snow(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Whitens the picture and lays driven flakes on it, and the same flakes turned by 180 degrees.

    The flakes are drawn on a grid of their own size, where theirs are enlarged from noise at each pixel.
    """
    mean, sigma, grain, threshold, radius, fade, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    scale = _scale(image)
    cells = [math.ceil(side / (grain * scale)) for side in image.shape[-2:]]
    noise = mean + sigma * torch.randn(1, 1, *cells, generator=generator)
    flakes = F.interpolate(noise, image.shape[-2:], mode="bilinear", align_corners=False)[0]
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(max=1)
    angle = 90 * float(torch.rand((), generator=generator)) - 135
    flakes = _convolve(flakes, _streak(2 * radius * scale, fade * scale, angle)).to(image.device)  # (1, H, W)
    grey = (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0)
    white = torch.maximum(image, 1.5 * grey + 0.5)
    return kept * image + (1 - kept) * white + flakes + flakes.rot90(2, (1, 2))


def fog(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Lays clouds on the picture and darkens both to the old maximum; the clouds are octaves of interpolated noise.

    Theirs are a diamond-square fractal of the same roughness. Their last two thicknesses, 2.5 and 3, are raised: with
    the smaller contrast of rougher clouds they would be no stronger than the third.
    """
    thickness, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (3.5, 1.5), (5, 1.4))[severity - 1]
    clouds = _clouds(image.shape[-2:], decay, generator).to(image.device)
    highest = image.max()
    return (image + thickness * clouds) * (highest / (highest + thickness))


def brightness(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Raises the value (of hue, saturation and value). Draws nothing."""
    rise = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = image.amax(dim=0)
    risen = (value + rise).clamp(max=1)
    return torch.where(value > 0, image / value * risen, risen)


def contrast(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Brings each channel closer to its mean. Draws nothing."""
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    return torch.lerp(image.mean(dim=(1, 2), keepdim=True), image, kept)


def saturate(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Maps the saturation (of hue, saturation and value) linearly; grey counts as red. Draws nothing.

    Their third factor, 2, moves pixels less than their second does; 3 stands in for it.
    """
    factor, offset = ((0.3, 0), (0.1, 0), (3, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value = image.amax(dim=0)
    span = value - image.amin(dim=0)
    red = image.new_tensor([0, 1, 1])[:, None, None]
    lack = torch.where(span > 0, (value - image) / span, red)  # (3, H, W): 0 in the largest channel, 1 in the least
    saturation = torch.where(value > 0, span / value, 0)
    return value * (1 - (factor * saturation + offset).clamp(0, 1) * lack)


def pixelate(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Shrinks by averaging blocks and enlarges again without smoothing, at least as CIFAR-10-C. Draws nothing."""
    share, most = ((0.6, 0.95), (0.5, 0.9), (0.4, 0.85), (0.3, 0.75), (0.25, 0.65))[severity - 1]
    share = min(share / _scale(image), most)
    rows, columns = (_block_means(n, min(n - 1, round(n * share))).to(image.device) for n in image.shape[-2:])
    return rows @ image @ columns  # both symmetric


def jpeg_compression(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Saves as JPEG and reads back, through Pillow on the CPU: an evaluation needs no gradient. Draws nothing."""
    quality = (25, 18, 15, 10, 7)[severity - 1]
    buffer = io.BytesIO()
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).to(image.device) / 255


def elastic_transform(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Moves pixels by smooth noise of the given standard deviation, the same in x and y.

    The last three severities have the strength and smoothness of theirs. They add a random affine map, nearly all of
    their first two severities, which it makes the strongest; here it is left out and these two are weaker.
    """
    sigma, smoothness = (0.3, 0.55, 0.81, 1.14, 1.95)[severity - 1], 2.44  # pixels
    kernel = _gaussian(smoothness * _scale(image))
    noise = torch.randn(2, *image.shape[-2:], generator=generator).to(image.device)
    # Smoothing leaves of white noise with deviation 1 the root of the kernel's sum of squares.
    return _warp(image, _convolve(noise, kernel) * (sigma * _scale(image) / float(kernel.norm())))


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        *(gaussian_noise, shot_noise, impulse_noise, speckle_noise),
        *(gaussian_blur, defocus_blur, motion_blur, zoom_blur),
        *(snow, fog, brightness, contrast, saturate),
        *(pixelate, jpeg_compression, elastic_transform),
    )
}
"""By their names in the literature: noise, blurs, weather and light, digital damage."""


def _generator(seed: int, name: str, severity: int, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name} {severity} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupts pictures, each by itself: what becomes of a row depends on its number, not on the rows beside it.

    Args:
        images: float32 ``(B, 3, H, W)`` in [0, 1], H and W at least 8.
        name: A key of :data:`CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        seed: With name, severity and the row's number all that the random draws depend on.
        first: Number of the first row, so that a caller who works in chunks gets the same pictures.

    Returns:
        float32 ``(B, 3, H, W)`` in [0, 1], on the same device.

    Raises:
        InputError: On an unknown name, a severity outside 1..5, another shape or dtype, or a pixel outside [0, 1].
    """
    if name not in CORRUPTIONS:
        raise InputError(f"corruption {name!r} is unknown; choose from {', '.join(CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise InputError(f"severity {severity} of {name}: choose 1, 2, 3, 4 or 5")
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIDE:
        given = f"{images.dtype} {tuple(images.shape)}"
        raise InputError(f"pictures to corrupt: {given}; give torch.float32 (B, 3, H, W), sides at least {MIN_SIDE}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("pictures to corrupt: a pixel is outside [0, 1]; divide 8-bit pixels by 255")
    corrupted = torch.empty_like(images)
    # Also where nothing is drawn: a batch at once is no faster on a CPU, and its rounding could depend on its size.
    for row, image in enumerate(images):
        corrupted[row] = CORRUPTIONS[name](image, severity, _generator(seed, name, severity, first + row))
    return corrupted.clamp_(0, 1)
