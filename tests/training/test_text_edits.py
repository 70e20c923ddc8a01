from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from training.errors import InputError
from training.robustness import text_edits
from training.robustness.text_edits import (
    CHARACTER_KINDS,
    WORD_KINDS,
    Kind,
    TextBudget,
    attack_captions,
    candidates,
    check_budget,
    load_synonyms,
    osa_distance,
)

SYNONYMS = {"dog": ["hound", "puppy"], "red": ["crimson"]}
CAPTIONS = [
    "A brown dog jumps over the wooden fence.",
    "two children playing football on green grass",
    "a cat",
    "",
    "🐶 🐱",
    "Une fille élégante près de la fenêtre",
    "一只棕色的狗跳过栅栏",
    "a red dog, a red ball and a people's t-shirt",
]
# Letters of several scripts and cases, a combining mark, a joined emoji, digits that are no decimals, punctuation.
texts = st.lists(
    st.sampled_from([*"aabcdeEMsßéİ\u0301ñжЖ狗猫की½²1_'-.,(\" \t\n", "👩‍🦰", "dog", "Red", " "]), max_size=20
)
texts = texts.map("".join)
texts |= st.lists(st.sampled_from(["dog", "Red", "house", "people's", "garden,", "(two)", "x"]), max_size=5).map(
    " ".join
)


def noise(captions: Sequence[str], rows: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """A margin without any structure that depends on the text alone."""
    return np.array([zlib.crc32(caption.encode()) / 2**32 for caption in captions])


def runs(text: str) -> list[str]:
    return ["".join(run) for letters, run in groupby(text, str.isalpha) if letters]


@pytest.mark.parametrize(
    ("kind", "caption", "expected"),
    [
        ("swap", "the word", ["the wrod"]),
        ("swap", "a cat McDonald", ["a cat McDnoald", "a cat McDoanld", "a cat McDonlad"]),
        ("drop", "cat word", ["cat wrd", "cat wod"]),
        ("drop", "MAIN-road", ["MIN-road", "MAN-road", "MAIN-rad", "MAIN-rod"]),
        ("insert", "élan", [f"él{key}an" for key in "lkop"] + [f"éla{key}n" for key in "aqwsz"]),
        ("insert", "猫狗人山", ["猫狗狗人山", "猫狗人人山"]),
        ("replace", "WORD", [f"W{key}RD" for key in "IPKL"] + [f"WO{key}D" for key in "ETDF"]),
        ("replace", "猫狗人山", []),
        ("swap", "猫狗人山", ["猫人狗山"]),
        ("drop", "cafe\u0301 🐶🐶🐶🐶 12345", ["cfe\u0301 🐶🐶🐶🐶 12345", "cae\u0301 🐶🐶🐶🐶 12345"]),
        ("drop-word", "a dog, a red.", ["dog, a red.", "a, a red.", "a dog, red.", "a dog, a."]),
        ("drop-word", "a (red) cat", ["(red) cat", "a () cat", "a (red)"]),
        ("drop-word", "the dog the", ["dog the", "the the", "the dog"]),
        ("drop-word", "dog 🐶.", []),
        ("drop-word", "一只狗", []),
        ("swap-words", "a red dog, a cat", ["red a dog, a cat", "a dog red, a cat", "a red dog, cat a"]),
        ("swap-words", "a red-ish cat", ["red-ish a cat", "a cat red-ish"]),
        ("swap-words", "a a", []),
        ("synonym", "Red 'dog'.", ["Crimson 'dog'.", "Red 'hound'.", "Red 'puppy'."]),
        ("synonym", "cat", []),
    ],
)
def test_candidates_are_those_written_by_hand(kind: Kind, caption: str, expected: list[str]) -> None:
    found = candidates(caption, [kind], SYNONYMS)
    assert sorted(found) == sorted(expected)


def test_word_candidates_come_by_word_and_kind() -> None:
    assert candidates("a red cat", WORD_KINDS, {"red": ["Red", "red", "rosy"]}) == [
        *("red cat", "red a cat", "a cat", "a cat red", "a Red cat", "a rosy cat", "a red")
    ]


def test_captions_without_an_edit() -> None:
    for caption in ("", " ", "cat", "🐶🐶🐶🐶🐶", "1234567", "a_b_c", "?!"):
        assert candidates(caption, [*CHARACTER_KINDS, *WORD_KINDS], {}) == []
        assert candidates(caption, WORD_KINDS) == []


@settings(max_examples=40, deadline=None)
@given(texts)
def test_character_candidates(caption: str) -> None:
    found = candidates(caption)
    assert found == candidates(caption)
    assert len({caption, *found}) == len(found) + 1
    for text in found:
        assert osa_distance(caption, text) == 1
        pairs = list(zip(runs(caption), runs(text), strict=True))
        changed = [(old, new) for old, new in pairs if old != new]
        assert len(changed) == 1
        old, new = changed[0]
        assert len(old) >= 4
        assert (old[0], old[-1]) == (new[0], new[-1])
        assert [c for c in text if not c.isalpha()] == [c for c in caption if not c.isalpha()]
        if len(old) == len(new):
            assert list(map(str.isupper, old)) == list(map(str.isupper, new))


@settings(deadline=None)
@given(texts)
def test_word_candidates(caption: str) -> None:
    found = candidates(caption, WORD_KINDS, SYNONYMS)
    assert len({caption, *found}) == len(found) + 1
    assert all(any(map(str.isalnum, text)) for text in found)
    assert (check_budget([caption] * len(found), found, TextBudget(0, 1)) == 1).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(texts, max_size=4), st.integers(0, 3), st.integers(0, 3), st.integers(1, 40), st.integers(0, 9))
