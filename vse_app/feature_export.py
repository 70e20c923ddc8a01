"""``vse features``: image features of a data set, written as a ``precomputed:`` one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.data.batches import Pixels
from training.data.formats import load_corpus, precomputed
from training.data.image_transform import ImageTransform
from training.errors import InputError
from training.models.config import ImageTowerConfig
from training.models.features import cached_features
from training.models.image_tower import PixelBackbone, build_image_backbone
from training.models.tower import Tower, default_device

DEV = {"val": "dev"}  # the layout's own name for the validation split


def export_features(data: str, splits: list[str], config: ImageTowerConfig, out: Path) -> Iterator[str]:
    """Write ``{split}_ims.npy``, ``{split}_caps.txt`` and ``{split}_owners.npy`` for each split.

    Args:
        data: ``KIND:PATH`` of a corpus with pictures.
        splits: The splits to write; ``val`` is called ``dev`` in this layout.
        config: Encoder, pooling and input size; the head is not used.
        out: Folder to write.

    Yields:
        One line per finished split.

    Raises:
        InputError: If a split is missing, has no pictures or is in ``out`` already, or the encoder cannot be had.
    """
    corpora = {split: load_corpus(data, split) for split in splits}  # hours may pass before the last is written
    for split, corpus in corpora.items():
        precomputed.check_absent(out, split)
        if not corpus.images:
            raise InputError(f"{data} [{split}]: holds features already; give a data set with pictures")
    if ":" not in config.encoder:
        raise InputError(f"--image-encoder {config.encoder}: is not pretrained; use torchvision:NAME or hf:REPO")
    backbone = build_image_backbone(config)
    assert isinstance(backbone, PixelBackbone)
    tower = Tower(backbone, config, dim=1, absolute=False).to(default_device())
    own = backbone.preprocessing
    transform = ImageTransform(own.size, own.resize, own.interpolation)
    for split, corpus in corpora.items():
        features = cached_features(tower, Pixels(corpus.images, transform), label=f"features {split}")
        rows = features.fetch(np.arange(len(features)), None).values.numpy()
        name = DEV.get(split, split)
        precomputed.write(out, name, rows, corpus)
        yield f"{out}: {name}: {rows.shape[0]:,} images, {len(corpus):,} captions, {rows.shape[1]} wide"
