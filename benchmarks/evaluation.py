"""OMP_NUM_THREADS=1 python -m benchmarks.evaluation

Exact ranks of 5,000 images and 25,000 captions, both directions with ties and checks, against one plain
``images @ captions.T`` and against the loop of published VSE++ evaluations, which scores and sorts one query
at a time. The loop is run on 50 of the 5,000 images (and their captions) and its ratio multiplied by 100.
"""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import compare, format_comparison
from training.evaluation.ranks import retrieval_ranks

IMAGES, PER_IMAGE, SAMPLED = 5_000, 5, 50


def sort_every_query(images: Tensor, captions: Tensor, sampled: int) -> tuple[list[int], list[int]]:
    """Ranks of the first images and their captions, by a full sort per query."""
    image_rows, caption_rows = images.numpy(), captions.numpy()
    i2t, t2i = [], []
    for image in range(sampled):
        own = range(PER_IMAGE * image, PER_IMAGE * (image + 1))
        ranked = np.argsort(caption_rows @ image_rows[image])[::-1]
        i2t.append(min(int(np.flatnonzero(ranked == caption)[0]) for caption in own))
        for scores in caption_rows[own.start : own.stop] @ image_rows.T:
            t2i.append(int(np.flatnonzero(np.argsort(scores)[::-1] == image)[0]))
    return i2t, t2i


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    owner = np.arange(IMAGES * PER_IMAGE) // PER_IMAGE
    for dimensions in (1024, 512):
        images = torch.nn.functional.normalize(torch.randn(IMAGES, dimensions, generator=generator))
        noise = torch.randn(len(owner), dimensions, generator=generator) / dimensions**0.5
        captions = torch.nn.functional.normalize(images[owner] + 3 * noise)
        loop = f"sort per query, {SAMPLED} images"
        results = compare(
            {
                "images @ captions.T": partial(torch.matmul, images, captions.T),
                "retrieval_ranks": partial(retrieval_ranks, images, captions, owner),
                loop: partial(sort_every_query, images, captions, SAMPLED),
            },
            repeats=5,
        )
        print(f"{IMAGES:,} images, {len(owner):,} captions, {dimensions} dimensions")
        print(format_comparison(results))
        print(f"sort per query, scaled to {IMAGES:,} images: {results[loop]['ratio'] * IMAGES / SAMPLED:.1f}")
        print(json.dumps({"dimensions": dimensions, **results}))


if __name__ == "__main__":
    main()