def test_any_attack_keeps_its_budget(captions: list[str], characters: int, words: int, limit: int, seed: int) -> None:
    budget = TextBudget(characters, words or not characters)
    found = attack_captions(captions, noise, budget, SYNONYMS, limit=limit, seed=seed)
    assert (found.margins >= found.clean_margins).all()
    assert (found.margins == noise(found.captions)).all()
    assert (found.clean_margins == noise(captions)).all()
    assert (found.edits <= budget.characters + budget.words).all()
    assert (found.distances <= found.edits).all()
    assert ((found.edits > 0) == [new != old for new, old in zip(found.captions, captions, strict=True)]).all()
    assert ((found.edits > 0) == (found.margins > found.clean_margins)).all()
    assert (check_budget(captions, found.captions, budget) == found.distances).all()


@pytest.mark.parametrize(("budget", "kinds"), [(TextBudget(1), CHARACTER_KINDS), (TextBudget(0, 1), WORD_KINDS)])
def test_one_edit_is_the_best_there_is(budget: TextBudget, kinds: Sequence[Kind]) -> None:
    found = attack_captions(CAPTIONS, noise, budget, SYNONYMS, limit=10**6)
    every = [[caption, *candidates(caption, kinds, SYNONYMS)] for caption in CAPTIONS]
    assert found.margins.tolist() == [noise(options).max() for options in every]
    assert found.captions == [options[int(noise(options).argmax())] for options in every]
    assert found.queries == sum(map(len, every))


def test_a_larger_budget_is_never_worse() -> None:
    for sizes in ([TextBudget(n) for n in (1, 2, 3, 4)], [TextBudget(0, n) for n in (1, 2, 3, 4)]):
        found = [attack_captions(CAPTIONS, noise, budget, SYNONYMS, limit=30) for budget in sizes]
        for smaller, larger in itertools.pairwise(found):
            assert (larger.margins >= smaller.margins).all()
        assert found[-1].margins.sum() > found[0].margins.sum()


