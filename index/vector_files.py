"""Vectors in other tools' files, and the items behind them, read a batch at a time.

The layout of clip-retrieval, which autofaiss reads too, is ``img_emb/*.npy`` beside ``metadata/*.parquet``. Taken in
order of their names, the files of the two folders belong together, and so do the rows of such a pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.ann_benchmarks import read_ann_benchmarks
from index.errors import GalleryError
from index.items import Item

BATCH = 10_000
"""Rows that are read or written at once, fewer if they are long."""
_BATCH_BYTES = 1 << 25
_FACTS = {"size", "mtime_ns", "sha256", "metadata"}
"""Together these columns tell that a table comes from :func:`index.exchange.export_gallery`."""


@dataclass(frozen=True)
class VectorFile:
    """Vectors in one file, and the table about them.

    Attributes:
        path: Where.
        rows: Number of vectors.
        dim: Dimensions of a vector.
        blocks: Reads the vectors, floating point, so many rows at a time.
        table: The parquet file with a row for each vector, if there is one.
        distance: What the vectors are compared by, if the file says so.
    """

    path: Path
    rows: int
    dim: int
    blocks: Callable[[int], Iterator[NDArray[Any]]]
    table: Path | None = None
    distance: str | None = None

    def batches(self) -> Iterator[tuple[int, list[Item | str], NDArray[Any]]]:
        """First row, items or why there is none, and vectors ``(B, dim)`` of each batch.

        Raises:
            GalleryError: If the file or its table is damaged.
        """
        row = 0
        items: Iterator[Item | str] = (Item(f"{self.path.stem}/{n}", None, 0, 0, "") for n in range(self.rows))
        if self.table:
            items = _read_table(self.table, self.path.stem)
        for vectors in self.blocks(max(1, min(BATCH, _BATCH_BYTES // (4 * self.dim)))):
            batch = list(islice(items, len(vectors)))
            if len(batch) < len(vectors):
                raise GalleryError(f"{self.table}: ends before the rows that it promises; write it again")
            yield row, batch, vectors
            row += len(vectors)


def vector_files(source: Path) -> list[VectorFile]:
    """The files of a directory in clip-retrieval's layout, or the one numpy or HDF5 file; only headers are read.

    Raises:
        GalleryError: If one is damaged, or they do not fit each other.
    """
    if source.suffix in (".hdf5", ".h5"):
        data = read_ann_benchmarks(source)
        return [VectorFile(source, data.rows, data.dim, data.blocks, distance=data.distance)]
    if source.suffix == ".npy":
        return [_numpy_file(source, None)]
    arrays = sorted((source / "img_emb").glob("*.npy"))
    tables: Sequence[Path | None] = sorted((source / "metadata").glob("*.parquet")) or [None] * len(arrays)
    if not arrays:
        raise GalleryError(f"{source}: is no .npy or .hdf5 file and has no img_emb/*.npy; give one that does")
    if len(tables) != len(arrays):
        raise GalleryError(
            f"{source}: has {len(arrays)} files of vectors and {len(tables)} tables; restore what is missing"
        )
    return [_numpy_file(path, table) for path, table in zip(arrays, tables, strict=True)]


def load_pyarrow(path: Path) -> Any:
    """The module ``pyarrow`` with ``pyarrow.parquet``, for the tables of ``path``.

    Raises:
        GalleryError: If it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise GalleryError(f"{path}: its tables need pyarrow; pip install 'vse-app[exchange]'") from error
    return pyarrow


def _numpy_file(path: Path, table: Path | None) -> VectorFile:
    """Vectors in a numpy file, from which nothing but numbers is ever read."""
    with _damage_reported(path), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version > (2, 0):
            raise ValueError(f"is a numpy file of version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
        if len(shape) != 2 or shape[0] < 0 or shape[1] < 1 or dtype.kind != "f" or by_columns:
            order = " by columns" if by_columns else ""
            raise ValueError(f"holds {dtype} {shape}{order}, not floating-point vectors in rows")
        rows, dim = shape
        offset = file.tell()
        if offset + rows * dim * dtype.itemsize > path.stat().st_size:
            raise ValueError(f"ends before the {rows:,} rows that its header promises")
    if table:
        with _damage_reported(table), load_pyarrow(table).parquet.ParquetFile(table) as tabular:
            if (count := tabular.metadata.num_rows) != rows:
                raise ValueError(f"has {count:,} rows for the {rows:,} vectors of {path.name}")
    return VectorFile(path, rows, dim, partial(_read_rows, path, offset, shape, dtype), table)


def _read_rows(
    path: Path, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], step: int
) -> Iterator[NDArray[Any]]:
    """Blocks of rows, read rather than mapped: mapped pages would stay in memory."""
    with _damage_reported(path), path.open("rb") as file:
        file.seek(offset)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            # A file that was cut meanwhile yields numbers that do not fit the shape.
            yield np.fromfile(file, dtype, count * shape[1]).reshape(count, shape[1])


def _read_table(path: Path, name: str) -> Iterator[Item | str]:
    """Items of a table that may have any columns; without paths, rows are called after ``name``."""
    arrow = load_pyarrow(path)
    text, integer = arrow.string(), arrow.int64()
    kinds = {"image_path": text, "caption": text}
    # By default pyarrow reads a group of rows, often the whole file, at once.
    opened = partial(arrow.parquet.ParquetFile, buffer_size=1 << 20, pre_buffer=False)
    with _damage_reported(path), opened(path) as table:
        own = set(table.schema_arrow.names) >= _FACTS
        if own:
            kinds |= {"size": integer, "mtime_ns": integer, "sha256": text, "metadata": text}
        schema = arrow.schema([(field.name, kinds.get(field.name, field.type)) for field in table.schema_arrow])
        row = 0
        for batch in table.iter_batches(BATCH, use_threads=False):
            for record in batch.cast(schema).to_pylist():
                yield _item(record, f"{name}/{row}", own)
                row += 1


def _item(record: dict[str, Any], name: str, own: bool) -> Item | str:
    """The item of one row of a table, or why there is none."""
    path, caption = record.pop("image_path", name), record.pop("caption", None)
    if path is None:
        return "has no image_path"
    if not own:
        return Item(path, caption, 0, 0, "", _as_metadata(record))
    record.pop("id", None)
    size, mtime_ns, sha256 = record.pop("size") or 0, record.pop("mtime_ns") or 0, record.pop("sha256") or ""
    try:
        metadata = json.loads(record.pop("metadata") or "{}")
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        return "its metadata is no JSON object"
    return Item(path, caption, size, mtime_ns, sha256, _as_metadata(record) | metadata)


def _as_metadata(record: dict[str, Any]) -> dict[str, Any]:
    """Dates, decimals and bytes as text; without nulls, as which count NaN and infinities, which JSON lacks."""
    known = {key: value for key, value in record.items() if value is not None}
    if not known:
        return {}
    plain = json.loads(json.dumps(known, default=str), parse_constant=lambda constant: None)
    return {key: value for key, value in plain.items() if value is not None}


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except GalleryError:
        raise
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, OverflowError, MemoryError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise GalleryError(f"{path}: {reason}; write it again or leave it out") from error
