"""COCO's official caption files: ``captions_train2014.json``, ``captions_val2017.json``, and alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.corpus import Corpus
from training.data.formats.records import PictureFinder, member, parse_json, read_text
from training.data.images import ImageFile
from training.errors import InputError


def read(directory: Path, split: str) -> Corpus:
    """Reads one annotation file; image and caption ids are COCO's.

    The file is looked for in the directory and in ``annotations/``, a picture in ``<split>/``,
    ``images/<split>/``, ``images/`` and the directory itself, in this order.

    Args:
        directory: Folder with ``captions_<split>.json``.
        split: Such as ``val2017``; the year may be left out where only one is there.

    Raises:
        InputError: On bad JSON, a missing key or picture, a caption of an unknown image, an image
            without captions, or an unknown split.
    """
    path = _annotation_file(directory, split)
    split = _split_of(path)
    content = parse_json(read_text(path), str(path))
    folders = [directory / split, directory / "images" / split, directory / "images", directory]
    find = PictureFinder()

    position: dict[str, int] = {}
    image_ids, images = [], []
    for i, record in enumerate(member(content, "images", list, str(path))):
        where = f"{path}: images[{i}]"
        image_id = _id(record, "id", where)
        if image_id in position:
            raise InputError(f"{where}: image id {image_id!r} occurs twice; make ids unique")
        position[image_id] = i
        image_ids.append(image_id)
        images.append(ImageFile(find(folders, member(record, "file_name", str, where), where)))

    captions, caption_ids, owner = [], [], []
    for i, record in enumerate(member(content, "annotations", list, str(path))):
        where = f"{path}: annotations[{i}]"
        image_id = _id(record, "image_id", where)
        if image_id not in position:
            raise InputError(f"{where}: image_id {image_id} is not among the images; remove the record")
        captions.append(member(record, "caption", str, where))
        caption_ids.append(_id(record, "id", where))
        owner.append(position[image_id])
    return Corpus(
        name=f"coco:{directory.resolve().name}",
        split=split,
        image_ids=image_ids,
        captions=captions,
        caption_ids=caption_ids,
        owner=np.array(owner, dtype=np.int64),
        images=images,
    )


def splits(directory: Path) -> list[str]:
    """The splits that have an annotation file."""
    return list(_annotation_files(directory))


def _id(record: object, key: str, where: str) -> str:
    """COCO's own ids are integers; other data in its layout have strings."""
    is_text = isinstance(record, dict) and isinstance(record.get(key), str)
    return member(record, key, str, where) if is_text else str(member(record, key, int, where))


def _split_of(path: Path) -> str:
    return path.stem.removeprefix("captions_")


def _annotation_files(directory: Path) -> dict[str, Path]:
    return {
        _split_of(path): path
        for pattern in ("captions_*.json", "annotations/captions_*.json")
        for path in sorted(directory.glob(pattern))
    }


def _annotation_file(directory: Path, split: str) -> Path:
    found = _annotation_files(directory)
    matches = [path for name, path in found.items() if split in (name, name.rstrip("0123456789"))]
    if split in found:
        return found[split]
    if len(matches) != 1:
        problem = "several years of" if matches else "no"
        raise InputError(f"{directory}: {problem} split {split!r}; choose from {', '.join(found) or 'none'}")
    return matches[0]
