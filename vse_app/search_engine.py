"""A dual encoder and a gallery together: pictures in, results out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from index.errors import GalleryError, ModelError
from index.filters import Condition
from index.gallery import Gallery, Hit
from index.manifest import Manifest, Part
from index.near_duplicates import collapse
from index.querybank import rescore
from index.relevance import Relevance, sample
from index.vector_index import SearchHits
from training.data.image_folders import Listing, find_images
from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from vse_app import limits
from vse_app.indexing import AddReport as AddReport
from vse_app.indexing import Facts as Facts
from vse_app.indexing import add_pictures, plan_pictures
from vse_app.queries import Options, Query, embed, item_id, told
from vse_app.text_cache import TextCache
from vse_app.uploads import tidy_uploads

_HUB_DEPTH = 10  # hubness correction ranks anew so many times as many results as are wanted
_HITS = 1 << 22  # hits held at once, 50 MB


@dataclass(frozen=True)
class Result(Hit):
    """A hit, and what is known about it.

    Attributes:
        probability: That it is what a text means, if the gallery was calibrated; None for other queries.
        likely: Whether that reaches the gallery's cut; None where there is no probability.
        alike: How many hits look the same, which it stands for.
        duplicates: The best :data:`~vse_app.limits.DUPLICATES` of these.
    """

    probability: float | None = None
    likely: bool | None = None
    alike: int = 0
    duplicates: tuple[Hit, ...] = ()


class SearchEngine:
    """Searches a gallery by text or picture with the model it was built with.

    Args:
        gallery: Open for reading, or for writing if pictures are to be added.
        model: The dual encoder; its checksum must be the gallery's. None loads the one that the gallery names
            when it is first needed.
        bfloat16: Embed texts in bfloat16, for processors that are faster at it; scores change in the third decimal.

    Raises:
        GalleryError: If the gallery was built with another model.
    """

    def __init__(self, gallery: Gallery, model: DualEncoder | None = None, *, bfloat16: bool = False) -> None:
        if model:
            gallery.check_model(model.fingerprint())
        self.gallery = gallery
        self._model, self._checksum = model, gallery.model.get("checksum")
        self._bfloat16 = bfloat16
        self._texts = TextCache(self._encode_texts)
        self._relevance: Relevance | None = None
        self._relevance_part: Part | None = None
        self._sample: tuple[Manifest, NDArray[np.float32]] | None = None

    @classmethod
    def open(
        cls, directory: Path, *, writable: bool = False, model: Path | None = None, bfloat16: bool = False
    ) -> SearchEngine:
        """A gallery with the model named in it.

        Args:
            directory: The gallery.
            writable: Open it for adding too.
            model: Where its model is now, if that was moved; the gallery remembers it if it can be written.
            bfloat16: See :class:`SearchEngine`.

        Raises:
            GalleryError: If there is no gallery, it is damaged or in use, or the model is another one.
            InputError: If the model cannot be loaded.
        """
        with ExitStack() as resources:
            gallery = resources.enter_context(Gallery.open(directory, writable=writable))
            if writable:
                tidy_uploads(gallery)
            encoder = named_model(model)
            engine = cls(gallery, encoder, bfloat16=bfloat16)
            if model and encoder:
                with (
                    suppress(GalleryError),
                    nullcontext(gallery) if writable else Gallery.open(directory, writable=True) as held,
                ):
                    held.rename_model(identity(model, encoder)["name"])
            resources.pop_all()
        return engine

    @classmethod
    def open_or_create(cls, directory: Path, model: Path | None) -> SearchEngine:
        """As :meth:`open` for writing, after creating the gallery if there is none.

        Args:
            directory: The gallery.
            model: Run directory or hub name; needed for a new gallery, checked against an old one.

        Raises:
            InputError: If the model cannot be loaded.
        """
        if Gallery.exists(directory):
            return cls.open(directory, writable=True, model=model)
        if model is None:
            raise InputError(f"{directory}: a new gallery needs a model; add --model RUN")
        encoder = DualEncoder.from_pretrained(model)
        encoder.transform()  # refuses a model that cannot see pictures before anything is written
        dim, metric = encoder.config.dim, encoder.config.similarity
        return cls(Gallery.create(directory, dim=dim, metric=metric, model=identity(model, encoder)), encoder)

    @property
    def model(self) -> DualEncoder:
        """The gallery's model.

        Raises:
            InputError: If it cannot be loaded.
            GalleryError: If what is there now is another one, or the gallery was made anew with another one since.
        """
        if self._model is None:
            self._model, self._checksum = load_model(self.gallery), self.gallery.model.get("checksum")
        self.check_model()
        return self._model

    def check_model(self) -> None:
        """Refuse to go on in a gallery that was made anew, by whoever, with another model than the one in memory.

        Raises:
            ModelError: If it was.
        """
        if self._model is not None and self._checksum != self.gallery.model.get("checksum"):
            raise ModelError(
                f"{self.gallery.directory}: was made anew with another model, {self.gallery.model.get('name')!r}; "
                "open it again, or restart vse serve"
            )

    def add(
        self,
        pictures: Sequence[Path] | Listing,
        facts: Mapping[Path, Facts] | None = None,
        *,
        dry_run: bool = False,
        force: bool = False,
        find_moved: bool = True,
    ) -> AddReport:
        """Index pictures from files and folders, see :func:`vse_app.indexing.add_pictures`.

        Raises:
            InputError: If a path is missing, or a folder among them cannot be read; what is wrong with a single
                picture is in the report.
            GalleryError: If the disk is full.
        """
        listing = pictures if isinstance(pictures, Listing) else find_images(pictures)
        plan = plan_pictures(self.gallery, listing, facts or {}, force=force, find_moved=find_moved)
        return plan.report if dry_run else add_pictures(self.gallery, lambda: self.model, plan)

    def search(
        self,
        queries: Sequence[Query],
        k: int = 10,
        *,
        where: Sequence[Condition] = (),
        collapse_at: float | None = None,
        correct_hubs: bool = False,
        vectors: NDArray[np.float32] | None = None,
    ) -> list[list[Result]]:
        """The ``k`` best pictures for each query, best first.

        Args:
            queries: What to look for; embedded together.
            k: Results per query; fewer only if the gallery, or what the conditions leave of it, is smaller.
            where: Conditions on the items, all of which must hold.
            collapse_at: Cosine from which two results count as one, which the better one stands for. If there are more
                copies than :data:`~vse_app.limits.DEPTH`, there may be fewer results.
            correct_hubs: Rank by querybank-normalised scores (:class:`index.querybank.QueryBank`) what plain
                similarity puts among the first ``10 k``.
            vectors: What :meth:`embed` gave for the queries, if that was called before.

        Raises:
            GalleryError: If there is nothing to correct hubs by, or an item to be like is not there.
            InputError: If a query is empty or its picture cannot be read, or more is asked than :mod:`vse_app.limits`
                allows.
        """
        Options(k, tuple(where), collapse_at, correct_hubs)  # which checks them
        k = int(k)  # faiss takes no number of numpy
        self.check_model()
        embedded = self.embed(queries) if vectors is None else vectors
        allowed = self.gallery.ids_where(where) if where else None
        if correct_hubs and not (self.relevance and self.relevance.bank):
            raise GalleryError(
                f"{self.gallery.directory}: has no query bank that helps; see what vse index tune says of it"
            )
        count = len(self.gallery) if allowed is None else len(allowed)
        if min(k, count) > limits.MOST_RESULTS:
            raise InputError(f"search: k is {told(k)}; ask for at most {limits.MOST_RESULTS:,} results")
        # One more for the item that a query is to be like, and some to make up for what is collapsed.
        depth = k * (2 if collapse_at is not None else 1) + 1
        if correct_hubs:
            depth = max(depth, min(_HUB_DEPTH * depth, limits.DEPTH))
        deepest = max(1, min(count, max(depth, limits.DEPTH) if collapse_at is not None else depth))
        results: list[list[Result]] = []
        together = max(1, _HITS // deepest)
        for start in range(0, len(queries), together):
            some = slice(start, start + together)
            reached = min(depth, deepest)
            while True:
                hits = self._ranked(embedded[some], reached, allowed, correct_hubs)
                groups = [self._groups(*row, k, collapse_at) for row in zip(hits.ids, queries[some], strict=True)]
                if reached == deepest or min(map(len, groups)) >= k:
                    break
                reached = min(4 * reached, deepest)
            results += self._results(queries[some], embedded[some], hits, groups, count)
        return results

    def embed(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Vectors of the queries, float32 ``(Q, D)``; see :func:`vse_app.queries.embed`.

        Raises:
            GalleryError: If an item to be like is not there.
            InputError: If a query is empty or its picture cannot be read.
        """
        self.check_model()
        return embed(queries, self.gallery, self._texts, self._encode_images, lambda: self.background)

    def _encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._bfloat16):
            rows: NDArray[np.float32] = self.model.encode_texts(texts).numpy()
        return rows

    def _encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.model.encode_images(images).numpy()
        return rows

    def knows_no_word(self, text: str) -> bool:
        """Whether a vocabulary of words has none of the text's, so that its results mean nothing."""
        tokenizer = self.model.tokenizer
        return isinstance(tokenizer, WordTokenizer) and int(tokenizer([text])[0].max()) < len(tokenizer.SPECIALS)

    def search_text(self, text: str, k: int = 10) -> list[Result]:
        """The ``k`` pictures nearest to a sentence, best first."""
        return self.search([Query(text=text)], k)[0]

    def search_image(self, path: Path, k: int = 10) -> list[Result]:
        """The ``k`` pictures nearest to a picture, best first."""
        return self.search([Query(image=path)], k)[0]

    @property
    def relevance(self) -> Relevance | None:
        """What the gallery knows about scores, if it was tuned with captions whose images are known."""
        part = self.gallery.snapshot.manifest.calibration
        if part != self._relevance_part:
            folder = self.gallery.calibration_folder()
            self._relevance = Relevance.load(folder, self.gallery.dim) if folder else None
            self._relevance_part = part
        return self._relevance

    @property
    def background(self) -> NDArray[np.float32]:
        """A sample of the gallery, float32 ``(B, D)``."""
        if self.relevance:
            return self.relevance.background
        state = self.gallery.snapshot.manifest
        if self._sample is None or self._sample[0] != state:
            self._sample = state, sample(self.gallery.snapshot)
        return self._sample[1]

    def _ranked(
        self, vectors: NDArray[np.float32], depth: int, allowed: NDArray[np.int64] | None, correct_hubs: bool
    ) -> SearchHits:
        hits = self.gallery.nearest(vectors, depth, allowed)
        if not (correct_hubs and self.relevance and self.relevance.bank):
            return hits
        found, where = np.unique(hits.ids[hits.ids >= 0], return_inverse=True)
        hubness = np.zeros(hits.ids.shape, np.float32)
        hubness[hits.ids >= 0] = self.relevance.bank.hubness(self.gallery.vectors(found))[where]
        order = np.argsort(-rescore(hits.scores, hubness), axis=1, kind="stable")
        return SearchHits(np.take_along_axis(hits.scores, order, 1), np.take_along_axis(hits.ids, order, 1))

    def _groups(
        self, ids: NDArray[np.int64], query: Query, k: int, collapse_at: float | None
    ) -> list[NDArray[np.intp]]:
        """Places of the first ``k`` results among the ids ``(m,)``, each with those that it stands for."""
        own = item_id(self.gallery, query.like) if query.like is not None else -1
        places = np.flatnonzero((ids >= 0) & (ids != own))
        if collapse_at is None:
            return [places[n : n + 1] for n in range(min(k, len(places)))]
        leader = collapse(self.gallery.vectors(ids[places]), collapse_at, k)
        return [places[leader == first] for first in np.unique(leader[leader >= 0])]

    def _results(
        self,
        queries: Sequence[Query],
        vectors: NDArray[np.float32],
        hits: SearchHits,
        groups: list[list[NDArray[np.intp]]],
        count: int,
    ) -> list[list[Result]]:
        told = slice(limits.DUPLICATES + 1)
        wanted = [hits.ids[n, place] for n, row in enumerate(groups) for group in row for place in group[told]]
        items = dict(self.gallery.items(np.array(wanted, np.int64)))

        def hit(n: int, place: np.intp) -> Hit:
            key = int(hits.ids[n, place])
            return Hit(key, items[key], float(hits.scores[n, place]))

        relevance = self.relevance
        probabilities = relevance.probabilities(vectors, hits.scores, count) if relevance else None
        results = []
        for n, (query, row) in enumerate(zip(queries, groups, strict=True)):
            # The calibration knows texts; how alike two pictures are means something else.
            known = probabilities[n] if probabilities is not None and query.text and query.image is None else None
            results.append(
                [
                    Result(
                        **vars(hit(n, group[0])),
                        probability=None if known is None else float(known[group[0]]),
                        likely=None if known is None or not relevance else bool(known[group[0]] >= relevance.cut),
                        alike=len(group) - 1,
                        duplicates=tuple(hit(n, place) for place in group[1 : told.stop]),
                    )
                    for group in row
                ]
            )
        return results

    def close(self) -> None:
        """Close the gallery."""
        self._texts.close()
        self.gallery.close()

    def __enter__(self) -> SearchEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def identity(name: Path, model: DualEncoder) -> dict[str, str]:
    """What a gallery remembers of its model: where it was, and the checksum of its weights."""
    return {"name": str(name.resolve()) if name.exists() else str(name), "checksum": model.fingerprint()}


def named_model(name: Path | None) -> DualEncoder | None:
    """The model of a run directory or hub name, if there is a name."""
    return DualEncoder.from_pretrained(name) if name else None


def load_model(gallery: Gallery) -> DualEncoder:
    """The model named in a gallery.

    Raises:
        InputError: If it cannot be loaded.
        GalleryError: If it is another one by now.
    """
    try:
        model = DualEncoder.from_pretrained(gallery.model["name"])
    except InputError as error:
        raise InputError(f"{error}; if the model of {gallery.directory} was moved, say where with --model") from error
    gallery.check_model(model.fingerprint())
    return model
