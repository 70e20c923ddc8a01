"""Each check passes on what is sound and fails on what is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.similarity import COSINE
from training.robustness import checks
from training.robustness.attack_trials import Trials, closed_form, noisy_copy, planted
from training.robustness.balls import Ball
from training.robustness.checks import Check
from training.robustness.curves import AttackSettings
from training.robustness.norms import L1, L2, LINF, FourierLInf, parse_norm
from training.robustness.retrieval_threats import QueryImage

RANKS = np.array([0, 3, 1])


@pytest.mark.parametrize(
    ("number", "sound", "broken"),
    [
        (1, lambda: checks.zero_changes_nothing(RANKS, RANKS), lambda: checks.zero_changes_nothing(RANKS, RANKS + 1)),
        (2, lambda: checks.success_grows((0, 1, 2), (0, 40, 39.5)), lambda: checks.success_grows((0, 1), (40, 30))),
        (
            3,
            lambda: checks.large_radius_breaks_everything(0, 0.1, 0.25, 12),
            lambda: checks.large_radius_breaks_everything(8, 0.1, 0.25, 12),
        ),
        (
            4,
            lambda: checks.stronger_attacks_do_more(50, 70, 80, (0, 0.1, 0.2)),
            lambda: checks.stronger_attacks_do_more(50, 70, 60, (0, 0.1, 0.2)),
        ),
        (
            4,
            lambda: checks.stronger_attacks_do_more(100, 100, 100, (0, 0.1, 0.2)),
            lambda: checks.stronger_attacks_do_more(100, 100, 100, (0.3, 0.1, 0.2)),
        ),
        (5, lambda: checks.white_box_does_most(90, 20, 1), lambda: checks.white_box_does_most(20, 90, 1)),
        (5, lambda: checks.white_box_does_most(90, 20, 1), lambda: checks.white_box_does_most(90, 1, 20)),
        (6, lambda: checks.more_steps_add_little(1.9, 6), lambda: checks.more_steps_add_little(2.0, 6)),
        (7, lambda: checks.restarts_add_little(0, 6), lambda: checks.restarts_add_little(5, 6)),
        (8, lambda: checks.gradients_are_alive(0, 6), lambda: checks.gradients_are_alive(1, 6)),
        (9, lambda: checks.perturbations_stay_inside(1e-7), lambda: checks.perturbations_stay_inside(2e-6)),
        (10, lambda: checks.forward_repeats(0.0), lambda: checks.forward_repeats(1e-9)),
        (11, lambda: checks.planted_pictures_are_found(99, 100), lambda: checks.planted_pictures_are_found(98, 100)),
        (11, lambda: checks.planted_pictures_are_found(1, 1), lambda: checks.planted_pictures_are_found(0, 0)),
        (12, lambda: checks.closed_form_is_reached(0.9991, "l2"), lambda: checks.closed_form_is_reached(0.99, "l2")),
        (13, lambda: checks.random_search_adds_nothing(0.2, 6), lambda: checks.random_search_adds_nothing(1, 6)),
        (
            14,
            lambda: checks.threats_change_something({"query-text": [], "corruption": []}),
            lambda: checks.threats_change_something({"query-text": [], "corruption": ["pixelate 1"]}),
        ),
    ],
)
def test_each_check_can_fail(number: int, sound: Callable[[], Check], broken: Callable[[], Check]) -> None:
    assert sound().passed
    assert not broken().passed
    assert sound().number == broken().number == number
    assert str(broken()).startswith(f"FAIL {number:2} ")


class Encoder(nn.Module):
    """Curved, deterministic, differentiable."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 8))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.net(images), dim=1)


def trials(encoder: nn.Module, epsilon: float = 0.05) -> Trials:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 8, 8, generator=generator)
    encoder.requires_grad_(False)
    with torch.no_grad():
        clean = encoder(images)
    # Each query has one caption near it; forty others are anywhere.
    captions = F.normalize(
        torch.cat([clean + 0.05 * torch.randn(6, 8, generator=generator), torch.randn(40, 8)]), dim=1
    )
    owner = np.array([*range(6), *[6] * 40])
    threat = QueryImage.of(encoder, COSINE, captions, owner, list(range(6)), clean)
    return Trials(threat, images, encoder, AttackSettings(steps=20), epsilon)


def verdicts(found: list[Check]) -> dict[int, bool]:
    return {check.number: check.passed for check in found}


def test_a_sound_model_and_attack_pass() -> None:
    of = trials(Encoder())
    assert verdicts(of.run()) == dict.fromkeys((3, 4, 5, 10, 11, 12), True)
    found = of.persistence(torch.arange(0), hits=6, survivors=0)
    assert verdicts(found) == dict.fromkeys((6, 7, 13), True)


def test_masked_gradients_are_caught() -> None:
    """A tower that rounds its pixels to eight levels has no gradient but where it is patched through by mistake."""

    class Masked(Encoder):
        def forward(self, images: Tensor) -> Tensor:
            rounded = (images * 8).round() / 8
            return super().forward(rounded + 1e-4 * (images - images.detach()) * torch.randn_like(images).sign())

    found = verdicts(trials(Masked()).run())
    assert not all(found.values())
    assert not found[3] or not found[11]


def test_a_random_model_is_caught() -> None:
    class Noisy(Encoder):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + 0.01 * torch.randn_like(images))

    assert not verdicts(trials(Noisy()).run())[10]


def test_attack_that_left_something_is_caught() -> None:
    found = verdicts(trials(Encoder()).persistence(torch.arange(6), hits=6, survivors=6))
    assert found[6] is False
    assert found[7] is False


def test_planted_weakness_is_missed_without_gradients() -> None:
    of = trials(Encoder())

    class Dead(Encoder):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.detach() + 0 * images)

    ball = Ball(LINF, 0.05)
    assert planted(of.threat, of.images, ball, of.settings).passed
    dead = Dead().requires_grad_(False)
    blind = QueryImage(dead, COSINE, of.threat.gallery, of.threat.own, of.threat.targets)
    assert not planted(blind, of.images, ball, of.settings).passed


@pytest.mark.parametrize("norm", [LINF, L2, L1, FourierLInf(), parse_norm("fourier-linf/f[0,0.9]")], ids=str)
def test_planted_weaknesses_are_found_in_every_norm(norm: object) -> None:
    of = trials(Encoder())
    radius = {"linf": 0.05, "l2": 0.5, "l1": 5.0, "fourier-linf": 0.1, "fourier-linf/f[0,0.9]": 0.5}[str(norm)]
    assert planted(of.threat, of.images, Ball(norm, radius), of.settings).passed  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["fourier-linf", "fourier-linf[0,0.7]", "fourier-linf/f", "fourier-linf/f[0,0.9]"])
def test_the_large_radius_allows_for_what_a_norm_leaves_out(norm: str) -> None:
    of = trials(Encoder())
    found = replace(of, settings=replace(of.settings, norm=parse_norm(norm))).large_radius()
    assert found.passed, found


def test_closed_form_notices_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert closed_form(L2).passed
    monkeypatch.setattr(type(L2), "steepest", lambda self, g: LINF.steepest(g) / g[0].numel() ** 0.5)
    assert not closed_form(L2).passed


def test_noisy_copy_leaves_the_model_alone() -> None:
    encoder = Encoder()
    before = [weight.clone() for weight in encoder.parameters()]
    twin = noisy_copy(encoder, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))
