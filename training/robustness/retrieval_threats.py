"""Who attacks what: the threats against a retrieval system, each as an objective over embeddings and as exact ranks.

The gallery is fixed, so a query against it is a linear classifier whose classes are the gallery's items, and an item
against its queries is a handful of scores with fixed thresholds. Ranks count ties against the true item, as
:mod:`training.evaluation.ranks` does; no approximate index takes part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.errors import InputError
from training.models.similarity import Similarity
from training.robustness.attacks import Objective, Value

Embed = Callable[[Tensor], Tensor]
Loss = Literal["margin", "dlr", "ce", "targeted"]

CUTOFFS = (1, 5, 10)
"""The K of R@K."""
CE_SCALE = 20.0
"""Cosines are divided by 0.05 before cross-entropy; undivided, thousands of classes would all weigh the same."""
_TINY = 1e-12


@dataclass(frozen=True)
class Threat(ABC):
    """N pictures that may be perturbed, and what happens in the search when they are.

    Attributes:
        embed: Pictures ``(b, 3, S, S)`` in [0, 1], or whatever is perturbed, to embeddings ``(b, D)``, differentiably.
        similarity: How the model compares.
    """

    embed: Embed
    similarity: Similarity

    @property
    def goal(self) -> int:
        """The hardest goal: to leave the first ten ranks, or to enter the first; it includes the others."""
        return CUTOFFS[-1]

    @abstractmethod
    def value(self, embeddings: Tensor, rows: Tensor, loss: Loss, goal: int, target: int) -> Value:
        """Attack loss ``(b,)`` and whether the goal is reached, at embeddings ``(b, D)`` of the pictures ``rows``."""

    @abstractmethod
    def ranks(self, embeddings: Tensor) -> NDArray[np.int64]:
        """Zero-based ranks ``(N, P)`` of up to P searches that each picture decides; -1 where it has fewer."""

    @abstractmethod
    def rows(self, rows: Tensor) -> Threat:
        """The same threat to the pictures at these indices alone."""

    def withstood(self, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pictures, of ranks ``(N, P)``, have a search left that an attack on the first rank has not changed."""
        kept: NDArray[np.bool_] = np.any(ranks == 0, axis=1)
        return kept

    def objective(self, loss: Loss = "margin", goal: int = 1, target: int = 0) -> Objective:
        """What an attack maximises.

        Args:
            loss: ``margin`` pushes best-ranked competitors above the true item, in units of the score; ``dlr`` divides
                that by the spread of the best scores; ``ce`` is cross-entropy; ``targeted`` is the targeted DLR.
            goal: The true item is to leave (for promotion, to enter) the first ``goal`` ranks.
            target: For ``targeted``: the competitor that stands ``target``-th in the clean ranking is to win.
        """

        def at(points: Tensor, rows: Tensor) -> Value:
            return self.value(self.embed(points), rows, loss, goal, target)

        return at


