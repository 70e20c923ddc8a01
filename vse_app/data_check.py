"""``vse data check``: read a data set as training would, decode every picture, and look for what spoils results."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.data.corpus import Corpus
from training.data.formats import available_splits, read_corpus
from training.data.images import ImageFile, read_picture
from training.data.text import WordTokenizer, split_words
from training.errors import InputError, printable
from training.models.config import TextTowerConfig

DEFAULTS = TextTowerConfig()


@dataclass(frozen=True)
class SplitCheck:
    """What one split holds.

    Attributes:
        split: Its name.
        images: Their number.
        captions: Their number.
        captions_per_image: The fewest and the most.
        median_words: Of a caption.
        longer_than_max_tokens: Captions that the default ``max_tokens`` cuts.
        unknown_words: The share of words that are ``<unk>`` to a vocabulary of the default ``min_count``, fitted on
            the split ``train`` or, where there is none, on the first.
        shared_captions: Sentences that describe several pictures.
    """

    split: str
    images: int
    captions: int
    captions_per_image: tuple[int, int]
    median_words: float
    longer_than_max_tokens: int
    unknown_words: float
    shared_captions: int


@dataclass
class DataReport:
    """Every split, and every record that cannot be used.

    Attributes:
        data: What was checked.
        splits: Those that can be read.
        problems: What training refuses, or what makes its figures wrong.
        notes: Where, and what was left out, repaired, converted or is worth knowing.
    """

    data: str
    splits: list[SplitCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        notes = [{"path": where, "reason": note} for where, note in self.notes]
        return {**asdict(self), "notes": notes}

    def text(self) -> str:
        """A table of splits, then one line per problem and per note."""
        lines = [f"{'split':12}{'images':>9}{'captions':>10}{'per image':>11}{'words':>7}{'cut':>6}"]
        for s in self.splits:
            low, high = s.captions_per_image
            each = str(low) if low == high else f"{low}–{high}"
            lines.append(
                f"{s.split:12}{s.images:9,}{s.captions:10,}{each:>11}{s.median_words:7.0f}{s.longer_than_max_tokens:6}"
            )
        lines += [printable(f"problem  {problem}") for problem in self.problems]
        lines += [printable(f"note     {where}: {note}") for where, note in self.notes]
        lines.append("no problems" if not self.problems else f"{len(self.problems)} problems")
        return "\n".join(lines)


def check_data(data: str, split: str | None) -> DataReport:
    """Read the given split, or all there are, and decode every picture.

    Raises:
        InputError: If nothing can be read at all.
    """
    report = DataReport(data)
    corpora = []
    names = [split] if split else available_splits(data)
    if not names:
        raise InputError(f"{data}: no images in any split; check the path")
    for name in names:
        try:
            corpora.append(read_corpus(data, name))
        except InputError as error:
            report.problems.append(str(error))
    for note in dict.fromkeys(note for corpus in corpora for note in corpus.notes):
        path, _, said = note.partition(": ")
        report.notes.append((path, said))
    if corpora:
        fitted = next((corpus for corpus in corpora if corpus.split.startswith("train")), corpora[0])
        tokenizer = WordTokenizer.fit(fitted.captions, DEFAULTS.min_count)
        report.splits += [_summary(corpus, tokenizer) for corpus in corpora]
        report.notes += _caption_notes(report.splits, fitted, tokenizer)
    # Two pictures may be one, stored in two formats.
    report.problems += [
        f"{corpus.name} [{corpus.split}]: all {len(corpus.image_ids)} pictures say {corpus.captions[0]!r}; "
        "caption each"
        for corpus in corpora
        if len(corpus.image_ids) > 2 and len(set(corpus.captions)) == 1
    ]
    _check_pictures(corpora, report)
    return report


def _summary(corpus: Corpus, tokenizer: WordTokenizer) -> SplitCheck:
    per_image = np.bincount(corpus.owner)
    words = [len(split_words(caption)) for caption in corpus.captions]
    described = defaultdict(set)
    for caption, image in zip(corpus.captions, corpus.owner.tolist(), strict=True):
        described[caption.strip()].add(image)
    return SplitCheck(
        split=corpus.split,
        images=len(corpus.image_ids),
        captions=len(corpus),
        captions_per_image=(int(per_image.min()), int(per_image.max())),
        median_words=statistics.median(words),
        longer_than_max_tokens=sum(count > DEFAULTS.max_tokens - 2 for count in words),
        unknown_words=tokenizer.unknown(corpus.captions),
        shared_captions=sum(len(images) > 1 for images in described.values()),
    )


def _caption_notes(splits: list[SplitCheck], fitted: Corpus, tokenizer: WordTokenizer) -> Iterator[tuple[str, str]]:
    try:
        known = tokenizer.check(fitted.captions)
    except InputError as error:
        known = str(error)
    yield fitted.split, known
    for split in splits:
        if split.split != fitted.split:
            yield split.split, f"{split.unknown_words:.1%} of all words are <unk> to that vocabulary"
        if split.shared_captions:
            yield split.split, f"{split.shared_captions:,} sentences describe several pictures, each other's negatives"


def _check_pictures(corpora: list[Corpus], report: DataReport) -> None:
    """Decodes every picture, and looks for the same content twice."""
    found: defaultdict[str, defaultdict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))  # content, split
    for corpus in corpora:
        files = [source.path for source in corpus.images if isinstance(source, ImageFile)]
        for path in tqdm(files, f"decode {corpus.split}", unit="image", leave=False, disable=None):
            try:
                picture = read_picture(path)
            except InputError as error:
                report.problems.append(str(error))
                continue
            report.notes += [(str(path), note) for note in picture.notes]
            found[picture.sha256][corpus.split].append(path)
    if leaks := [places for places in found.values() if len(places) > 1]:
        seen, held_out = [f"{paths[0]} [{split}]" for split, paths in leaks[0].items()][:2]
        report.problems.append(
            f"{seen} and {held_out} are the same picture ({len(leaks)} such pictures): a model would be tested "
            "on what it has learned; keep each in one split"
        )
    for corpus in corpora:
        if copies := [paths for places in found.values() if len(paths := places.get(corpus.split, [])) > 1]:
            first, second = copies[0][:2]
            others = sum(map(len, copies)) - len(copies)
            note = f"the same picture as {second}, yet each other's negatives ({others:,} such copies)"
            report.notes.append((str(first), note))
