"""Attack one picture against the gallery that is being searched, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event, Thread

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.robustness.balls import Ball
from training.robustness.curves import AttackSettings, attack, attack_curve
from training.robustness.norms import L1, L2, LINF, parse_norm
from vse_app.attack_case import AttackRequest, AttackTarget, Case, build_case
from vse_app.decoding import give_way

SHOWN = 10
_CURVE_STEPS = 8  # a defended picture costs twice as many, at each radius
_LADDER = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # the curve's radii, in units of the attack's


@dataclass(frozen=True)
class Progress:
    """Where an attack is.

    Attributes:
        step: Evaluations so far, the random start included.
        steps: Of how many; those of the curve, which stop early, are not foreseen.
        loss: What the attack raises: the margin by which the hardest goal is reached, in units of the score.
        rank: Of the right answer at this step's point, from 1.
        curve: Whether the attack is over and the curve is being measured.
    """

    step: int
    steps: int
    loss: float
    rank: int
    curve: bool


@dataclass(frozen=True)
class Ranked:
    """One of the things found, before and after the attack; ranks from 1."""

    id: int
    text: str
    before: int
    after: int
    score_before: float
    score_after: float
    own: bool


@dataclass(frozen=True)
class Outcome:
    """What an attack did.

    Attributes:
        clean: The picture as the model sees it.
        adversarial: The attacked one in 8 bits, as a PNG would hold it.
        difference: Grey plus ten times the change.
        spectrum: Logarithm of the change's Fourier magnitudes; low frequencies in the middle.
        among: How many things are ranked.
        rank_before: Of the right answer for the clean picture, from 1; of the picture itself in gallery threats.
        rank_after: For the attacked picture in full precision: a bound of the worst from one side only.
        rank_after_8bit: For :attr:`adversarial`.
        reached: Whether the hardest goal is: ten others stand before the right answer (in a gallery of fewer, all of
            them), or the lifted picture stands first.
        survives_8bit: Whether that is as bad.
        norms: Size of the change in full precision: ``linf``, ``l2``, ``l1``.
        before: The first ten for the clean picture.
        after: The first ten for the attacked one.
        curve: ``(ε, rank)`` from 0 on, never better for a larger ε: what the attack reached, so the worst rank there
            is (lifting: the best) lies at it or beyond.
        seconds: What all of it took.
    """

    clean: Image.Image
    adversarial: Image.Image
    difference: Image.Image
    spectrum: Image.Image
    among: int
    rank_before: int
    rank_after: int
    rank_after_8bit: int
    reached: bool
    survives_8bit: bool
    norms: dict[str, float]
    before: tuple[Ranked, ...]
    after: tuple[Ranked, ...]
    curve: tuple[tuple[float, int], ...]
    seconds: float


def run(
    target: AttackTarget,
    image: Image.Image,
    request: AttackRequest,
    own: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[Progress | Outcome, None, None]:
    """Attack a picture; closing the generator stops the attack within a step.

    Args:
        target: The gallery.
        image: The picture.
        request: What to try.
        own: Id of the picture, if it is in the gallery.
        cancelled: Asked after each evaluation, in another thread; the attack ends without an outcome once it says so.

    Yields:
        Progress after each evaluation, and one outcome at the end.

    Raises:
        InputError: If there is nothing to rank, or a search is missing.
    """
    news: SimpleQueue[Progress | Outcome | BaseException] = SimpleQueue()
    closed = Event()

    def report(progress: Progress) -> None:
        if closed.is_set() or cancelled():
            raise _Cancelled
        news.put(progress)

    def work() -> None:
        give_way()
        try:
            news.put(_attack(target, image, request, own, report))
        except BaseException as error:
            news.put(error)

    # Not torch.set_num_threads(1) in there: every thread that begins later would be held to one core as well.
    thread = Thread(target=work, name="attack")
    thread.start()
    try:
        while True:
            one = news.get()
            if isinstance(one, _Cancelled):
                return
            if isinstance(one, BaseException):
                raise one
            yield one
            if isinstance(one, Outcome):
                return
    finally:
        closed.set()
        thread.join()


class _Cancelled(Exception):
    pass


def _attack(
    target: AttackTarget,
    image: Image.Image,
    request: AttackRequest,
    own: int | None,
    report: Callable[[Progress], None],
) -> Outcome:
    started = time.perf_counter()
    tower = target.model.image_tower
    view = target.model.transform()(image.convert("RGB"), None)[None].to(target.model.device)  # uint8 (1, 3, S, S)
    pixels = view.float() / 255
    with torch.no_grad():
        clean = tower(view)
    case: Case
    done, measuring, only = 0, False, torch.zeros(1, dtype=torch.long, device=view.device)

    def watched(points: Tensor) -> Tensor:
        nonlocal done
        embedding: Tensor = tower(points)
        here, threat = embedding.detach(), case.threat
        loss = float(threat.value(here, only, "margin", threat.goal, 0).loss)
        report(Progress(done, request.steps, loss, _rank(case, here), measuring))
        done += 1
        return embedding

    case = build_case(target, request, own, clean, watched)
    norm = parse_norm(request.norm)
    settings = AttackSettings(norm, steps=request.steps, least=None, seed=request.seed, batch_size=1)
    attacked = attack(case.threat, pixels, Ball(norm, request.epsilon), settings)
    points, measuring = attacked.points, True
    radii = [epsilon for share in _LADDER if (epsilon := share * request.epsilon) <= 1 or request.norm != "linf"]
    curve = attack_curve(case.threat, pixels, radii, replace(settings, steps=min(request.steps, _CURVE_STEPS)))
    saved = (points * 255).round().to(torch.uint8)
    with torch.no_grad():
        reached, rounded = tower(points), tower(saved)
    before, after = case.ranks(clean), case.ranks(reached)
    rank_after, rank_8bit = _rank(case, reached), _rank(case, rounded)
    lifted = request.threat == "gallery-promote"
    found = curve.ranks[:, 0, 0] + 1
    found[list(curve.epsilons).index(request.epsilon)] = rank_after
    # What a smaller ball holds, a larger one holds too.
    worst = (np.minimum if lifted else np.maximum).accumulate(found)
    change = (points - pixels)[0].cpu()
    return Outcome(
        clean=_picture(view[0]),
        adversarial=_picture(saved[0]),
        difference=_picture(((0.5 + 10 * change).clamp(0, 1) * 255).to(torch.uint8)),
        spectrum=_spectrum(change),
        among=len(case.ids),
        rank_before=_rank(case, clean),
        rank_after=rank_after,
        rank_after_8bit=rank_8bit,
        reached=bool(attacked.done[0]),
        survives_8bit=rank_8bit <= rank_after if lifted else rank_8bit >= rank_after,
        norms={one.name: float(one.measure(change[None])) for one in (LINF, L2, L1)},
        before=_first(target, case, before, after, before[1]),
        after=_first(target, case, before, after, after[1]),
        curve=tuple(zip(curve.epsilons, worst.tolist(), strict=True)),
        seconds=time.perf_counter() - started,
    )


def _rank(case: Case, embedding: Tensor) -> int:
    return int(case.threat.ranks(embedding)[0, 0]) + 1


def _first(
    target: AttackTarget,
    case: Case,
    before: tuple[NDArray[np.float32], NDArray[np.int64]],
    after: tuple[NDArray[np.float32], NDArray[np.int64]],
    by: NDArray[np.int64],
) -> tuple[Ranked, ...]:
    return tuple(
        Ranked(
            id=int(case.ids[n]),
            text=target.name(int(case.ids[n])),
            before=int(before[1][n]),
            after=int(after[1][n]),
            score_before=float(before[0][n]),
            score_after=float(after[0][n]),
            own=bool(case.own[n]),
        )
        for n in np.argsort(by)[:SHOWN]
    )


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _spectrum(change: Tensor) -> Image.Image:
    magnitude = torch.fft.fftshift(torch.fft.fft2(change.double()).abs().mean(0)).clamp(min=1e-12).log()
    low, high = magnitude.quantile(0.01), magnitude.max()
    grey = ((magnitude - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    return Image.fromarray(grey.to(torch.uint8).numpy())