@dataclass(frozen=True)
class QueryImage(Threat):
    """``query-image``: the picture that is searched with is perturbed so that its own captions fall in rank.

    Attributes:
        gallery: Embeddings of all captions ``(G, D)``.
        own: bool ``(N, G)``; the captions that describe each query.
        targets: int64 ``(N, T)``; the captions of others that rank first when nothing is perturbed.
    """

    gallery: Tensor
    own: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls,
        embed: Embed,
        similarity: Similarity,
        gallery: Tensor,
        owner: NDArray[np.int64],
        queries: Sequence[int],
        clean: Tensor,
        targets: int = 9,
    ) -> QueryImage:
        """The threat for some images of a corpus.

        Args:
            embed: See :class:`Threat`.
            similarity: See :class:`Threat`.
            gallery: Embeddings of all captions ``(G, D)``.
            owner: int64 ``(G,)``; the image that each caption describes.
            queries: Indices of the N images that are searched with.
            clean: Their embeddings ``(N, D)``.
            targets: Competitors to aim at, one after the other.

        Raises:
            InputError: If an image has no captions.
        """
        own = torch.from_numpy(np.asarray(queries)[:, None] == owner[None]).to(gallery.device)
        if not bool(own.any(dim=1).all()):
            bad = queries[int(torch.nonzero(~own.any(dim=1))[0])]
            raise InputError(f"image {bad} has no captions, so nothing can be found with it; leave it out")
        with torch.no_grad():
            rivals = similarity.scores(clean, gallery).masked_fill(own, -torch.inf)
        return cls(embed, similarity, gallery, own, rivals.topk(min(targets, rivals.shape[1])).indices)

    def rows(self, rows: Tensor) -> QueryImage:
        """The same threat by fewer queries."""
        return QueryImage(self.embed, self.similarity, self.gallery, self.own[rows], self.targets[rows])

    def value(self, embeddings: Tensor, rows: Tensor, loss: Loss, goal: int, target: int) -> Value:
        """See :class:`Threat`. ``margin``: the mean over K of the K-th best competitor, minus the best own caption."""
        scores, own = self.similarity.scores(embeddings, self.gallery), self.own[rows]
        best = scores.masked_fill(~own, -torch.inf).amax(1)  # (b,)
        others = scores.masked_fill(own, -torch.inf)
        count = min(max(goal, 4), int((~own).sum(1).min()))  # a small gallery may have fewer competitors
        top = others.topk(count).values  # (b, count), best first
        done = (top[:, :goal] >= best[:, None]).sum(1) >= min(goal, count)
        if loss == "margin":
            return Value(_rivals(top, goal) - best, done)
        if loss == "ce":
            logits = CE_SCALE * torch.cat([best[:, None], others], 1)
            return Value(logits.logsumexp(1) - logits[:, 0], done)
        order = torch.cat([best[:, None], top[:, :4]], 1).sort(descending=True).values
        if loss == "dlr":
            return Value((top[:, 0] - best) / (order[:, 0] - order[:, 2] + _TINY), done)
        aimed = scores.gather(1, self.targets[rows][:, target : target + 1])[:, 0]
        return Value((aimed - best) / (order[:, 0] - (order[:, 2] + order[:, 3]) / 2 + _TINY), done)

    @torch.no_grad()
    def ranks(self, embeddings: Tensor) -> NDArray[np.int64]:
        """``(N, 1)``: competitors that score at least as high as the best own caption."""
        scores = self.similarity.scores(embeddings, self.gallery)
        best = scores.masked_fill(~self.own, -torch.inf).amax(1, keepdim=True)
        above = (scores.masked_fill(self.own, -torch.inf) >= best).sum(1, keepdim=True)
        return above.cpu().numpy()


