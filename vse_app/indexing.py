"""Pictures into a gallery: what is new or has changed is embedded; what is known of the others is kept."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from index.errors import GalleryError
from index.gallery import Gallery
from index.items import JSON, Item, check_item
from training.data.image_folders import Listing, Quarantine
from training.data.image_transform import ImageTransform
from training.data.images import read_file, read_picture
from training.data.padded import Padded
from training.errors import InputError
from training.models.dual_encoder import DualEncoder

BATCH = 64
"""Pictures that are made durable together."""
TOGETHER = 16
"""Pictures in a pass of the image tower; on a CPU the activations of more leave its caches."""


@dataclass(frozen=True)
class Facts:
    """What is known of a picture beside its pixels: a sentence, and whatever else searches may ask for."""

    caption: str | None = None
    metadata: Mapping[str, JSON] = field(default_factory=dict)


@dataclass
class AddReport:
    """What became of pictures that were to be added.

    Attributes:
        added: New ones.
        updated: Those whose file has another content than it had; caption and metadata are kept.
        moved: Those whose file has another name than it had; ids, captions and metadata are kept.
        reworded: Those of which only caption or metadata are others, as was asked for.
        unchanged: Those known as they are, or with another time of change.
        left_out: A line for each kind of thing that was passed over.
        quarantine: What could not be added, and what was converted.
    """

    added: int = 0
    updated: int = 0
    moved: int = 0
    reworded: int = 0
    unchanged: int = 0
    left_out: list[str] = field(default_factory=list)
    quarantine: Quarantine = field(default_factory=Quarantine)

    @property
    def in_vain(self) -> bool:
        """Whether there was something, and all of it was refused."""
        refused = bool(self.quarantine.refused or self.left_out)
        return refused and not (self.added or self.updated or self.moved or self.reworded or self.unchanged)

    def __str__(self) -> str:
        often = [(self.added, "added"), (self.updated, "updated"), (self.moved, "moved")]
        often += [
            (self.reworded, "reworded"),
            (self.unchanged, "unchanged"),
            (len(self.quarantine.refused), "refused"),
        ]
        return ", ".join(f"{n} {what}" for n, what in often if n or what not in ("updated", "moved"))

    def to_json(self) -> dict[str, Any]:
        """Counts, what was passed over, and the quarantined files."""
        counts = {key: value for key, value in vars(self).items() if key != "quarantine"}
        return counts | self.quarantine.to_json()


@dataclass(frozen=True)
class New:
    """A picture to embed.

    Attributes:
        key: Its path as the gallery has it.
        path: Its path as it was given.
        facts: What to keep with it.
        known: Whether the gallery has what the file held before.
    """

    key: str
    path: Path
    facts: Facts
    known: bool

    def item(self, size: int = 0, mtime_ns: int = 0, sha256: str = "") -> Item:
        """What the gallery keeps of it, for a file of this content."""
        return Item(self.key, self.facts.caption, size, mtime_ns, sha256, dict(self.facts.metadata))


@dataclass
class Plan:
    """What is to be done to a gallery.

    Attributes:
        new: Pictures to embed.
        changed: Items that stay, by id, with what changes of them.
        report: What becomes of all pictures if all of ``new`` can be decoded.
    """

    new: list[New] = field(default_factory=list)
    changed: dict[int, Item] = field(default_factory=dict)
    report: AddReport = field(default_factory=AddReport)


def plan_pictures(
    gallery: Gallery, listing: Listing, facts: Mapping[Path, Facts], *, force: bool = False, find_moved: bool = True
) -> Plan:
    """Find out which pictures are new, decoding none; the gallery may be open for reading.

    A file is known by path, size and time of change. If one of these is another, it is known by its content, at its
    path or under a new name if the old one is gone or belongs to something else now.

    Args:
        gallery: To add to.
        listing: The files.
        facts: What to keep with some of the files, in place of what is known of them.
        force: Compare the content even where path, size and time of change are the same.
        find_moved: Whether a new file may be one that is known under another name.
    """
    plan = Plan()
    plan.report.left_out += listing.lines()
    plan.report.quarantine.refused += listing.refused
    planner = _Planner(gallery, plan, {os.path.realpath(path): of for path, of in facts.items()})
    planner.take_names(listing.files)
    if unused := [path for path in facts if os.path.realpath(path) not in planner.files]:
        plan.report.left_out.append(
            f"facts of {len(unused)} that are not among these pictures, as {unused[0]}; check their names"
        )
    if not force:
        planner.take_unchanged()
    displaced = planner.take_touched()
    if find_moved:
        planner.take_moved(displaced)
    planner.take_new(displaced)
    return plan


def add_pictures(gallery: Gallery, model: Callable[[], DualEncoder], plan: Plan) -> AddReport:
    """Do what was planned; each batch is durable when the next is begun, and pictures are cut to size one by one.

    Args:
        gallery: Open for writing, and as it was when the plan was made.
        model: Gives what embeds the pictures; called if there are any.
        plan: From :func:`plan_pictures`; its report is brought up to date.

    Raises:
        GalleryError: If the disk is full; says how many pictures of the batches before are in the gallery.
    """
    if plan.changed:
        gallery.update(plan.changed)
    if plan.new:
        encoder, done = model(), 0
        views = _views(plan, encoder.transform())
        while batch := list(islice(views, BATCH)):
            pixels = torch.stack([view for _, view in batch])  # (B, 3, S, S)
            vectors = torch.cat([encoder.encode("image", _Views(part)) for part in torch.split(pixels, TOGETHER)])
            try:
                done += len(gallery.add([item for item, _ in batch], vectors.numpy()))
            except GalleryError as error:
                if not done:
                    raise
                told = f"{gallery.directory}: {done} of {len(plan.new)} pictures were added, the others were not"
                raise GalleryError(f"{told}, {error.__cause__ or error}; make room and add them again") from error
    return plan.report


class _Planner:
    """The files that are not decided on yet, and what is known of them.

    Args:
        gallery: What is there.
        plan: Takes what is decided.
        facts: By path, what to keep in place of what is known.

    Attributes:
        files: Files by their paths in the gallery.
    """

    def __init__(self, gallery: Gallery, plan: Plan, facts: Mapping[str, Facts]) -> None:
        self.files: dict[str, Path] = {}
        self._gallery = gallery
        self._plan = plan
        self._facts = facts

    def take_names(self, paths: Iterable[Path]) -> None:
        """All files; spellings of one are one picture, and what has a name that cannot be kept is refused."""
        for path in paths:
            key = os.path.realpath(path)
            self.files[key] = path
            try:
                check_item(New(key, path, Facts(), False).item())
            except GalleryError as error:
                self._refuse(key, error, known=False)

    def take_unchanged(self) -> None:
        """Files that are known by path, size and time of change."""
        states: dict[str, tuple[int, int]] = {}
        for key, path in self.files.items():
            with suppress(OSError):  # it is read below, and what is wrong told
                status = path.stat()
                states[key] = status.st_size, status.st_mtime_ns
        unchanged = self._gallery.unchanged(states)
        for key in unchanged - self._facts.keys():
            del self.files[key]
            self._plan.report.unchanged += 1
        for number, item in self._known(unchanged & self._facts.keys()):
            self._keep(number, item, item)

    def take_touched(self) -> dict[str, tuple[int, Item]]:
        """Files that are known by path and content; returns what is known of those with another content."""
        displaced = {}
        for number, item in list(self._known(self.files.keys())):
            path = self.files[item.path]
            try:
                content = read_file(path)
            except InputError as error:
                self._refuse(item.path, error, known=True)
                continue
            if content.sha256 == item.sha256:
                self._keep(number, item, replace(item, size=len(content.data), mtime_ns=content.mtime_ns))
            else:
                displaced[item.path] = number, item
        return displaced

    def take_moved(self, displaced: dict[str, tuple[int, Item]]) -> None:
        """Files that are known by their content alone; their items are taken out of those displaced."""
        sizes = {path.stat().st_size for path in self.files.values() if path.is_file()}
        by_content: defaultdict[str, list[tuple[int, Item]]] = defaultdict(list)
        for number, item in self._gallery.items(self._gallery.ids_of_sizes(sizes)):
            if item.path in displaced or not os.path.lexists(item.path):
                by_content[item.sha256].append((number, item))
        sizes = {item.size for items in by_content.values() for _, item in items}
        for key, path in list(self.files.items()):
            with suppress(InputError, OSError):
                if path.stat().st_size not in sizes:
                    continue
                content = read_file(path)
                if items := by_content[content.sha256]:
                    same_name = [of for of in items if os.path.basename(of[1].path) == path.name]
                    number, item = (same_name or items)[0]
                    items.remove((number, item))
                    displaced.pop(item.path, None)
                    now = replace(item, path=key, size=len(content.data), mtime_ns=content.mtime_ns)
                    self._keep(number, item, now)

    def take_new(self, displaced: Mapping[str, tuple[int, Item]]) -> None:
        """All others."""
        report = self._plan.report
        for key, path in list(self.files.items()):
            former = displaced[key][1] if key in displaced else None
            kept = Facts(former.caption, former.metadata) if former else Facts()
            new = New(key, path, self._facts.get(key, kept), former is not None)
            try:
                check_item(new.item())
            except GalleryError as error:
                self._refuse(key, error, new.known)
                continue
            self._plan.new.append(new)
            report.updated += new.known
            report.added += not new.known
            if key not in self._facts and kept != Facts():
                report.quarantine.notes.append((path, "has changed; its caption and fields are kept"))

    def _known(self, keys: Collection[str]) -> Iterator[tuple[int, Item]]:
        return self._gallery.items(self._gallery.ids_of(sorted(keys)))

    def _keep(self, number: int, item: Item, now: Item) -> None:
        """An item stays, with what its file is now and the facts that are given."""
        facts = self._facts.get(now.path)
        if facts:
            now = replace(now, caption=facts.caption, metadata=dict(facts.metadata))
        report = self._plan.report
        try:
            check_item(now)
        except GalleryError as error:
            self._refuse(now.path, error, known=True)
            return
        del self.files[now.path]
        if now != item:
            self._plan.changed[number] = now
        if now.path != item.path:
            report.moved += 1
        elif (now.caption, now.metadata) != (item.caption, item.metadata):
            report.reworded += 1
        else:
            report.unchanged += 1

    def _refuse(self, key: str, error: ValueError, known: bool) -> None:
        _refuse(self._plan.report, self.files.pop(key), error, known)


def _views(plan: Plan, transform: ImageTransform) -> Iterator[tuple[Item, Tensor]]:
    """The pictures that can be decoded, cut to size; one of full size is held at a time."""
    report = plan.report
    for new in tqdm(plan.new, "index", unit="image", delay=1, leave=False, disable=None):
        try:
            picture = read_picture(new.path)
        except InputError as error:
            report.updated -= new.known
            report.added -= not new.known
            _refuse(report, new.path, error, new.known)
            continue
        report.quarantine.notes.extend((new.path, note) for note in picture.notes)
        yield new.item(picture.size, picture.mtime_ns, picture.sha256), transform(picture.image, None)


def _refuse(report: AddReport, path: Path, error: ValueError, known: bool) -> None:
    key = os.path.realpath(path)
    reason = str(error)
    for name in (f"{path}: ", f"{key}: ", f"{key!r}: "):
        reason = reason.removeprefix(name)
    if known:
        reason += "; the gallery keeps what it knew before"
    report.quarantine.refused.append((path, reason))


class _Views:
    """Pictures that are cut to size; :class:`~training.data.batches.Inputs` of an image tower.

    Args:
        pixels: uint8 ``(B, 3, S, S)``.
    """

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels

    fingerprint = ""

    @property
    def lengths(self) -> Sequence[int]:
        """One input per picture."""
        return [1] * len(self)

    def __len__(self) -> int:
        return len(self._pixels)

    def name(self, index: int) -> str:
        """Any of them."""
        return "picture"

    def fetch(self, indices: NDArray[np.int64], seeds: Sequence[int] | None) -> Padded:
        """Pictures at ``indices``."""
        return Padded(self._pixels[torch.from_numpy(indices)])
