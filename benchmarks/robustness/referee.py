"""Does AutoAttack break queries that our attacks leave standing? torchattacks is the referee.

    python -m benchmarks.robustness.referee RUN --data KIND:PATH --split val --site DIR --out FILE.json

Pictures are searched with against all captions, and perturbed so that their own captions lose the first rank. For each
ε and attack: R@1 that is left, by exact ranks of the pictures that the attack returns, where ties count as lost;
passes per attacked picture; wall seconds. Queries that fail when nothing is perturbed are not attacked. Equal budget
means equally many passes forward and backward: k-step PGD makes k of them and k-step APGD k + 1, ours and the peer's;
ours stop early at pictures that are broken. torchattacks requires an old requests, so it is installed apart, with
``pip install --no-deps --target DIR torchattacks scipy``.

Its AutoAttack makes 10 steps where the paper's makes 100; --autoattack-steps 10 100 runs both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from training.config import parse_epsilon
from training.data.batches import Pixels
from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.robustness.attacks import TOLERANCE, Attacked, apgd, pgd
from training.robustness.balls import Ball
from training.robustness.curves import AttackSettings, attack, attack_curve, embed_all
from training.robustness.norms import LINF
from training.robustness.retrieval_threats import CE_SCALE, QueryImage

CLASSES = 10
"""Told to AutoAttack, which aims at one class less, the best-ranked ones: 9 as in the paper, not all captions."""
BATCH = AttackSettings().batch_size

Attack = Callable[[QueryImage, Tensor, float], Tensor]


def find_torchattacks(site: Path | None) -> ModuleType | None:
    """The module, from the path or the folder; None, and a line on stderr, if it is in neither."""
    if site:
        sys.path.append(str(site))
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        print(
            f"{error}; pip install --no-deps --target DIR torchattacks scipy makes a folder for --site DIR",
            file=sys.stderr,
        )
        return None


class CountingTower(nn.Module):
    """An image tower that counts the pictures that pass it forward and backward."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        embeddings: Tensor = self.tower(images)
        if embeddings.requires_grad:
            embeddings.register_hook(self._count_backward)
        return embeddings

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class Classifier(nn.Module):
    """Retrieval as classification: the true class 0 is the best own caption, the others are the captions of others.

    Calls must pass versions of all pictures of the threat, in order: for attacks that drop pictures on the way, make
    one of each picture. Logits ``(n, 1 + G)``; own captions have minus infinity in their own places.
    """

    def __init__(self, threat: QueryImage) -> None:
        super().__init__()
        self.tower, self.threat = threat.embed, threat  # a module, so that attacks find the device
        self.eval()  # torchattacks puts a model that came in training mode back into it, and the tower with it

    def forward(self, images: Tensor) -> Tensor:
        own = self.threat.own
        if len(images) != len(own):
            raise ValueError(f"{len(images)} pictures for {len(own)} rows")
        scores = self.threat.similarity.scores(self.tower(images), self.threat.gallery)
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        return CE_SCALE * torch.cat([best, scores.masked_fill(own, -torch.inf)], 1)


class Queries(NamedTuple):
    """Pictures to attack, and what is needed to tell whether an attack succeeds; embeddings are counted."""

    model: DualEncoder
    corpus: Corpus
    tower: CountingTower
    threat: QueryImage
    images: Tensor


def load_queries(run: str, data: str, split: str, count: int, seed: int = 0) -> Queries:
    """A frozen model and some pictures as queries against all captions of a split: those an audit would choose."""
    model = DualEncoder.from_pretrained(run).eval().requires_grad_(False)
    corpus = load_corpus(data, split)
    rows: list[int] = np.random.default_rng(seed).permutation(len(corpus.image_ids))[:count].tolist()
    pixels = Pixels(corpus.images, model.transform()).fetch(np.asarray(rows), None).values
    images = pixels.to(model.device).float() / 255
    gallery = encode_corpus(model, corpus)[1].to(model.device)
    tower = CountingTower(model.image_tower).eval()
    with torch.no_grad():
        clean = torch.cat([tower(part) for part in images.split(BATCH)])
    return Queries(
        model, corpus, tower, QueryImage.of(tower, model.similarity, gallery, corpus.owner, rows, clean), images
    )


def found_first(threat: QueryImage, points: Tensor) -> NDArray[np.bool_]:
    """Which pictures rank an own caption first, both in batches and alone: rounding differs, and attacks use it."""
    ranks = [threat.ranks(embed_all(threat, points, size)) for size in (BATCH, 1)]
    return np.all(np.concatenate(ranks, axis=1) == 0, axis=1)


def our_default(threat: QueryImage, images: Tensor, epsilon: float) -> Tensor:
    return attack(threat, images, Ball(LINF, epsilon), AttackSettings(), start=images).points


def our_strong(threat: QueryImage, images: Tensor, epsilon: float) -> Tensor:
    return attack_curve(threat, images, [epsilon], AttackSettings(strong=True)).points[-1]


def our_steps(run: Callable[..., Attacked], steps: int, threat: QueryImage, images: Tensor, epsilon: float) -> Tensor:
    return run(threat.objective("margin", 1), images, Ball(LINF, epsilon), steps, least=0, batch_size=BATCH).points