@dataclass(frozen=True)
class GalleryImage(Threat):
    """A picture in the gallery is perturbed: ``gallery-owner`` demotes it, ``gallery-promote`` lifts it.

    Only the perturbed picture's scores move; those of all other pictures are thresholds, known beforehand.

    Attributes:
        captions: Embeddings of up to P captions ``(N, P, D)`` that search for each picture.
        present: bool ``(N, P)``; False where a picture has fewer.
        rivals: Scores of the other pictures ``(N, P, M)``, ascending.
        promote: Lift the picture rather than demote it.
    """

    captions: Tensor
    present: Tensor
    rivals: Tensor
    promote: bool

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        embed: Embed,
        similarity: Similarity,
        images: Tensor,
        captions: Tensor,
        perturbed: Sequence[int],
        searches: Sequence[Sequence[int]],
        promote: bool,
    ) -> GalleryImage:
        """The threat for some images of a gallery.

        Args:
            embed: See :class:`Threat`.
            similarity: See :class:`Threat`.
            images: Embeddings of the whole gallery ``(I, D)``.
            captions: Embeddings of all captions ``(C, D)``.
            perturbed: Indices of the N images that may be perturbed.
            searches: For each, the captions that decide: its own when it is demoted, others' when it is promoted.
            promote: Lift it rather than demote it.

        Raises:
            InputError: If an image has no captions, or stands alone in the gallery.
        """
        if len(images) < 2:
            raise InputError("one image has no competitors; audit on more")
        for image, searched in zip(perturbed, searches, strict=True):
            if not len(searched):
                raise InputError(f"image {image} has no captions, so nothing searches for it; leave it out")
        width = max(map(len, searches))
        chosen = torch.tensor([[*found, *[found[0]] * (width - len(found))] for found in searches])  # (N, P)
        present = torch.tensor([[place < len(found) for place in range(width)] for found in searches])
        rivals = images.new_empty(len(perturbed), width, len(images) - 1)
        for row, image in enumerate(perturbed):
            others = torch.cat([images[:image], images[image + 1 :]])
            rivals[row] = similarity.scores(others, captions[chosen[row]]).T.sort(dim=1).values
        return cls(embed, similarity, captions[chosen], present.to(images.device), rivals, promote)

    def rows(self, rows: Tensor) -> GalleryImage:
        """The same threat to fewer pictures."""
        kept = self.captions[rows], self.present[rows], self.rivals[rows]
        return GalleryImage(self.embed, self.similarity, *kept, self.promote)

    def value(self, embeddings: Tensor, rows: Tensor, loss: Loss, goal: int, target: int) -> Value:
        """See :class:`Threat`. The margin is averaged over the captions; ``dlr`` and ``ce`` have no meaning here.

        Raises:
            ValueError: For another loss than ``margin``.
        """
        if loss != "margin":
            raise ValueError(f"a gallery picture is attacked by its margin, not by {loss}")
        scores = self.similarity.pairs(embeddings[:, None], self.captions[rows])  # (b, P)
        best = self.rivals[rows].flip(2)[..., : max(goal, 1)]  # (b, P, K), best first
        present = self.present[rows]
        inside = scores[..., None] > best[..., -1:]  # ranks among the first K
        if self.promote:
            margin, done = scores - best[..., -1], inside[..., 0].all(1)
        else:
            shape = best.shape[:2]
            margin = _rivals(best.flatten(0, 1), goal).view(shape) - scores
            done = ~(inside[..., 0] & present).any(1)
        mean = (margin * present).sum(1) / present.sum(1)
        return Value(mean, done)

    @property
    def goal(self) -> int:
        """See :class:`Threat`."""
        return 1 if self.promote else super().goal

    def withstood(self, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """See :class:`Threat`."""
        return np.any(ranks > 0, axis=1) if self.promote else super().withstood(ranks)

    @torch.no_grad()
    def ranks(self, embeddings: Tensor) -> NDArray[np.int64]:
        """``(N, P)``: pictures that score at least as high for each caption; -1 where a picture has fewer."""
        scores = self.similarity.pairs(embeddings[:, None], self.captions)
        below = torch.searchsorted(self.rivals, scores[..., None].contiguous())[..., 0]
        return (self.rivals.shape[2] - below).masked_fill(~self.present, -1).cpu().numpy()


@dataclass(frozen=True)
class QueryText:
    """``query-text``: the caption that is searched with is edited so that its own image falls in rank.

    Attributes:
        encode: Sentences to embeddings ``(n, D)``.
        similarity: How the model compares.
        gallery: Embeddings of all images ``(I, D)``.
        owner: int64 ``(N,)``; the image that each query describes.
    """

    encode: Callable[[Sequence[str]], Tensor]
    similarity: Similarity
    gallery: Tensor
    owner: NDArray[np.int64]

    @torch.no_grad()
    def margins(self, texts: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.floating]:
        """Score of the best other image minus the own one's, ``(n,)``, for edited versions of queries ``rows``."""
        scores, own = self._scores(texts, rows)
        return (scores.amax(1) - own[:, 0]).cpu().numpy()

    @torch.no_grad()
    def ranks(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """``(N, 1)``: images that score at least as high as the own one."""
        scores, own = self._scores(texts, np.arange(len(texts)))
        return (scores >= own).sum(1, keepdim=True).cpu().numpy()

    def _scores(self, texts: Sequence[str], rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        scores = self.similarity.scores(self.gallery, self.encode(texts).to(self.gallery.device)).T  # (n, I)
        own = torch.from_numpy(self.owner[rows]).to(scores.device)[:, None]
        return scores.scatter(1, own, -torch.inf), scores.gather(1, own)


def _rivals(top: Tensor, goal: int) -> Tensor:
    """Mean over the cutoffs K up to ``goal`` of the K-th best of ``top`` ``(b, >= goal)``, so that all R@K suffer."""
    chosen = [min(k, top.shape[1]) - 1 for k in CUTOFFS if k <= goal] or [0]
    return top[:, chosen].mean(1)
