"""The one in-memory form of an image–caption data set."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from training.errors import InputError

_UNUSABLE = re.compile("[\0\ud800-\udfff]")


def text_fault(text: str) -> str | None:
    """What in ``text`` no file, hash or tokenizer takes; None if it can be used."""
    found = _UNUSABLE.search(text)
    return found and ("a NUL character" if found[0] == "\0" else f"half a character (\\u{ord(found[0]):04x})")


class ImageSource(Protocol):
    """A picture that can be decoded when it is needed."""

    @property
    def name(self) -> str:
        """What to call this picture in messages and results: a path, or a stable identifier."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the pixels do; computed without decoding. Keys the feature cache."""
        ...

    def load(self) -> Image.Image:
        """Decode to an upright 8-bit RGB image. Raises :class:`InputError` if that is impossible."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Images, captions, and who describes whom, for one split.

    Ownership is explicit: caption ``c`` describes image ``owner[c]``. Nothing assumes five captions per
    image, nor that captions of one image stand next to each other.

    Attributes:
        name: Where the corpus came from, e.g. ``karpathy:flickr8k``.
        split: The split it holds, e.g. ``train`` or ``train+restval``.
        image_ids: One unique identifier per image, ``(I,)``.
        captions: The sentences, ``(C,)``.
        caption_ids: One unique identifier per caption, ``(C,)``.
        owner: int64 ``(C,)``; ``owner[c]`` is the index of the image that caption ``c`` describes.
        images: The pictures, ``(I,)``; empty when only features are known.
        features: Precomputed image features ``(I, F)`` or ``(I, R, F)``, possibly memory-mapped; None when
            there are pictures.
        weights: How many pairs each one stands for, float64 ``(C,)``, where duplicates have been left out; None
            where every pair stands for itself.
        notes: What reading left out or repaired, one line each.

    Raises:
        InputError: On duplicate identifiers, a caption that is empty, unusable or owned by no image, an image
            without captions, or lengths that disagree.
    """

    name: str
    split: str
    image_ids: Sequence[str]
    captions: Sequence[str]
    caption_ids: Sequence[str]
    owner: NDArray[np.int64]
    images: Sequence[ImageSource] = ()
    features: NDArray[np.floating] | None = None
    weights: NDArray[np.float64] | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        where = f"{self.name} [{self.split}]"
        if not self.image_ids:
            raise InputError(f"{where}: no images; check the path and the split's name")
        if not self.images and self.features is None:
            raise InputError(f"{where}: neither pictures nor features")
        rows = len(self.images) if self.features is None else len(self.features)
        if rows != len(self.image_ids):
            raise InputError(f"{where}: {len(self.image_ids)} image ids for {rows} images")
        if not len(self.captions) == len(self.caption_ids) == len(self.owner):
            raise InputError(
                f"{where}: {len(self.captions)} captions, {len(self.caption_ids)} caption ids and "
                f"{len(self.owner)} owners; they must agree"
            )
        for kind, ids in (("image", self.image_ids), ("caption", self.caption_ids)):
            if len(set(ids)) != len(ids):
                seen: set[str] = set()
                twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
                raise InputError(f"{where}: {kind} id {twice!r} occurs twice; make ids unique")
        if len(self.owner) and not (self.owner.min() >= 0 and self.owner.max() < len(self.image_ids)):
            bad = int(np.flatnonzero((self.owner < 0) | (self.owner >= len(self.image_ids)))[0])
            raise InputError(f"{where}: caption {self.caption_ids[bad]!r} belongs to no image; remove it")
        for caption_id, caption in zip(self.caption_ids, self.captions, strict=True):
            if not caption.strip():
                raise InputError(f"{where}: caption {caption_id!r} is empty; write it or remove it")
            if fault := text_fault(caption):
                raise InputError(f"{where}: caption {caption_id!r} holds {fault}; remove it")
        alone = np.flatnonzero(np.bincount(self.owner, minlength=len(self.image_ids)) == 0)
        if len(alone):
            raise InputError(
                f"{where}: image {self.image_ids[alone[0]]!r} has no caption "
                f"({len(alone)} such images); caption it or remove it"
            )

    def __len__(self) -> int:
        """Number of (image, caption) pairs, i.e. captions."""
        return len(self.captions)

    def subset(self, image_indices: Sequence[int] | NDArray[np.integer], split: str | None = None) -> Corpus:
        """The given images, in the given order, with all their captions."""
        chosen = [int(index) for index in image_indices]
        position = np.full(len(self.image_ids), -1, dtype=np.int64)
        position[chosen] = np.arange(len(chosen))
        kept = np.flatnonzero(position[self.owner] >= 0)
        weights = None if self.weights is None else self.weights[kept]
        return self._part(chosen, kept, split or self.split, weights)

    def select(self, captions: NDArray[np.int64], weights: NDArray[np.float64]) -> Corpus:
        """The given captions, in the given order, with their weights and the images that they describe."""
        images = np.unique(self.owner[captions])
        return self._part(images.tolist(), captions, self.split, weights)

    def _part(
        self, images: list[int], captions: NDArray[np.int64], split: str, weights: NDArray[np.float64] | None
    ) -> Corpus:
        position = np.full(len(self.image_ids), -1, dtype=np.int64)
        position[images] = np.arange(len(images))
        chosen, kept = images, captions.tolist()
        return Corpus(
            name=self.name,
            split=split,
            image_ids=[self.image_ids[i] for i in chosen],
            captions=[self.captions[c] for c in kept],
            caption_ids=[self.caption_ids[c] for c in kept],
            owner=position[self.owner[captions]],
            images=[self.images[i] for i in chosen] if self.images else (),
            features=self.features[chosen] if self.features is not None else None,
            weights=weights,
            notes=self.notes,
        )

    def fingerprint(self, side: str) -> str:
        """SHA-256 over the pictures, none decoded, or their features (``image``), or over the captions (``text``)."""
        if side == "image" and self.features is not None:
            digest = hashlib.sha256(f"{self.features.shape} {self.features.dtype}".encode())
            for start in range(0, len(self.features), 1024):  # they may be larger than the memory
                digest.update(self.features[start : start + 1024].tobytes())
            return digest.hexdigest()
        parts = self.captions
        if side == "image":
            bar = tqdm(self.images, desc="read", unit="image", delay=2, leave=False, disable=None)
            parts = [source.fingerprint for source in bar]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()  # no part holds a NUL


def concatenate(parts: Sequence[Corpus]) -> Corpus:
    """Join splits of one data set, e.g. ``train`` and ``restval``.

    Raises:
        InputError: If some parts have features and others pictures, or identifiers collide.
    """
    if len(parts) == 1:
        return parts[0]
    if len({part.features is None for part in parts}) > 1:
        raise InputError(f"{parts[0].name}: cannot join pictures with precomputed features")
    offsets = np.cumsum([0] + [len(part.image_ids) for part in parts])
    return Corpus(
        name=parts[0].name,
        split="+".join(part.split for part in parts),
        image_ids=[i for part in parts for i in part.image_ids],
        captions=[c for part in parts for c in part.captions],
        caption_ids=[c for part in parts for c in part.caption_ids],
        owner=np.concatenate([part.owner + offset for part, offset in zip(parts, offsets, strict=False)]),
        images=[image for part in parts for image in part.images],
        features=None
        if parts[0].features is None
        else np.concatenate([part.features for part in parts if part.features is not None]),
        weights=None
        if all(part.weights is None for part in parts)
        else np.concatenate([np.ones(len(p)) if p.weights is None else p.weights for p in parts]),
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
    )
