"""From a corpus to batches: what each side is fed with, in which order, and how it is collated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.data.corpus import ImageSource
from training.data.image_transform import ImageTransform
from training.data.images import DECODER_VERSION
from training.data.padded import Padded, pad
from training.data.text import Tokenizer
from training.errors import InputError

PIXEL_MEMORY = 2 << 30  # bytes of decoded pictures that are kept rather than decoded again every epoch


class Inputs(Protocol):
    """One side of the pairs, as the tower takes it: pixels, token ids, or cached features."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens per row; 1 for a picture or a pooled feature."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever a row does, as the tower takes it in evaluation."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call a row."""
        ...

    def fetch(self, indices: NDArray[np.int64], seeds: Sequence[int] | None) -> Padded:
        """Rows at ``indices``. ``seeds``, one per row, drive augmentation; None means evaluation."""
        ...


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)  # so that no two lists read alike
    return digest.hexdigest()


class Pixels:
    """Decoded pictures, uint8 ``(B, 3, S, S)``.

    Args:
        sources: The pictures.
        transform: Cuts them to size.
        keep: They will be fetched again and again: decode them now and keep them in memory, if they never
            change (no augmentation) and fit in ``PIXEL_MEMORY``.
    """

    def __init__(self, sources: Sequence[ImageSource], transform: ImageTransform, keep: bool = False) -> None:
        self._sources = sources
        self._transform = transform
        self._kept: Tensor | None = None
        size = len(sources) * 3 * transform.size**2
        if keep and transform.augment == "none" and size <= PIXEL_MEMORY:
            kept = torch.empty((len(sources), 3, transform.size, transform.size), dtype=torch.uint8)
            for index in tqdm(range(len(sources)), desc="decode", unit="image", delay=2, leave=False, disable=None):
                kept[index] = self._decode(index, None)
            self._kept = kept

    @property
    def lengths(self) -> Sequence[int]:
        """One input per picture."""
        return [1] * len(self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pictures and how they are decoded and cut to size; none is decoded for it."""
        how = f"{replace(self._transform, augment='none')} {DECODER_VERSION}"
        return _sha256(*(source.fingerprint.encode() for source in self._sources), how.encode())

    def __len__(self) -> int:
        return len(self._sources)

    def name(self, index: int) -> str:
        """The picture's name."""
        return self._sources[index].name

    def _decode(self, index: int, seed: int | None) -> Tensor:
        return self._transform(self._sources[index].load(), seed)

    def fetch(self, indices: NDArray[np.int64], seeds: Sequence[int] | None) -> Padded:
        """Pictures at ``indices``."""
        if self._kept is not None:
            return Padded(self._kept[torch.from_numpy(indices)])
        each = seeds if seeds is not None else [None] * len(indices)
        return Padded(torch.stack([self._decode(int(i), seed) for i, seed in zip(indices, each, strict=True)]))


class Tokens:
    """Token ids of captions, int64 ``(B, T)``, padded to the longest of the batch."""

    def __init__(self, captions: Sequence[str], tokenizer: Tokenizer) -> None:
        self._captions = captions
        self._rows = tokenizer(captions)

    @property
    def lengths(self) -> Sequence[int]:
        """Ids per caption."""
        return [len(row) for row in self._rows]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ids of each caption."""
        return _sha256(*(row.numpy().tobytes() for row in self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The caption."""
        return f"caption {self._captions[index]!r}"

    def fetch(self, indices: NDArray[np.int64], seeds: Sequence[int] | None) -> Padded:
        """Captions at ``indices``."""
        return pad([self._rows[i] for i in indices])


class Features:
    """Cached or precomputed features, float32 ``(B, F)`` or ``(B, T, F)``.

    Args:
        values: ``(N, F)``, ``(N, T, F)``, or with ``offsets`` all tokens in a row, ``(sum T, F)``.
        offsets: int64 ``(N + 1,)``; row ``n`` is ``values[offsets[n]:offsets[n + 1]]``.
        fingerprint: That of the rows they were computed from; empty where the features are the data.
    """

    def __init__(
        self, values: NDArray[np.floating], offsets: NDArray[np.int64] | None = None, fingerprint: str = ""
    ) -> None:
        self._values = values
        self._offsets = offsets
        self.fingerprint = fingerprint

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens per row."""
        return [1] * len(self) if self._offsets is None else np.diff(self._offsets).tolist()

    def __len__(self) -> int:
        return len(self._values) if self._offsets is None else len(self._offsets) - 1

    def name(self, index: int) -> str:
        """The row's number."""
        return f"row {index}"

    def fetch(self, indices: NDArray[np.int64], seeds: Sequence[int] | None) -> Padded:
        """Feature rows at ``indices``."""
        if self._offsets is None:
            return Padded(torch.from_numpy(self._values[indices].astype(np.float32)))
        spans = zip(self._offsets[indices], self._offsets[indices + 1], strict=True)
        return pad([torch.from_numpy(self._values[a:b].astype(np.float32)) for a, b in spans])


@dataclass(frozen=True)
class Batch:
    """B image–caption pairs.

    Attributes:
        images: Input of the image tower, one row per pair.
        texts: Input of the text tower, one row per pair.
        image_ids: int64 ``(B,)``, index of each pair's image: equal ids are never each other's negatives.
        pairs: int64 ``(B,)``, index of each pair's caption in the corpus.
    """

    images: Padded
    texts: Padded
    image_ids: Tensor
    pairs: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same pairs on another device."""
        return Batch(self.images.to(device), self.texts.to(device), self.image_ids.to(device), self.pairs)


class Pairs(Dataset[Batch]):
    """Batches of (image, caption) pairs addressed by caption indices.

    Args:
        images: One row per image.
        texts: One row per caption.
        owner: int64 ``(C,)``, the image that each caption describes.
        seed: Together with the epoch and the caption index it decides every augmentation, whatever the
            number of worker processes and wherever a run was resumed.
    """

    def __init__(self, images: Inputs, texts: Inputs, owner: NDArray[np.int64], seed: int = 0) -> None:
        self.images, self.texts, self.owner, self.seed = images, texts, owner, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, pairs: Sequence[int]) -> Batch:
        """Collate the given captions with their images."""
        chosen = np.asarray(pairs, dtype=np.int64)
        owner = self.owner[chosen]
        seeds = [hash((self.seed, self.epoch, int(pair))) & 0x7FFF_FFFF for pair in chosen]
        return Batch(
            images=self.images.fetch(owner, seeds),
            texts=self.texts.fetch(chosen, seeds),
            image_ids=torch.from_numpy(owner),
            pairs=torch.from_numpy(chosen),
        )


def epoch_length(count: int, batch_size: int) -> int:
    """Batches of one epoch; a rest of a single pair, which has no negatives, is no batch of its own."""
    full, rest = divmod(count, batch_size)
    return max(1, full + (rest > 1))


class ShuffledBatches:
    """Every caption once per epoch, in an order that depends only on ``(seed, epoch)``.

    The last batch may be short; a last batch of a single pair, which has no negatives, joins the one
    before it.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def __len__(self) -> int:
        return epoch_length(self.count, self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Index lists of the epoch's batches from position ``start`` on."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        for position in range(start, len(self)):
            end = self.count if position == len(self) - 1 else (position + 1) * self.batch_size
            yield order[position * self.batch_size : end].tolist()


class _Attempts(Dataset["Batch | InputError"]):
    """Batches, or the errors that say why there are none.

    An error that a worker process raises reaches the parent with the worker's traceback in its message.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __getitem__(self, pairs: Sequence[int]) -> Batch | InputError:
        try:
            return self._pairs[pairs]
        except InputError as error:
            return error


def load_epoch(pairs: Pairs, epoch: int, order: Iterable[list[int]], workers: int) -> Iterator[Batch]:
    """What is left of an epoch, optionally read by worker processes.

    Args:
        pairs: The data.
        epoch: Its number, which decides augmentation.
        order: Index lists of the batches.
        workers: Number of processes.

    Raises:
        InputError: If a picture of the next batch cannot be used.
    """
    pairs.epoch = epoch
    loader = DataLoader(
        _Attempts(pairs),
        sampler=list(order),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else each loader would draw from the global one, and a resumed run would differ
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch
