"""Does the optimiser of a linear retrieval head decide which attack on its features it withstands?

    python -m benchmarks.robustness.retrieval_heads RUN --data KIND:PATH [--seeds 3] [--json FILE]

Image heads ``u = W f`` of :mod:`training.robustness.linear.retrieval_heads` are trained on the frozen, standardised
features of the training split against the caption embeddings of RUN, and measured on the validation split: R@1 among
all captions, and what of it is certified in linf, l2 and l1, in standard deviations of the features. Two regimes:

* ``all``: all images and captions, which a linear head does not separate;
* ``few``: 300 images with one caption each, fewer pairs than features. There the training pairs are measured too.

For each norm there are two radii, at which the heads of plain gradient descent keep a half and a quarter of their
clean R@1, and the median radius of a head's own hits, which a head with few hits chooses for itself.

Hyper-parameters are chosen with the first seed, never on validation. ``all``: step size and number of steps by clean
R@1 of 500 images of the training split, left out of training; RUN's text tower has seen their captions. ``few``: step
size by the margin of the training pairs that theory says the optimiser maximises. A penalty weighs ``share / penalty(W
of gradient descent)``, with the share by certified R@1 of the 500, in its norm, where gradient descent keeps a half.
Seeds decide who trains, and the batches. RUN's own head, trained in another way on all images, is for reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data.formats import load_corpus
from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from training.models.features import corpus_inputs, encode_corpus
from training.robustness.certificates import linear_head
from training.robustness.linear.retrieval_heads import HEAD_OPTIMIZERS, HeadEvaluation, evaluate_head, train_head
from training.robustness.norms import L1, L2, LINF, Norm

NORMS: dict[str, Norm] = {norm.name: norm for norm in (LINF, L2, L1)}
HELD_OUT = 500
SHARES = (0.1, 0.3, 1.0)
KEPT = (0.5, 0.25)
# Pairs of captions that estimate a margin penalty.
PAIRS = 2000


class Recipe(NamedTuple):
    """How a head is trained, and the norm of the attack it is meant to withstand."""

    optimizer: str
    regularizer: str
    attack: str


RECIPES = {
    "gradient descent": Recipe("gradient", "none", "l2"),
    "sign descent": Recipe("sign", "none", "l1"),
    "coordinate descent": Recipe("coordinate", "none", "linf"),
    "spectral descent": Recipe("spectral", "none", "l2"),
    "row descent": Recipe("rows", "none", "linf"),
    "gradient + l2 of W": Recipe("gradient", "l2", "l2"),
    "gradient + linf of W": Recipe("gradient", "linf", "l1"),
    "gradient + l1 of W": Recipe("gradient", "l1", "linf"),
    "gradient + l2 margin": Recipe("gradient", "margin", "l2"),
    "gradient + l1 margin": Recipe("gradient", "margin", "l1"),
    "gradient + linf margin": Recipe("gradient", "margin", "linf"),
}


class Regime(NamedTuple):
    """Training images, captions of each, and for each of :data:`HEAD_OPTIMIZERS` the steps and step sizes tried."""

    images: int | None
    captions: int
    steps: tuple[int, ...]
    rates: tuple[tuple[float, ...], ...]


# Coordinate descent moves one entry of W in a step; with few pairs there is time for more steps.
REGIMES = {
    "all": Regime(None, 5, (40,) * 5, ((2e4, 5e4), (1e4, 3e4), (1e5, 1e6), (5e2, 1e3), (1e6, 3e6))),
    "few": Regime(300, 1, (200, 200, 1500, 200, 200), ((3e2, 1e3), (3e2, 1e3), (1e4,), (1e2,), (3e3, 1e4))),
}


class Pairs(NamedTuple):
    """Standardised features ``(N, F)``, caption vectors ``(G, D)``, and the row a caption describes ``(G,)``."""

    features: Tensor
    gallery: Tensor
    owner: Tensor

    def images(self, rows: Tensor, captions: int | None = None) -> Pairs:
        """Some of the images, with the first few of their captions."""
        chosen = [(self.owner == row).nonzero().flatten()[:captions] for row in rows.tolist()]
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(of) for of in chosen]))
        return Pairs(self.features[rows], self.gallery[torch.cat(chosen)], owner)


class Data(NamedTuple):
    """Both splits, and the certified radii of the run's own head on validation, if it is linear."""

    name: str
    train: Pairs
    val: Pairs
    own_head: HeadEvaluation | None


