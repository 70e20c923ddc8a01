"""What is attacked: the gallery that is being searched, and one search in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from index.items import Item
from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from training.robustness.norms import check_radius
from training.robustness.retrieval_threats import GalleryImage, QueryImage, Threat
from vse_app.search_engine import SearchEngine

THREATS = {
    "query-image": "somebody searches with the picture, and no longer finds what belongs to it",
    "gallery-owner": "the picture's owner hides it from a search",
    "gallery-promote": "the picture's owner lifts it to the top of a search",
}
MOST_CAPTIONS = 5000
"""Of larger galleries, so many captions are drawn for a picture to be ranked among."""
MOST_STEPS = 200


@dataclass(frozen=True)
class AttackRequest:
    """What is to be tried.

    Attributes:
        threat: A key of :data:`THREATS`.
        norm: A name that :func:`~training.robustness.norms.parse_norm` knows.
        epsilon: Radius, for pixels in [0, 1].
        steps: Gradient steps.
        text: The search of a gallery threat; None takes the picture's own caption.
        seed: Of the random start.

    Raises:
        InputError: If one of these makes no sense.
    """

    threat: str = "query-image"
    norm: str = "linf"
    epsilon: float = 2 / 255
    steps: int = 20
    text: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threat not in THREATS:
            raise InputError(f"threat {self.threat!r} is unknown; choose from {', '.join(THREATS)}")
        check_radius(self.norm, self.epsilon)
        if not 1 <= self.steps <= MOST_STEPS:
            raise InputError(f"{self.steps} steps; give 1 to {MOST_STEPS}")


class AttackTarget:
    """A gallery as an attack sees it, with its captions embedded once.

    Args:
        model: Put in evaluation mode, its weights frozen, for good.
        ids: int64 ``(N,)``.
        vectors: float32 ``(N, D)``.
        items: ``(N,)``.
    """

    def __init__(
        self, model: DualEncoder, ids: NDArray[np.int64], vectors: NDArray[np.float32], items: Sequence[Item]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.ids, self.items = ids, items
        self.vectors = torch.from_numpy(vectors).to(model.device)

    @classmethod
    def of(cls, engine: SearchEngine) -> Self:
        """What an engine searches, as it is now."""
        ids = engine.gallery.snapshot.ids()
        return cls(engine.model, ids, engine.gallery.vectors(ids), [item for _, item in engine.gallery.items(ids)])

    @cached_property
    def captions(self) -> tuple[list[int], Tensor]:
        """Rows of at most :data:`MOST_CAPTIONS` items with a caption, drawn evenly, and its embeddings ``(C, D)``."""
        rows = [row for row, item in enumerate(self.items) if (item.caption or "").strip()]
        rows = rows[:: max(1, math.ceil(len(rows) / MOST_CAPTIONS))]
        texts = [str(self.items[row].caption) for row in rows]
        return rows, self.model.encode_texts(texts).to(self.model.device)

    def row(self, item: int) -> int:
        """Where an item stands. Raises :class:`InputError` if it is not here."""
        row = int(np.searchsorted(self.ids, item))
        if row == len(self.ids) or self.ids[row] != item:
            raise InputError("the picture is no longer in the gallery; choose another one")
        return row

    def name(self, row: int) -> str:
        """What a picture is called: its caption, or its file's name."""
        return self.items[row].caption or PurePath(self.items[row].path).name


@dataclass(frozen=True)
class Case:
    """A threat to one picture, and all that is ranked in it.

    Attributes:
        threat: To the one picture.
        scores: Of everything ranked ``(M,)``, for an embedding ``(1, D)``.
        ids: int64 ``(M,)``; 0 for a picture that is not in the gallery.
        texts: ``(M,)``.
        own: bool ``(M,)``; right answers, or the picture itself.
    """

    threat: Threat
    scores: Callable[[Tensor], Tensor]
    ids: NDArray[np.int64]
    texts: list[str]
    own: NDArray[np.bool_]

    def ranks(self, embedding: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and ranks from 1 of everything; of equal scores, right answers come last."""
        scores = self.scores(embedding).float().cpu().numpy()
        ranks = np.empty(len(scores), np.int64)
        ranks[np.lexsort((self.own, -scores))] = np.arange(1, len(scores) + 1)
        return scores, ranks


def build_case(
    target: AttackTarget, request: AttackRequest, own: int | None, clean: Tensor, embed: Callable[[Tensor], Tensor]
) -> Case:
    """The threat that a request makes, and everything that is ranked in it.

    Args:
        target: The gallery.
        request: What is to be tried.
        own: Id of the picture, if it is in the gallery.
        clean: Its embedding ``(1, D)``.
        embed: Pictures to embeddings, differentiably; the attack goes through it.

    Raises:
        InputError: If there is nothing to rank, or a search is missing.
    """
    similarity = target.model.similarity
    row = None if own is None else target.row(own)
    caption = None if row is None else target.items[row].caption
    if request.threat == "query-image":
        if caption and caption.strip():
            rows, gallery = target.captions
            if row not in rows:
                rows = [*rows, row] if row is not None else rows
                gallery = torch.cat([gallery, target.model.encode_texts([caption]).to(gallery.device)])
            answers = np.array([target.items[other].caption == caption for other in rows])
        else:  # what it finds today is what it should find
            rows = [other for other in range(len(target.items)) if other != row]
            gallery = target.vectors[rows]
            answers = np.arange(len(rows)) == (int(similarity.scores(clean, gallery).argmax()) if rows else 0)
        if answers.all():
            raise InputError("there is nothing else to be found; add more pictures first")
        threat: Threat = QueryImage.of(embed, similarity, gallery, np.where(answers, 0, 1), [0], clean)
        texts = [target.name(other) for other in rows]
        return Case(threat, lambda e: similarity.scores(e, gallery)[0], target.ids[rows], texts, answers)
    text = request.text or caption
    if not text or not text.strip():
        raise InputError("write the search that the picture is to rise or fall in")
    promote = request.threat == "gallery-promote"
    if row is None and not promote:
        raise InputError("only a picture of the gallery can be hidden in it; choose one, or lift yours instead")
    words = target.model.encode_texts([text]).to(target.model.device)
    images = target.vectors if row is not None else torch.cat([target.vectors, clean])
    place = len(target.vectors) if row is None else row
    threat = GalleryImage.of(embed, similarity, images, words, [place], [[0]], promote)
    others = similarity.scores(images, words)[:, 0]

    def scores(embedding: Tensor) -> Tensor:
        found = others.clone()
        found[place] = similarity.pairs(embedding, words)[0]
        return found

    ids = np.append(target.ids, 0) if row is None else target.ids
    texts = [target.name(other) for other in range(len(target.items))] + ["your picture"] * (row is None)
    return Case(threat, scores, ids, texts, np.arange(len(images)) == place)
