from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.robustness import norms as norms_module
from training.robustness.balls import Ball
from training.robustness.norms import FOURIER_LINF, L1, L2, LINF, FourierLInf, Norm, one_over_f, parse_norm

BAND = FourierLInf((0.1, 0.8))
PROFILE = FourierLInf(profile=lambda radius: 1 / (1 + 4 * radius))
ONE_OVER_F, LOW_ONE_OVER_F = parse_norm("fourier-linf/f"), parse_norm("fourier-linf/f[0,0.5]")
NORMS = [LINF, L2, L1, FOURIER_LINF, BAND, PROFILE, ONE_OVER_F, LOW_ONE_OVER_F]
SHAPE = (4, 3, 6, 6)
norms = pytest.mark.parametrize("norm", NORMS, ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A third of the pixels of the first picture is black or white."""
    centres = torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))
    centres[0] = (centres[0] * 1.5 - 0.25).clamp(0, 1)
    return centres


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def rows(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def soft(x: Tensor, threshold: float | Tensor) -> Tensor:
    return x * (1 - threshold / x.abs()).clamp(min=0)


@pytest.mark.parametrize("shape", [SHAPE, (3, 2, 5, 7), (2, 1, 7, 4)])
@norms
def test_steepest_attains_the_dual_norm(norm: Norm, shape: tuple[int, ...]) -> None:
    gradient = draw(*shape)
    direction = norm.steepest(gradient)
    assert direction.dtype == gradient.dtype
    torch.testing.assert_close(dot(gradient, direction), norm.dual(gradient))
    torch.testing.assert_close(norm.measure(direction), torch.ones(shape[0], dtype=torch.float64))
    torch.testing.assert_close(norm.measure(2.5 * direction), 2.5 * norm.measure(direction))


@norms
def test_steepest_beats_random_directions(norm: Norm) -> None:
    gradient = draw(1, *SHAPE[1:])
    others = norm.project(draw(1000, *SHAPE[1:], seed=1), 1e-3)
    others = others / rows(norm.measure(others))
    assert (dot(gradient, others) <= norm.dual(gradient) + 1e-9).all()


@norms
def test_norm_and_dual_survive_tiny_and_zero_gradients(norm: Norm) -> None:
    gradient = draw(*SHAPE, dtype=torch.float32) * 1e-30
    gradient[1] = 0
    direction = norm.steepest(gradient)
    expected = torch.tensor([1.0, 0, 1, 1])
    torch.testing.assert_close(norm.measure(direction), expected)
    lengths, zeros = torch.tensor([1.0, 2, 3, 4]), torch.zeros_like(gradient)
    step = Ball(norm, lengths, -math.inf, math.inf).step(zeros, zeros, gradient, lengths)
    torch.testing.assert_close(norm.measure(step), expected * torch.tensor([1.0, 2, 3, 4]))
    assert (norm.project(torch.zeros(SHAPE), 0.0) == 0).all()
    assert (Ball(norm, 0.5).project(torch.zeros(SHAPE), torch.zeros(SHAPE)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [LINF, L2, L1], ids=str)
def test_norm_and_dual_grow_with_the_row_at_every_scale(norm: Norm, dtype: torch.dtype) -> None:
    """Squares leave the range of the numbers at half of its exponents."""
    info, x = torch.finfo(dtype), draw(6, 3, 5, dtype=dtype)
    low, high = math.log10(info.tiny / info.eps), math.log10(info.max) - 3
    for exponent in range(math.ceil(low), math.floor(high)):
        scale = 10.0**exponent
        torch.testing.assert_close(norm.measure(x * scale) / scale, norm.measure(x))
        torch.testing.assert_close(norm.dual(x * scale) / scale, norm.dual(x))
    mixed = torch.cat([x * 10.0 ** round(0.6 * low), x, x[:1] * 0, x * 10.0 ** round(0.6 * high)])
    alone = torch.cat([norm.measure(row[None]) for row in mixed])
    torch.testing.assert_close(norm.measure(mixed), alone, rtol=1e-5, atol=0)


@norms
def test_projection_is_the_nearest_point(norm: Norm) -> None:
    x, radius = 3 * draw(*SHAPE), torch.tensor([0.0, 0.5, 2, 1e3], dtype=torch.float64)
    nearest = norm.project(x, radius)
    assert (norm.measure(nearest) <= radius + 1e-9).all()
    torch.testing.assert_close(norm.project(nearest, radius), nearest)
    for seed in range(20):
        other = draw(*SHAPE, seed=seed)
        inside = norm.project(other, radius)
        assert (dot(x - nearest, inside - nearest) <= 1e-8).all()
        assert ((nearest - inside).flatten(1).norm(dim=1) <= (x - other).flatten(1).norm(dim=1) + 1e-9).all()
        # Points on the sphere towards other directions, made without a projection.
        vertex = rows(radius) * norm.steepest(other)
        assert (dot(x - nearest, vertex - nearest) <= 1e-8).all()
    if norm not in (BAND, LOW_ONE_OVER_F):
        torch.testing.assert_close(nearest[3], x[3])
    torch.testing.assert_close(norm.project(x, 0.5)[1], nearest[1])


@norms
def test_moreau_decomposition(norm: Norm) -> None:
    """``x`` is its projection on the ball of radius r plus the proximal point of r times the dual norm."""
    x, radius = draw(*SHAPE), 0.7
    if norm is LINF:  # the dual norm is l1
        proximal = soft(x, radius)
    elif norm is L2:
        proximal = x * (1 - radius / x.flatten(1).norm(dim=1)).clamp(min=0)[:, None, None, None]
    elif norm is L1:  # the dual norm is the largest value: cut at the level that removes r in all
        low, high = torch.zeros(4, dtype=torch.float64), norm.dual(x)
        for _ in range(80):
            level = (low + high) / 2
            removed = (x.abs() - rows(level)).clamp(min=0).flatten(1).sum(1)
            low, high = torch.where(removed > radius, level, low), torch.where(removed > radius, high, level)
        proximal = x.clamp(-rows(level), rows(level))
    else:
        spectrum = torch.fft.fft2(x, norm="ortho")
        frequencies = torch.fft.fftfreq(6, dtype=torch.float64)
        radial = (frequencies[:, None] ** 2 + frequencies**2).sqrt() / 0.5
        assert isinstance(norm, FourierLInf)
        shrunk = soft(spectrum, radius * (torch.ones_like(radial) if norm.profile is None else norm.profile(radial)))
        if norm.band is not None:  # frequencies outside cost nothing
            shrunk = torch.where((radial >= norm.band[0]) & (radial <= norm.band[1]), shrunk, spectrum)
        proximal = torch.fft.ifft2(shrunk, norm="ortho")
        assert proximal.imag.abs().max() < 1e-12
        proximal = proximal.real
    torch.testing.assert_close(norm.project(x, radius) + proximal, x)


def test_fourier_norm_agrees_with_the_full_transform() -> None:
    for shape in (SHAPE, (2, 3, 5, 7)):
        x = draw(*shape)
        magnitudes = torch.fft.fft2(x, norm="ortho").abs().flatten(1)
        torch.testing.assert_close(FOURIER_LINF.measure(x), magnitudes.amax(1))
        torch.testing.assert_close(FOURIER_LINF.dual(x), magnitudes.sum(1))


def test_fourier_conversions() -> None:
    for seed in range(20):
        x, side, channels = draw(1, 3, 8, 8, seed=seed), 8, 3
        fourier, linf, l2 = (float(norm.measure(x)) for norm in (FOURIER_LINF, LINF, L2))
        assert linf <= side * fourier
        assert fourier <= side * linf
        assert fourier <= l2 <= math.sqrt(channels) * side * fourier


def test_fourier_ball_holds_an_impulse() -> None:
    epsilon = 8 / 255
    impulse = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    impulse[:, :, 5, 9] = 32 * epsilon
    torch.testing.assert_close(FOURIER_LINF.measure(impulse), torch.tensor([epsilon], dtype=torch.float64))
    assert Ball(FOURIER_LINF, epsilon, high=2.0).violation(impulse, torch.zeros_like(impulse)).norm < 1e-12
    assert Ball(FOURIER_LINF, epsilon, high=2.0).violation(1.01 * impulse, torch.zeros_like(impulse)).norm > 1e-4


def test_band_is_finite_inside_only() -> None:
    x = draw(*SHAPE)
    assert BAND.measure(x).isinf().all()
    inside = BAND.project(x, 0.3)
    assert (BAND.measure(inside.float()) <= 0.3 + 1e-6).all()
    assert inside.mean(dim=(2, 3)).abs().max() < 1e-12  # frequency 0 lies below the band
    torch.testing.assert_close(FourierLInf((0, 1.5)).project(x, 0.3), FOURIER_LINF.project(x, 0.3))


def test_profile_bounds_each_frequency() -> None:
    """ε(ω) = ε / (1 + 4 |ω|), with |ω| = 1 at half a cycle per pixel."""
    x, epsilon = draw(*SHAPE), 0.3
    frequencies = torch.fft.fftfreq(6, 0.5, dtype=torch.float64)
    limits = epsilon / (1 + 4 * torch.hypot(frequencies[:, None], frequencies))
    for point in (PROFILE.project(x, epsilon), epsilon * PROFILE.steepest(x)):
        magnitudes = torch.fft.fft2(point, norm="ortho").abs()
        assert (magnitudes <= limits + 1e-12).all()
        assert (PROFILE.measure(point) - epsilon).abs().max() < 1e-12
    torch.testing.assert_close(FourierLInf(profile=torch.ones_like).project(x, 0.3), FOURIER_LINF.project(x, 0.3))


def test_one_over_f_falls_from_a_sixteenth_of_nyquist() -> None:
    """ε(ω) = ε min(1, 1 / (16 |ω|)), in the band, whatever the size of the picture."""
    for norm, highest in ((ONE_OVER_F, 2.0), (LOW_ONE_OVER_F, 0.5)):
        for height, width in ((64, 64), (33, 48)):
            x, epsilon = draw(1, 3, height, width), 0.3
            point = epsilon * norm.steepest(x)
            magnitudes = torch.fft.fft2(point, norm="ortho").abs().amax((0, 1))
            for u in range(height):
                for v in range(width):
                    down, across = 2 * min(u, height - u) / height, 2 * min(v, width - v) / width
                    frequency = math.hypot(down, across)
                    limit = epsilon * min(1, 1 / (16 * max(frequency, 1e-9))) if frequency <= highest else 0
                    assert float(magnitudes[u, v]) == pytest.approx(limit, abs=1e-12)


@norms
def test_linear_worst_case_is_attained(norm: Norm) -> None:
    weights, centres = draw(*SHAPE), draw(*SHAPE, seed=1)
    ball = Ball(norm, 0.3, -math.inf, math.inf)
    attacked = ball.project(ball.step(centres, centres, weights, 2 * 0.3), centres)
    torch.testing.assert_close(dot(attacked - centres, weights), 0.3 * norm.dual(weights))


@pytest.mark.parametrize(
    ("norm", "epsilon"),
    [
        (LINF, 8 / 255),
        (L2, 2.0),
        (L1, 12.0),
        (FOURIER_LINF, 8 / 255),
        (FourierLInf((0, 0.25)), 8 / 255),
        (ONE_OVER_F, 1.0),
    ],
    ids=str,
)
def test_both_constraints_hold_in_large_pictures(norm: Norm, epsilon: float) -> None:
    centres = pictures(1, 3, 224, 224, dtype=torch.float32)
    ball = Ball(norm, epsilon)
    points = ball.project(ball.step(centres, centres, draw(*centres.shape, dtype=torch.float32), 2 * epsilon), centres)
    violation = ball.violation(points, centres)
    assert points.dtype == torch.float32
    assert violation.norm.dtype == torch.float64
    assert violation.norm <= 1e-6
    assert violation.box <= 1e-6
    if norm.name != "fourier-linf[0,0.25]":  # saturated noise allows hardly any smooth perturbation
        assert norm.measure(points.double() - centres.double()) >= 0.99 * epsilon


def test_limits_keep_their_strength_where_pictures_allow() -> None:
    centres = pictures(2, 3, 64, 64, dtype=torch.float32)[1:] * 0.98 + 0.01
    for band in (BAND, FourierLInf((0, 0.25)), ONE_OVER_F, LOW_ONE_OVER_F):
        ball = Ball(band, 8 / 255)
        gradient = draw(*centres.shape, dtype=torch.float32)
        points = ball.project(ball.step(centres, centres, gradient, 2 * ball.epsilon), centres)
        assert max(float(part.max()) for part in ball.violation(points, centres)) <= 1e-6
        assert dot(points - centres, gradient) >= 0.7 * ball.epsilon * band.dual(gradient)


@pytest.mark.parametrize(("norm", "epsilon"), [(LINF, 0.1), (L2, 1.5), (L1, 8.0), (FOURIER_LINF, 0.3)], ids=str)
def test_ball_projection_is_nearest(norm: Norm, epsilon: float) -> None:
    centres = pictures(*SHAPE)
    points = centres + draw(*SHAPE)
    ball = Ball(norm, epsilon)
    nearest = ball.project(points, centres)
    ball_correction = box_correction = torch.zeros_like(points)
    reference = points - centres
    for _ in range(1000):
        boxed = (reference + box_correction).clamp(-centres, 1 - centres)
        box_correction = reference + box_correction - boxed
        reference = norm.project(boxed + ball_correction, epsilon)
        ball_correction = boxed + ball_correction - reference
    # Dykstra's algorithm has not converged after its 50 rounds.
    tolerance = 1e-2 if norm is FOURIER_LINF else 1e-6
    torch.testing.assert_close(nearest - centres, reference, atol=tolerance, rtol=0)
    torch.testing.assert_close(ball.project(nearest, centres), nearest, atol=1e-6, rtol=0)
    assert max(float(part.max()) for part in ball.violation(nearest, centres)) <= 1e-6


@norms
def test_rows_do_not_depend_on_each_other(norm: Norm) -> None:
    centres = pictures(*SHAPE)
    points = centres + draw(*SHAPE) * torch.tensor([1e-3, 1, 5, 0.1], dtype=torch.float64)[:, None, None, None]
    ball = Ball(norm, 0.2)
    together = ball.project(points, centres)
    for row in range(4):
        alone = ball.project(points[row : row + 1], centres[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@norms
def test_epsilon_zero_gives_back_the_centres(norm: Norm, dtype: torch.dtype) -> None:
    centres = pictures(*SHAPE, dtype=dtype)
    assert torch.equal(Ball(norm, 0).project(centres + draw(*SHAPE, dtype=dtype), centres), centres)


def test_l1_step_is_the_greedy_one() -> None:
    points, gradient = pictures(*SHAPE), draw(*SHAPE)
    gradient[1, 0] = 0
    lengths = torch.tensor([0.3, 2.5, 7, 1e3], dtype=torch.float64)
    expected = points.flatten(1).clone()
    for row, length in enumerate(lengths.tolist()):
        slopes = gradient[row].flatten()
        for index in slopes.abs().argsort(descending=True).tolist():
            if slopes[index] != 0:
                value = float(expected[row, index])
                move = min(length, 1 - value if slopes[index] > 0 else value)
                expected[row, index] += math.copysign(move, float(slopes[index]))
                length -= move
    stepped = points + L1.ascend(gradient, lengths, points, 1 - points)
    torch.testing.assert_close(stepped, expected.view(SHAPE))


def test_l1_step_without_a_box_moves_one_coordinate() -> None:
    features = draw(2, 5)
    gradient = torch.tensor([[1.0, -3, 3, 2, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    change = Ball(L1, 0.5, -math.inf, math.inf).step(features, features, gradient, 0.5) - features
    assert int((change != 0).sum()) == 1
    torch.testing.assert_close(dot(change, gradient), torch.tensor([1.5, 0], dtype=torch.float64))


@norms
def test_random_starts_are_inside_and_repeatable(norm: Norm) -> None:
    centres, ball = pictures(*SHAPE, dtype=torch.float32), Ball(norm, 0.1)
    first, second = (ball.random(centres, torch.Generator().manual_seed(3)) for _ in range(2))
    other = ball.random(centres, torch.Generator().manual_seed(4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert max(float(part.max()) for part in ball.violation(first, centres)) <= 1e-6


@norms
def test_violation_reports_what_is_broken(norm: Norm) -> None:
    centres = torch.full(SHAPE, 0.5, dtype=torch.float32)
    direction = norm.steepest(draw(*SHAPE, dtype=torch.float32))
    ball = Ball(norm, 0.1)
    assert ball.violation(centres + 0.1 * direction, centres).norm.max() <= 1e-6
    torch.testing.assert_close(
        ball.violation(centres + 0.11 * direction, centres).norm,
        torch.full((4,), 0.01, dtype=torch.float64),
        atol=1e-5,
        rtol=0,
    )
    points = centres.clone()
    points[2, 0, 0, 0], points[3, 1, 2, 3] = -0.25, 1.5
    assert ball.violation(points, centres).box.tolist() == [0, 0, 0.25, 0.5]
    assert Ball(norm, 0.1, -math.inf, math.inf).violation(points, centres).box.max() == 0


def test_names() -> None:
    for norm in (LINF, L2, L1, FOURIER_LINF, BAND, ONE_OVER_F, LOW_ONE_OVER_F):
        assert parse_norm(norm.name).name == str(norm) == norm.name
        torch.testing.assert_close(parse_norm(norm.name).dual(draw(*SHAPE)), norm.dual(draw(*SHAPE)), rtol=0, atol=0)
    fine = FourierLInf((1e-5, 0.12345678), one_over_f)
    assert fine.name == "fourier-linf/f[0.00001,0.12345678]"
    assert parse_norm(fine.name).band == fine.band  # type: ignore[attr-defined]
    assert parse_norm("l1") is L1
    assert BAND.name == "fourier-linf[0.1,0.8]"
    assert doctest.testmod(norms_module).failed == 0


@pytest.mark.parametrize(
    "name", ["l3", "", "fourier-linf[0.1]", "fourier-linf[a,b]", "fourier-linf/g", "fourier-linf/f[0.5,0.1]"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"fourier-linf.*low") as error:
        parse_norm(name)
    assert "\n" not in str(error.value)


def test_impossible_balls_are_refused() -> None:
    for epsilon in (-1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="epsilon"):
            Ball(L2, epsilon)
    with pytest.raises(InputError, match="box"):
        Ball(L2, 1.0, 1.0, 0.0)
    with pytest.raises(InputError, match="needs pictures"):
        FOURIER_LINF.measure(torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"fourier-linf\[0.4,0.45\]: no frequency of 4 × 6 pixels lies in the band"):
        FourierLInf((0.4, 0.45)).measure(torch.zeros(1, 4, 6))
