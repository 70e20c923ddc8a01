"""Karpathy's split files: ``dataset_flickr8k.json``, ``dataset_flickr30k.json``, ``dataset_coco.json``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.corpus import Corpus
from training.data.formats.records import PictureFinder, check_text, in_split, inside, member, parse_json, read_text
from training.data.images import ImageFile
from training.errors import InputError


def read(directory: Path, split: str) -> Corpus:
    """Reads one split with all its sentences.

    A picture is looked for in ``images/``, the directory itself, ``<filepath>/`` and
    ``images/<filepath>/``, in this order. Image ids are file names without suffix, caption ids are
    ``sentid``; where these are not unique in the file, ``imgid`` and ``<image id>#<number>``.

    Args:
        directory: Folder with one ``dataset*.json``, or that file.
        split: ``train``, ``restval``, ``val``, ``test``, or ``all``.

    Raises:
        InputError: On bad JSON, a missing key, a missing picture or an unknown split.
    """
    path = _dataset_file(directory)
    records = member(parse_json(read_text(path), str(path)), "images", list, str(path))
    where = [f"{path}: images[{i}]" for i in range(len(records))]
    splits = [member(r, "split", str, w) for r, w in zip(records, where, strict=True)]
    file_names = [member(r, "filename", str, w) for r, w in zip(records, where, strict=True)]
    sentences = [member(r, "sentences", list, w) for r, w in zip(records, where, strict=True)]

    # Decided on the whole file, so that splits can be joined.
    stems = [name.rpartition("/")[2].rpartition(".")[0] or name for name in file_names]
    if len(set(stems)) < len(stems):
        stems = [str(record.get("imgid", i)) for i, record in enumerate(records)]
    sentids = [str(s["sentid"]) for group in sentences for s in group if isinstance(s, dict) and "sentid" in s]
    has_sentids = len(set(sentids)) == sum(map(len, sentences))

    chosen, find = in_split(splits, split, path), PictureFinder()
    images, captions, caption_ids, owner = [], [], [], []
    for position, i in enumerate(chosen):
        subfolder = inside(str(records[i].get("filepath", "")), where[i])
        folders = dict.fromkeys(path.parent / f for f in ("images", "", subfolder, f"images/{subfolder}"))
        images.append(ImageFile(find(folders, file_names[i], where[i])))
        for j, sentence in enumerate(sentences[i]):
            captions.append(_text(sentence, f"{where[i]}.sentences[{j}]"))
            caption_ids.append(str(sentence["sentid"]) if has_sentids else f"{stems[i]}#{j}")
            owner.append(position)
    return Corpus(
        name=f"karpathy:{path.parent.resolve().name}",
        split=split,
        image_ids=[stems[i] for i in chosen],
        captions=captions,
        caption_ids=caption_ids,
        owner=np.array(owner, dtype=np.int64),
        images=images,
    )


def splits(directory: Path) -> list[str]:
    """The splits that the file names, in the order of their first image."""
    path = _dataset_file(directory)
    records = member(parse_json(read_text(path), str(path)), "images", list, str(path))
    return list(dict.fromkeys(member(r, "split", str, f"{path}: images[{i}]") for i, r in enumerate(records)))


def _dataset_file(directory: Path) -> Path:
    if directory.is_file():
        return directory
    found = sorted(directory.glob("dataset*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{directory}: need one dataset*.json, found {names}; name the file itself")
    return found[0]


def _text(sentence: object, where: str) -> str:
    if isinstance(sentence, dict) and not sentence.get("raw"):
        text = " ".join(map(str, member(sentence, "tokens", list, where)))
        check_text(text, f"{where}: 'tokens'")
        return text
    return member(sentence, "raw", str, where)
