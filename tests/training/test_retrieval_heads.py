"""Retrieval heads: steps and losses against naive references, and which attack which optimiser withstands."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.robustness.linear.retrieval_heads import (
    HEAD_OPTIMIZERS,
    MARGIN_PAIRS,
    evaluate_head,
    margin_penalty,
    ranking_loss,
    steepest_step,
    train_head,
)
from training.robustness.norms import L1, L2, LINF, Norm

OPTIMIZERS = pytest.mark.parametrize("optimizer", HEAD_OPTIMIZERS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_problem(images: int = 6, captions: int = 2, width: int = 20, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features, captions in mixed order, and whose they are."""
    order = torch.randperm(images * captions, generator=torch.Generator().manual_seed(2))
    owner = torch.arange(images).repeat(captions)[order]
    return normal(images, width), normal(images * captions, dim, seed=1), owner


def step_norm(step: Tensor, optimizer: str) -> float:
    """The norm whose unit ball an optimiser's steps are taken from, by its definition."""
    if optimizer == "spectral":
        return float(torch.linalg.svdvals(step)[0])
    if optimizer == "rows":
        return float(step.abs().sum(dim=1).max())
    entries: list[float] = step.abs().flatten().tolist()
    return {"gradient": math.hypot(*entries), "sign": max(entries), "coordinate": sum(entries)}[optimizer]


@OPTIMIZERS
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_steps_are_the_textbook_ones(optimizer: str, shape: tuple[int, int]) -> None:
    gradient = normal(*shape)
    step, gain = steepest_step(gradient, optimizer)
    if optimizer == "spectral":
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        wanted, dual = left @ right, values.sum()
    elif optimizer == "rows":
        wanted, dual = torch.zeros(shape, dtype=torch.float64), gradient.abs().amax(1).sum()
        for row, column in enumerate(gradient.abs().argmax(1).tolist()):
            wanted[row, column] = math.copysign(1, gradient[row, column])
    elif optimizer == "coordinate":
        wanted, dual = torch.zeros(shape, dtype=torch.float64), gradient.abs().max()
        row, column = divmod(int(gradient.abs().argmax()), shape[1])
        wanted[row, column] = math.copysign(1, gradient[row, column])
    elif optimizer == "sign":
        wanted, dual = torch.where(gradient > 0, 1.0, -1.0).double(), gradient.abs().sum()
    else:
        wanted, dual = gradient / gradient.norm(), gradient.norm()
    torch.testing.assert_close(step, wanted)
    torch.testing.assert_close(gain, dual)


@OPTIMIZERS
def test_no_random_step_of_unit_norm_gains_more(optimizer: str) -> None:
    gradient = normal(4, 7)
    step, gain = steepest_step(gradient, optimizer)
    assert step_norm(step, optimizer) == pytest.approx(1)
    assert float((gradient * step).sum()) == pytest.approx(float(gain))
    for other in normal(1000, 4, 7, seed=1):
        # Half of them are near the best, where a wrong one would be found out.
        for candidate in (other, step + 0.1 * other):
            assert float((gradient * candidate).sum()) / step_norm(candidate, optimizer) <= float(gain) * (1 + 1e-9)


def test_a_spectral_step_ignores_the_null_space_and_a_zero_gradient_moves_nothing() -> None:
    thin = normal(6, 2) @ normal(2, 8, seed=1)
    for gradient in (thin, thin.float()):
        step, _ = steepest_step(gradient, "spectral")
        assert torch.linalg.svdvals(step.double())[2:].max() < 1e-4
    for optimizer in HEAD_OPTIMIZERS:
        step, gain = steepest_step(torch.zeros(3, 4), optimizer)
        assert not step.any()
        assert gain == 0


def naive_loss(weight: Tensor, features: Tensor, gallery: Tensor, owner: Tensor) -> Tensor:
    losses = []
    for p, i in enumerate(owner.tolist()):
        rivals = [j for j, other in enumerate(owner.tolist()) if other != i]
        margins = [(gallery[p] - gallery[j]) @ (weight @ features[i]) for j in rivals]
        losses.append(torch.log1p(sum((torch.exp(-m) for m in margins), torch.zeros((), dtype=weight.dtype))))
    return torch.stack(losses).mean().log()


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_the_loss_and_its_gradient_are_those_of_the_loops(scale: float) -> None:
    features, gallery, owner = a_problem()
    weight = (scale * normal(5, 20, seed=2)).requires_grad_()
    wanted = naive_loss(weight, features, gallery, owner)
    (gradient,) = torch.autograd.grad(wanted, weight)
    value, slope = ranking_loss(weight.detach(), features, gallery, owner)
    assert value == pytest.approx(float(wanted.detach()))
    torch.testing.assert_close(slope, gradient)


