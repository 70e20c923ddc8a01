"""Readers of data sets: one module per layout, and :func:`load_corpus`, which picks the reader."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from training.data.corpus import Corpus, concatenate, text_fault
from training.data.formats import coco_annotations, dedup, folder, karpathy, precomputed
from training.errors import InputError, printable

_READERS: dict[str, ModuleType] = {
    "karpathy": karpathy,
    "coco": coco_annotations,
    "precomputed": precomputed,
    "folder": folder,
    "dedup": dedup,
}
# In the order in which they are tried: whoever keeps dataset_coco.json beside COCO's own files wants it.
_SIGNS = {
    "karpathy": ("dataset*.json",),
    "coco": ("captions_*.json", "annotations/captions_*.json"),
    "precomputed": ("*_caps.txt",),
    "folder": ("captions.csv", "captions.jsonl", "**/*.txt"),
}
_DEFAULT_SCENES = 6000
_NOTES_SAID = 5  # at the start of whatever is done with the data


def load_corpus(spec: str, split: str) -> Corpus:
    """Reads one split, or several joined, of a data set; what was left out or repaired is said on stderr.

    Args:
        spec: As in :func:`read_corpus`.
        split: As in :func:`read_corpus`.

    Raises:
        InputError: As :func:`read_corpus`.

    Example:
        >>> load_corpus("scenes:60", "train").split
        'train'
    """
    corpus = read_corpus(spec, split)
    for note in corpus.notes[:_NOTES_SAID]:
        print(printable(note), file=sys.stderr)
    if len(corpus.notes) > _NOTES_SAID:
        print(f"{len(corpus.notes) - _NOTES_SAID} more such notes; `vse data check {spec}` has all", file=sys.stderr)
    return corpus


def read_corpus(spec: str, split: str) -> Corpus:
    """Reads one split, or several joined, of a data set.

    Args:
        spec: ``KIND:PATH`` with kind ``karpathy``, ``coco``, ``precomputed``, ``folder`` or ``dedup``; ``PATH``
            alone, whose kind is detected from its files; or ``scenes[:N]``, N generated images.
        split: A split's name, or several joined by ``+`` such as ``train+restval``; a split that has a ``+`` in its
            own name goes first.

    Raises:
        InputError: On an unknown kind or split, or files that cannot be used.
    """
    kind, path = _resolve(spec)
    parts = [split] if "+" not in split or split in available_splits(spec) else split.split("+")
    return concatenate([_read(kind, path, part) for part in parts])


def available_splits(spec: str) -> list[str]:
    """The splits that a data set has; ``spec`` as in :func:`load_corpus`."""
    kind, path = _resolve(spec)
    if kind == "scenes":
        return ["train", "val", "test"]
    names: list[str] = _READERS[kind].splits(Path(path))
    return names


def _read(kind: str, path: str, split: str) -> Corpus:
    if kind != "scenes":
        corpus: Corpus = _READERS[kind].read(Path(path), split)
        return corpus
    # Drawing pictures is needed for this kind only.
    from training.data.formats.scenes import read_scenes

    return read_scenes(int(path), split)


def _resolve(spec: str) -> tuple[str, str]:
    """Kind and path, or kind ``scenes`` and a count."""
    if fault := text_fault(spec):  # runs and reports name their data
        raise InputError(f"{spec}: this name holds {fault}; rename the folder")
    kind, colon, rest = spec.partition(":")
    if kind == "scenes":
        if colon and not (rest.isascii() and rest.isdigit() and int(rest) > 0):
            raise InputError(f"{spec}: {rest!r} is not a number of images; write e.g. scenes:{_DEFAULT_SCENES}")
        return kind, rest or str(_DEFAULT_SCENES)
    path = Path(rest if colon and kind in _READERS else spec).expanduser()
    if colon and kind not in _READERS and not path.exists():
        raise InputError(f"{spec}: unknown kind {kind!r}; choose from {', '.join([*_READERS, 'scenes'])}")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if kind not in _READERS or not colon:
        kind = _detect(path)
    elif not path.is_dir() and kind not in ("karpathy", "dedup"):
        raise InputError(f"{path}: not a folder; {kind} data are read from a folder")
    return kind, str(path)


def _detect(path: Path) -> str:
    if path.is_file() and path.suffix == ".json":
        return "karpathy"
    for kind, patterns in _SIGNS.items():
        if any(next(path.glob(pattern), None) for pattern in patterns):
            return kind
    looked = "; ".join(f"{', '.join(patterns)} ({kind})" for kind, patterns in _SIGNS.items())
    raise InputError(f"{path}: cannot tell the kind of data; looked for {looked}")
