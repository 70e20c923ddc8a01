"""A run on synthetic features: small enough to be trained in every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TOWERS

from training.config import Config, OptimConfig


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added in the same order in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 kinds of image, colour by shape; five captions say both; the features hold them with some noise."""
    folder = tmp_path_factory.mktemp("features")
    random_numbers = np.random.default_rng(0)
    kinds = [(colour, shape) for colour in range(6) for shape in range(4)]
    clean = np.array([np.concatenate([np.eye(6)[colour], np.eye(4)[shape]]) for colour, shape in kinds])
    for split in ("train", "dev"):
        noisy = clean + random_numbers.normal(0, 0.05, clean.shape)
        np.save(folder / f"{split}_ims.npy", noisy.astype(np.float32))
        captions = [
            f"{word} colour{colour} shape{shape}"
            for colour, shape in kinds
            for word in ("a", "the", "one", "my", "its")
        ]
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
    return f"precomputed:{folder}"


@pytest.fixture
def config(tiny_features: str, tmp_path: Path) -> Config:
    """Five batches an epoch; a step takes milliseconds."""
    return Config(
        data=tiny_features,
        out=str(tmp_path / "run"),
        model=TOWERS,
        optim=OptimConfig(lr=1e-2, epochs=2, batch_size=24, schedule="constant"),
    )
