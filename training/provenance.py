"""What a run learns from, by fingerprint, so that no resumed run meets other data unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.checkpoint import load_record
from training.config import Config, changed_course, from_dict
from training.data.corpus import Corpus
from training.errors import InputError

_PARTS = {"images": "the images", "captions": "the captions", "pairs": "which caption describes which image"}


def provenance(corpus: Corpus, saved: Mapping[str, str] | None = None) -> dict[str, str]:
    """The size of a split, and fingerprints of its images, its captions, and who describes whom.

    Args:
        corpus: The split, wherever its files lie.
        saved: Its provenance when the run was started.

    Raises:
        InputError: If the two differ; names the split and what has changed.
    """
    pairs = corpus.owner.tobytes() + (b"" if corpus.weights is None else corpus.weights.tobytes())
    found = {
        "size": f"{len(corpus):,} captions of {len(corpus.image_ids):,} images",
        "images": corpus.fingerprint("image"),
        "captions": corpus.fingerprint("text"),
        "pairs": hashlib.sha256(pairs).hexdigest(),
    }
    where, mend = f"{corpus.name} [{corpus.split}]", "restore the data, or train anew with another --out"
    if saved and saved["size"] != found["size"]:
        raise InputError(f"{where}: {found['size']}, but {saved['size']} when the run was started; {mend}")
    for part, what in _PARTS.items():
        if saved and saved[part] != found[part]:
            raise InputError(f"{where}: {what} changed since the run was started; {mend}")
    return found


def saved_provenance(state: Path, config: Config) -> dict[str, Any]:
    """What a state says its run was made from; nothing, and a line, if an earlier version wrote it.

    Args:
        state: The file.
        config: What the run is to be resumed with.

    Raises:
        InputError: If there is no such file, or the run was started with other settings.
    """
    record = load_record(state)
    changed = changed_course(from_dict(record["config"], str(state)), config)
    if changed:
        raise InputError(f"{state}: the run was started with other settings ({changed}); choose another --out")
    saved: dict[str, Any] = record.get("provenance", {})
    if not saved:
        tqdm.write(
            f"{state}: an earlier version wrote it, which did not record data, vocabulary and encoders; "
            "whether they are still the same is not checked"
        )
    return saved
