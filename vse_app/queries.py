"""What can be searched for, and its place among the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from index.filters import Condition
from index.gallery import Gallery
from index.items import Item
from training.data.images import decode
from training.errors import InputError
from vse_app import limits

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

    Raises:
        InputError: If one of these makes no sense, or goes beyond :mod:`vse_app.limits`.
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
        if self.text is not None:
            check_text("text", self.text, limits.TEXT)
        if isinstance(self.like, str):
            check_text("like", self.like, limits.PATH)
        elif self.like is not None:
            check_id(self.like)
        if not (_is_number(self.weight) and 0 <= self.weight <= 1):
            raise InputError(f"search: weight {told(self.weight)}; give the text's say, from 0 to 1")


@dataclass(frozen=True)
class Options:
    """What to show of what is found; see :meth:`~vse_app.search_engine.SearchEngine.search`.

    Raises:
        InputError: If one of these makes no sense, or goes beyond :mod:`vse_app.limits`.
    """

    k: int = 10
    where: tuple[Condition, ...] = ()
    collapse_at: float | None = None
    correct_hubs: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.k, Integral) or self.k < 1:
            raise InputError(f"search: k is {told(self.k)}; ask for at least 1 result")
        if len(self.where) > limits.CONDITIONS:
            raise InputError(f"search: {len(self.where)} conditions; give at most {limits.CONDITIONS}")
        least, most = limits.LEAST_ALIKE, limits.MOST_ALIKE
        if self.collapse_at is not None and not (_is_number(self.collapse_at) and least <= self.collapse_at <= most):
            raise InputError(f"search: collapse {told(self.collapse_at)}; give a cosine from {least} to {most:g}")


def condition_lines(text: Any) -> list[str]:
    """Conditions as they are written one a line.

    Raises:
        InputError: If that is no text, or there can be too many in it.
    """
    check_text("filter", text, limits.CONDITIONS * (limits.CONDITION + 2))
    return [line.strip() for line in text.split("\n") if line.strip()]


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Conditions from how they are written, no more and no longer than :mod:`vse_app.limits` allows.

    Raises:
        InputError: If they are.
        GalleryError: If one is no condition.
    """
    if len(texts) > limits.CONDITIONS:
        raise InputError(f"search: {len(texts)} conditions; give at most {limits.CONDITIONS}")
    for text in texts:
        check_text("condition", text, limits.CONDITION)
    return tuple(Condition.parse(text) for text in texts)


def check_text(name: str, text: Any, most: int) -> None:
    """Refuse what is no text, or a longer one, from whoever may have sent anything.

    Raises:
        InputError: If it is.
    """
    if not isinstance(text, str):
        raise InputError(f"search: {name} is {told(text)}; give words")
    if len(text) > most:
        raise InputError(f"search: {name} of {len(text):,} characters; give at most {most:,}")


def check_id(key: Any) -> int:
    """The id of an item, from whoever may have sent anything.

    Raises:
        InputError: If it can be none.
    """
    if not _is_number(key, Integral) or not 0 < key < limits.IDS:
        raise InputError(f"item {told(key)}: is no id; give one that a search has found")
    return int(key)


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
            vectors[n] = _as_embedding(query.vector, gallery.metric)
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


def told(value: Any) -> str:
    """Something that anybody may have sent, briefly: it may be long, and a whole number of any length."""
    if isinstance(value, int) and abs(value) >= limits.IDS:
        return "a number of many digits"
    return f"{value}" if _is_number(value) else f"of type {type(value).__name__}"


def item_id(gallery: Gallery, key: str | int) -> int:
    """The id of an item given by path or id.

    Raises:
        InputError: If the path is not in the gallery.
    """
    if not isinstance(key, str):
        return key
    found = gallery.ids_of([key])
    if not len(found):
        raise InputError(f"{key}: is not in {gallery.directory}; add it, or search with --image")
    return int(found[0])


def find_item(gallery: Gallery, key: Any) -> Item:
    """The item of an id that a client has kept since some earlier search.

    Raises:
        InputError: If it is no id, or the item was removed meanwhile.
    """
    for _, item in gallery.items(np.array([check_id(key)])):
        return item
    raise InputError(f"item {key}: is no longer in the gallery; search again")


def read_vectors(path: Path) -> NDArray[np.floating]:
    """Vectors ``(N, D)`` of a ``.npy`` file that holds one, or one a row; not read before they are used.

    Raises:
        InputError: If it holds anything else.
    """
    try:
        vectors = np.atleast_2d(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{path}: {reason}; give float vectors in a .npy file") from error
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or not vectors.size:
        raise InputError(f"{path}: holds {vectors.dtype} {vectors.shape}; give float vectors, one a row")
    return vectors


def _as_embedding(vector: NDArray[np.floating], metric: str) -> NDArray[np.floating]:
    """As the model would give it: finite and, for cosine, of length 1."""
    if not np.isfinite(vector).all():
        raise InputError("search: a vector that is not finite; embed it again")
    if metric != "cosine":
        return vector
    wide = np.asarray(vector, np.float64)
    wide = wide / (np.abs(wide).max() or 1)  # squares of large numbers overflow
    length = float(np.linalg.norm(wide))
    if not length:
        raise InputError("search: a vector of zeros points nowhere; embed it again")
    return wide / length


def _spread(vector: NDArray[np.float32], background: NDArray[np.float32]) -> float:
    return max(float((background @ vector).std()), _SPREAD_FLOOR) if len(background) else 1.0


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