def test_a_word_is_edited_once() -> None:
    def errors(captions: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([osa_distance(text, "a wooden bridge") for text in captions], dtype=float)

    found = attack_captions(["a wooden bridge"], errors, TextBudget(5), limit=1000)
    assert found.edits.tolist() == found.distances.tolist() == [2]
    first, *words = found.captions[0].split(" ")
    assert first == "a"
    assert [osa_distance(*pair) for pair in zip(words, ("wooden", "bridge"), strict=True)] == [1, 1]

    def swapped(captions: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([(t != "bridge wooden") + 1.0 if t[0] == "b" and " " in t else 0.0 for t in captions])

    assert attack_captions(["wooden bridge"], swapped, TextBudget(1, 1), limit=1000).captions == ["bridge wooden"]


def test_words_that_were_no_neighbours_are_not_swapped() -> None:
    """Without this rule the swap after the drop would be three edits of the caption."""

    def margins(captions: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([["a b c d", "a c d", "c a d"].index(t) if t in ("a c d", "c a d") else 0 for t in captions])

    assert attack_captions(["a b c d"], margins, TextBudget(0, 2)).captions == ["a c d"]


def test_mixed_budget_uses_both_sorts() -> None:
    def length(captions: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.array([-len(text) for text in captions], dtype=np.float32)

    found = attack_captions(["the wooden bridge is long"], length, TextBudget(2, 1), limit=10**6)
    assert found.edits.tolist() == [3]
    assert len(found.captions[0].split()) == 4
    assert found.margins.tolist() == [-len(found.captions[0])] == [7 + 2 - 25]


def test_attack_is_deterministic_and_independent_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = TextBudget(2, 1)
    found = attack_captions(CAPTIONS, noise, budget, SYNONYMS, limit=10, seed=3)
    again = attack_captions(CAPTIONS[::-1], noise, budget, SYNONYMS, limit=10, seed=3)
    assert found.captions == again.captions[::-1]
    alone = [attack_captions([caption], noise, budget, SYNONYMS, limit=10, seed=3) for caption in CAPTIONS]
    assert found.captions == [result.captions[0] for result in alone]
    assert found.queries == sum(result.queries for result in alone) <= len(CAPTIONS) * (1 + 3 * 10)
    assert found.captions != attack_captions(CAPTIONS, noise, budget, SYNONYMS, limit=10, seed=4).captions

    sizes = []

    def watched(captions: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        assert rows.dtype == np.int64
        assert all(osa_distance(text, CAPTIONS[row]) <= 2 for text, row in zip(captions, rows, strict=True))
        sizes.append(len(captions))
        return noise(captions)

    whole = attack_captions(CAPTIONS, watched, TextBudget(2), limit=10)
    assert sizes == [8, 50, sizes[2]]
    monkeypatch.setattr(text_edits, "BATCH_TEXTS", 7)
    assert attack_captions(CAPTIONS, watched, TextBudget(2), limit=10).captions == whole.captions
    assert max(sizes[3:]) == 7


def test_sample_gives_every_word_and_kind_a_share() -> None:
    caption = "word extraordinarily long incomprehensibilities here"
    scored: list[str] = []

    def watched(captions: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        scored.extend(captions)
        return np.zeros(len(captions))

    found = attack_captions([caption], watched, TextBudget(2), limit=40)  # finished after the first
    assert (found.captions, found.queries, len(scored)) == ([caption], 41, 41)
    changed = [[a != b for a, b in zip(caption.split(), text.split(), strict=True)].index(True) for text in scored[1:]]
    assert min(changed.count(word) for word in range(5)) >= 6
    lengths = [len(text) - len(caption) for text in scored[1:]]
    assert min(lengths.count(-1), lengths.count(0), lengths.count(1)) >= 8


@pytest.mark.parametrize(
    ("caption", "budget", "editable"),
    [
        ("a red box", TextBudget(2), False),
        ("the sea", TextBudget(2), False),
        ("一只狗", TextBudget(2), False),
        ("12345 !!", TextBudget(2), False),
        ("a dark box", TextBudget(2), True),
        ("the sea", TextBudget(0, 1), True),
        ("sea", TextBudget(0, 1), False),
    ],
)
def test_captions_that_the_rules_leave_alone_are_named(caption: str, budget: TextBudget, editable: bool) -> None:
    found = attack_captions([caption, "a wooden bridge"], lambda t, r: np.zeros(len(t)), budget)
    assert found.editable.tolist() == [editable, True]
    assert found.edits.tolist() == [0, 0]  # nothing raised a margin, which is another thing


def test_no_captions() -> None:
    found = attack_captions([], noise, TextBudget())
    assert (found.captions, found.queries, found.margins.shape, found.distances.shape) == ([], 0, (0,), (0,))


@pytest.mark.parametrize("margins", [lambda t, r: np.zeros(1), lambda t, r: np.full(len(t), np.nan)])
def test_margins_that_are_none(margins: text_edits.Margins) -> None:
    with pytest.raises(ValueError, match="margins of shape"):
        attack_captions(CAPTIONS, margins, TextBudget())


@settings(deadline=None)
@given(*[st.text("abé", max_size=6)] * 2)
def test_distance_is_the_recursive_one(first: str, second: str) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if not (i and j):
            return i + j
        costs = [distance(i - 1, j) + 1, distance(i, j - 1) + 1]
        costs.append(distance(i - 1, j - 1) + (first[i - 1] != second[j - 1]))
        if i > 1 and j > 1 and first[i - 2 : i] == second[j - 2 : j][::-1]:
            costs.append(distance(i - 2, j - 2) + 1)
        return min(costs)

    assert osa_distance(first, second) == distance(len(first), len(second)) == osa_distance(second, first)


def test_budget_is_checked() -> None:
    assert check_budget(["abcd", "same"], ["acbd", "same"], TextBudget(1)).tolist() == [1, 0]
    with pytest.raises(RuntimeError, match="'abcd' became 'xbcx': 2 edits exceed"):
        check_budget(["same", "abcd"], ["same", "xbcx"], TextBudget(1))
    with pytest.raises(RuntimeError, match="2 edits exceed"):
        check_budget(["a red dog"], ["dog"], TextBudget(0, 1))
    for characters, words in ((-1, 2), (2, -1), (0, 0)):
        with pytest.raises(InputError, match="at least one edit"):
            TextBudget(characters, words)
    with pytest.raises(InputError, match="limit 0"):
        attack_captions(CAPTIONS, noise, TextBudget(), limit=0)
    with pytest.raises(InputError, match="'hot dog' of 'dog'"):
        candidates("a dog", ["synonym"], {"dog": ["hot dog"]})


def test_synonyms_file(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("\ufeff# animals\nDog: hound ,puppy\n\ncat\tkitten\ttom-cat\r\nfille : élève\ndog: cur\n", "utf-8")
    expected = {"dog": ["hound", "puppy", "cur"], "cat": ["kitten", "tom-cat"], "fille": ["élève"]}
    assert load_synonyms(path) == expected


@pytest.mark.parametrize("line", ["dog", "dog:", ": hound", "dog: hound,, puppy", "dog: hot dog", "a dog: hound"])
def test_synonyms_errors(tmp_path: Path, line: str) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text(f"cat: kitten\n\n{line}\n")
    with pytest.raises(InputError, match=r"synonyms\.txt:3: .*single words"):
        load_synonyms(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load_synonyms(path)
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="no synonyms"):
        load_synonyms(path)
    with pytest.raises(InputError, match=r"absent\.txt"):
        load_synonyms(tmp_path / "absent.txt")
