"""``vse data check``: read a data set as training would, and decode every picture."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from training.data.corpus import Corpus
from training.data.formats import available_splits, load_corpus
from training.data.image_folders import Quarantine, decode_all
from training.data.images import ImageFile
from training.data.text import split_words
from training.errors import InputError

LONG = 62  # words beyond which the default max_tokens cuts a caption


@dataclass(frozen=True)
class SplitCheck:
    """What one split holds."""

    split: str
    images: int
    captions: int
    captions_per_image: tuple[int, int]
    median_words: float
    longer_than_max_tokens: int


@dataclass
class DataReport:
    """Every split, and every record that cannot be used."""

    data: str
    splits: list[SplitCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    quarantine: Quarantine = field(default_factory=Quarantine)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "data": self.data,
            "splits": [asdict(split) for split in self.splits],
            "problems": self.problems,
            **self.quarantine.to_json(),
        }

    def text(self) -> str:
        """A table of splits, then one line per problem."""
        lines = [f"{'split':12}{'images':>9}{'captions':>10}{'per image':>11}{'words':>7}{'cut':>6}"]
        for s in self.splits:
            low, high = s.captions_per_image
            each = str(low) if low == high else f"{low}–{high}"
            lines.append(
                f"{s.split:12}{s.images:9,}{s.captions:10,}{each:>11}{s.median_words:7.0f}{s.longer_than_max_tokens:6}"
            )
        lines += [f"problem  {problem}" for problem in self.problems]
        if self.quarantine.report():
            lines.append(self.quarantine.report())
        lines.append("no problems" if not self.problems else f"{len(self.problems)} problems")
        return "\n".join(lines)


def check_data(data: str, split: str | None) -> DataReport:
    """Read the given split, or all there are, and decode every picture.

    Raises:
        InputError: If nothing can be read at all.
    """
    report = DataReport(data)
    for name in [split] if split else available_splits(data):
        try:
            corpus = load_corpus(data, name)
        except InputError as error:
            report.problems.append(str(error))
            continue
        report.splits.append(_summary(corpus))
        files = [source.path for source in corpus.images if isinstance(source, ImageFile)]
        for _ in tqdm(decode_all(files, report.quarantine), f"decode {name}", len(files), unit="image", leave=False):
            pass
    report.problems += [f"{path}: {reason}" for path, reason in report.quarantine.refused]
    report.quarantine.refused.clear()
    return report


def _summary(corpus: Corpus) -> SplitCheck:
    per_image = [0] * len(corpus.image_ids)
    for image in corpus.owner:
        per_image[image] += 1
    words = [len(split_words(caption)) for caption in corpus.captions]
    return SplitCheck(
        split=corpus.split,
        images=len(corpus.image_ids),
        captions=len(corpus),
        captions_per_image=(min(per_image), max(per_image)),
        median_words=statistics.median(words),
        longer_than_max_tokens=sum(count > LONG for count in words),
    )
