from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from index.gallery import Gallery
from index.items import Item, ItemFile
from training.models.dual_encoder import DualEncoder
from vse_app import tuning_queries
from vse_app.tuning_queries import read_queries


def at(angles: NDArray[Any]) -> NDArray[np.float32]:
    return np.stack([np.cos(angles / 500), np.sin(angles / 500)], axis=1).astype(np.float32)


class Encoder:
    """Captions are numbers, and this is their vector."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(at(np.array([int(text) for text in texts])))


def test_captions_of_the_gallery_are_drawn_before_their_items_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_queries, "MOST", 120)
    read: list[int] = []
    real = ItemFile._item
    monkeypatch.setattr(ItemFile, "_item", lambda table, key, *facts: read.append(key) or real(table, key, *facts))
    captions: list[Any] = [None, "", *map(str, range(2, 500))]
    with Gallery.create(tmp_path / "g", dim=2, metric="cosine", model={"name": "n", "checksum": "c"}) as gallery:
        gallery.add(
            [Item(f"{n}", caption, 0, 0, "") for n, caption in enumerate(captions)],
            at(np.arange(500)),
        )
        found = read_queries(gallery, lambda: cast(DualEncoder, Encoder()), None, "val")
    assert found.source == "120 captions of the gallery"
    assert len(np.unique(found.queries[:, 0])) == len(read) == 120
    np.testing.assert_array_equal(found.images, found.queries)
    np.testing.assert_array_equal(found.owner, np.arange(120))
