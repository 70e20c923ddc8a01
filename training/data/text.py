"""Captions to token ids: a word vocabulary fitted on the training split, or a Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.errors import InputError
from training.files import write_text

VOCABULARY_FILE = "vocabulary.json"
_WORDS = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")


class Tokenizer(Protocol):
    """Turns captions into ids; padding happens per batch."""

    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Ids of each caption, int64 ``(T_b,)`` with ``2 <= T_b <= max_tokens``."""
        ...

    def save(self, directory: Path) -> None:
        """Write what :func:`load_tokenizer` needs to ``directory``."""
        ...


def split_words(caption: str) -> list[str]:
    """Lower-cased words and punctuation marks."""
    return _WORDS.findall(caption.lower())


class WordTokenizer:
    """One id per word, as in VSE++ (Faghri et al. 2018): ``<start> words <end>``, rare words ``<unk>``.

    The vocabulary is stored as JSON together with the rule that split the words, the count threshold and
    a hash of the captions it was fitted on, so that a model can never meet another model's vocabulary
    unnoticed.
    """

    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
    RULE = "words-v1"

    def __init__(self, words: Sequence[str], *, min_count: int, source: str, max_tokens: int = 64) -> None:
        if max_tokens < 3:
            raise InputError(f"text.max_tokens {max_tokens}: must be at least 3, for <start>, a word and <end>")
        self.words = list(words)
        self.min_count = min_count
        self.source = source
        self.max_tokens = max_tokens
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
            words = split_words(caption)[: self.max_tokens - 2]
            rows.append(torch.tensor([1, *(self._ids.get(word, unknown) for word in words), 2]))
        return rows

    def save(self, directory: Path) -> None:
        """Write ``vocabulary.json``."""
        record = {
            "rule": self.RULE,
            "min_count": self.min_count,
            "max_tokens": self.max_tokens,
            "source": self.source,
            "words": self.words,
        }
        write_text(directory / VOCABULARY_FILE, json.dumps(record, ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def load(cls, directory: Path) -> WordTokenizer:
        """Read ``vocabulary.json``. Raises :class:`InputError` if it was written by another rule."""
        path = directory / VOCABULARY_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["rule"] != cls.RULE:
                raise InputError(f"{path}: words were split by {record['rule']!r}, here by {cls.RULE!r}; update vse")
            return cls(
                record["words"],
                min_count=record["min_count"],
                source=record["source"],
                max_tokens=record["max_tokens"],
            )
        except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].strip()
            raise InputError(f"{name}: no tokenizer can be loaded ({reason}); check the name or the network") from None

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Ids of each caption, int64 ``(T_b,)``."""
        if not captions:
            return []
        rows = self._tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        return [torch.tensor(row) for row in rows]

    def save(self, directory: Path) -> None:
        """Write the tokenizer's own files."""
        self._tokenizer.save_pretrained(str(directory))


def load_tokenizer(directory: Path, encoder: str, max_tokens: int) -> Tokenizer:
    """The tokenizer that was saved with a model whose text encoder is ``encoder``."""
    return WordTokenizer.load(directory) if encoder == "gru" else HubTokenizer.load(directory, max_tokens)
