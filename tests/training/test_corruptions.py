from __future__ import annotations

import io
import itertools
import math

import kornia
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training.errors import InputError
from training.robustness.corruptions import CORRUPTIONS, _convolve, _disk, _enlarge, _streak, _warp, corrupt

SEVERITIES = range(1, 6)
RANDOM = ("noise", "motion_blur", "snow", "fog", "elastic_transform")  # endings of names


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Colour fields with the spectrum 1/f of natural pictures, and boxes with sharp edges, ``(B, 3, H, W)``."""
    generator = draws(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)) + 1 / max(height, width)
    spectrum = torch.fft.rfft2(torch.randn(count, 4, height, width, generator=generator)) / frequency
    fields = torch.fft.irfft2(spectrum, s=(height, width))
    fields = fields / fields.std(dim=(2, 3), keepdim=True)
    images = 0.45 + 0.15 * fields[:, :1] + 0.1 * fields[:, 1:]
    for image, _ in itertools.product(images, range(4)):
        top, left = (int(torch.randint(side // 2, (), generator=generator)) for side in (height, width))
        colour = 0.4 * torch.rand(3, 1, 1, generator=generator) - 0.2
        image[:, top : top + height // 3, left : left + width // 3] += colour
    return images.clamp(0, 1)


def apply(name: str, image: Tensor, severity: int, seed: int = 0) -> Tensor:
    """Not clipped."""
    return CORRUPTIONS[name](image, severity, draws(seed))


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class TestBlurs:
    @pytest.mark.parametrize(("severity", "sigma"), zip(SEVERITIES, (1, 2, 3, 4, 6), strict=True))
    @pytest.mark.parametrize("size", [(112, 90), (224, 240)])
    def test_gaussian_blur_equals_kornia(self, severity: int, sigma: float, size: tuple[int, int]) -> None:
        image, sigma = pictures(1, *size), sigma * min(size) / 224
        side = 2 * math.ceil(4 * sigma) + 1
        expected = kornia.filters.gaussian_blur2d(image, (side, side), (sigma, sigma), border_type="reflect")
        close(apply("gaussian_blur", image[0], severity), expected[0], 2e-6)

    @pytest.mark.parametrize(("tall", "wide"), [(1, 1), (3, 7), (15, 1), (11, 11)])
    def test_convolution_equals_the_naive_sum(self, tall: int, wide: int) -> None:
        image, kernel = torch.rand(2, 9, 12, generator=draws()), torch.rand(tall, wide, generator=draws(1))
        padded = F.pad(image, (wide // 2, wide // 2, tall // 2, tall // 2), mode="reflect")
        expected = torch.zeros_like(image)
        for y, x in itertools.product(range(9), range(12)):
            expected[:, y, x] = (padded[:, y : y + tall, x : x + wide] * kernel.flip(0, 1)).sum((1, 2))
        close(_convolve(image, kernel), expected, 1e-4)

    @pytest.mark.parametrize("radius", [0.2, 0.9, 3, 4.4, 10])
    def test_disk_covers_its_area_evenly(self, radius: float) -> None:
        kernel = _disk(radius)
        side, naive = len(kernel) // 2, torch.zeros_like(kernel)
        for y, x in itertools.product(range(-side - 3, side + 4), repeat=2):
            if math.hypot(x, y) < radius + 0.5:
                naive[y + side, x + side] = min(1.0, radius + 0.5 - math.hypot(x, y))
        close(kernel, naive / naive.sum(), 1e-6)
        if radius >= 3:
            assert 1 / float(kernel.max()) == pytest.approx(math.pi * radius**2, rel=0.03)

    @pytest.mark.parametrize(("severity", "radius"), zip(SEVERITIES, (3, 4, 6, 8, 10), strict=True))
    def test_defocus_blur_spreads_a_point_over_the_published_radius(self, severity: int, radius: float) -> None:
        point = torch.zeros(3, 224, 230)
        point[:, 60, 50] = 1
        x, y = torch.arange(230) - 50, torch.arange(224)[:, None] - 60
        spread = float(((x**2 + y**2) * apply("defocus_blur", point, severity)[1]).sum())
        # Half the squared radius for a disk; here the mean of disks with radii from radius - 1/2 to radius + 1/2.
        expected = (radius**4 + radius**2 / 2 + 1 / 80) / (2 * radius**2 + 1 / 6)
        assert spread == pytest.approx(expected, rel=0.03)

    @pytest.mark.parametrize(("angle", "x", "y"), [(0, 1, 0), (90, 0, -1), (180, -1, 0), (-90, 0, 1)])
    def test_streak_equals_kornias_motion_blur_moved_by_half_its_length(self, angle: float, x: int, y: int) -> None:
        image = pictures(1, 60, 70)
        expected = kornia.filters.motion_blur(image, 9, float(angle), 0.0, border_type="reflect")[0]
        actual = _convolve(image[0], _streak(8, 1e6, angle))
        close(actual[:, 10:-10, 10:-10], expected.roll((4 * y, 4 * x), (1, 2))[:, 10:-10, 10:-10], 1e-6)

    @pytest.mark.parametrize("angle", [-40, 20, 45, -100])
    def test_slanting_streak_is_near_kornias_motion_blur(self, angle: float) -> None:
        image = kornia.filters.gaussian_blur2d(pictures(1, 80, 80), (13, 13), (2.0, 2.0))
        lines = kornia.filters.motion_blur(image, 15, float(angle), 0.0, "reflect", "bilinear")[0]
        shift = torch.tensor([-7 * math.cos(math.radians(angle)), 7 * math.sin(math.radians(angle))])
        expected = _warp(lines, shift[:, None, None].expand(2, 80, 80))
        actual = _convolve(image[0], _streak(14, 1e6, angle))
        difference = (actual - expected)[:, 16:-16, 16:-16].square().mean()
        assert difference < 0.02 * (actual - image[0])[:, 16:-16, 16:-16].square().mean()

    @pytest.mark.parametrize("angle", [-45, -17.3, 0, 33, 90, 200])
    @pytest.mark.parametrize(("length", "sigma"), [(0.4, 0.1), (7.5, 3), (30, 8)])
    def test_streak_has_the_centroid_of_half_a_gaussian(self, angle: float, length: float, sigma: float) -> None:
        kernel = _streak(length, sigma, angle).double()
        along = np.linspace(0, length, math.ceil(length) + 1)
        weights = np.exp(-0.5 * (along / sigma) ** 2)
        distance = (weights * along).sum() / weights.sum()
        cells = torch.arange(len(kernel)).double() - len(kernel) // 2
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)
        assert float(kernel.sum(0) @ cells) == pytest.approx(distance * math.cos(math.radians(angle)), abs=1e-5)
        assert float(kernel.sum(1) @ cells) == pytest.approx(-distance * math.sin(math.radians(angle)), abs=1e-5)

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_motion_blur_smears_a_point_sideways(self, severity: int) -> None:
        radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
        point = torch.zeros(3, 112, 112)
        point[:, 50, 50] = 1
        along = np.arange(radius + 1)  # at half of 224 pixels, twice the radius is as many
        weights = np.exp(-0.5 * (along / (sigma / 2)) ** 2)
        slopes: set[float] = set()
        for seed in range(8):
            smeared = apply("motion_blur", point, severity, seed)[0]
            x = float(smeared.sum(0) @ (torch.arange(112.0) - 50))
            y = float(smeared.sum(1) @ (torch.arange(112.0) - 50))
            assert math.hypot(x, y) == pytest.approx((weights * along).sum() / weights.sum(), rel=1e-3)
            assert abs(y) <= x
            slopes.add(round(y / x, 3))
        assert len(slopes) == 8

    @pytest.mark.parametrize("size", [(40, 40), (33, 50)])
    def test_zoom_blur_equals_kornia(self, size: tuple[int, int]) -> None:
        image = pictures(1, *size)
        centre = torch.tensor([[(size[1] - 1) / 2, (size[0] - 1) / 2]])

        def enlarged(factor: float) -> Tensor:
            return kornia.geometry.transform.scale(image, torch.full((1, 2), factor), centre)[0]

        close(_enlarge(image[0], 1.3), enlarged(1.3), 1e-5)
        ends = ((1.1, 11), (1.15, 16), (1.2, 11), (1.24, 13), (1.3, 11))
        for severity, factors in zip(SEVERITIES, ends, strict=True):
            layers = [image[0], *(enlarged(float(factor)) for factor in np.linspace(1, *factors))]
            close(apply("zoom_blur", image[0], severity), torch.stack(layers).mean(0), 1e-5)


class TestNoise:
    @pytest.mark.parametrize("severity", SEVERITIES)
    @pytest.mark.parametrize("value", [0.2, 0.7])
    def test_has_its_exact_mean_and_variance(self, severity: int, value: float) -> None:
        share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
        mean = share / 2 + (1 - share) * value
        moments = {
            "gaussian_noise": (value, (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] ** 2),
            "shot_noise": (value, value / (60, 25, 12, 5, 3)[severity - 1]),
            "impulse_noise": (mean, share / 2 + (1 - share) * value**2 - mean**2),
            "speckle_noise": (value, (value * (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]) ** 2),
        }
        for name, (expected, variance) in moments.items():
            noisy = apply(name, torch.full((3, 150, 150), value), severity).double()
            deviations, count = (noisy - expected).square(), noisy.numel()
            assert abs(float(noisy.mean()) - expected) < 4.5 * math.sqrt(variance / count), name
            assert abs(float(deviations.mean()) - variance) < 4.5 * float(deviations.std()) / math.sqrt(count), name
            correlations = torch.corrcoef(noisy.flatten(1))[[0, 0, 1], [1, 2, 2]]
            assert float(correlations.abs().max()) < 4.5 / 150, name

    def test_impulse_noise_keeps_values_and_shot_noise_counts(self) -> None:
        image = 0.1 + 0.8 * torch.rand(3, 50, 50, generator=draws())
        noisy, counts = apply("impulse_noise", image, 3), apply("shot_noise", image, 3) * 12
        assert bool(((noisy == image) | (noisy == 0) | (noisy == 1)).all())
        close(counts, counts.round(), 1e-5)


class TestLight:
    @pytest.fixture
    def image(self) -> Tensor:
        """With grey, black, white, and pixels whose channels tie."""
        image = pictures(1, 40, 60)[0]
        image[:, :4], image[:, 4:6], image[:, 6:8], image[1, 8:12] = image[:1, :4], 0, 1, image[0, 8:12]
        return image

    @pytest.mark.parametrize(("severity", "rise"), zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
    def test_brightness_equals_kornia(self, image: Tensor, severity: int, rise: float) -> None:
        hsv = kornia.color.rgb_to_hsv(image)
        hsv[2] = (hsv[2] + rise).clamp(0, 1)
        close(apply("brightness", image, severity), kornia.color.hsv_to_rgb(hsv), 2e-6)

    @pytest.mark.parametrize(
        ("severity", "factor", "offset"), [(1, 0.3, 0), (2, 0.1, 0), (3, 3, 0), (4, 5, 0.1), (5, 20, 0.2)]
    )
    def test_saturate_equals_kornia(self, image: Tensor, severity: int, factor: float, offset: float) -> None:
        hsv = kornia.color.rgb_to_hsv(image)
        hsv[1] = (hsv[1] * factor + offset).clamp(0, 1)
        close(apply("saturate", image, severity), kornia.color.hsv_to_rgb(hsv), 2e-5)

    @pytest.mark.parametrize(("severity", "kept"), zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True))
    def test_contrast_equals_kornia(self, image: Tensor, severity: int, kept: float) -> None:
        expected = kornia.enhance.adjust_contrast_with_mean_subtraction(image[:, None], kept)  # channels apart
        close(apply("contrast", image, severity), expected[:, 0], 1e-6)

    @pytest.mark.parametrize(("severity", "thickness"), zip(SEVERITIES, (1.5, 2, 2.5, 3.5, 5), strict=True))
    def test_fog_spans_its_exact_range(self, severity: int, thickness: float) -> None:
        value = 0.6
        fogged = apply("fog", torch.full((3, 64, 64), value), severity)
        assert float(fogged.min()) == pytest.approx(value**2 / (value + thickness), abs=1e-6)
        assert float(fogged.max()) == pytest.approx(value, abs=1e-6)
        assert torch.equal(fogged[0], fogged[2])

    def test_fog_is_smooth_and_rougher_when_severe(self) -> None:
        white, rough = torch.ones(3, 64, 64), []
        for severity in SEVERITIES:
            fogs = torch.stack([apply("fog", white, severity, seed)[0] for seed in range(8)])
            rough.append(float(fogs.diff(dim=2).square().mean() / fogs.var()))
        assert rough[0] == pytest.approx(rough[1], rel=1e-3)  # the same decay
        assert rough[1] < rough[2] < rough[3] < rough[4] < 0.2

    @pytest.mark.parametrize(("severity", "kept"), zip(SEVERITIES, (0.8, 0.7, 0.7, 0.65, 0.55), strict=True))
    def test_snow_falls_on_a_whitened_picture(self, severity: int, kept: float) -> None:
        black, value = torch.zeros(3, 96, 96), 0.2
        snow = apply("snow", black, severity)
        flakes = snow - 0.5 * (1 - kept)
        assert float(flakes.min()) > -1e-5
        assert float(flakes.max()) > 0.1
        close(snow, snow.rot90(2, (1, 2)), 1e-6)
        # The same flakes on grey: what is added does not depend on the picture.
        whitened = kept * value + (1 - kept) * (1.5 * value + 0.5)
        close(apply("snow", black + value, severity), flakes + whitened, 1e-5)
        falls = torch.stack([apply("snow", black, severity, seed)[0] for seed in range(4)])
        assert falls.diff(dim=1).square().mean() < falls.diff(dim=2).square().mean()


class TestDamage:
    @pytest.mark.parametrize(
        ("severity", "rows", "columns"), [(1, 134, 269), (2, 112, 224), (3, 90, 179), (4, 67, 134), (5, 56, 112)]
    )
    def test_pixelate_equals_pillow(self, severity: int, rows: int, columns: int) -> None:
        image = (pictures(1, 224, 448)[0] * 255).round()
        pixels, box = Image.fromarray(image.byte().permute(1, 2, 0).numpy()), Image.Resampling.BOX
        expected = torch.from_numpy(np.array(pixels.resize((columns, rows), box).resize((448, 224), box)))
        close(apply("pixelate", image / 255, severity) * 255, expected.permute(2, 0, 1).float(), 1.01)

    @pytest.mark.parametrize(("severity", "quality"), zip(SEVERITIES, (25, 18, 15, 10, 7), strict=True))
    def test_jpeg_is_pillows(self, severity: int, quality: int) -> None:
        image = pictures(1, 50, 75)[0]
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        expected = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255
        assert torch.equal(apply("jpeg_compression", image, severity), expected)

    @pytest.mark.parametrize(("severity", "sigma"), zip(SEVERITIES, (0.3, 0.55, 0.81, 1.14, 1.95), strict=True))
    @pytest.mark.parametrize("size", [(112, 112), (224, 300)])
    def test_elastic_transform_equals_kornia(self, severity: int, sigma: float, size: tuple[int, int]) -> None:
        image = pictures(1, *size)
        (height, width), scale = size, min(size) / 224
        smoothness = 2.44 * scale
        side = 2 * math.ceil(4 * smoothness) + 1
        noise = torch.randn(1, 2, *size, generator=draws(3))
        # Smoothed white noise has the variance 1 / (4 pi sigma^2); kornia's unit is half a side.
        pixels = sigma * scale * 2 * math.sqrt(math.pi) * smoothness
        alpha = (pixels * 2 / (width - 1), pixels * 2 / (height - 1))
        moved = kornia.geometry.transform.elastic_transform2d(
            image, noise, (side, side), (smoothness, smoothness), alpha, align_corners=True, padding_mode="reflection"
        )[0]
        inside = (..., slice(side, -side), slice(side, -side))  # kornia smooths the noise with zeros around it
        close(apply("elastic_transform", image[0], severity, seed=3)[inside], moved[inside], 2e-4)

    def test_warp_reflects_as_kornia(self) -> None:
        image, shift = pictures(1, 20, 31), 3 * torch.randn(1, 2, 20, 31, generator=draws())
        units = shift * torch.tensor([2 / 30, 2 / 19])[:, None, None]
        expected = kornia.geometry.transform.elastic_transform2d(
            image, units, (1, 1), (1.0, 1.0), align_corners=True, padding_mode="reflection"
        )
        close(_warp(image[0], shift[0]), expected[0], 1e-5)


class TestCorrupt:
    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_rows_depend_on_their_number_alone(self, name: str) -> None:
        images = pictures(3, 24, 32)
        images[2] = images[1]
        before, state = images.clone(), torch.get_rng_state()
        together = corrupt(images, name, 3, seed=5)
        assert (together.shape, together.dtype) == (images.shape, torch.float32)
        alone = [corrupt(images[row : row + 1], name, 3, seed=5, first=row) for row in range(3)]
        assert torch.equal(torch.cat(alone), together)
        assert torch.equal(corrupt(images.flip(0)[:2], name, 3, seed=5, first=1)[0], together[1])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        close(corrupt(images.to(device), name, 3, seed=5).cpu(), together, 1e-4)
        assert torch.equal(together[1], together[2]) == (not name.endswith(RANDOM))
        assert torch.equal(corrupt(images, name, 3, seed=6), together) == (not name.endswith(RANDOM))
        assert torch.equal(images, before)
        assert torch.equal(torch.get_rng_state(), state)
        assert corrupt(images[:0], name, 3).shape == (0, 3, 24, 32)

    def test_draws_differ_between_kinds_and_severities(self) -> None:
        image = torch.full((1, 3, 16, 16), 0.5)
        noises = [
            corrupt(image, *kind) for kind in (("gaussian_noise", 1), ("gaussian_noise", 2), ("speckle_noise", 1))
        ]
        correlations = torch.corrcoef(torch.stack(noises).flatten(1)) - torch.eye(3)
        assert float(correlations.abs().max()) < 0.2

    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_severities_are_ordered(self, name: str) -> None:
        images = pictures(6, 144, 160)
        errors = [float((corrupt(images, name, severity) - images).square().mean()) for severity in SEVERITIES]
        assert errors[0] > 5e-5
        assert all(weaker < stronger for weaker, stronger in itertools.pairwise(errors)), errors

    @pytest.mark.parametrize("name", CORRUPTIONS)
    @pytest.mark.parametrize("side", [32, 40, 64, 96, 128])
    def test_small_pictures_are_corrupted_too(self, name: str, side: int) -> None:
        """In grey levels, at every severity: what only rounds would look like a model that withstands it."""
        images = (pictures(2, side, side + 3) * 255).round() / 255
        for severity in SEVERITIES:
            moved = (corrupt(images, name, severity) * 255).round() != (images * 255).round()
            assert bool(moved.flatten(1).any(1).all()), severity

    @pytest.mark.parametrize("name", ["pixelate", "gaussian_blur", "defocus_blur"])
    @pytest.mark.parametrize("side", [32, 40, 48, 64, 96, 128, 224])
    def test_lengths_are_ordered_at_every_size(self, name: str, side: int) -> None:
        images = pictures(4, side, side)
        errors = [float((corrupt(images, name, severity) - images).square().mean()) for severity in SEVERITIES]
        assert errors[0] > 1e-5
        assert all(weaker < stronger for weaker, stronger in itertools.pairwise(errors)), errors

    @pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "snow", "fog"])
    def test_a_smaller_picture_looks_alike(self, name: str) -> None:
        images = pictures(2, 224, 256)
        small = F.avg_pool2d(images, 2)
        expected = F.avg_pool2d(corrupt(images, name, 4), 2)
        difference = (corrupt(small, name, 4) - expected).square().mean()
        assert difference < 0.02 * (small - expected).square().mean()

    @pytest.mark.parametrize("side", [96, 160, 288])
    def test_pixelate_has_the_same_blocks_at_every_size(self, side: int) -> None:
        ramp = torch.linspace(0, 1, side).expand(1, 3, side, side)
        assert len(corrupt(ramp, "pixelate", 5)[0, 0, 0].mul(1e4).round().unique()) == 56

    @pytest.mark.parametrize("name", CORRUPTIONS)
    @pytest.mark.parametrize("size", [(8, 8), (8, 41), (37, 9)])
    def test_constant_and_tiny_pictures_stay_in_range(self, name: str, size: tuple[int, int]) -> None:
        values = torch.tensor([0, 1e-40, 0.5, 1])[:, None, None, None].expand(4, 3, *size)
        for images, severity in itertools.product((values, torch.rand(1, 3, *size, generator=draws())), SEVERITIES):
            corrupted = corrupt(images, name, severity)
            assert corrupted.shape == images.shape
            assert bool(((corrupted >= 0) & (corrupted <= 1)).all())
            if name.endswith("blur") or name in ("pixelate", "elastic_transform", "contrast"):
                close(corrupted.mean((1, 2, 3)), images.mean((1, 2, 3)), 2e-6 if images is values else 0.1)

    def test_refuses_what_it_cannot_corrupt(self) -> None:
        images = torch.zeros(1, 3, 8, 8)
        wrong: list[tuple[Tensor, str, int, str]] = [
            (images, "rust", 1, "'rust' is unknown; choose from gaussian_noise, .*elastic_transform"),
            *((images, "fog", severity, "severity") for severity in (0, 6, -1)),
            *((images + value, "fog", 1, "outside") for value in (1.01, -0.01, float("nan"))),
            (images.double(), "fog", 1, "float64"),
            (images[..., :7], "fog", 1, "at least 8"),
            *((given, "fog", 1, "B, 3, H, W") for given in (images[0], images[:, :1])),
        ]
        for given, name, severity, message in wrong:
            with pytest.raises(InputError, match=message) as caught:
                corrupt(given, name, severity)
            assert "\n" not in str(caught.value)
