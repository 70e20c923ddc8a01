from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.batches import Batch, Features, Pairs, Pixels, ShuffledBatches, Tokens, load_epoch
from training.data.image_transform import ImageTransform
from training.data.text import WordTokenizer
from training.errors import InputError

OWNER = np.repeat(np.arange(4), 3)
CAPTIONS = [f"a {'very ' * (c % 4)}small dog" for c in range(12)]


class Picture:
    """Noise that counts how often it is decoded."""

    def __init__(self, seed: int) -> None:
        self.name = self.fingerprint = f"noise {seed}"
        self.seed, self.loads = seed, 0

    def load(self) -> Image.Image:
        self.loads += 1
        return Image.fromarray(np.random.default_rng(self.seed).integers(0, 256, (24, 20, 3), dtype=np.uint8))


def pairs(augment: str = "crop+flip", seed: int = 0) -> Pairs:
    pixels = Pixels([Picture(i) for i in range(4)], ImageTransform(16, 16, augment=augment), keep=True)
    return Pairs(pixels, Tokens(CAPTIONS, WordTokenizer.fit(CAPTIONS, 1)), OWNER, seed)


def views(loader: Iterator[Batch]) -> dict[int, torch.Tensor]:
    """What each pair's picture looked like."""
    return {int(p): image for batch in loader for p, image in zip(batch.pairs, batch.images.values, strict=True)}


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(12, 4, [4, 4, 4]), (11, 4, [4, 4, 3]), (9, 4, [4, 5]), (5, 8, [5]), (1, 8, [1]), (3, 2, [3])],
)
def test_every_caption_comes_once_per_epoch(count: int, size: int, sizes: list[int]) -> None:
    batches = ShuffledBatches(count, size, seed=0)
    order = list(batches.epoch(0))
    assert [len(batch) for batch in order] == sizes
    assert len(batches) == len(sizes)
    assert sorted(pair for batch in order for pair in batch) == list(range(count))


def test_the_order_follows_from_seed_and_epoch() -> None:
    order = list(ShuffledBatches(100, 8, seed=1).epoch(3))
    assert order == list(ShuffledBatches(100, 8, seed=1).epoch(3))
    assert order != list(ShuffledBatches(100, 8, seed=1).epoch(4))
    assert order != list(ShuffledBatches(100, 8, seed=2).epoch(3))


def test_an_epoch_continues_where_it_was_left() -> None:
    batches = ShuffledBatches(17, 4, seed=0)
    whole = list(batches.epoch(2))
    for start in range(len(batches) + 1):
        assert list(batches.epoch(2, start)) == whole[start:]


def test_a_batch_holds_each_caption_with_its_own_image() -> None:
    data = pairs(augment="none")
    batch = data[[5, 0, 4]]
    assert batch.pairs.tolist() == [5, 0, 4]
    assert batch.image_ids.tolist() == [1, 0, 1]
    assert batch.images.values.dtype == torch.uint8
    assert torch.equal(batch.images.values[0], batch.images.values[2])
    assert torch.equal(
        batch.images.values, torch.stack([data.images.fetch(OWNER[[c]], None).values[0] for c in (5, 0, 4)])
    )
    tokens = WordTokenizer.fit(CAPTIONS, 1)(CAPTIONS)
    assert batch.texts.mask is not None
    for row, caption in enumerate((5, 0, 4)):
        assert torch.equal(batch.texts.values[row][batch.texts.mask[row]], tokens[caption])


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_pair_alone(workers: int) -> None:
    reference = views(iter(load_epoch(pairs(), 1, ShuffledBatches(12, 4, 0).epoch(1), workers=0)))
    other_order = views(iter(load_epoch(pairs(), 1, ShuffledBatches(12, 5, 9).epoch(1), workers=workers)))
    assert reference.keys() == other_order.keys() == set(range(12))
    for pair, image in reference.items():
        assert torch.equal(image, other_order[pair])
    assert not torch.equal(reference[0], reference[1]), "the same picture with another caption"

    later = views(iter(load_epoch(pairs(), 2, ShuffledBatches(12, 4, 0).epoch(2), workers=workers)))
    reseeded = views(iter(load_epoch(pairs(seed=1), 1, ShuffledBatches(12, 4, 0).epoch(1), workers=workers)))
    for other in (later, reseeded):
        assert sum(torch.equal(reference[p], other[p]) for p in range(12)) < 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_anywhere_and_leaves_the_random_state_alone(workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = ShuffledBatches(12, 5, 0)
    whole = list(load_epoch(pairs(), 0, batches.epoch(0, 0), workers=workers))
    rest = list(load_epoch(pairs(), 0, batches.epoch(0, 1), workers=workers))
    assert torch.equal(before, torch.get_rng_state()), "or dropout would differ after a resume"
    assert len(rest) == len(whole) - 1 == 2
    for again, batch in zip(rest, whole[1:], strict=True):
        assert torch.equal(again.pairs, batch.pairs)
        assert torch.equal(again.images.values, batch.images.values)


def test_kept_pictures_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, every = ImageTransform(16, 16), np.arange(3)

    def loads(keep: bool, transform: ImageTransform = transform) -> list[int]:
        pictures = [Picture(i) for i in range(3)]
        pixels = Pixels(pictures, transform, keep)
        first, second = (pixels.fetch(every, [0, 1, 2]).values for _ in range(2))
        assert torch.equal(first, second)
        return [picture.loads for picture in pictures]

    assert loads(keep=True) == [1, 1, 1]
    assert loads(keep=False) == [2, 2, 2]
    assert loads(True, ImageTransform(16, 16, augment="crop")) == [2, 2, 2]
    monkeypatch.setattr("training.data.batches.PIXEL_MEMORY", 3 * 3 * 16 * 16 - 1)
    assert loads(keep=True) == [2, 2, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_the_same_one_line_from_a_worker_process(workers: int) -> None:
    def refuse() -> Image.Image:
        raise InputError("noise 2: cannot be decoded; replace or remove it")

    pictures = [Picture(i) for i in range(4)]
    pictures[2].load = refuse  # type: ignore[method-assign]
    data = Pairs(Pixels(pictures, ImageTransform(16, 16)), Tokens(CAPTIONS, WordTokenizer.fit(CAPTIONS, 1)), OWNER)
    batches = iter(load_epoch(data, 0, [[0, 1], [2, 3], [4, 6], [9, 10]], workers))
    assert [next(batches).pairs.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(InputError) as refused:
        next(batches)
    assert str(refused.value) == "noise 2: cannot be decoded; replace or remove it"


def test_features_are_fetched_as_float32_rows_or_ragged_tokens() -> None:
    values = np.arange(20, dtype=np.float16).reshape(10, 2)
    pooled = Features(values).fetch(np.array([3, 0]), None)
    assert pooled.values.tolist() == [[6, 7], [0, 1]]
    assert pooled.values.dtype == torch.float32
    assert pooled.mask is None

    ragged = Features(values, np.array([0, 2, 3, 10]))
    assert len(ragged) == 3
    assert list(ragged.lengths) == [2, 1, 7]
    tokens, mask = ragged.fetch(np.array([1, 0]), None)
    assert mask is not None
    assert tokens.tolist() == [[[4, 5], [0, 0]], [[0, 1], [2, 3]]]
    assert mask.tolist() == [[True, False], [True, True]]
