"""An attack on the caption that is searched with: a few typing errors or word edits, found from scores alone.

Characters are edited as in Pruthi et al. (*Combating Adversarial Misspellings with Robust Word Recognition*, 2019),
DeepWordBug (Gao et al. 2018) and TextBugger (Li et al. 2019); words are dropped, swapped or replaced by a given
synonym, so no language model is needed. These rules keep an edited caption readable:

- Character edits change inner letters only, in runs of at least :data:`MIN_LETTERS` letters. The first and the last
  letter, digits, punctuation, emoji and combining marks stay, and case is kept.
- A word is touched by at most one edit of any kind: two errors in one word are what makes it unreadable.
- Only words with nothing but space between them in the caption are swapped, and the last word is never dropped.

A word reaches from the first to the last letter or digit between two spaces, as ``t-shirt``. A script without spaces
(Chinese, Thai) has one word per clause, hence at most one edit in each, and no promise that it can still be read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from training.errors import InputError

Kind = Literal["swap", "drop", "insert", "replace", "drop-word", "swap-words", "synonym"]
CHARACTER_KINDS: tuple[Kind, ...] = get_args(Kind)[:4]
WORD_KINDS: tuple[Kind, ...] = get_args(Kind)[4:]
Synonyms = Mapping[str, Sequence[str]]
Margins = Callable[[Sequence[str], NDArray[np.int64]], NDArray[np.floating[Any]]]

MIN_LETTERS = 4  # shorter words have too few letters left to be recognised
# Texts per call of the margins: enough for full batches of an encoder, few enough for the progress bar to move.
BATCH_TEXTS = 1024

# Combining marks and the vowel signs of Indic scripts are no letters, but end a word with its last letter.
_WORD = re.compile("([^\\W_](?:\\S*[^\\W_])?[\u0300-\u036f\u0900-\u0eff]*)")
# Each row of a QWERTY keyboard is half a key to the right of the row above.
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_KEYS = {key: (row, column + row / 2) for row, keys in enumerate(_ROWS) for column, key in enumerate(keys)}
_NEIGHBOURS = {
    key: [other for other, (y, x) in _KEYS.items() if other != key and abs(y - row) <= 1 and abs(x - column) <= 1]
    for key, (row, column) in _KEYS.items()
}
# Separator, word, separator, …, separator, each with whether an edit may still touch it.
_Pieces = tuple[tuple[str, bool], ...]
_Edit = tuple[str, tuple[int, Kind], _Pieces]  # the edited caption, the word and the kind of the edit, its pieces


@dataclass(frozen=True)
class TextBudget:
    """At most so many edits of characters and of words; :class:`InputError` if negative, or both are zero."""

    characters: int = 2
    words: int = 0

    def __post_init__(self) -> None:
        if min(self.characters, self.words) < 0 or not self.characters + self.words:
            raise InputError(f"{self}: must allow at least one edit, and not a negative number")


@dataclass(frozen=True)
class TextAttack:
    """What :func:`attack_captions` found for N captions; arrays ``(N,)``, int64 or float64.

    The edited and the clean margins are equal where no edit raised it. ``edits`` were made, ``distances`` are what
    :func:`check_budget` measured, ``editable`` is False where the rules allow no edit, so that nothing was tried, and
    ``queries`` texts were scored in all.
    """

    captions: list[str]
    margins: NDArray[np.float64]
    clean_margins: NDArray[np.float64]
    edits: NDArray[np.int64]
    distances: NDArray[np.int64]
    editable: NDArray[np.bool_]
    queries: int


def _rewrite(word: str, kind: Kind, synonyms: Synonyms) -> Iterator[str]:
    if kind == "synonym":
        for other in synonyms.get(word.lower(), ()):
            if not _WORD.fullmatch(other):
                raise InputError(f"synonym {other!r} of {word.lower()!r}: must be a single word")
            yield other[0].upper() + other[1:] if word[0].isupper() else other
        return
    runs = [list(run) for letters, run in groupby(range(len(word)), lambda at: word[at].isalpha()) if letters]
    inner = [at for run in runs if len(run) >= MIN_LETTERS for at in run[1:-1]]
    for at in inner:
        letter, before, after = word[at], word[:at], word[at + 1 :]
        keys = [key.upper() if letter.isupper() else key for key in _NEIGHBOURS.get(letter.lower(), ())]
        if kind == "drop":
            yield before + after
        elif kind == "insert":  # the key was hit twice, or another along with it
            yield from (before + letter + key + after for key in (letter, *keys))
        elif kind == "replace":
            yield from (before + key + after for key in keys)
        # The next inner letter is of the same run. One of other case is left: the case of both would move.
        elif at + 1 in inner and letter != after[0] and letter.isupper() == after[0].isupper():
            yield before + after[0] + letter + after[1:]


def _edits(pieces: _Pieces, kinds: Sequence[Kind], synonyms: Synonyms) -> Iterator[tuple[tuple[int, Kind], _Pieces]]:
    for at in range(1, len(pieces), 2):
        (before, _), (word, fresh), (after, joined), *rest = pieces[at - 1 :]
        for kind in kinds if fresh else ():
            if kind == "drop-word":
                if len(pieces) > 3:  # another word is left
                    space = before.rstrip() + after if before[-1:].isspace() else before + after.lstrip()
                    # The joined separator is spent, so that only neighbours of the caption are swapped.
                    yield (at, kind), (*pieces[: at - 1], (space, False), *pieces[at + 2 :])
            elif kind == "swap-words":
                if rest and rest[0][1] and rest[0][0] != word and joined and after.isspace():
                    swapped = (rest[0][0], False), (after, False), (word, False)
                    yield (at, kind), (*pieces[:at], *swapped, *rest[1:])
            else:
                for text in _rewrite(word, kind, synonyms):
                    yield (at, kind), (*pieces[:at], (text, False), *pieces[at + 1 :])


def _distinct(pieces: _Pieces, kinds: Sequence[Kind], synonyms: Synonyms | None) -> list[_Edit]:
    edits = (("".join(text for text, _ in edited), at, edited) for at, edited in _edits(pieces, kinds, synonyms or {}))
    found = {edit[0]: edit for edit in edits}
    found.pop("".join(text for text, _ in pieces), None)  # a synonym may be the word itself
    return list(found.values())


def candidates(caption: str, kinds: Sequence[Kind] = CHARACTER_KINDS, synonyms: Synonyms | None = None) -> list[str]:
    """Every text one edit away from a caption, by word and then by kind; see the module for the rules.

    ``insert`` repeats a letter or adds a neighbouring key of a QWERTY keyboard after it, ``replace`` puts a
    neighbouring key in its place. Synonyms are from lower-case words to single words, else :class:`InputError`.
    The texts are distinct, none is blank or the caption itself, and there are none if nothing can be edited.
    """
    return [text for text, *_ in _distinct(tuple((piece, True) for piece in _WORD.split(caption)), kinds, synonyms)]


def _sample(edits: list[_Edit], limit: int, random: Random) -> list[_Edit]:
    """At most ``limit``: words and kinds take turns, or long words and insertions would fill the sample."""
    order, taken, turns = random.sample(edits, len(edits)), Counter[tuple[int, Kind]](), {}
    for text, stratum, _ in order:
        turns[text] = taken[stratum]
        taken[stratum] += 1
    return sorted(order, key=lambda edit: turns[edit[0]])[:limit]


def _score(margins: Margins, texts: list[str], rows: list[int], label: str) -> NDArray[np.float64]:
    values = np.empty(len(texts))
    for first in tqdm(range(0, len(texts), BATCH_TEXTS), desc=label, unit="batch", delay=2, leave=False, disable=None):
        part = slice(first, first + BATCH_TEXTS)
        scored = np.asarray(margins(texts[part], np.array(rows[part], dtype=np.int64)))
        if scored.shape != values[part].shape or np.isnan(scored).any():
            raise ValueError(f"margins of shape {scored.shape} for {len(values[part])} texts, or one is NaN")
        values[part] = scored
    return values


def attack_captions(
    captions: Sequence[str],
    margins: Margins,
    budget: TextBudget,
    synonyms: Synonyms | None = None,
    limit: int = 64,
    seed: int = 0,
) -> TextAttack:
    """Edit each caption greedily so that its margin rises, from scores alone.

    The best candidate for each edit is kept if it raises the margin; else the caption is finished. A larger budget
    of one sort, with none of the other, begins with the same edits, so its margin is never lower. Words are not
    ranked by importance first as in TextBugger: that costs a query per word, and a caption has few words.

    Args:
        margins: From B texts and the rows ``(B,)`` of the captions that they are edits of, int64, to margins
            ``(B,)``; higher is worse for the search. Must not depend on the other texts of a call.
        synonyms: See :func:`candidates`; without them words are dropped and swapped only.
        limit: Most candidates scored per caption and edit; a sample of all words and kinds if there are more.
        seed: Of the sample, which depends on the seed and the caption alone.

    Raises :class:`InputError` if ``limit`` is not positive, ValueError if ``margins`` returns another shape or NaN.
    """
    if limit < 1:
        raise InputError(f"limit {limit}: at least one candidate must be scored")
    pieces: list[_Pieces] = [tuple((piece, True) for piece in _WORD.split(caption)) for caption in captions]
    active = list(range(len(captions)))
    clean = _score(margins, list(captions), active, "clean captions")
    best, queries = clean.copy(), len(captions)
    left = np.full((len(captions), 2), (budget.characters, budget.words), dtype=np.int64)
    for turn in range(1, budget.characters + budget.words + 1):
        edits: list[tuple[int, _Edit]] = []
        for row in active:
            kinds = CHARACTER_KINDS * bool(left[row, 0]) + WORD_KINDS * bool(left[row, 1])
            random = Random(f"{seed} {turn} {captions[row]}")
            edits += ((row, edit) for edit in _sample(_distinct(pieces[row], kinds, synonyms), limit, random))
        if turn == 1:
            editable = np.isin(np.arange(len(captions)), [row for row, _ in edits])
        values = _score(margins, [text for _, (text, *_) in edits], [row for row, _ in edits], f"edit {turn}")
        queries += len(edits)
        chosen: dict[int, Kind] = {}
        for (row, (_, (_, kind), edited)), value in zip(edits, values, strict=True):
            if value > best[row]:
                best[row], pieces[row], chosen[row] = value, edited, kind
        for row, kind in chosen.items():
            left[row, int(kind in WORD_KINDS)] -= 1
        active = list(chosen)
    texts = ["".join(text for text, _ in row) for row in pieces]
    made = budget.characters + budget.words - left.sum(axis=1)
    return TextAttack(texts, best, clean, made, check_budget(captions, texts, budget), editable, queries)


def osa_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Fewest swaps of neighbours, drops, insertions and replacements, nothing edited twice (optimal alignment)."""
    before, above = [0] * (len(second) + 1), list(range(len(second) + 1))
    for i, item in enumerate(first):
        row = [i + 1]
        for j, other in enumerate(second):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (item != other)))
            if i and j and item == second[j - 1] and other == first[i - 1]:
                row[-1] = min(row[-1], before[j - 1] + 1)
        before, above = above, row
    return above[-1]


