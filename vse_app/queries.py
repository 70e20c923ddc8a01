"""What can be searched for, and its place among the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from index.gallery import Gallery
from training.data.images import decode
from training.errors import InputError

_SPREAD_FLOOR = 1e-6


@dataclass(frozen=True)
class Query:
    """A text, a picture, both, something in the gallery, or a vector.

    Attributes:
        text: What to look for in words.
        image: A picture file, or a decoded picture, to find similar ones.
        weight: Say of the text where both are given, from 0 to 1.
        like: Path or id of an item whose like to find; it is not among its own results.
        vector: An embedding made elsewhere with the gallery's model, float32 ``(D,)``.
    """

    text: str | None = None
    image: Path | Image.Image | None = None
    weight: float = 0.5
    like: str | int | None = None
    vector: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        given = [self.text is not None or self.image is not None, self.like is not None, self.vector is not None]
        if sum(given) != 1:
            raise InputError("search: give a text, --image FILE or both; or --like; or --vector")
        if not 0 <= self.weight <= 1:
            raise InputError(f"search: weight {self.weight}; give the text's say, from 0 to 1")


def embed(
    queries: Sequence[Query],
    gallery: Gallery,
    encode_texts: Callable[[Sequence[str]], NDArray[np.float32]],
    encode_images: Callable[[Sequence[Image.Image]], NDArray[np.float32]],
    background: Callable[[], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Vectors of all queries, float32 ``(Q, D)``; texts go through the model together, and so do pictures.

    A text and a picture are weighed after dividing each by the spread of its own scores on the gallery:
    pictures resemble pictures far more than texts do, and would drown them.

    Args:
        queries: What to embed.
        gallery: Where the items are that a query wants the like of.
        encode_texts: Embeds texts; not called for queries without any.
        encode_images: Embeds decoded pictures; not called for queries without any.
        background: Gives a sample of the gallery, float32 ``(B, D)``; called if a text and a picture meet.

    Raises:
        InputError: If a text is empty, or a picture cannot be read.
        GalleryError: If an item is not there.
    """
    texts = {n: query.text for n, query in enumerate(queries) if query.text is not None}
    images = {n: query.image for n, query in enumerate(queries) if query.image is not None}
    if texts.keys() & images.keys() and gallery.metric != "cosine":
        raise InputError(f"search: text and picture together need cosine similarity, not {gallery.metric}; give one")
    vectors = np.zeros((len(queries), gallery.dim), np.float32)
    if texts:
        vectors[list(texts)] = encode_texts(list(texts.values()))
    for n, query in enumerate(queries):
        if query.like is not None:
            vectors[n] = gallery.vectors(np.array([item_id(gallery, query.like)]))[0]
        elif query.vector is not None:
            if np.shape(query.vector) != (gallery.dim,):
                raise InputError(f"search: a vector of shape {np.shape(query.vector)}; give ({gallery.dim},)")
            vectors[n] = query.vector
    if images:
        seen = encode_images([decode(i) if isinstance(i, Path) else i for i in images.values()])
        for n, vector in zip(images, seen, strict=True):
            weight = queries[n].weight
            if n in texts:
                sample = background()
                both = weight * vectors[n] / _spread(vectors[n], sample)
                both += (1 - weight) * vector / _spread(vector, sample)
                vectors[n] = both / np.linalg.norm(both)
            else:
                vectors[n] = vector
    return vectors


def item_id(gallery: Gallery, key: str | int) -> int:
    """The id of an item given by path or id.

    Raises:
        InputError: If the path is not in the gallery.
    """
    if isinstance(key, int):
        return key
    found = gallery.ids_of([key])
    if not len(found):
        raise InputError(f"{key}: is not in {gallery.directory}; add it, or search with --image")
    return int(found[0])


def _spread(vector: NDArray[np.float32], background: NDArray[np.float32]) -> float:
    return max(float((background @ vector).std()), _SPREAD_FLOOR) if len(background) else 1.0
