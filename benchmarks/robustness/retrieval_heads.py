"""Does the optimiser of a linear retrieval head decide which attack on its features it withstands?

    python -m benchmarks.robustness.retrieval_heads RUN --data KIND:PATH [--seeds 3] [--json FILE]

Image heads ``u = W f`` of :mod:`training.robustness.linear.retrieval_heads` are trained on the frozen, standardised
features of the training split against the caption embeddings of RUN, and measured on the validation split: R@1 among
all captions, and what of it is certified in linf, l2 and l1, in standard deviations of the features. Two regimes:

* ``all``: all images and captions, which a linear head does not separate;
* ``few``: 300 images with one caption each, fewer pairs than features, and no penalties. There the training pairs are
  measured too.

For each norm there are two radii, at which the heads of plain gradient descent keep a half and a quarter of their
clean R@1, and the median radius of a head's own hits, which a head with few hits chooses for itself.

Steps are as long as a line search finds, so there is no step size to choose. ``all``: the number of steps, by clean
R@1 of 500 images of the training split that are left out of training, RUN's text tower having seen their captions.
``few``: all steps are taken, as theory wants. The weights of penalties are chosen with the first seed, by certified
R@1 of the 500; see :func:`training.robustness.linear.head_training.train`. Seeds decide who trains, and the batches.
RUN's own head, trained in another way on all images, is for reference.

With a GPU, ``--batch 10000 --steps 300`` trains on full batches. ``--write FILE`` writes features and embeddings, in
half precision, for a machine without the pictures, where FILE takes the place of RUN.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange

from training.data.formats import load_corpus
from training.models.dual_encoder import DualEncoder
from training.models.tower import default_device
from training.robustness.linear.head_training import (
    ATTACKS,
    HeadPairs,
    HeadRecipe,
    TrainedHead,
    current_head,
    image_pairs,
    radii_kept,
    train,
)
from training.robustness.linear.retrieval_heads import HEAD_OPTIMIZERS, HeadEvaluation, evaluate_head

HELD_OUT = 500
SHARES = (0.3, 1.0, 3.0)
# Coordinate descent moves one entry of W in a step, and needs more of them.
COORDINATE_STEPS = 10
RECIPES = {
    "gradient descent": HeadRecipe("gradient", "none", "l2"),
    "sign descent": HeadRecipe("sign", "none", "l1"),
    "coordinate descent": HeadRecipe("coordinate", "none", "linf"),
    "spectral descent": HeadRecipe("spectral", "none", "l2"),
    "row descent": HeadRecipe("rows", "none", "linf"),
    "gradient + l2 of W": HeadRecipe("gradient", "l2", "l2"),
    "gradient + linf of W": HeadRecipe("gradient", "linf", "l1"),
    "gradient + l1 of W": HeadRecipe("gradient", "l1", "linf"),
    "gradient + l2 margin": HeadRecipe("gradient", "margin", "l2"),
    "gradient + l1 margin": HeadRecipe("gradient", "margin", "l1"),
    "gradient + linf margin": HeadRecipe("gradient", "margin", "linf"),
    "spectral + l2 margin": HeadRecipe("spectral", "margin", "l2"),
}


class Regime(NamedTuple):
    """Training images, captions of each, and by how much there is time for more steps."""

    images: int | None
    captions: int
    more_steps: int


REGIMES = {"all": Regime(None, 5, 1), "few": Regime(300, 1, 5)}


class Data(NamedTuple):
    """Both splits, standardised, and the certified radii of the run's own head on validation."""

    name: str
    train: HeadPairs
    val: HeadPairs
    own_head: HeadEvaluation

    def to(self, device: torch.device) -> Data:
        return self._replace(train=self.train.to(device), val=self.val.to(device))


def prepare(run: str, data: str) -> dict[str, Tensor]:
    """Standardised features in half precision, captions embedded by the run's text tower, and the run's own head."""
    model = DualEncoder.from_pretrained(run)
    parts = {split: image_pairs(model, load_corpus(data, split)) for split in ("train", "val")}
    mean, std = parts["train"].moments()
    tensors = dict(zip(("weight", "bias"), current_head(model, mean, std), strict=True))
    for split, pairs in parts.items():
        features, gallery, owner = pairs.standardised(mean, std)
        tensors |= {f"{split}.features": features.half(), f"{split}.gallery": gallery.half(), f"{split}.owner": owner}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def load(tensors: dict[str, Tensor], name: str) -> Data:
    """What :func:`prepare` gave."""
    names = HeadPairs._fields
    parts = {split: HeadPairs(*(tensors[f"{split}.{part}"] for part in names)) for split in ("train", "val")}
    train, val = (HeadPairs(of.features.float(), of.gallery.float(), of.owner) for of in parts.values())
    return Data(name, train, val, evaluate_head(tensors["weight"], *val, bias=tensors["bias"]))