def check_budget(clean: Sequence[str], edited: Sequence[str], budget: TextBudget) -> NDArray[np.int64]:
    """Measure, from the strings alone, that N edited captions keep a budget; RuntimeError if one does not.

    Returns the :func:`osa_distance` of each pair, int64 ``(N,)``: between the texts if the budget is of characters
    alone, else between their words, of which each edit of either sort costs one.
    """
    split: Callable[[str], list[str]] = _WORD.findall if budget.words else list
    distances = [osa_distance(split(old), split(new)) for old, new in zip(clean, edited, strict=True)]
    for old, new, distance in zip(clean, edited, distances, strict=True):
        if distance > budget.characters + budget.words:
            raise RuntimeError(f"{old!r} became {new!r}: {distance} edits exceed {budget}")
    return np.array(distances, dtype=np.int64)


def load_synonyms(path: Path) -> dict[str, list[str]]:
    """Read a UTF-8 text file of lines ``word: a, b, c``, or with tabs for the colon and the commas.

    Empty lines and lines that begin with ``#`` are skipped; words are lower-cased, and their lines joined. Raises
    :class:`InputError` if the file cannot be read or holds nothing, or a line is not of that form.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of synonyms ({error})") from None
    synonyms: dict[str, list[str]] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            word, *rest = re.split(r"\s*[:\t]\s*", line, maxsplit=1)
            others = [other.strip() for text in rest for other in re.split(r"[,\t]", text)]
            if not others or not all(map(_WORD.fullmatch, [word, *others])):
                raise InputError(f"{path}:{number}: {line!r} is not of the form 'word: a, b, c' with single words")
            synonyms.setdefault(word.lower(), []).extend(others)
    if not synonyms:
        raise InputError(f"{path}: no synonyms; write lines 'word: a, b, c'")
    return synonyms
