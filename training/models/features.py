"""Backbone features computed once: memory-mapped, keyed by what made them, resumable after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.data.batches import Features, Inputs, Pixels, Tokens
from training.data.corpus import Corpus
from training.errors import InputError
from training.files import make_directory
from training.models.dual_encoder import DualEncoder
from training.models.feature_store import LOCK, VALUES, FeatureStore
from training.models.tower import Tower

logger = logging.getLogger(__name__)

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

    Rows are float16 on disk, float32 where that is too narrow for one of them. They are computed in chunks; after
    each, data and then its checksum reach the disk, so a killed run goes on where it stopped, and what was damaged
    since is computed again. A second process waits for the first.

    Args:
        tower: Frozen tower, on the device it should run on.
        inputs: Pixels or token ids, ``N`` rows.
        label: What the progress bar says.
        batch_size: Rows per forward pass.
        root: Cache directory, by default :func:`cache_root`.

    Returns:
        Pooled features ``(N, F)``; all tokens where the pooling is trainable.

    Raises:
        InputError: If the disk has too little room, or a feature is not finite.
    """
    directory = (root or cache_root()) / feature_key(tower, inputs)
    lengths = np.asarray(inputs.lengths, dtype=np.int64)
    ragged = tower.pooling is not None and bool((lengths > 1).any())
    offsets = np.concatenate([[0], lengths.cumsum()]) if ragged else np.arange(len(lengths) + 1)
    starts = [*range(0, len(inputs), CHUNK), len(inputs)]
    make_directory(directory)
    with (
        (directory / LOCK).open("ab") as lock,
        tqdm(total=len(inputs), desc=label, unit="row", delay=2, disable=None) as bar,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = FeatureStore(directory, offsets[starts].tolist())
        while store.missing:
            chunk = store.missing[0]
            rows = np.arange(starts[chunk], starts[chunk + 1])
            order = np.argsort(lengths[rows], kind="stable")  # little padding per batch
            bar.update(starts[chunk] - bar.n)
            try:
                for row, values in _computed(tower, inputs, rows[order], batch_size, ragged):
                    store.put(offsets[row], values)
                    bar.update()
                store.finish(chunk, label)
            except FloatingPointError:
                logger.info("%s: features beyond %s are kept as float32", label, np.finfo(store.dtype).max)
                store.clear(np.float32)
    values = np.load(directory / VALUES, mmap_mode="r", allow_pickle=False)
    return Features(values, offsets if ragged else None, inputs.fingerprint)


def _computed(
    tower: Tower, inputs: Inputs, rows: NDArray[np.int64], batch_size: int, ragged: bool
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Numbers of rows and their features, ``(1, F)`` or ``(1, T, F)``; ragged ones as ``(T, F)`` without padding."""
    device, lengths = next(tower.parameters()).device, inputs.lengths
    tower.backbone.eval()
    for batch in np.split(rows, range(batch_size, len(rows), batch_size)):
        with torch.inference_mode():
            values = tower.features(*inputs.fetch(batch, None).to(device)).values.float().cpu().numpy()
        for index, row in enumerate(batch):
            own = values[index, : lengths[row]] if ragged else values[index : index + 1]
            if not np.isfinite(own).all():
                raise InputError(
                    f"{inputs.name(row)}: {tower.config.encoder} gives features that are not finite; "
                    "remove it or take another encoder"
                )
            yield row, own


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