def test_far_from_the_boundary_it_is_the_exponential_loss_and_does_not_underflow() -> None:
    features, gallery, owner = torch.eye(3), torch.eye(3), torch.arange(3)
    for scale in (30.0, 1e4):
        value, slope = ranking_loss(scale * torch.eye(3), features, gallery, owner)
        assert value == pytest.approx(math.log(2) - scale)
        # Of log Σ exp(-m), each of six pairs having an equal share.
        torch.testing.assert_close(slope, torch.full((3, 3), 1 / 6) - torch.eye(3) / 2)


def test_the_margin_penalty_and_its_subgradient() -> None:
    differences, weight = normal(7, 5), normal(5, 11, seed=1).requires_grad_()
    for attack, order in ((LINF, 1), (L2, 2), (L1, math.inf)):
        wanted = torch.linalg.vector_norm(differences @ weight, order, dim=1).mean()
        value, slope = margin_penalty(weight.detach(), differences, attack)
        assert value == pytest.approx(float(wanted.detach()))
        torch.testing.assert_close(slope, torch.autograd.grad(wanted, weight)[0])


@OPTIMIZERS
def test_a_step_is_the_steepest_one_at_the_longest_proven_length(optimizer: str) -> None:
    features, gallery, owner = a_problem()
    weight = train_head(features, gallery, owner, optimizer, steps=1, rate=1)
    step, gain = steepest_step(-ranking_loss(torch.zeros(5, 20).double(), features, gallery, owner)[1], optimizer)
    order, width = {"sign": (1, 1), "coordinate": (math.inf, math.inf), "rows": (1, math.inf)}.get(optimizer, (2, 2))
    length = float((weight * step).sum() / (gain * step.square().sum()))
    torch.testing.assert_close(weight, length * gain * step)
    pairs = torch.stack([p - j for p in gallery for j in gallery])
    longest = torch.linalg.vector_norm(pairs, order, 1).max() * torch.linalg.vector_norm(features, width, 1).max()
    assert longest**-2 / 4 <= length <= longest**-2


@OPTIMIZERS
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_the_line_search_takes_the_longest_step_that_keeps_half_of_its_promise(optimizer: str, lam: float) -> None:
    features, gallery, owner = problem = a_problem()
    regularizer = "margin" if lam else "none"
    seen: list[Tensor] = []
    train_head(*problem, optimizer, regularizer, lam, L1, 3, seed=7, observe=lambda _, w: seen.append(w.clone()))
    generator, before = torch.Generator().manual_seed(7), torch.zeros(5, 20, dtype=torch.float64)
    for after in seen:
        first, second = torch.randint(12, (2, MARGIN_PAIRS), generator=generator)
        apart = (gallery[first] - gallery[second])[owner[first] != owner[second]]

        def objective(weight: Tensor, apart: Tensor = apart) -> tuple[float, float]:
            loss = float(naive_loss(weight, features, gallery, owner).exp())
            return loss, margin_penalty(weight, apart, L1)[0] if lam else 0.0

        slope = ranking_loss(before, *problem)[1]
        if lam:
            slope += lam * margin_penalty(before, apart, L1)[1]
        step, dual = steepest_step(-slope, optimizer)
        length = float(((after - before) * step).sum() / step.square().sum() / dual)
        torch.testing.assert_close(after, before + length * dual * step)
        kept = []
        for t in (length, 2 * length):
            (loss, penalty), (old_loss, old) = objective(before + t * dual * step), objective(before)
            kept.append(loss / old_loss - 1 + lam * (penalty - old) <= -0.5 * t * float(dual) ** 2)
        if after is seen[0]:  # later searches begin with twice the step before, which may be good enough
            assert not kept[1]
        assert kept[0] or lam  # where a penalty has a kink, the longest proven step is taken
        before = after


@pytest.mark.parametrize("rate", [1.0, None])
def test_on_separable_data_the_matching_optimiser_withstands_most(rate: float | None) -> None:
    # Two pictures and captions 1 and -1: the certificate is the margin of a vector, and theory is exact.
    features, gallery, owner = normal(2, 30, seed=3), torch.tensor([[1.0], [-1.0]]).double(), torch.arange(2)
    radii: dict[str, dict[str, float]] = {}
    for optimizer in ("gradient", "sign", "coordinate"):
        head = train_head(features, gallery, owner, optimizer, steps=2000, rate=rate)
        found = evaluate_head(head, features, gallery, owner)
        assert found.clean == 1
        radii[optimizer] = {norm: float(of.min()) for norm, of in found.radii.items()}
    for optimizer, norm in (("gradient", "l2"), ("sign", "l1"), ("coordinate", "linf")):
        for other in radii.keys() - {optimizer}:
            assert radii[optimizer][norm] > 1.1 * radii[other][norm]