def load(run: str, data: str) -> Data:
    """Features from the cache and captions embedded by the run's text tower."""
    model = DualEncoder.from_pretrained(run, "cpu").eval()
    parts = {}
    for split in ("train", "val"):
        corpus = load_corpus(data, split)
        inputs, cached = corpus_inputs(model, corpus, "image")
        if not cached:
            raise InputError(f"{run}: the image tower is not frozen, so there are no fixed features; give another run")
        features = inputs.fetch(np.arange(len(inputs)), None).values.float()
        parts[split] = Pairs(features, encode_corpus(model, corpus)[1], torch.as_tensor(corpus.owner))
    raw = parts["train"].features
    mean, std = raw.mean(dim=0), raw.std(dim=0).clamp(min=1e-6)
    train, val = (some._replace(features=(some.features - mean) / std) for some in (parts["train"], parts["val"]))
    own_head = None
    if model.similarity.name == "cosine":
        head = linear_head(model.image_tower)
        own_head = evaluate_head(head.weight * std, *val, bias=head.bias + head.weight @ mean.double())
    return Data(corpus.name, train, val, own_head)


def split(data: Data, regime: Regime, seed: int) -> tuple[Pairs, Pairs]:
    """Training pairs of a regime and held-out images."""
    order = torch.randperm(len(data.train.features), generator=torch.Generator().manual_seed(seed))
    count = len(order) - HELD_OUT if regime.images is None else regime.images
    return data.train.images(order[HELD_OUT:][:count], regime.captions), data.train.images(order[:HELD_OUT])


class Chosen(NamedTuple):
    """Hyper-parameters of a head."""

    steps: int
    rate: float
    share: float = 0.0


