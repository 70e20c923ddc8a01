"""What is attacked: the gallery that is being searched, and one search in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from index.filters import Condition
from index.gallery import Gallery
from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from training.robustness.norms import check_radius
from training.robustness.retrieval_threats import GalleryImage, QueryImage, Threat
from vse_app import limits
from vse_app.queries import check_text, find_item
from vse_app.search_engine import SearchEngine

THREATS = {
    "query-image": "somebody searches with the picture, and no longer finds what belongs to it",
    "gallery-owner": "the picture's owner hides it from a search",
    "gallery-promote": "the picture's owner lifts it to the top of a search",
}
MOST_RANKED = 5000
"""Of larger galleries, so many captions, or pictures, are drawn for a picture that searches to be ranked among."""
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
        if self.text is not None:
            check_text("text", self.text, limits.TEXT)


class AttackTarget:
    """A gallery as an attack sees it: read bit by bit, beside whoever searches it, with some captions embedded once.

    Args:
        model: Put in evaluation mode, its weights frozen, for good.
        gallery: Open for reading, and for this alone.

    Raises:
        ModelError: If the gallery is of another model.
    """

    def __init__(self, model: DualEncoder, gallery: Gallery) -> None:
        self.model = model.eval().requires_grad_(False)
        self.gallery = gallery

    @classmethod
    def of(cls, engine: SearchEngine) -> Self:
        """What an engine searches, as it is on disk now."""
        return cls(engine.model, Gallery.open(engine.gallery.directory))

    def follow(self, checksum: str) -> None:
        """Go on to the gallery's current state.

        Args:
            checksum: Of the model.

        Raises:
            ModelError: If the gallery was made anew with another model.
        """
        if self.gallery.refresh():
            self.__dict__.pop("captions", None)
        self.gallery.check_model(checksum)

    @cached_property
    def captions(self) -> tuple[NDArray[np.int64], list[str], Tensor]:
        """Ids of at most :data:`MOST_RANKED` items with a caption, drawn evenly; these; their vectors ``(C, D)``."""
        drawn = _evenly(self.gallery.ids_where([Condition("caption", "!=", None)]))
        found = [
            (key, item.caption) for key, item in self.gallery.items(drawn) if item.caption and item.caption.strip()
        ]
        texts = [text for _, text in found]
        embedded = self.model.encode_texts(texts) if texts else torch.empty(0, self.gallery.dim)
        return np.array([key for key, _ in found], np.int64), texts, embedded.to(self.model.device)

    def scores(self, vector: Tensor) -> tuple[NDArray[np.int64], Tensor]:
        """Ids of all items, int64 ``(N,)``, and their scores ``(N,)`` with a vector ``(1, D)``, block by block."""
        ids, scores = [np.empty(0, np.int64)], [torch.empty(0, device=self.model.device)]
        for some, vectors in self.gallery.snapshot.blocks():
            ids.append(some)
            rows = torch.tensor(vectors, device=self.model.device)
            scores.append(self.model.similarity.scores(rows, vector)[:, 0])
        return np.concatenate(ids), torch.cat(scores)

    def name(self, key: int) -> str:
        """What a picture is called: its caption, or its file's name; an id of 0 is a picture from outside."""
        item = find_item(self.gallery, key) if key else None
        return item.caption or PurePath(item.path).name if item else "your picture"


def _evenly(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return ids[:: max(1, math.ceil(len(ids) / MOST_RANKED))]


@dataclass(frozen=True)
class Case:
    """A threat to one picture, and all that is ranked in it.

    Attributes:
        threat: To the one picture.
        scores: Of everything ranked ``(M,)``, for an embedding ``(1, D)``.
        ids: int64 ``(M,)``; 0 for a picture that is not in the gallery.
        own: bool ``(M,)``; right answers, or the picture itself.
    """

    threat: Threat
    scores: Callable[[Tensor], Tensor]
    ids: NDArray[np.int64]
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
    caption = find_item(target.gallery, own).caption if own is not None else None
    if request.threat == "query-image":
        return _query_case(target, own, caption, clean, embed)
    text = request.text or caption
    if not text or not text.strip():
        raise InputError("write the search that the picture is to rise or fall in")
    promote = request.threat == "gallery-promote"
    if own is None and not promote:
        raise InputError("only a picture of the gallery can be hidden in it; choose one, or lift yours instead")
    similarity = target.model.similarity
    words = target.model.encode_texts([text]).to(target.model.device)
    ids, known = target.scores(words)
    if own is None:  # it stands last
        ids, known = np.append(ids, 0), torch.cat([known, known.new_zeros(1)])
    attacked = ids == (own or 0)
    rivals = known[torch.from_numpy(~attacked).to(known.device)].sort().values
    if not len(rivals):
        raise InputError("there is nothing else to be found; add more pictures first")
    present = torch.ones(1, 1, dtype=torch.bool, device=known.device)
    threat = GalleryImage(embed, similarity, words[None], present, rivals[None, None], promote)

    def scores(embedding: Tensor) -> Tensor:
        return torch.where(torch.from_numpy(attacked).to(known.device), similarity.pairs(embedding, words)[0], known)

    return Case(threat, scores, ids, attacked)


def _query_case(
    target: AttackTarget, own: int | None, caption: str | None, clean: Tensor, embed: Callable[[Tensor], Tensor]
) -> Case:
    """A picture that searches: for its caption, or, if it has none, for what it finds today."""
    similarity = target.model.similarity
    if caption and caption.strip():
        ids, texts, gallery = target.captions
        if own is not None and own not in ids:
            ids, texts = np.append(ids, own), [*texts, caption]
            gallery = torch.cat([gallery, target.model.encode_texts([caption]).to(gallery.device)])
        answers = np.array([text == caption for text in texts])
    else:
        everything, found = target.scores(clean)
        other = everything != (own or 0)
        others = everything[other]
        best = others[int(found.cpu().numpy()[other].argmax())] if len(others) else 0
        ids = np.union1d(_evenly(others), others[others == best])
        gallery = torch.from_numpy(target.gallery.vectors(ids)).to(clean.device)
        answers = ids == best
    if answers.all():
        raise InputError("there is nothing else to be found; add more pictures first")
    threat = QueryImage.of(embed, similarity, gallery, np.where(answers, 0, 1), [0], clean)
    return Case(threat, lambda e: similarity.scores(e, gallery)[0], ids, answers)