def their_steps(build: Callable[..., Any], threat: QueryImage, images: Tensor, epsilon: float) -> Tensor:
    """One picture at a time: attacks go on with those that still stand and do not tell the model which."""
    torch.manual_seed(0)
    label, found = torch.zeros(1, dtype=torch.int64, device=images.device), []
    for row in tqdm(range(len(images)), delay=5, leave=False):
        attacker = build(Classifier(threat.rows(torch.tensor([row], device=images.device))), eps=epsilon)
        found.append(attacker(images[row : row + 1], label))
    return torch.cat(found).detach()


def autoattack(torchattacks: ModuleType, steps: int, model: nn.Module, eps: float) -> Any:
    """The standard version: APGD-CE, targeted APGD, targeted FAB, Square with 5,000 queries."""
    whole = torchattacks.AutoAttack(model, norm="Linf", eps=eps, version="standard", n_classes=CLASSES, seed=0)
    for part in whole._autoattack.attacks:
        if hasattr(part, "steps"):
            part.steps = steps
    return whole


def attacks(torchattacks: ModuleType, steps: int, autoattack_steps: list[int]) -> dict[str, Attack]:
    def their_pgd(model: nn.Module, eps: float) -> Any:
        return torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps, random_start=True)

    chosen: dict[str, Attack] = {
        "ours, default": our_default,
        "ours, strong": our_strong,
        f"ours, PGD-{steps}": partial(our_steps, pgd, steps),
        f"ours, APGD-{steps}": partial(our_steps, apgd, steps),
        f"torchattacks, PGD-{steps}": partial(their_steps, their_pgd),
    }
    for loss in ("ce", "dlr"):
        build = partial(torchattacks.APGD, norm="Linf", steps=steps, loss=loss, seed=0)
        chosen[f"torchattacks, APGD-{steps} {loss}"] = partial(their_steps, build)
    for count in autoattack_steps:
        chosen[f"torchattacks, AutoAttack-{count}"] = partial(their_steps, partial(autoattack, torchattacks, count))
    return chosen


def measure(queries: Queries, rows: NDArray[np.int64], epsilon: float, run: Attack) -> dict[str, Any]:
    """Attack these queries; the others count as broken.

    Raises:
        RuntimeError: If a picture leaves its ball or the range of pixels, or the tower evaluation mode.
    """
    chosen = torch.from_numpy(rows).to(queries.images.device)
    threat, images, tower = queries.threat.rows(chosen), queries.images[chosen], queries.tower
    tower.forwards = tower.backwards = 0
    begin = time.perf_counter()
    points = run(threat, images, epsilon)
    seconds = time.perf_counter() - begin
    forwards, backwards = tower.forwards, tower.backwards
    if any(module.training for module in tower.modules()):
        raise RuntimeError("the attack has left the tower in training mode")
    violation = max(float(of.max()) for of in Ball(LINF, epsilon).violation(points, images))
    if not violation <= TOLERANCE:
        raise RuntimeError(f"a picture has left its ball or [0, 1] by {violation:.3g}")
    standing = rows[found_first(threat, points)]
    return {
        "r1": 100 * len(standing) / len(queries.images),
        "passes": backwards / len(rows),
        "forward_only": (forwards - backwards) / len(rows),
        "seconds": seconds,
        "violation": violation,
        "standing": standing.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run directory or hub name")
    parser.add_argument("--data", required=True, help="KIND:PATH")
    parser.add_argument("--split", default="val")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--epsilons", nargs="+", default=["0.5/255", "2/255"], metavar="ε")
    parser.add_argument("--steps", type=int, default=10, help="of the attacks with equal budgets")
    parser.add_argument("--autoattack-steps", type=int, nargs="+", default=[10], metavar="N", help="of APGD and FAB")
    parser.add_argument("--only", default="", metavar="TEXT", help="only attacks whose names contain this")
    parser.add_argument("--site", type=Path, metavar="DIR", help="folder that has torchattacks")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    torchattacks = find_torchattacks(args.site)
    if torchattacks is None:
        raise SystemExit(1)
    queries = load_queries(args.run, args.data, args.split, args.queries)
    rows = np.flatnonzero(found_first(queries.threat, queries.images))
    if not len(rows):
        raise SystemExit("no query finds a caption of its own first, so there is nothing to attack; add --queries")
    report: dict[str, Any] = {
        "data": queries.corpus.name,
        "split": queries.corpus.split,
        "model": queries.model.fingerprint(),
        "queries": len(queries.images),
        "captions": len(queries.corpus.captions),
        "clean_r1": 100 * len(rows) / len(queries.images),
        "versions": {"torch": torch.__version__, "torchattacks": torchattacks.__version__},
        "device": queries.model.device.type,
        "threads": torch.get_num_threads(),
        "epsilons": {},
    }
    print(
        f"{len(queries.images)} queries, {len(queries.corpus.captions)} captions, clean R@1 {report['clean_r1']:.1f}"
    )
    for text in args.epsilons:
        print(f"\nε = {text:26}  R@1 left  forward+backward  forward only  seconds")
        for name, run in attacks(torchattacks, args.steps, args.autoattack_steps).items():
            if args.only not in name:
                continue
            of = report["epsilons"].setdefault(text, {})[name] = measure(queries, rows, parse_epsilon(text), run)
            print(
                f"{name:30}  {of['r1']:8.1f}  {of['passes']:16.1f}  {of['forward_only']:12.1f}  {of['seconds']:7.1f}",
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
