"""python -m benchmarks.gradient_variance.flickr8k karpathy:flickr8k [--fraction 0.9] [--seeds 5] [--loss infonce]

Training curves of two linear heads on frozen Flickr8k features when a fraction of the 30,000 training pairs are
copies of ten of them: rSum on the validation split (1,000 images, 5,000 captions) against steps and against
seconds. Uniform batches, batches twice as large, draws by gradient norm, gradient clusters, and uniform anchors
with the separate negatives that clusters need. Seconds are processor time of one thread, without validations.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import Config, read_toml
from training.data.batches import Batch, Pairs
from training.files import write_text
from training.run_log import METRICS_FILE
from training.sampling.stratified import StratifiedBatches
from training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "flickr8k_frozen.toml"
COPIED = 10  # pairs that the copies are of
BATCH, EPOCHS, EVERY = 128, 4, 47  # pairs per step, epochs, steps between validations
SAMPLERS = ("uniform", "doubled batch", "importance", "clustered", "uniform, separate negatives")


class PlantedPairs(Pairs):
    """Pairs of which a fraction has been replaced by copies of a few.

    Args:
        pairs: The data.
        fraction: Part that is copies.
        seed: Decides which.
    """

    def __init__(self, pairs: Pairs, fraction: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        kept = rng.choice(len(pairs), len(pairs) - round(fraction * len(pairs)), replace=False)
        copied = rng.choice(rng.choice(len(pairs), COPIED, replace=False), len(pairs) - len(kept))
        self.chosen: NDArray[np.int64] = np.concatenate([kept, copied])
        self.whole = pairs
        super().__init__(pairs.images, pairs.texts, pairs.owner[self.chosen], pairs.seed)

    def __getitem__(self, pairs: Sequence[int]) -> Batch:
        chosen = np.asarray(pairs, dtype=np.int64)
        return replace(self.whole[self.chosen[chosen].tolist()], pairs=torch.from_numpy(chosen))


class PlantedTrainer(Trainer):
    """A trainer on planted pairs, whose seconds are processor time without validations."""

    def __init__(self, config: Config, fraction: float) -> None:
        super().__init__(config)
        self.pairs: Pairs = PlantedPairs(self.pairs, fraction, config.seed)
        self._validating, self._began = 0.0, time.process_time()
        if self.sampling is not None:
            self.sampling.pairs = self.pairs

    def _validate(self, logged: dict[str, float]) -> None:
        begin = time.process_time()
        super()._validate(logged)
        self._validating += time.process_time() - begin

    def _elapsed(self) -> float:
        return time.process_time() - self._began - self._validating if hasattr(self, "_began") else 0.0


def configure(data: str, out: str, loss: str, seed: int, sampler: str, allocation: str) -> Config:
    """The recipe's features and towers, with small heads, no dropout and a constant rate."""
    recipe = read_toml(RECIPE)
    batch = 2 * BATCH if sampler == "doubled batch" else BATCH
    kind = sampler if sampler in ("importance", "clustered") else "uniform"
    if sampler == "uniform, separate negatives":
        kind = "clustered"
    return replace(
        recipe,
        data=data,
        out=out,
        seed=seed,
        sampler=kind,
        clusters=replace(recipe.clusters, allocation=allocation),
        validate_every=EVERY,
        checkpoint_every=10**9,
        loss=replace(recipe.loss, name=loss),
        model=replace(
            recipe.model,
            dim=256,
            image=replace(recipe.model.image, dropout=0.0),
            text=replace(recipe.model.text, dropout=0.0),
        ),
        # A batch twice as large halves the steps of an epoch; all samplers take the same number of steps.
        optim=replace(
            recipe.optim,
            lr=5e-4,
            batch_size=batch,
            epochs=EPOCHS * batch // BATCH,
            schedule="constant",
            warmup_steps=0,
        ),
    )


def curve(config: Config, fraction: float, sampler: str) -> dict[str, Any]:
    """Validations and decisions of one run."""
    trainer = PlantedTrainer(config, fraction)
    if sampler == "uniform, separate negatives":
        _draw_uniformly(trainer)
    trainer.fit()
    records = [json.loads(line) for line in (Path(config.out) / METRICS_FILE).read_text().splitlines()]
    points = [{key: r[key] for key in ("step", "seconds", "rsum")} for r in records if r["kind"] == "validation"]
    return {
        "sampler": sampler,
        "seed": config.seed,
        "points": points,
        "decisions": [r for r in records if r["kind"] == "sampler"],
    }


def _draw_uniformly(trainer: PlantedTrainer) -> None:
    """One cluster of all pairs is a plain shuffle with weights 1; only the negatives are drawn apart."""
    sampling = trainer.sampling
    assert sampling is not None

    one_cluster = np.zeros(len(trainer.pairs), dtype=np.int64)
    sampling.batches = StratifiedBatches(one_cluster, BATCH, mix=0.0, seed=trainer.config.seed)
    trainer._update_sampling = lambda ends_epoch: False  # type: ignore[method-assign]
    trainer._report = lambda decision: None  # type: ignore[method-assign]
    sampling.start = lambda: None  # type: ignore[method-assign,assignment,return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--fraction", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--loss", default="infonce", choices=["infonce", "max", "sum"])
    parser.add_argument("--allocation", default="neyman", choices=["equal", "proportional", "neyman"])
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--out", type=Path, default=Path("docs/gradient_variance"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.out / f"flickr8k_{args.loss}_{round(100 * args.fraction)}.json"
    settings = {"fraction": args.fraction, "copied": COPIED, "loss": args.loss, "allocation": args.allocation}
    settings |= {"batch": BATCH, "epochs": EPOCHS, "split": "val", "images": 1000, "captions": 5000}
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    done = {(run["sampler"], run["seed"]) for run in runs}
    for seed in range(args.seeds):
        for sampler in args.samplers:
            if (sampler, seed) in done:  # an interrupted study goes on
                continue
            with TemporaryDirectory() as directory:
                out = f"{directory}/run"
                config = configure(args.data, out, args.loss, seed, sampler, args.allocation)
                runs.append(curve(config, args.fraction, sampler))
            write_text(file, json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
