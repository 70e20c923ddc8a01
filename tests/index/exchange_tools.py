"""What the tests of import and export share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index.gallery import Gallery

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DIM = 6
MODEL = {"name": "small", "checksum": "abc"}


def unit(seed: int, count: int, dim: int = DIM) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def create(path: Path, dim: int = DIM, metric: str = "cosine") -> Gallery:
    return Gallery.create(path, dim=dim, metric=metric, model=MODEL)


def clip_retrieval(folder: Path, rows: NDArray[Any], tables: dict[str, Any] | None, parts: int = 1) -> Path:
    """What ``clip-retrieval inference`` writes: half precision and a table without facts about files."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for part, places in enumerate(np.array_split(np.arange(len(rows)), parts)):
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", rows[places])
        if tables is not None:
            table = pa.table({name: [values[place] for place in places] for name, values in tables.items()})
            pq.write_table(table, folder / "metadata" / f"metadata_{part}.parquet")
    return folder