@pytest.mark.parametrize(
    ("optimizer", "attack", "order"),
    [
        ("gradient", L2, 2),
        ("sign", L1, 1),
        ("coordinate", LINF, math.inf),
        ("spectral", L2, 2),
        ("rows", LINF, 1),
    ],
)
def test_the_margin_of_the_matrix_bounds_the_certificate(optimizer: str, attack: Norm, order: float) -> None:
    features, gallery, owner = a_problem(captions=1, dim=8)
    weight = train_head(features, gallery, owner, optimizer, steps=100, rate=30)
    radii = evaluate_head(weight, features, gallery, owner).radii[attack.name]
    scores = features @ weight.T @ gallery.T
    for i, p in enumerate(owner.argsort().tolist()):
        for j in set(range(6)) - {p}:
            apart, margin = gallery[p] - gallery[j], scores[i, p] - scores[i, j]
            exact = float(margin / attack.dual((apart @ weight)[None]))
            bound = float(margin / (step_norm(weight, optimizer) * torch.linalg.vector_norm(apart, order)))
            assert bound <= exact * (1 + 1e-9) or exact < 0
            assert radii[i] <= max(exact, 0)


def test_multiples_of_a_head_have_the_same_certificates() -> None:
    features, gallery, owner = a_problem()
    weight = train_head(features, gallery, owner, steps=20, rate=100)
    plain = evaluate_head(weight, features, gallery, owner)
    for factor in (2.0**20, 0.03):
        scaled = evaluate_head(factor * weight, features, gallery, owner)
        assert scaled.clean == plain.clean
        for norm, radii in plain.radii.items():
            torch.testing.assert_close(scaled.radii[norm], radii, rtol=1e-9, atol=0)
    moved = evaluate_head(weight, features - features[0], gallery, owner, bias=weight @ features[0])
    torch.testing.assert_close(moved.radii["l2"], plain.radii["l2"], rtol=1e-9, atol=0)
    assert plain.curve("l2", [0.0, 1e9]).tolist() == [plain.clean, 0]


@pytest.mark.parametrize(("penalty", "order"), [("l1", math.inf), ("l2", 2), ("linf", 1)])
def test_penalties_beyond_the_gradient_leave_nothing(penalty: str, order: float) -> None:
    problem = a_problem()
    slope = ranking_loss(torch.zeros(5, 20).double(), *problem)[1]
    limit = float(torch.linalg.vector_norm(slope, order))
    for share, moves in ((1.01, False), (0.99, True)):
        head = train_head(*problem, regularizer=penalty, lam=share * limit, steps=5)
        assert bool(head.any()) == moves


def test_the_margin_penalty_raises_the_certificates_it_is_for() -> None:
    features, gallery, owner = a_problem(captions=1, width=40)
    settings: dict[str, Any] = {"steps": 300, "rate": 10}
    plain = evaluate_head(train_head(features, gallery, owner, **settings), features, gallery, owner)
    head = train_head(features, gallery, owner, "gradient", "margin", 0.1, LINF, **settings)
    penalised = evaluate_head(head, features, gallery, owner)
    assert penalised.radii["linf"].min() > 1.05 * plain.radii["linf"].min()


def test_batches_are_reproducible_and_the_observer_sees_every_step() -> None:
    problem, seen = a_problem(images=9), list[int]()
    heads = [
        train_head(*problem, "sign", steps=5, batch=4, seed=seed, observe=lambda number, _: seen.append(number))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert seen == 3 * [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: 'adam' is unknown"),
        ({"regularizer": "l3"}, "regularizer: 'l3' is unknown"),
        ({"regularizer": "l1", "optimizer": "sign"}, "optimizer gradient only"),
        ({"lam": -1.0}, "penalty -1.0"),
        ({"rate": math.nan}, "rate nan"),
        ({"batch": 1}, "batch 1"),
        ({"features": torch.full((6, 20), math.nan)}, "features: a value is not finite"),
        ({"gallery": torch.full((12, 5), math.inf)}, "gallery: a value is not finite"),
        ({"features": torch.zeros(6)}, "features are"),
        ({"owner": torch.zeros(11, dtype=torch.int64)}, "owner"),
        ({"owner": torch.zeros(12, dtype=torch.int64)}, "1 rows of 6 are described"),
        ({"owner": torch.full((12,), -1)}, "owner"),
        ({"rate": 1e300, "features": normal(6, 20).float()}, "diverges at step 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    features, gallery, owner = a_problem()
    with pytest.raises(InputError, match=message) as caught:
        train_head(**({"features": features, "gallery": gallery, "owner": owner} | change))
    assert "\n" not in str(caught.value)
