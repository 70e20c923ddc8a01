"""Captions to token ids: a word vocabulary fitted on the training split, or a Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from training.errors import InputError
from training.files import write_text

VOCABULARY_FILE = "vocabulary.json"
_WORDS_V1 = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")
# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces between words.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
_UNSPACED += "\uaa60-\uaa7f\uf900-\ufaff\U00020000-\U0003ffff"
MOST_UNKNOWN = 0.9
"""Where a vocabulary lacks a larger share of the training captions' words, captions can hardly be told apart."""


class Tokenizer(Protocol):
    """Turns captions into ids; padding happens per batch."""

    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Ids of each caption, int64 ``(T_b,)`` with ``2 <= T_b <= max_tokens``."""
        ...

    def check(self, captions: Sequence[str]) -> str:
        """Say which share of the training captions is unknown; :class:`InputError` if next to nothing is known."""
        ...

    def save(self, directory: Path) -> None:
        """Write what :func:`load_tokenizer` needs to ``directory``."""
        ...


def split_words(caption: str) -> list[str]:
    """Lower-cased words and punctuation marks, the same however the caption is encoded.

    Compatibility forms are composed (NFKC), so that "é" is one character and "Ａ" is "A"; apostrophes are straight.
    Combining marks (accents, the vowel signs of Indic scripts, of Arabic and Hebrew) and joiners belong to the
    character before them. Scripts that put no spaces between words are split into characters with their marks.
    """
    if caption.isascii():  # the same, several times as fast
        return _split_words_v1(caption)
    return _words().findall(unicodedata.normalize("NFKC", caption).replace("’", "'").lower())


@cache
def _words() -> re.Pattern[str]:
    # Python's \w has letters and digits, but no combining marks; beyond this range are none but variation selectors.
    codes = map(chr, range(0x300, 0x1F000))
    marks = "".join(code for code in codes if unicodedata.category(code).startswith("M"))
    marks = f"[{marks}\U000e0100-\U000e01ef\u200c\u200d]*+"
    word = rf"(?:[^\W{_UNSPACED}]++{marks})++"
    return re.compile(rf"{word}(?:'{word})?|\S{marks}")


def _split_words_v1(caption: str) -> list[str]:
    return _WORDS_V1.findall(caption.lower())


class WordTokenizer:
    """One id per word, as in VSE++ (Faghri et al. 2018): ``<start> words <end>``, rare words ``<unk>``.

    The vocabulary is stored as JSON together with the rule that split the words, the count threshold and
    a hash of the captions it was fitted on, so that a model can never meet another model's vocabulary
    unnoticed.

    Args:
        words: Those with an id of their own.
        min_count: How often each occurred at least.
        source: Hash of the captions.
        max_tokens: Longer captions are cut to this many ids, specials included.
        rule: How captions are split, of :data:`RULES`.

    Raises:
        InputError: If ``max_tokens`` leaves no room for a word.
    """

    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
    RULES: ClassVar[dict[str, Callable[[str], list[str]]]] = {"words-v1": _split_words_v1, "words-v2": split_words}

    def __init__(
        self, words: Sequence[str], *, min_count: int, source: str, max_tokens: int = 64, rule: str = "words-v2"
    ) -> None:
        if max_tokens < 3:
            raise InputError(f"text.max_tokens {max_tokens}: must be at least 3, for <start>, a word and <end>")
        self.words = list(words)
        self.min_count = min_count
        self.source = source
        self.max_tokens = max_tokens
        self.rule = rule
        self._ids = {word: index for index, word in enumerate((*self.SPECIALS, *self.words))}

    @classmethod
    def fit(cls, captions: Iterable[str], min_count: int = 4, max_tokens: int = 64) -> WordTokenizer:
        """Collect the words that occur at least ``min_count`` times.

        Args:
            captions: Those of the **training split only**; words seen only at test time must stay unknown.
            min_count: Rarer words become ``<unk>``.
            max_tokens: Longer captions are cut to this many ids, specials included.
        """
        counts: Counter[str] = Counter()
        digest = hashlib.sha256()
        for caption in captions:
            counts.update(split_words(caption))
            digest.update(caption.encode() + b"\0")
        words = sorted(word for word, count in counts.items() if count >= min_count)
        return cls(words, min_count=min_count, source=digest.hexdigest(), max_tokens=max_tokens)

    def __len__(self) -> int:
        """Vocabulary size, specials included."""
        return len(self._ids)

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Ids of each caption, int64 ``(T_b,)``."""
        unknown = self._ids["<unk>"]
        rows = []
        for caption in captions:
            words = self.RULES[self.rule](caption)[: self.max_tokens - 2]
            rows.append(torch.tensor([1, *(self._ids.get(word, unknown) for word in words), 2]))
        return rows

    def unknown(self, captions: Iterable[str]) -> float:
        """The share of the captions' words that are ``<unk>``, in 0..1; punctuation is not counted."""
        split = self.RULES[self.rule]
        missing = [word not in self._ids for caption in captions for word in split(caption) if word[0].isalnum()]
        return sum(missing) / max(1, len(missing))

    def check(self, captions: Sequence[str]) -> str:
        """Say which share of the training captions' words is ``<unk>``.

        Raises:
            InputError: If so few words are known that most captions look alike to a model.
        """
        unknown = self.unknown(captions)
        said = (
            f"vocabulary: {len(self.words):,} words seen at least {self.min_count} times; "
            f"{unknown:.1%} of the words of {len(captions):,} training captions are <unk>"
        )
        if unknown > MOST_UNKNOWN or not self.words:
            raise InputError(f"{said}; fit one with a lower model.text.min_count, or take an hf: text encoder")
        return said

    def save(self, directory: Path) -> None:
        """Write ``vocabulary.json``."""
        record = {
            "rule": self.rule,
            "min_count": self.min_count,
            "max_tokens": self.max_tokens,
            "source": self.source,
            "words": self.words,
        }
        write_text(directory / VOCABULARY_FILE, json.dumps(record, ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def load(cls, directory: Path) -> WordTokenizer:
        """Read ``vocabulary.json``. Raises :class:`InputError` if its words were split by an unknown rule."""
        path = directory / VOCABULARY_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["rule"] not in cls.RULES:
                raise InputError(f"{path}: words were split by the unknown rule {record['rule']!r}; update vse")
            if type(record["max_tokens"]) is not int or not all(isinstance(word, str) for word in record["words"]):
                raise TypeError("words must be text, and max_tokens a whole number")
            return cls(
                record["words"],
                min_count=record["min_count"],
                source=record["source"],
                max_tokens=record["max_tokens"],
                rule=record["rule"],
            )
        except InputError:
            raise
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a vocabulary ({error}); restore the run's own file") from None


class HubTokenizer:
    """A Hugging Face tokenizer with its special tokens, cut to ``max_tokens`` or what its model can take."""

    def __init__(self, tokenizer: Any, max_tokens: int = 64) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = min(max_tokens, tokenizer.model_max_length)

    @classmethod
    def load(cls, name: str | Path, max_tokens: int = 64) -> HubTokenizer:
        """From a directory or a hub name. Raises :class:`InputError` if there is none."""
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(name)), max_tokens)
        except Exception as error:  # its files may hold anything, and parsers raise whatever they stumble on
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{name}: no tokenizer can be loaded ({reason}); check the name or the network") from None

    def __len__(self) -> int:
        """Vocabulary size, special and added tokens included."""
        return len(self._tokenizer)

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Ids of each caption, int64 ``(T_b,)``."""
        if not captions:
            return []
        rows = self._tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        return [torch.tensor(row) for row in rows]

    def check(self, captions: Sequence[str]) -> str:
        """Say which share of the first 10,000 training captions' tokens is unknown."""
        first = list(captions[:10_000])
        rows = self._tokenizer(first, add_special_tokens=False, truncation=True, max_length=self.max_tokens)
        ids = [token for row in rows["input_ids"] for token in row]
        unknown = ids.count(self._tokenizer.unk_token_id) / max(1, len(ids))
        return f"tokenizer: {unknown:.1%} of the tokens of {len(first):,} training captions are unknown"

    def save(self, directory: Path) -> None:
        """Write the tokenizer's own files."""
        self._tokenizer.save_pretrained(str(directory))


def load_tokenizer(directory: Path, encoder: str, max_tokens: int) -> Tokenizer:
    """The tokenizer that was saved with a model whose text encoder is ``encoder``."""
    return WordTokenizer.load(directory) if encoder == "gru" else HubTokenizer.load(directory, max_tokens)
