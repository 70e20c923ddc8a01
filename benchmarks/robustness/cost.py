"""OMP_NUM_THREADS=1 python -m benchmarks.robustness.cost RUN --data KIND:PATH [--site DIR]

What attacking costs beyond the passes that no gradient attack can do without. The floor is k times forward and
backward through the frozen image tower to the pixels, with a plain sum as loss and no gallery. Against it, in one
process, on one thread, in turn: our k-step PGD on the query-image threat without early stop, with the scores against
all captions in every step; the same and then exact ranks, which embeds the pictures once more; and, where torchattacks
is found, its PGD with k steps, which has no passes but those k. As ours also looks at its last point, its ideal ratio
is (k + a forward pass) / k. The goal is at most 1.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.robustness.referee import Classifier, find_torchattacks, load_queries
from benchmarks.timing import compare, format_comparison
from training.robustness.attacks import Attacked, pgd
from training.robustness.balls import Ball
from training.robustness.curves import embed_all
from training.robustness.norms import LINF

EPSILON = 8 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run directory or hub name")
    parser.add_argument("--data", required=True, help="KIND:PATH")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--site", type=Path, metavar="DIR", help="folder that has torchattacks")
    args = parser.parse_args()
    torchattacks = find_torchattacks(args.site)
    queries = load_queries(args.run, args.data, args.split, args.images)
    threat, images, tower = queries.threat, queries.images, queries.tower
    batches, parts = images.split(args.batch_size), torch.arange(len(images)).split(args.batch_size)

    def bare() -> None:
        for _ in range(args.steps):
            for batch in batches:
                pixels = batch.clone().requires_grad_()
                torch.autograd.grad(tower(pixels).sum(), pixels)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            tower(batch)

    def ours() -> Attacked:
        return pgd(
            threat.objective("margin", threat.goal),
            images,
            Ball(LINF, EPSILON),
            args.steps,
            batch_size=args.batch_size,
        )

    def ranked() -> None:
        threat.ranks(embed_all(threat, ours().points, args.batch_size))

    alternatives: dict[str, Callable[[], object]] = {
        "floor": bare,
        "a forward pass": forward,
        f"ours, PGD-{args.steps}": ours,
        "ours and ranks": ranked,
    }
    if torchattacks:
        settings = {"eps": EPSILON, "alpha": EPSILON / 4, "steps": args.steps}
        attackers = [torchattacks.PGD(Classifier(threat.rows(rows)), **settings) for rows in parts]
        labels = [torch.zeros(len(rows), dtype=torch.int64) for rows in parts]

        def theirs() -> list[Tensor]:
            return [attacker(*of) for attacker, *of in zip(attackers, batches, labels, strict=True)]

        alternatives[f"torchattacks, PGD-{args.steps}"] = theirs
    found = compare(alternatives, args.repeats)
    print(f"{len(images)} pictures of {images.shape[-1]} pixels, {len(threat.gallery)} captions, {args.steps} steps")
    print(format_comparison(found))
    print(f"ideal ratio of ours: {1 + found['a forward pass']['ratio']:.3f}")


if __name__ == "__main__":
    main()
