"""A dual encoder and a gallery together: pictures in, results out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from index.gallery import Gallery, Hit
from index.items import Item
from training.data.images import Quarantine, decode, decode_all, find_images
from training.errors import InputError
from training.models.dual_encoder import DualEncoder

BATCH = 64  # pictures decoded, embedded and made durable together


@dataclass
class AddReport:
    """What became of the files given to :meth:`SearchEngine.add`."""

    added: int = 0
    unchanged: int = 0
    quarantine: Quarantine = field(default_factory=Quarantine)

    def to_json(self) -> dict[str, Any]:
        """Counts and the quarantined files."""
        return {"added": self.added, "unchanged": self.unchanged, **self.quarantine.to_json()}


class SearchEngine:
    """Searches a gallery by text or picture with the model it was built with.

    Args:
        model: The dual encoder; its checksum must be the gallery's.
        gallery: Open for reading, or for writing if pictures are to be added.

    Raises:
        GalleryError: If the gallery was built with another model.
    """

    def __init__(self, model: DualEncoder, gallery: Gallery) -> None:
        gallery.check_model(model.fingerprint())
        self.model = model
        self.gallery = gallery

    @classmethod
    def open(cls, directory: Path, *, writable: bool = False) -> SearchEngine:
        """A gallery with the model named in it.

        Raises:
            GalleryError: If there is no gallery, it is damaged or in use.
            InputError: If its model cannot be loaded.
        """
        gallery = Gallery.open(directory, writable=writable)
        return cls._with_model(gallery, gallery.model["name"])

    @classmethod
    def open_or_create(cls, directory: Path, model: Path | None) -> SearchEngine:
        """As :meth:`open` for writing, after creating the gallery if there is none.

        Args:
            directory: The gallery.
            model: Run directory or hub name; needed for a new gallery, checked against an old one.
        """
        if Gallery.exists(directory):
            gallery = Gallery.open(directory, writable=True)
            return cls._with_model(gallery, model or gallery.model["name"])
        if model is None:
            raise InputError(f"{directory}: a new gallery needs a model; add --model RUN")
        encoder = DualEncoder.from_pretrained(model)
        encoder.transform()  # refuses a model that cannot see pictures before anything is written
        name = str(model.resolve()) if model.exists() else str(model)
        identity = {"name": name, "checksum": encoder.fingerprint()}
        gallery = Gallery.create(directory, dim=encoder.config.dim, metric=encoder.config.similarity, model=identity)
        return cls(encoder, gallery)

    @classmethod
    def _with_model(cls, gallery: Gallery, model: Path | str) -> SearchEngine:
        with ExitStack() as resources:
            resources.enter_context(gallery)
            engine = cls(DualEncoder.from_pretrained(model), gallery)
            resources.pop_all()
        return engine

    def add(self, paths: Sequence[Path], captions: dict[Path, str] | None = None) -> AddReport:
        """Index pictures from files and folders; each batch is durable once the bar has moved past it.

        Unchanged files that are in the gallery already are not decoded again. Files that cannot be decoded
        are reported and left out.

        Args:
            paths: Files, and folders to walk.
            captions: Sentences to keep with some of the files.
        """
        report = AddReport()
        stale = []
        files = {path.resolve(): path for path in find_images(paths)}  # links and spellings of a file are one picture
        for target, path in files.items():
            status = path.stat() if path.exists() else None
            if status and self.gallery.has_unchanged(str(target), status.st_size, status.st_mtime_ns):
                report.unchanged += 1
            else:
                stale.append(path)
        with tqdm(total=len(stale), desc="index", unit="image", delay=1, leave=False) as bar:
            for batch in _batches(decode_all(stale, report.quarantine)):
                vectors = self.model.encode_images([image for _, image in batch]).numpy()
                items = [_item(path, (captions or {}).get(path)) for path, _ in batch]
                report.added += len(self.gallery.add(items, vectors))
                bar.update(len(batch))
        return report

    def search_text(self, text: str, k: int = 10) -> list[Hit]:
        """The ``k`` pictures nearest to a sentence, best first."""
        return self._search(self.model.encode_texts([text]).numpy(), k)

    def search_image(self, path: Path, k: int = 10) -> list[Hit]:
        """The ``k`` pictures nearest to a picture, best first."""
        return self._search(self.model.encode_images([decode(path)]).numpy(), k)

    def _search(self, vector: NDArray[np.float32], k: int) -> list[Hit]:
        return self.gallery.search(vector, k)[0]

    def close(self) -> None:
        """Close the gallery."""
        self.gallery.close()

    def __enter__(self) -> SearchEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _batches(
    decoded: Iterator[tuple[Path, Image.Image]],
) -> Iterator[list[tuple[Path, Image.Image]]]:
    while batch := list(islice(decoded, BATCH)):
        yield batch


def _item(path: Path, caption: str | None) -> Item:
    content = path.read_bytes()
    status = path.stat()
    return Item(
        path=str(path.resolve()),
        caption=caption,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=hashlib.sha256(content).hexdigest(),
    )
