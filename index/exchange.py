"""Galleries to and from other tools' files: clip-retrieval's folders, plain numpy files, ann-benchmarks' HDF5."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.errors import GalleryError, remedy
from index.files import new_directory, sync
from index.gallery import Gallery
from index.items import Item
from index.vector_files import BATCH, VectorFile, load_pyarrow, vector_files

PARTITION = 100_000
"""Rows per exported file, at most."""
SHOWN = 1000
"""So many skipped rows are named; further ones are only counted."""
_UNIT, _ROUNDED = 1e-5, 1e-3
"""How far from 1 rounding takes the length of a unit vector: in float32, and in half precision."""

Progress = Callable[[str, int, int], object]


@dataclass
class ImportReport:
    """What :func:`import_vectors` did, or in a dry run would do.

    Attributes:
        added: Rows that became items.
        replaced: How many of these took the place of an item of the same path, be it from the gallery or from an
            earlier row. A dry run misses earlier rows of other batches.
        normalised: Rows that were scaled to unit length, apart from what is due to half precision.
        skipped_rows: Rows that were left out.
        skipped: Which and why, ``file: row: reason``, for the first :data:`SHOWN` of them.
    """

    added: int = 0
    replaced: int = 0
    normalised: int = 0
    skipped_rows: int = 0
    skipped: list[str] = field(default_factory=list)


def export_gallery(
    gallery: Gallery, out: str | os.PathLike[str], progress: Progress = lambda stage, done, total: None
) -> int:
    """Write all vectors and items in clip-retrieval's layout, in order of id; returns their number.

    Vectors are float32 and lose nothing. Tables have ``image_path`` and ``caption``, and for :func:`import_vectors`
    ``size``, ``mtime_ns``, ``sha256``, ``id`` and, as JSON, ``metadata``. Memory stays at one batch.

    Args:
        gallery: What to export.
        out: A directory that is not there or empty; it appears only once it is complete.
        progress: Told the stage, and how many of how many vectors have been written.

    Raises:
        GalleryError: If pyarrow is missing, there is nothing to export, ``out`` holds something, or the disk is full.
    """
    out = Path(out).resolve()
    arrow = load_pyarrow(out)
    if not len(gallery):
        raise GalleryError(f"{gallery.directory}: has no items; add some before exporting")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise GalleryError(f"{out}: is there and not empty; choose another directory")
        unfinished = out.with_name(f".{out.name}.unfinished")
        with new_directory(unfinished) as folder:
            _write_partitions(gallery, folder, arrow, progress)
        unfinished.rename(out)
        sync(out.parent)
    except OSError as error:
        mend = remedy(error, "choose another directory")
        raise GalleryError(f"{out}: nothing is written, {error}; {mend}") from error
    return len(gallery)


def import_vectors(
    gallery: Gallery,
    source: str | os.PathLike[str],
    progress: Progress = lambda stage, done, total: None,
    dry_run: bool = False,
) -> ImportReport:
    """Add vectors that were made elsewhere, and what is known about them.

    Each batch is on disk before the next one is read, and a row whose path is there already replaces that item: so an
    import that was interrupted can be run again. Memory stays at one batch, whatever the size of the source.

    Rows of a table become items by their ``image_path``, or ``NAME/ROW`` after the file of vectors where there is
    none, and ``caption``. Exported items come back as they were, under new ids; of other tables all further columns
    become metadata. Vectors that are not finite and, for cosine, zero, are skipped and reported; for cosine others
    are scaled to unit length unless they have it.

    Args:
        gallery: Open for writing, unless it is a dry run.
        source: A directory with ``img_emb/*.npy`` and, not necessarily, ``metadata/*.parquet``; a numpy file
            ``(N, D)``; or an HDF5 file of ann-benchmarks (:mod:`index.ann_benchmarks`).
        progress: Told the stage, and how many of how many rows have been read.
        dry_run: Read and count only.

    Raises:
        GalleryError: If the source is damaged, does not fit the gallery, or names a path that leads elsewhere, if a
            package that reads it is missing, or the disk is full. Batches before that are in the gallery.
    """
    files = vector_files(Path(source))
    for file in files:
        _check_fits(gallery, file)
    report = ImportReport()
    done, total = 0, sum(file.rows for file in files)
    for file in files:
        for row, items, vectors in file.batches():
            _add_batch(gallery, file.path, row, items, vectors, report, dry_run)
            done += len(vectors)
            progress("importing", done, total)
    return report


def source_shape(source: str | os.PathLike[str]) -> tuple[int, int]:
    """Rows and dimensions of what :func:`import_vectors` would read, from the headers alone.

    Raises:
        GalleryError: If the source is damaged.
    """
    files = vector_files(Path(source))
    return sum(file.rows for file in files), files[0].dim


def _check_fits(gallery: Gallery, file: VectorFile) -> None:
    if file.dim != gallery.dim:
        raise GalleryError(
            f"{file.path}: its vectors have {file.dim} dimensions, those of {gallery.directory} have {gallery.dim}; "
            "use the same encoder"
        )
    if file.distance is not None and (gallery.metric != "cosine" or file.distance not in ("angular", "ip")):
        raise GalleryError(
            f"{file.path}: is for {file.distance or 'unknown'} distance, {gallery.directory} for {gallery.metric} "
            "similarity; import a file for angular distance into a cosine gallery"
        )


def _add_batch(
    gallery: Gallery,
    path: Path,
    first: int,
    items: Sequence[Item | str],
    vectors: NDArray[Any],
    report: ImportReport,
    dry_run: bool,
) -> None:
    """Add what can be added of one batch, whose first row is ``first`` in the file."""
    cosine = gallery.metric == "cosine"
    with np.errstate(over="ignore"):
        rows = vectors.astype(np.float32)
    # In float64 squares of finite float32 numbers neither overflow nor vanish.
    norms = np.sqrt(np.einsum("bd,bd->b", rows, rows, dtype=np.float64))
    kept: dict[str, tuple[int, Item]] = {}
    for n, (item, norm) in enumerate(zip(items, norms.tolist(), strict=True)):
        if not isinstance(item, str) and np.isfinite(norm) and (norm > 0 or not cosine):
            report.added += 1
            report.replaced += item.path in kept
            kept[item.path] = n, item
            continue
        report.skipped_rows += 1
        if len(report.skipped) < SHOWN:
            reason = item if isinstance(item, str) else "its vector is zero" if norm == 0 else "it is not finite"
            report.skipped.append(f"{path}: {first + n}: {reason}")
    places = np.array([n for n, _ in kept.values()], np.intp)
    rows, off = rows[places], np.abs(norms[places] - 1)
    if cosine:
        report.normalised += int((off > _ROUNDED).sum())
        rows[off > _UNIT] /= norms[places][off > _UNIT, None]
    if dry_run:
        report.replaced += len(gallery.ids_of(list(kept)))
    else:
        before = len(gallery)
        gallery.add([item for _, item in kept.values()], rows)
        report.replaced += before + len(kept) - len(gallery)


def _write_partitions(gallery: Gallery, folder: Path, arrow: Any, progress: Progress) -> None:
    kinds = {"size": arrow.int64(), "mtime_ns": arrow.int64(), "id": arrow.int64()}
    names = ("image_path", "caption", "size", "mtime_ns", "sha256", "id", "metadata")
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in names])
    with (
        new_directory(folder / "img_emb") as arrays,
        new_directory(folder / "metadata") as tables,
        ExitStack() as partition,
    ):
        for done, ids, vectors in _pieces(gallery):
            if done % PARTITION == 0:
                partition.close()
                number = f"{done // PARTITION:04d}"
                file = partition.enter_context((arrays / f"img_emb_{number}.npy").open("wb"))
                shape = min(PARTITION, len(gallery) - done), gallery.dim
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                path = tables / f"metadata_{number}.parquet"
                table = partition.enter_context(arrow.parquet.ParquetWriter(path, schema))
            file.write(vectors.data)
            rows = _as_table(arrow, schema, gallery.items(ids))
            if rows["id"].to_pylist() != ids.tolist():
                raise GalleryError(f"{gallery.directory}: has vectors without items; restore it or build it again")
            table.write_table(rows)  # which, unlike write_batch, keeps nothing back
            progress("exporting", done + len(ids), len(gallery))


def _pieces(gallery: Gallery) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
    """How many came before, ids and vectors of at most a batch, never across the end of a partition."""
    done = 0
    for ids, vectors in gallery.snapshot.blocks():
        while len(ids):
            count = min(len(ids), BATCH, PARTITION - done % PARTITION)
            yield done, ids[:count], vectors[:count]
            done += count
            ids, vectors = ids[count:], vectors[count:]


def _as_table(arrow: Any, schema: Any, items: Iterable[tuple[int, Item]]) -> Any:
    rows = (
        (item.path, item.caption, item.size, item.mtime_ns, item.sha256, key, json.dumps(item.metadata))
        for key, item in items
    )
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return arrow.table([*map(arrow.array, columns, schema.types)], schema=schema)