def split(data: Data, regime: Regime, seed: int) -> tuple[HeadPairs, HeadPairs]:
    """Training pairs of a regime and held-out images."""
    order = torch.randperm(len(data.train.features), generator=torch.Generator().manual_seed(seed))
    count = len(order) - HELD_OUT if regime.images is None else regime.images
    return data.train.images(order[HELD_OUT:][:count], regime.captions), data.train.images(order[:HELD_OUT])


def matrix_margins(weight: Tensor, pairs: HeadPairs) -> dict[str, float]:
    """``min m / ‖W‖`` in the norm of each optimiser, which is what it maximises on separable pairs."""
    weight = weight.double()
    scores = (pairs.features.double() @ weight.T) @ pairs.gallery.double().T
    own = pairs.owner == torch.arange(len(scores), device=scores.device)[:, None]
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


def study(data: Data, name: str, seeds: int, steps: int, batch: int) -> Iterator[dict[str, Any]]:
    """Train and measure all heads of a regime; what is known after each seed."""
    regime = REGIMES[name]
    recipes = {label: of for label, of in RECIPES.items() if regime.images is None or of.regularizer == "none"}
    chosen: dict[str, list[TrainedHead]] = {label: [] for label in recipes}
    found: dict[str, list[HeadEvaluation]] = {label: [] for label in recipes}
    trained: dict[str, list[dict[str, float]]] = {label: [] for label in recipes}
    for seed in range(seeds):
        pairs, held = split(data, regime, seed)
        for label, recipe in recipes.items():
            more = regime.more_steps * (COORDINATE_STEPS if recipe.optimizer == "coordinate" else 1)
            recipe = replace(recipe, steps=more * steps, batch=batch, shares=SHARES)
            if seed:
                recipe = replace(recipe, shares=(chosen[label][0].share,))
            plain = chosen["gradient descent"][seed].weight if recipe.regularizer != "none" else None
            with trange(recipe.steps, desc=f"{name} {seed} {label}", leave=False) as bar:
                done = lambda number, bar=bar: bar.update(number - bar.n)  # noqa: E731
                head = train(recipe, pairs, held, plain, seed, done, early_stopping=regime.images is None)
            chosen[label].append(head)
            found[label].append(evaluate_head(head.weight, *data.val))
            if regime.images:
                row = {"clean R@1": 100 * (own := evaluate_head(head.weight, *pairs)).clean}
                least = {f"{norm} least": float(of.min()) for norm, of in own.radii.items()}
                trained[label].append(row | least | matrix_margins(head.weight, pairs))
            print(
                f"{name} {seed} {label}: R@1 {100 * found[label][-1].clean:.1f}, step {head.steps}, {head.share:g}",
                file=sys.stderr,
            )
        kept = {norm: [radii_kept(of.radii[norm]) for of in found["gradient descent"]] for norm in ATTACKS}
        radii = {norm: np.mean(of, axis=0).tolist() for norm, of in kept.items()}
        rows = {label: [figures(of, radii) for of in some] for label, some in found.items()}
        rows["the run's own head"] = [figures(data.own_head, radii)]
        yield {
            "images": len(pairs.features),
            "captions": len(pairs.gallery),
            "radii": radii,
            "chosen": {
                label: [{"steps": head.steps, "share": head.share} for head in of] for label, of in chosen.items()
            },
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
    parser.add_argument("run", metavar="RUN", help="run directory or hub name, or a FILE of --write")
    parser.add_argument("--data", required=True, help="KIND:PATH")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write what another machine needs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1000, help="images")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    tensors = load_file(args.run) if args.run.endswith(".safetensors") else prepare(args.run, args.data)
    if args.write:
        save_file(tensors, args.write)
        return
    data = load(tensors, args.data).to(default_device())
    sizes = {name: list(of.shape) for name, of in data.val._asdict().items()}
    machine = "cpu"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
        torch.set_float32_matmul_precision("high")  # TF32; what is measured is computed in float64
    report: dict[str, Any] = {"data": data.name, "validation": sizes, "torch": torch.__version__, "device": machine}
    report |= {"steps": args.steps, "batch": args.batch, "regimes": {}}
    for name in args.regimes:
        for of in study(data, name, args.seeds, args.steps, args.batch):
            report["regimes"][name] = of
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\n{name}: {of['images']} images, {of['captions']} captions of {data.name}; validation {sizes}")
        print(f"{args.steps} steps of {args.batch} images, {machine}")
        print("radii", {norm: [float(f"{radius:.3g}") for radius in at] for norm, at in of["radii"].items()})
        print(grid(of["validation"]))
        print("training pairs\n" + grid(of["training"]) if of["training"] else "", flush=True)


if __name__ == "__main__":
    main()
