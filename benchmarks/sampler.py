"""OMP_NUM_THREADS=1 python -m benchmarks.sampler

What draws by gradient cost, for 30,000 pairs of random features as wide as those of the Flickr8k recipe, with heads
of 1024 dimensions, as VSE++ has, and of 512, as that recipe has: drawing a batch and keeping sketches against a
training step, refreshing clusters against an epoch on cached features. And the clustering of 150,000 sketches of 256
numbers into 128 clusters: seconds, and memory above the sketches.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from training.config import ClusterConfig, Config, LossConfig, OptimConfig
from training.data.batches import Features, Pairs
from training.gradient_sampling import GradientSampling
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.optimizer import build_optimizer
from training.sampling.clustering import fit_clusters
from training.trainer import Trainer

PAIRS, IMAGES, IMAGE_WIDTH, TEXT_WIDTH, BATCH, STEPS = 30_000, 6_000, 3424, 2304, 512, 30
SKETCHES, SIZE, CLUSTERS = 150_000, 256, 128


def trainer(folder: Path, dim: int, sampler: Any) -> Trainer:
    """Two linear heads on random features; the text side's stand where a frozen encoder's would."""
    for split in ("train", "dev"):
        np.save(folder / f"{split}_ims.npy", np.zeros((2, IMAGE_WIDTH), dtype=np.float32))
        (folder / f"{split}_caps.txt").write_text("a word\n" * 10)
    config = Config(
        data=f"precomputed:{folder}",
        out=str(folder / f"{sampler}{dim}"),
        sampler=sampler,
        clusters=ClusterConfig(allocation="neyman"),
        model=ModelConfig(
            image=ImageTowerConfig(encoder="precomputed"),
            text=TextTowerConfig(word_dim=8, min_count=1, head="linear"),
            dim=dim,
        ),
        loss=LossConfig(name="max"),
        optim=OptimConfig(batch_size=BATCH),
    )
    made = Trainer(config)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((IMAGES, IMAGE_WIDTH), dtype=np.float32).astype(np.float16)
    texts = rng.standard_normal((PAIRS, TEXT_WIDTH), dtype=np.float32).astype(np.float16)
    made.pairs = Pairs(Features(images), Features(texts), np.arange(PAIRS) % IMAGES)
    tower = made.model.text_tower
    tower.head = torch.nn.Linear(TEXT_WIDTH, dim)
    made._texts_cached = True
    made.optimizer = build_optimizer(made.config.optim, made.model, made.loss)
    if sampler != "uniform":
        made.sampling = made.gradient_sampling(sampler)
    return made


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def costs(dim: int) -> dict[str, float]:
    """Ratios, each the median over steps that take turns."""
    with TemporaryDirectory() as directory:
        plain, sampled = (trainer(Path(directory), dim, sampler) for sampler in ("uniform", "clustered"))
        of = sampled.sampling
        assert isinstance(of, GradientSampling)
        start = seconds(of.start)
        everything = seconds(lambda: of.gradients(np.arange(PAIRS), of.draw_negatives(0)))
        of.refresh(0)
        drawing = of._plan()
        of.batches = None
        rng = np.random.default_rng(1)
        times: dict[str, list[float]] = {name: [] for name in ("uniform", "kept", "clustered")}
        for position in range(STEPS):
            items = rng.choice(PAIRS, BATCH, replace=False).tolist()
            times["uniform"].append(seconds(lambda items=items: plain._train_step(plain.pairs[items])))  # type: ignore[misc]
            times["kept"].append(seconds(lambda items=items: sampled._train_step(sampled.pairs[items])))  # type: ignore[misc]
            of.batches = drawing
            with_negatives = next(iter(of.epoch(0, position % len(drawing)) or ()))
            times["clustered"].append(
                seconds(lambda items=with_negatives: sampled._train_step(sampled.pairs[items]))  # type: ignore[misc]
            )
            of.batches = None
        step = float(np.median(times["uniform"]))
        steps = -(-PAIRS // BATCH)
        draw = min(seconds(lambda epoch=epoch: list(drawing.epoch(epoch))) for epoch in range(5)) / len(drawing)  # type: ignore[misc]
        refresh = float(np.median([seconds(lambda at=at: of.refresh(at)) for at in (1000, 2000, 3000)]))  # type: ignore[misc]
        return {
            "dim": dim,
            "step_seconds": step,
            "draw_over_step": draw / step,
            "kept_over_step": float(np.median(np.array(times["kept"]) / times["uniform"])),
            "clustered_over_step": float(np.median(np.array(times["clustered"]) / times["uniform"])),
            "refresh_over_epoch": refresh / (steps * step),
            "start_over_epoch": start / (steps * step),
            "all_gradients_over_epoch": everything / (steps * step),
        }


def clustering() -> dict[str, float]:
    """Seconds and memory of the largest clustering that is promised."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((300, SIZE), dtype=np.float32)
    sketches = np.empty((SKETCHES, SIZE), dtype=np.float32)
    for block in np.array_split(sketches, 100):  # making them must not set the peak of memory
        block[:] = rng.standard_normal(block.shape, dtype=np.float32) * rng.random((len(block), 1), dtype=np.float32)
        block += centers[rng.integers(300, size=len(block))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    clusters = fit_clusters(sketches, CLUSTERS)
    taken = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": taken,
        "sweeps": len(clusters.moved),
        "explained": clusters.explained,
        "megabytes_above": (peak - before) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"clustering": clustering(), "steps": [costs(dim) for dim in (1024, 512)]}  # memory first: it is a peak
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
