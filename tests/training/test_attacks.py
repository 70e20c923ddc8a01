"""Attacks against encoders whose worst case is known, and against naive versions of themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.attack_trials import closed_form
from training.robustness.attacks import Attacked, Objective, Value, apgd, fgsm, pgd, square
from training.robustness.attacks import _checkpoints as checkpoints
from training.robustness.balls import Ball
from training.robustness.norms import FOURIER_LINF, L1, L2, LINF, FourierLInf, Norm, parse_norm

SHAPE = (3, 3, 8, 8)


def pictures(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(weights: Tensor, goal: float = float("inf")) -> Objective:
    def at(points: Tensor, rows: Tensor) -> Value:
        loss = (points * weights[rows]).flatten(1).sum(1)
        return Value(loss, loss > goal)

    return at


def wavy(points: Tensor, rows: Tensor) -> Value:
    """Curved, with another optimum for every example."""
    loss = torch.sin(5 * points + rows[:, None, None, None]).flatten(1).mean(1)
    return Value(loss, torch.zeros(len(rows), dtype=torch.bool))


WEIGHTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))


def worst(images: Tensor, epsilon: float) -> Tensor:
    """Naively, pixel by pixel: the largest score of the linear encoder in the ℓ∞ ball and the box."""
    best = images.clone()
    for index in range(images.numel()):
        x, w = images.flatten()[index], WEIGHTS.flatten()[index]
        best.view(-1)[index] = min(x + epsilon, torch.tensor(1.0)) if w > 0 else max(x - epsilon, torch.tensor(0.0))
    return (best * WEIGHTS).flatten(1).sum(1)


ONE_OVER_F, SOME_ONE_OVER_F = parse_norm("fourier-linf/f"), parse_norm("fourier-linf/f[0.1,0.9]")


@pytest.mark.parametrize(
    "norm", [LINF, L2, L1, FOURIER_LINF, FourierLInf((0.1, 0.9)), ONE_OVER_F, SOME_ONE_OVER_F], ids=str
)
def test_linear_worst_case_is_reached_in_every_norm(norm: Norm) -> None:
    assert closed_form(norm).passed, closed_form(norm)


@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
def test_linear_worst_case_in_the_box(attack: object) -> None:
    images = pictures()
    found = attack(linear(WEIGHTS), images, Ball(LINF, 0.1))  # type: ignore[operator]
    torch.testing.assert_close(found.loss, worst(images, 0.1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [LINF, L2, L1, FOURIER_LINF, ONE_OVER_F, SOME_ONE_OVER_F], ids=str)
@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "square"])
def test_every_attack_stays_inside_and_says_what_it_found(norm: Norm, name: str) -> None:
    images = pictures()
    ball = Ball(norm, 2.0 if norm is L1 else 0.3)
    run = {
        "fgsm": lambda: fgsm(wavy, images, ball),
        "pgd": lambda: pgd(wavy, images, ball, 5),
        "apgd": lambda: apgd(wavy, images, ball, 7),
        "square": lambda: square(wavy, images, ball, 20),
    }[name]
    found = run()
    assert found.points.min() >= 0
    assert found.points.max() <= 1
    assert (norm.measure(found.points.double() - images.double()) <= ball.epsilon + 1e-6).all()
    assert found.violation.norm.max() <= 1e-6
    torch.testing.assert_close(found.loss, wavy(found.points, torch.arange(3)).loss)
    steps = {"fgsm": 1, "pgd": 5, "apgd": 7, "square": 19}[name]
    assert found.trace.shape == (steps + 1, 3)
    assert (found.trace.diff(dim=0) >= 0).all()
    assert torch.equal(found.trace[-1], found.loss)
    assert found.passes == 3 * (steps + 1)
    again = run()
    assert torch.equal(again.points, found.points)


def test_attacks_get_stronger() -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = torch.randn(192, 64, generator=generator) / 4, torch.randn(64, generator=generator)

    def network(points: Tensor, rows: Tensor) -> Value:
        return Value(torch.tanh((points - 0.5).flatten(1) @ first) @ last, rows < 0)

    images, ball = torch.rand(20, 3, 8, 8, generator=generator), Ball(LINF, 0.2)
    clean = network(images, torch.arange(20)).loss.mean()
    noise = network(ball.random(images, generator), torch.arange(20)).loss.mean()
    black, one, ten, adaptive = (
        found.loss.mean()
        for found in (
            square(network, images, ball, 100),
            fgsm(network, images, ball),
            pgd(network, images, ball, 20),
            apgd(network, images, ball, 20),
        )
    )
    assert abs(noise - clean) < black - clean
    assert black < one < ten < adaptive


def test_pgd_is_projected_gradient_ascent() -> None:
    images = pictures(dtype=torch.float64)
    found = pgd(wavy, images, Ball(LINF, 0.1), 3, step_size=0.5, start=images)
    points, best = images.clone(), wavy(images, torch.arange(3)).loss
    for _ in range(3):
        points.requires_grad_(True)
        (slope,) = torch.autograd.grad(wavy(points, torch.arange(3)).loss.sum(), points)
        points = points.detach() + 0.05 * slope.sign()
        points = torch.minimum(torch.maximum(points, images - 0.1), images + 0.1).clamp(0, 1)
        best = torch.maximum(best, wavy(points, torch.arange(3)).loss)
    torch.testing.assert_close(found.loss, best)


def test_apgd_follows_its_algorithm() -> None:
    """The published recipe in a plain loop over single examples."""
    images, ball, steps = pictures(dtype=torch.float64), Ball(LINF, 0.3), 20
    found = apgd(wavy, images, ball, steps, start=images)
    for row in range(3):
        centre, index = images[row : row + 1], torch.tensor([row])

        def value(x: Tensor, index: Tensor = index) -> tuple[float, Tensor]:
            x = x.clone().requires_grad_(True)
            loss = wavy(x, index).loss.sum()
            return loss.item(), torch.autograd.grad(loss, x)[0]

        def project(x: Tensor, centre: Tensor = centre) -> Tensor:
            return torch.minimum(torch.maximum(x, centre - 0.3), centre + 0.3).clamp(0, 1)

        x, before, step = centre, centre, 0.6
        loss, slope = value(x)
        best, best_x, best_slope = loss, x, slope
        mark, rises, reduced, last = best, 0, False, 0
        for k in range(steps):
            z = project(x + step * slope.sign())
            if k:
                z = project(x + 0.75 * (z - x) + 0.25 * (x - before))
            new, new_slope = value(z)
            rises += new > loss
            before, x, loss, slope = x, z, new, new_slope
            if new > best:
                best, best_x, best_slope = new, z, new_slope
            if k + 1 in checkpoints(steps):
                if rises < 0.75 * (k + 1 - last) or (not reduced and best <= mark):
                    step, reduced = step / 2, True
                    x, loss, slope = best_x, best, best_slope
                else:
                    reduced = False
                mark, rises, last = best, 0, k + 1
        assert float(found.loss[row]) == pytest.approx(best, abs=1e-12)


def test_checkpoints_come_closer() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_zero_radius_gives_the_pictures_back() -> None:
    for norm in (LINF, L2, L1, FOURIER_LINF):
        assert torch.equal(apgd(wavy, pictures(), Ball(norm, 0.0), 3).points, pictures())


def test_examples_do_not_depend_on_each_other() -> None:
    images = pictures()
    whole = apgd(wavy, images, Ball(LINF, 0.1), 12, start=images, batch_size=2)
    for row in range(3):

        def one(points: Tensor, rows: Tensor, row: int = row) -> Value:
            return wavy(points, rows + row)

        alone = apgd(one, images[row : row + 1], Ball(LINF, 0.1), 12, start=images[row : row + 1])
        torch.testing.assert_close(alone.points[0], whole.points[row])


def test_radii_may_differ_by_example() -> None:
    images = pictures()
    found = apgd(linear(WEIGHTS), images, Ball(LINF, torch.tensor([0.0, 0.05, 0.1])), 10, start=images)
    moved = (found.points - images).abs().flatten(1).amax(1)
    assert moved.tolist() == pytest.approx([0, 0.05, 0.1], abs=1e-6)


def test_finished_examples_stop_and_keep_the_strongest_point_that_did_it() -> None:
    images = pictures()
    start = (images * WEIGHTS).flatten(1).sum(1)
    goal = float(start.sort().values[1] + 0.05)  # two of three are near it
    eager = apgd(linear(WEIGHTS, goal), images, Ball(LINF, 0.01), 30, start=images, least=0)
    thorough = apgd(linear(WEIGHTS, goal), images, Ball(LINF, 0.01), 30, start=images)
    assert eager.done.tolist() == thorough.done.tolist()
    assert eager.passes < thorough.passes == 3 * 31
    assert (eager.loss <= thorough.loss + 1e-6).all()


def test_what_cannot_be_attacked_is_refused() -> None:
    ball = Ball(LINF, 0.1)
    with pytest.raises(InputError, match="before normalisation"):
        fgsm(wavy, pictures() - 1, ball)
    with pytest.raises(InputError, match="not differentiable"):
        fgsm(lambda x, rows: Value(x.detach().flatten(1).sum(1), rows < 0), pictures(), ball)
    with pytest.raises(InputError, match="float32 or float64"):
        fgsm(wavy, pictures().half(), ball)
    with pytest.raises(InputError, match="not finite"):
        fgsm(lambda x, rows: Value((x / 0).flatten(1).sum(1), rows < 0), pictures(), ball)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attack", [fgsm, pgd, apgd, square])
def test_other_dtypes_are_refused_in_one_line(attack: Callable[..., Attacked], dtype: torch.dtype) -> None:
    for norm in (LINF, L2, L1):
        with pytest.raises(InputError, match=f"^attacks run in float32 or float64, not {dtype}; divide 8-bit pixels"):
            attack(wavy, (255 * pictures()).to(dtype), Ball(norm, 0.1))


@pytest.mark.parametrize("norm", [LINF, L2, L1, FOURIER_LINF], ids=str)
@pytest.mark.parametrize("attack", [fgsm, pgd, apgd, square])
def test_no_examples_have_an_outcome_without_examples(attack: Callable[..., Attacked], norm: Norm) -> None:
    none = pictures()[:0]
    found = attack(wavy, none, Ball(norm, 0.1))
    assert found.points.shape == none.shape
    assert (len(found.loss), len(found.done), len(found.flat), found.passes) == (0, 0, 0, 0)
    assert found.trace.shape[1] == 0


def test_a_steep_gradient_is_finite() -> None:
    """Each entry is finite in float32; their sum is not."""

    def steep(points: Tensor, rows: Tensor) -> Value:
        return Value(((points - 0.5) * 1e37).flatten(1).mean(1) * 192, rows < 0)

    images = pictures()
    found = fgsm(steep, images, Ball(LINF, 0.1))
    torch.testing.assert_close(found.points, (images + 0.1).clamp(max=1))


def test_flat_gradients_are_reported() -> None:
    def at(points: Tensor, rows: Tensor) -> Value:
        return Value((points * (rows > 0)[:, None, None, None]).flatten(1).sum(1), rows < 0)

    assert pgd(at, pictures(), Ball(LINF, 0.1), 2).flat.tolist() == [True, False, False]


def test_leaving_the_ball_is_a_bug_that_shows() -> None:
    class Broken(Ball):
        def project(self, points: Tensor, centres: Tensor) -> Tensor:
            return points.clamp(0, 1)

    with pytest.raises(RuntimeError, match="left its linf ball"):
        pgd(linear(WEIGHTS), pictures(), Broken(LINF, 0.01), 5)


def test_fourier_apgd_reaches_what_flawed_arithmetic_does_not() -> None:
    """Released code multiplied the step of 2ε with a direction of size ε, and took the picture for the last change.

    On a linear model the attainable increase is ε times the dual norm of its weights.
    """
    generator = torch.Generator().manual_seed(0)
    centres = 0.2 + 0.6 * torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    epsilon, steps = 4 / 255, 100
    attainable = epsilon * float(FOURIER_LINF.dual(weights))

    def increase(points: Tensor) -> Tensor:
        return ((points - centres) * weights).flatten(1).sum(1) / attainable

    def objective(points: Tensor, rows: Tensor) -> Value:
        loss = (points * weights).flatten(1).sum(1)
        return Value(loss, torch.zeros(len(loss), dtype=torch.bool))

    ours = apgd(objective, centres, Ball(FOURIER_LINF, epsilon), steps).points
    assert (increase(ours) >= 0.999).all()

    change = torch.zeros_like(centres)
    for _ in range(steps):
        direction = epsilon * FOURIER_LINF.steepest(weights.expand_as(centres))
        z = FOURIER_LINF.project(change + 2 * epsilon * direction, epsilon)
        wrong = change + 0.75 * (z - change) + 0.25 * (change - (centres + change))
        change = FOURIER_LINF.project(wrong, epsilon)
    assert (increase((centres + change).clamp(0, 1)) < 0.5).all()
