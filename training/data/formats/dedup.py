"""Other data without its duplicates: a JSON file that names them and says how many pairs each kept one stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.data.corpus import Corpus
from training.data.formats.records import member, parse_json, read_text
from training.errors import InputError
from training.files import write_text

_MOST_PAIRS = 10**9  # more than any data set has; sums of larger weights would lose the smaller ones
_MOST_FILES = 16  # that lead from one to the next


def read(path: Path, split: str) -> Corpus:
    """Reads the kept captions of the split that was deduplicated, with weights; other splits as they are.

    Args:
        path: A file written by :func:`write`.
        split: A split of the data it names.

    Raises:
        InputError: On bad JSON, a caption that the data does not have, a weight that is no number of pairs, or
            files that name each other.
    """
    from training.data.formats import read_corpus  # which reads this format, too

    record = _record(path)
    corpus = read_corpus(record["data"], split)
    if split != record["split"]:
        return corpus
    index = {caption_id: number for number, caption_id in enumerate(corpus.caption_ids)}
    for caption_id, weight in record["weights"].items():
        if caption_id not in index:
            raise InputError(f"{path}: {record['data']} [{split}] has no caption {caption_id!r}; make the file anew")
        if type(weight) not in (int, float) or not 1 <= weight <= _MOST_PAIRS:
            raise InputError(
                f"{path}: caption {caption_id!r}: weight {weight!r:.40} is not a number of pairs; correct it"
            )
    chosen = np.array([index[caption_id] for caption_id in record["weights"]], dtype=np.int64)
    return corpus.select(chosen, np.array(list(record["weights"].values()), dtype=np.float64))


def splits(path: Path) -> list[str]:
    """The splits of the data that the file names."""
    from training.data.formats import available_splits

    return available_splits(_record(path)["data"])


def write(path: Path, data: str, split: str, weights: Mapping[str, int]) -> None:
    """Write what :func:`read` reads.

    Args:
        path: The file.
        data: ``KIND:PATH`` of the data.
        split: Its deduplicated split.
        weights: Kept caption ids, and how many pairs each stands for.
    """
    write_text(path, json.dumps({"data": data, "split": split, "weights": dict(weights)}, indent=1) + "\n")


def _record(path: Path) -> dict[str, Any]:
    """The file's record, if the data that it names are found at last."""
    record = following = _parsed(path)
    for _ in range(_MOST_FILES):
        if not following["data"].startswith("dedup:"):
            return record
        following = _parsed(Path(following["data"].removeprefix("dedup:")).expanduser())
    raise InputError(f"{path}: 'data' leads from one dedup file to another without end; name the data themselves")


def _parsed(path: Path) -> dict[str, Any]:
    record = parse_json(read_text(path), str(path))
    for key, kind in (("data", str), ("split", str), ("weights", dict)):
        member(record, key, kind, str(path))
    if not record["weights"]:
        raise InputError(f"{path}: keeps no caption; make the file anew")
    return dict(record)
