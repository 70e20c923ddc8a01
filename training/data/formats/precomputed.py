"""Precomputed image features in the layout of VSE++ (``coco_precomp``, ``f30k_precomp``, ...)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.corpus import Corpus
from training.data.formats.records import check_text, text_lines
from training.errors import InputError
from training.files import current_files, replacing_files

_PER_IMAGE = 5
_BLOCK_BYTES = 1 << 26


def read(directory: Path, split: str, dev_limit: int = 5000) -> Corpus:
    """Reads ``{split}_caps.txt`` and, memory-mapped, ``{split}_ims.npy``.

    Five consecutive captions belong to one image. The features have one row per image, or each row five
    times; which of the two is told by the number of rows. An optional ``{split}_owners.npy``, int64
    ``(C,)``, gives the feature row of every caption instead; then any number of captions will do and
    nothing is cut off.

    Args:
        directory: Folder with the files.
        split: ``train``, ``dev`` (also called ``val``), ``test``, ``testall``, ...
        dev_limit: Captions kept of ``dev``, as VSE++ does; cutting is noted.

    Raises:
        InputError: If a file is missing or malformed, a caption is empty, counts disagree, five rows that should be
            equal differ, or a feature is not finite in single precision.
    """
    split = _canonical(split)
    captions_path, features_path, owners_path = _paths(directory, split)
    if not captions_path.is_file():
        available = ", ".join(splits(directory))
        raise InputError(f"{directory}: no {captions_path.name}; choose a split from {available or 'none'}")
    captions, notes = _captions(captions_path), []
    features = _load(features_path)
    if features.dtype.kind != "f" or features.ndim not in (2, 3) or not features.size:
        raise InputError(
            f"{features_path}: {features.dtype} array of shape {features.shape}; "
            "save floats as (images, F) or (images, regions, F)"
        )
    if owners_path.is_file():
        owner = _load(owners_path)
        if owner.dtype != np.int64 or owner.shape != (len(captions),):
            raise InputError(
                f"{owners_path}: {owner.dtype} array of shape {owner.shape} for {len(captions)} captions; "
                f"save int64 ({len(captions)},)"
            )
        _check(features, features_path, repeats=1)
    else:
        repeats = _repeats(len(captions), len(features), features_path)
        if split == "dev" and len(captions) > dev_limit:
            kept = dev_limit // _PER_IMAGE
            notes.append(
                f"{captions_path}: dev cut to its first {kept * _PER_IMAGE} of {len(captions)} captions "
                f"({kept} images), as in VSE++"
            )
            captions, features = captions[: kept * _PER_IMAGE], features[: kept * repeats]
        _check(features, features_path, repeats)
        features = features[::repeats]
        owner = np.arange(len(captions)) // _PER_IMAGE
    return Corpus(
        name=f"precomputed:{directory.resolve().name}",
        split=split,
        image_ids=[f"{split}/{row}" for row in range(len(features))],
        captions=captions,
        caption_ids=[f"{split}#{line}" for line in range(1, len(captions) + 1)],
        owner=np.asarray(owner, dtype=np.int64),
        features=features,
        notes=notes,
    )


def splits(directory: Path) -> list[str]:
    """The splits that have a caption file."""
    paths = (*directory.glob("*_caps.txt"), *current_files(directory).glob("*_caps.txt"))
    return sorted({path.name.removesuffix("_caps.txt") for path in paths})


def write(directory: Path, split: str, features: NDArray[np.floating], corpus: Corpus) -> None:
    """Writes what :func:`read` reads, owners included, in place of what was there: all files of the split or none.

    Args:
        directory: Created if need be.
        split: Name of the split; ``val`` is written as ``dev``.
        features: One row per image of ``corpus``, ``(I, F)`` or ``(I, R, F)``.
        corpus: Gives captions (white space is collapsed) and owners.

    Raises:
        InputError: If rows and images disagree.
    """
    if len(features) != len(corpus.image_ids):
        raise InputError(f"{directory}: {len(features)} feature rows for {len(corpus.image_ids)} images")
    text = "".join(" ".join(caption.split()) + "\n" for caption in corpus.captions)
    with replacing_files(directory) as folder:
        captions_path, features_path, owners_path = _paths(folder, _canonical(split))
        for path, array in ((features_path, features), (owners_path, corpus.owner)):
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        captions_path.write_text(text, encoding="utf-8")


def check_absent(directory: Path, split: str) -> None:
    """Refuses a folder that holds anything of a split already.

    Raises:
        InputError: If it does.
    """
    for path in _paths(directory, _canonical(split)):
        if path.exists():
            raise InputError(f"{path}: is there already; choose another --out, or delete it first")


def _canonical(split: str) -> str:
    return "dev" if split == "val" else split


def _paths(directory: Path, split: str) -> tuple[Path, Path, Path]:
    current = current_files(directory)  # of the split that was written last
    directory = current if (current / f"{split}_caps.txt").exists() else directory
    return (
        directory / f"{split}_caps.txt",
        directory / f"{split}_ims.npy",
        directory / f"{split}_owners.npy",
    )


def _captions(path: Path) -> list[str]:
    captions = [line.strip() for _, line in text_lines(path)]
    while captions and not captions[-1]:  # the end of the last line, and blank lines after it
        captions.pop()
    for number, caption in enumerate(captions, start=1):
        if not caption:
            raise InputError(f"{path}: line {number} is empty; write its caption")
        check_text(caption, f"{path}: line {number}")
    return captions


def _load(path: Path) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; write it with `vse features`") from error
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a whole .npy array ({reason}); write it again") from error


def _repeats(captions: int, rows: int, path: Path) -> int:
    """How often each image's features are repeated: once or five times."""
    if captions % _PER_IMAGE == 0 and rows in (captions, captions // _PER_IMAGE):
        return _PER_IMAGE * rows // captions
    raise InputError(
        f"{path}: {rows} rows for {captions} captions, neither one per caption nor one per {_PER_IMAGE}; "
        "correct the counts or say in *_owners.npy which row each caption describes"
    )


def _check(features: NDArray[Any], path: Path, repeats: int) -> None:
    """Refuses rows that single precision cannot hold, and groups of ``repeats`` rows that differ.

    It works in blocks of bounded memory.
    """
    group_bytes = repeats * features[0].nbytes
    step = repeats * max(1, _BLOCK_BYTES // group_bytes)
    for start in range(0, len(features), step):
        block = np.asarray(features[start : start + step]).reshape(-1, repeats, features[0].size)
        with np.errstate(over="ignore"):  # which is what is looked for
            finite = np.isfinite(block.astype(np.float32, copy=False)).all(axis=2).ravel()
        if not finite.all():
            row = start + int(finite.argmin())
            raise InputError(f"{path}: row {row} is not finite in single precision; compute its features again")
        same = (block == block[:, :1]).all(axis=(1, 2))
        if not same.all():
            row = start + repeats * int(same.argmin())
            raise InputError(
                f"{path}: rows {row} to {row + repeats - 1} should repeat one image's features but differ; "
                "say in *_owners.npy which row each caption describes"
            )
