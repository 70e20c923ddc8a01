"""What the tests of galleries share: items, vectors, small tuned indexes, and a gallery that has one of everything."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from index.approximate_index import ApproximateIndex
from index.errors import GalleryError
from index.files import FileRecord
from index.gallery import Gallery
from index.items import Item
from index.verification import verify

DIM = 8
MODEL = {"name": "small", "checksum": "abc"}
CURVE = {"chosen": {"index": "a small one"}}


def item(path: str, **facts: Any) -> Item:
    return Item(path, **{"caption": None, "size": 1, "mtime_ns": 2, "sha256": "00", **facts})


def vectors(seed: int, count: int, dim: int = DIM) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def small_index(
    gallery: Gallery, factory: str = "IVF2,Flat", parameters: dict[str, int] | None = None
) -> ApproximateIndex:
    """An index of all items, searched so widely that it is exact unless it is compressed."""
    built = faiss.index_factory(gallery.dim, factory, faiss.METRIC_INNER_PRODUCT)
    built.train(vectors(0, 120, gallery.dim))
    widest = {"efSearch": 1 << 20} if "HNSW" in factory else {"nprobe": 1 << 20} if "IVF" in factory else {}
    index = ApproximateIndex(built, widest if parameters is None else parameters)
    index.refill(len(gallery), gallery.snapshot.blocks)
    return index


def create(directory: Path, metric: str = "cosine", dim: int = DIM) -> Gallery:
    return Gallery.create(directory, dim=dim, metric=metric, model=MODEL)


def furnish(directory: Path, factory: str = "IVF2,Flat") -> None:
    """A gallery of two segments, both with removed rows, a tuned index and a calibration."""
    with create(directory) as gallery:
        items = [item(f"{n}.jpg", caption="a cat", metadata={"n": n, "tags": ["x", "y"]}) for n in range(24)]
        gallery.add(items[:14], vectors(1, 14))
        gallery.add(items[14:], vectors(2, 10))
        gallery.remove(["3.jpg", "20.jpg"])
        gallery.install_index(small_index(gallery, factory), CURVE)
        gallery.install_calibration(lambda folder: (folder / "calibration.json").write_text('{"slope": 1.0}'))


def files_of(directory: Path) -> list[str]:
    """Every file of a gallery but its lock."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return [path.relative_to(directory).as_posix() for path in paths]


@contextmanager
def refused(match: str | None = None) -> Iterator[None]:
    """Nothing but a ``GalleryError`` of a single line comes out."""
    with pytest.raises(GalleryError, match=match) as refusal:
        yield
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 1500


def outcome(act: Callable[[], object]) -> str | None:
    """What a ``GalleryError`` said, in one line, or None if there was none; no other comes out."""
    try:
        act()
    except GalleryError as error:
        message = str(error)
    else:
        return None
    assert len(message.splitlines()) == 1
    return message


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """As the gallery writes it, so that its own checksum is right."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    (directory / "gallery.json").write_bytes(json.dumps(content).encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "gallery.json").read_bytes())
    return content


def cook(directory: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> None:
    """Make every length and checksum right again."""
    content = read_manifest(directory)
    for part in [*content["segments"], content["index"], content["calibration"]]:
        for name in part["files"] if part else ():
            path = directory / part["name"] / name
            if path.is_file():
                record = FileRecord.of(path)
                part["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    change(content)
    write_manifest(directory, content)


def assert_refused(directory: Path, match: str, opens: bool = False, sparing: bool = False) -> None:
    """For readers and writers alike, without much memory, and without touching what is next to the gallery."""
    canary = directory.parent / "canary"
    before = sorted((path, path.is_file() and path.read_bytes()) for path in canary.rglob("*"))
    for writable in (False, True):
        if sparing:
            tracemalloc.start()
        with refused(match), Gallery.open(directory, writable=writable) as gallery:
            assert opens, "opened"
            gallery.search(vectors(0, 1), 30)
            list(gallery.items())
            gallery.info()
        if sparing:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 20_000_000
    problems = verify(directory).problems
    assert problems
    assert all(len(problem.splitlines()) == 1 for problem in problems)
    assert sorted((path, path.is_file() and path.read_bytes()) for path in canary.rglob("*")) == before
