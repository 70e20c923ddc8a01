"""python -m benchmarks.gradient_variance.flickr8k_variance karpathy:flickr8k [--loss infonce]

Variance of the mini-batch gradient of two linear heads on frozen Flickr8k features, along a run with uniform batches,
when 0, 50 and 90 % of the 30,000 training pairs are copies of ten. As ``vse variance`` measures it: at the anchors,
sketched, clusters fresh at each point. And at the end, for uniform and clustered batches, the whole gradient of both
heads with the part that goes through the negatives: against one pool of negatives, and with a new pool for each
batch, whose own noise no choice of anchors removes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gradient_variance.flickr8k import EPOCHS, PlantedPairs, configure
from training.files import write_text
from training.losses import NegativePool
from training.models.tower import evaluating
from training.sampling.clustering import Floats, Labels
from training.sampling.stratified import WeightedBatches
from training.sampling.variance import GradientVariance, VarianceReport
from vse_app.gradient_study import GradientStudy
from vse_app.variance_report import format_point, write_plot

FRACTIONS, WHOLE_DRAWS = (0.0, 0.5, 0.9), 100
WHOLE = ("uniform", "clustered, proportional", "clustered, neyman")


def whole_gradient(study: GradientStudy, items: Labels, weights: Floats, negatives: Labels) -> Tensor:
    """Gradient ``(P,)`` of the weighted mean loss of some anchors, through anchors and negatives."""
    trainer, n = study.trainer, len(items)
    batch = trainer.pairs[[*items.tolist(), *negatives.tolist()]]
    images, captions = study.sampling.embed(batch)
    pool = NegativePool(images[n:], captions[n:], batch.image_ids[n:])
    own = images[:n], captions[:n], batch.image_ids[:n]
    costs, _ = trainer.loss.pair_costs(*own, pool)
    value = (costs * torch.from_numpy(weights).to(costs)).mean()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, parameters)])


def whole_variance(study: GradientStudy, batches: WeightedBatches, new_pools: bool) -> VarianceReport:
    """Variance over independent batches."""
    collected = GradientVariance(batches.batch_size)
    with evaluating(study.trainer.model):
        for number in range(WHOLE_DRAWS):
            draw = next(batches.epoch(number))
            negatives = study.sampling.draw_negatives(EPOCHS, number if new_pools else 0)
            collected.add([whole_gradient(study, draw.indices, draw.weights, negatives)])
    return collected.report()


def measure(data: str, loss: str, fraction: float, figure: Path) -> dict[str, Any]:
    """All points of one run and the whole gradient at its end."""
    with TemporaryDirectory() as directory:
        study = GradientStudy(configure(data, directory, loss, 0, "uniform", "neyman"), draws=50)
        study.trainer.pairs = PlantedPairs(study.trainer.pairs, fraction, 0)
        study.sampling.pairs = study.trainer.pairs
        points = []
        for point in study.points(EPOCHS):
            points.append(point)
            print(format_point(point), flush=True)
        write_plot(points, f"Flickr8k heads, {loss}, {fraction:.0%} of the pairs are copies of ten, batch 128", figure)
        negatives = study.sampling.draw_negatives(EPOCHS, 0)
        sketches, losses = study.sampling.gradients(np.arange(len(study.trainer.pairs)), negatives)
        samplers = study.samplers(sketches.numpy(), losses.double().numpy())
        whole: dict[str, Any] = {}
        for pools in ("one pool", "new pools"):
            reports = {name: whole_variance(study, samplers[name], pools == "new pools") for name in WHOLE}
            base = reports["uniform"].variance
            whole[pools] = {name: {"ratio": r.variance / base, **r.to_json()} for name, r in reports.items()}
            print(pools, {name: round(of["ratio"], 3) for name, of in whole[pools].items()}, flush=True)
    record = [
        {
            "epoch": p.epoch,
            "samplers": {name: {"ratio": m.ratio, **m.report.to_json()} for name, m in p.samplers.items()},
        }
        for p in points
    ]
    return {"fraction": fraction, "points": record, "whole_gradient": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--loss", default="infonce", choices=["infonce", "max", "sum"])
    parser.add_argument("--out", type=Path, default=Path("docs/gradient_variance"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = f"flickr8k_variance_{args.loss}"
    found = []
    for fraction in FRACTIONS:
        found.append(measure(args.data, args.loss, fraction, args.out / f"{name}_{round(100 * fraction)}.png"))
        write_text(args.out / f"{name}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
