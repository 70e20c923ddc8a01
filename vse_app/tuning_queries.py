"""Where the queries come from that a gallery is tuned on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.filters import Condition
from index.gallery import Gallery
from index.tuning import FEWEST_QUERIES
from training.config import read_toml
from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.data.formats.records import text_lines
from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from vse_app.queries import read_vectors

MOST = 4000  # queries to tune on; their mean recall is known to a quarter of a percent
_PAIRS_AT_LEAST = 100


@dataclass(frozen=True)
class TuningQueries:
    """Embedded queries and, where they are captions of known images, those images.

    Attributes:
        queries: float32 ``(C, D)``.
        source: What they are, in words.
        images: float32 ``(I, D)``, or None.
        owner: int64 ``(C,)``, the row of ``images`` that each caption describes, or None.
    """

    queries: NDArray[np.float32]
    source: str
    images: NDArray[np.float32] | None = None
    owner: NDArray[np.int64] | None = None

    def sample(self) -> NDArray[np.float32]:
        """At most 4,000 of the queries, drawn evenly."""
        return self.queries[np.random.default_rng(0).permutation(len(self.queries))[:MOST]]


def read_queries(
    gallery: Gallery, load_model: Callable[[], DualEncoder], given: str | None, split: str
) -> TuningQueries:
    """The queries that are given, or the best that can be found.

    Args:
        gallery: What is to be tuned.
        load_model: Loads the gallery's model, if texts are to be embedded.
        given: A file of vectors (``.npy``) or of texts (``.txt``, one a line), or data as ``KIND:PATH``. None looks
            for captions in the gallery, then for the validation split that its model was trained with, and at
            last takes vectors of the gallery, which says too little about texts.
        split: Of the data.

    Raises:
        InputError: If what is given cannot be read.
    """
    if given is None:
        return _found(gallery, load_model, split)
    path = Path(given)
    if path.suffix == ".npy":
        vectors = read_vectors(path)
        return TuningQueries(np.array(vectors[:MOST], np.float32), f"{len(vectors):,} vectors of {path.name}")
    if path.suffix == ".txt" and path.is_file():
        texts = [line for _, line in text_lines(path) if line.strip()][:MOST]
        return TuningQueries(load_model().encode_texts(texts).numpy(), f"{len(texts):,} texts of {path.name}")
    return _of_corpus(load_model(), load_corpus(given, split), f"{given} [{split}]")


def _found(gallery: Gallery, load_model: Callable[[], DualEncoder], split: str) -> TuningQueries:
    captioned = gallery.ids_where([Condition("caption", "!=", None), Condition("caption", "!=", "")])
    if len(captioned) >= _PAIRS_AT_LEAST:
        chosen = captioned[np.sort(np.random.default_rng(0).permutation(len(captioned))[:MOST])]
        texts = [str(item.caption) for _, item in gallery.items(chosen)]
        return TuningQueries(
            load_model().encode_texts(texts).numpy(),
            f"{len(texts):,} captions of the gallery",
            gallery.vectors(chosen),
            np.arange(len(texts)),
        )
    recipe = Path(gallery.model.get("name", "")) / "config.toml"
    try:
        config = read_toml(recipe)
        corpus = load_corpus(config.data, split)
        if corpus.images:
            return _of_corpus(load_model(), corpus, f"{config.data} [{split}], which the model was validated on")
    except (InputError, OSError) as error:
        print(f"no captions to tune on ({error})", file=sys.stderr)
    print(
        "tuning on vectors of the gallery: texts will find less; better name captions with --queries", file=sys.stderr
    )
    ids = gallery.snapshot.ids()
    chosen = np.sort(np.random.default_rng(0).permutation(len(ids))[: max(FEWEST_QUERIES, min(MOST, len(ids) // 2))])
    return TuningQueries(gallery.vectors(ids[chosen]), f"{len(chosen):,} vectors of the gallery itself")


def _of_corpus(model: DualEncoder, corpus: Corpus, source: str) -> TuningQueries:
    images, captions = encode_corpus(model, corpus)
    return TuningQueries(captions.numpy(), f"{len(captions):,} captions of {source}", images.numpy(), corpus.owner)