def penalty(weight: Tensor, recipe: Recipe, pairs: Pairs) -> float:
    """What a penalty of weight 1 is for a head."""
    apart = (pairs.gallery - pairs.gallery.roll(len(pairs.gallery) // 2, 0))[:PAIRS]
    rows = apart @ weight if recipe.regularizer == "margin" else weight[None]
    return float(NORMS[recipe.attack].dual(rows).mean())


def train(recipe: Recipe, chosen: Chosen, pairs: Pairs, plain: Tensor, seed: int, observe: Any = None) -> Tensor:
    """A head; ``plain`` is that of gradient descent, which scales the penalty."""
    lam = chosen.share / penalty(plain, recipe, pairs) if chosen.share else 0.0
    features, gallery, owner = pairs
    names, attack = (recipe.optimizer, recipe.regularizer), NORMS[recipe.attack]
    settings = {"steps": chosen.steps, "rate": chosen.rate, "seed": seed, "observe": observe}
    return train_head(features, gallery, owner, *names, lam, attack, **settings)


def tune_optimizer(recipe: Recipe, regime: Regime, pairs: Pairs, held: Pairs) -> tuple[Chosen, Tensor]:
    """Step size and, where it matters, number of steps; and that head. The first of equals."""
    best: list[tuple[float, Chosen, Tensor]] = []
    place = HEAD_OPTIMIZERS.index(recipe.optimizer)
    steps, early = regime.steps[place], regime.images is None

    def look(number: int, weight: Tensor, rate: float) -> None:
        if number == steps or (early and number % (steps // 4) == 0):
            found = clean_r1(weight, held) if early else matrix_margins(weight, pairs)[f"{recipe.optimizer} margin"]
            if not best or found > best[0][0]:
                best[:] = [(found, Chosen(number, rate), weight.clone())]

    for rate in regime.rates[place]:
        train(recipe, Chosen(steps, rate), pairs, torch.empty(0), 0, partial(look, rate=rate))
    return best[0][1:]


def tune_penalty(recipe: Recipe, plain: Tensor, base: Chosen, pairs: Pairs, held: Pairs) -> tuple[Chosen, Tensor]:
    """The weight of a penalty, and that head."""
    radius = radii_kept(evaluate_head(plain, *held).radii[recipe.attack])[:1]
    choices = [base._replace(share=share) for share in SHARES]
    heads = [train(recipe, chosen, pairs, plain, 0) for chosen in choices]
    kept = [float(evaluate_head(weight, *held).curve(recipe.attack, radius)) for weight in heads]
    return max(zip(kept, choices, heads, strict=True), key=lambda head: head[0])[1:]


def clean_r1(weight: Tensor, pairs: Pairs) -> float:
    """R@1, without the care for ties that :func:`evaluate_head` takes."""
    best = (pairs.features @ weight.T @ pairs.gallery.T).argmax(dim=1)
    return float((pairs.owner[best] == torch.arange(len(best))).double().mean())


def radii_kept(radii: Tensor) -> list[float]:
    """The radii at which shares :data:`KEPT` of the hits are still certified."""
    return [float(radii[radii > 0].quantile(1 - share)) for share in KEPT]


def matrix_margins(weight: Tensor, pairs: Pairs) -> dict[str, float]:
    """``min m / ‖W‖`` in the norm of each optimiser, which is what it maximises on separable pairs."""
    weight = weight.double()
    scores = (pairs.features.double() @ weight.T) @ pairs.gallery.double().T
    own = pairs.owner == torch.arange(len(scores))[:, None]
    margins = scores.masked_fill(~own, torch.inf).amin(1) - scores.masked_fill(own, -torch.inf).amax(1)
    entries = weight.abs()
    sizes = weight.norm(), entries.max(), entries.sum(), torch.linalg.svdvals(weight)[0], entries.sum(dim=1).max()
    return {f"{name} margin": float(margins.min() / size) for name, size in zip(HEAD_OPTIMIZERS, sizes, strict=True)}


def figures(evaluation: HeadEvaluation, radii: dict[str, list[float]]) -> dict[str, float]:
    """A row of the table on validation."""
    row = {"clean R@1": 100 * evaluation.clean}
    for norm, at in radii.items():
        half, quarter = (100 * evaluation.curve(norm, at)).tolist()
        hits = evaluation.radii[norm][evaluation.radii[norm] > 0]
        median = float(hits.median()) if len(hits) else 0.0
        row |= {f"{norm} half": half, f"{norm} quarter": quarter, f"{norm} median": median}
    return row


def study(data: Data, name: str, seeds: int) -> Iterator[dict[str, Any]]:
    """Tune, train and measure all heads of a regime; what is known after each seed."""
    regime = REGIMES[name]
    chosen: dict[str, Chosen] = {}
    found: dict[str, list[HeadEvaluation]] = {label: [] for label in RECIPES}
    trained: dict[str, list[dict[str, float]]] = {label: [] for label in RECIPES}
    for seed in range(seeds):
        pairs, held = split(data, regime, seed)
        plain = torch.empty(0)
        for label, recipe in RECIPES.items():
            if seed:
                weight = train(recipe, chosen[label], pairs, plain, seed)
            elif recipe.regularizer == "none":
                chosen[label], weight = tune_optimizer(recipe, regime, pairs, held)
            else:
                chosen[label], weight = tune_penalty(recipe, plain, chosen["gradient descent"], pairs, held)
            if label == "gradient descent":
                plain = weight
            found[label].append(evaluate_head(weight, *data.val))
            if regime.images:
                row = {"clean R@1": 100 * (own := evaluate_head(weight, *pairs)).clean}
                least = {f"{norm} least": float(of.min()) for norm, of in own.radii.items()}
                trained[label].append(row | least | matrix_margins(weight, pairs))
            print(f"{name} {seed} {label}: R@1 {100 * found[label][-1].clean:.1f}, {chosen[label]}", file=sys.stderr)
        kept = {norm: [radii_kept(of.radii[norm]) for of in found["gradient descent"]] for norm in NORMS}
        radii = {norm: np.mean(of, axis=0).tolist() for norm, of in kept.items()}
        rows = {label: [figures(of, radii) for of in some] for label, some in found.items()}
        if data.own_head:
            rows["the run's own head"] = [figures(data.own_head, radii)]
        yield {
            "images": len(pairs.features),
            "captions": len(pairs.gallery),
            "radii": radii,
            "chosen": {label: some._asdict() for label, some in chosen.items()},
            "validation": rows,
            "training": trained if regime.images else {},
        }


def grid(heads: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation of the seeds."""

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.3g}" + (f" ±{statistics.stdev(values):.2g}" if len(values) > 1 else "")

    columns = list(next(iter(heads.values()))[0])
    cells = {label: [cell([row[column] for row in rows]) for column in columns] for label, rows in heads.items()}
    lines = [["", *columns], *([label, *texts] for label, texts in cells.items())]
    return "\n".join(f"{line[0]:23}" + "".join(f"{text:>18}" for text in line[1:]) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run directory or hub name, with a frozen image tower")
    parser.add_argument("--data", required=True, help="KIND:PATH")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    data = load(args.run, args.data)
    sizes = {name: list(of.shape) for name, of in data.val._asdict().items()}
    report: dict[str, Any] = {"data": data.name, "validation": sizes, "torch": torch.__version__, "regimes": {}}
    for name in args.regimes:
        for of in study(data, name, args.seeds):
            report["regimes"][name] = of
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\n{name}: {of['images']} images, {of['captions']} captions of {data.name}; validation {sizes}")
        print("radii", {norm: [float(f"{radius:.3g}") for radius in at] for norm, at in of["radii"].items()})
        print(grid(of["validation"]))
        print("training pairs\n" + grid(of["training"]) if of["training"] else "", flush=True)


if __name__ == "__main__":
    main()
