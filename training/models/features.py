"""Backbone features computed once: memory-mapped, keyed by what made them, resumable after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.data.batches import Features, Inputs, Pixels, Tokens
from training.data.corpus import Corpus
from training.data.padded import Padded
from training.errors import InputError
from training.files import write_text
from training.models.dual_encoder import DualEncoder
from training.models.tower import Tower

CHUNK = 1024  # rows between two durable marks of progress


def cache_root() -> Path:
    """``$VSE_CACHE``, else ``~/.cache/vse``."""
    return Path(os.environ.get("VSE_CACHE") or "~/.cache/vse").expanduser() / "features"


def feature_key(tower: Tower, inputs: Inputs) -> str:
    """Equal exactly when the features would be: same weights, same preprocessing, same inputs.

    Args:
        tower: Frozen tower; its checksum stands for the weights, its architecture for the preprocessing.
        inputs: Pixels or token ids.
    """
    stage = f"{'tokens' if tower.pooling is not None else tower.config.pooling} {tower.config.layers}"
    architecture = json.dumps(tower.backbone.architecture, sort_keys=True)
    parts = [str(tower.checksum), architecture, stage, inputs.fingerprint]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def cached_features(
    tower: Tower,
    inputs: Inputs,
    *,
    label: str,
    batch_size: int = 64,
    root: Path | None = None,
) -> Features:
    """Features of every input row, from the cache as far as they are there.

    Rows are float16 on disk. They are computed in chunks; after each, data and then a progress mark reach
    the disk, so a killed run goes on where it stopped. A second process waits for the first.

    Args:
        tower: Frozen tower, on the device it should run on.
        inputs: Pixels or token ids, ``N`` rows.
        label: What the progress bar says.
        batch_size: Rows per forward pass.
        root: Cache directory, by default :func:`cache_root`.

    Returns:
        Pooled features ``(N, F)``; all tokens where the pooling is trainable.

    Raises:
        InputError: If the disk has too little room.
    """
    directory = (root or cache_root()) / feature_key(tower, inputs)
    progress, values_file = directory / "progress.json", directory / "values.npy"
    count = len(inputs)
    device = next(tower.parameters()).device
    tower.backbone.eval()

    def run(indices: NDArray[np.int64]) -> Padded:
        with torch.inference_mode():
            return tower.features(*inputs.fetch(indices, None).to(device))

    lengths = np.asarray(inputs.lengths, dtype=np.int64)
    ragged = tower.pooling is not None and bool((lengths > 1).any())
    offsets = np.concatenate([[0], lengths.cumsum()]) if ragged else None

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if progress.exists():
            done = int(json.loads(progress.read_text(encoding="utf-8"))["rows"])
        else:
            done, row = 0, run(np.arange(1)).values.shape[1:]
            _reserve(values_file, (int(lengths.sum()), row[-1]) if ragged else (count, *row))
        if done < count:
            values = np.lib.format.open_memmap(values_file, "r+")
            with tqdm(total=count, initial=done, desc=label, unit="row", delay=2) as bar:
                for start in range(done, count, CHUNK):
                    rows = np.arange(start, min(start + CHUNK, count))
                    by_length = rows[np.argsort(lengths[rows], kind="stable")]  # little padding per batch
                    for batch in np.split(by_length, range(batch_size, len(rows), batch_size)):
                        _store(values, offsets, batch, run(batch))
                        bar.update(len(batch))
                    values.flush()
                    write_text(progress, json.dumps({"rows": int(rows[-1]) + 1, "label": label}))
    return Features(np.load(values_file, mmap_mode="r", allow_pickle=False), offsets, inputs.fingerprint)


def _reserve(file: Path, shape: tuple[int, ...]) -> None:
    """A float16 array on disk, written where there is room: a full disk kills a process that maps a file."""
    size, free = 2 * math.prod(shape), shutil.disk_usage(file.parent).free
    if size > free:
        raise InputError(
            f"{file}: the features take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "make room or set VSE_CACHE to a directory on another disk"
        )
    np.lib.format.open_memmap(file, "w+", np.float16, shape).flush()


def _store(
    values: NDArray[np.float16], offsets: NDArray[np.int64] | None, rows: NDArray[np.int64], features: Padded
) -> None:
    block = features.values.float().cpu().numpy().astype(np.float16)
    if offsets is None:
        values[rows] = block
        return
    for row, tokens in zip(rows, block, strict=True):
        start, end = offsets[row], offsets[row + 1]
        values[start:end] = tokens[: end - start]


def corpus_inputs(model: DualEncoder, corpus: Corpus, side: str, augment: str = "none") -> tuple[Inputs, bool]:
    """What to feed a tower with for this corpus, and whether it is past the backbone already.

    A frozen tower without augmentation is fed from the feature cache, everything else with raw rows.

    Raises:
        InputError: If the corpus has pictures and the model wants features, or the other way round, or
            their widths disagree.
    """
    tower: Tower = model.image_tower if side == "image" else model.text_tower
    cached = tower.config.frozen and augment == "none"
    if side == "text":
        inputs: Inputs = Tokens(corpus.captions, model.tokenizer)
    elif corpus.features is not None:
        width = corpus.features.shape[-1]
        if tower.config.encoder != "precomputed" or tower.backbone.dim != width:
            wanted = f"features {tower.backbone.dim} wide" if tower.config.encoder == "precomputed" else "pictures"
            raise InputError(f"{corpus.name}: holds features {width} wide, the model takes {wanted}")
        return Features(corpus.features), False
    else:
        inputs = Pixels(corpus.images, model.transform(augment), keep=not cached)
    if not cached:
        return inputs, False
    label = f"{tower.config.encoder.rsplit('/', 1)[-1]} {corpus.split}"
    return cached_features(tower, inputs, label=label), True


def corpus_encoder(model: DualEncoder, corpus: Corpus) -> Callable[[], tuple[Tensor, Tensor]]:
    """:func:`encode_corpus` for a model that keeps changing: what the towers are fed with is prepared once."""
    images, image_cached = corpus_inputs(model, corpus, "image")
    texts, text_cached = corpus_inputs(model, corpus, "text")
    return lambda: (
        model.encode("image", images, project=image_cached),
        model.encode("text", texts, project=text_cached, batch_size=256),
    )


def encode_corpus(model: DualEncoder, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Embeddings of all images ``(I, D)`` and all captions ``(C, D)``, float32 on the CPU."""
    return corpus_encoder(model, corpus)()
