from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config import Config
from training.data.corpus import Corpus
from training.data.padded import pad
from training.data.text import (
    VOCABULARY_FILE,
    HubTokenizer,
    WordTokenizer,
    load_tokenizer,
    split_words,
)
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.trainer import Trainer

CAPTIONS = ["A dog runs.", "a DOG sleeps", "the dog's ball!", "a cat"]


def decoded(tokenizer: WordTokenizer, caption: str) -> list[str]:
    words = [*tokenizer.SPECIALS, *tokenizer.words]
    return [words[i] for i in tokenizer([caption])[0]]


def test_words_are_lower_cased_and_punctuation_stands_alone() -> None:
    assert split_words("The dog's ball, red!") == ["the", "dog's", "ball", ",", "red", "!"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Café Zürich", ["café", "zürich"]),
        ("İstanbul", ["i\u0307stanbul"]),
        ("दौड़ता हुआ कुत्ता", ["दौड\u093cता", "हुआ", "कुत्ता"]),
        ("ஒரு நாய் ஓடுகிறது", ["ஒரு", "நாய்", "ஓடுகிறது"]),
        ("كَلْبٌ يَجْرِي", ["كَلْبٌ", "يَجْرِي"]),
        ("שָׁלוֹם", [unicodedata.normalize("NFC", "שָׁלוֹם")]),
        ("한국어 강아지", ["한국어", "강아지"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("เด็กวิ่ง", ["เ", "ด็", "ก", "วิ่", "ง"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("一只狗，在跑。", ["一", "只", "狗", ",", "在", "跑", "。"]),
        ("犬のボール", ["犬", "の", "ボ", "ー", "ル"]),
        ("ABC犬2匹", ["abc", "犬", "2", "匹"]),
        ("ＡＢＣ ﬁsh", ["abc", "fish"]),
        ("the dog’s ball", ["the", "dog's", "ball"]),
        ("a ❤\ufe0f!", ["a", "❤\ufe0f", "!"]),
        ("\u0301 b", ["\u0301", "b"]),
    ],
)
def test_words_of_every_script_keep_their_marks_however_they_are_encoded(caption: str, words: list[str]) -> None:
    for form in ("NFC", "NFD"):
        assert split_words(unicodedata.normalize(form, caption)) == words


@given(st.text(st.characters(codec="ascii")) | st.text())
def test_splitting_loses_nothing_but_space(caption: str) -> None:
    kept = unicodedata.normalize("NFKC", caption).replace("’", "'").lower()
    assert "".join(split_words(caption)) == "".join(kept.split())
    if caption.isascii():
        assert split_words(caption) == re.findall(r"\w+(?:'\w+)?|[^\w\s]", caption.lower())


OLD_VOCABULARY = """{
"rule": "words-v1",
"min_count": 1,
"max_tokens": 16,
"source": "0c9b",
"words": ["a", "cafe", "dog’s", "café", "犬", "一只狗", "´"]
}
"""


def test_an_older_runs_vocabulary_keeps_its_rule(tmp_path: Path) -> None:
    (tmp_path / VOCABULARY_FILE).write_text(OLD_VOCABULARY, encoding="utf-8")
    tokenizer = WordTokenizer.load(tmp_path)
    for caption, words in {
        "A dog’s café": ["a", "dog’s", "café"],
        "cafe\u0301": ["cafe", "<unk>"],
        "一只狗": ["一只狗"],
        "दौड़ता": ["<unk>"] * 6,
    }.items():
        assert decoded(tokenizer, caption) == ["<start>", *words, "<end>"]
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / VOCABULARY_FILE).read_text()) == json.loads(OLD_VOCABULARY)


def test_the_share_of_unknown_words_counts_no_punctuation() -> None:
    tokenizer = WordTokenizer.fit(["a dog .", "a cat ."], min_count=2)
    assert tokenizer.unknown(["a dog !", "a , . cat"]) == 0.5
    assert tokenizer.unknown(["!"]) == 0


@pytest.mark.parametrize(
    "captions",
    [
        [f"w{n} x{n} y{n} ." for n in range(24)],
        ["the " + " ".join(f"w{n}x{k}" for k in range(12)) for n in range(24)],
        ["🐶", "🐱"],
    ],
    ids=["only punctuation is known", "hardly a word is known", "nothing is known"],
)
def test_a_vocabulary_that_knows_next_to_nothing_is_refused(captions: list[str]) -> None:
    with pytest.raises(
        InputError, match=r"^vocabulary: .+ <unk>; fit one with a lower model\.text\.min_count, or .+$"
    ):
        WordTokenizer.fit(captions, min_count=4).check(captions)


def test_rare_words_are_unknown() -> None:
    tokenizer = WordTokenizer.fit(CAPTIONS, min_count=2)
    assert tokenizer.words == ["a", "dog"]
    assert len(tokenizer) == 6
    assert decoded(tokenizer, "A dog sleeps") == ["<start>", "a", "dog", "<unk>", "<end>"]


def test_the_order_of_captions_does_not_change_the_ids() -> None:
    assert WordTokenizer.fit(CAPTIONS, 1).words == WordTokenizer.fit(CAPTIONS[::-1], 1).words


def test_a_special_token_written_in_a_caption_is_no_special_token() -> None:
    ids = WordTokenizer.fit(["<end> dog"], 1)(["<end> dog"])[0].tolist()
    assert ids.count(2) == 1


def test_the_trainer_fits_the_vocabulary_on_the_training_split_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def corpus(spec: str, split: str) -> Corpus:
        return Corpus(
            name=spec,
            split=split,
            image_ids=["0", "1"],
            captions=["a dog", "a dog"] if split == "train" else ["zeppelin " * 50, "a zeppelin"],
            caption_ids=["0", "1"],
            owner=np.array([0, 1]),
            features=np.zeros((2, 3), np.float32),
        )

    monkeypatch.setattr("training.trainer.load_corpus", corpus)
    model = ModelConfig(
        image=ImageTowerConfig(encoder="precomputed"), text=TextTowerConfig(min_count=1, word_dim=4), dim=4
    )
    with caplog.at_level("INFO"):
        tokenizer = Trainer(Config(data="any", out=str(tmp_path), model=model)).model.tokenizer
    assert (
        "vocabulary: 2 words seen at least 1 times; 0.0% of the words of 2 training captions are <unk>" in caplog.text
    )
    assert isinstance(tokenizer, WordTokenizer)
    assert tokenizer.words == ["a", "dog"]
    assert decoded(tokenizer, "a zeppelin") == ["<start>", "a", "<unk>", "<end>"]


def test_a_vocabulary_survives_saving(tmp_path: Path) -> None:
    tokenizer = WordTokenizer.fit([*CAPTIONS, "naïve 狗"], min_count=1, max_tokens=7)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path, "gru", max_tokens=64)
    assert isinstance(loaded, WordTokenizer)
    assert vars(loaded) == vars(tokenizer)


def test_the_source_tells_captions_apart() -> None:
    assert WordTokenizer.fit(["a b"], 1).source != WordTokenizer.fit(["a", "b"], 1).source


@pytest.mark.parametrize(
    "damage",
    [{"rule": "words-v0"}, {"words": None}, {"max_tokens": 1}],
    ids=["other rule", "no words", "no room for a word"],
)
def test_an_unusable_vocabulary_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    WordTokenizer.fit(CAPTIONS).save(tmp_path)
    path = tmp_path / VOCABULARY_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        WordTokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff\xfe", b'{"rule": "words-v1"}', b"[" * 20_000])
def test_a_damaged_vocabulary_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / VOCABULARY_FILE).write_bytes(content)
    with pytest.raises(InputError, match=VOCABULARY_FILE):
        WordTokenizer.load(tmp_path)


def test_long_captions_are_cut() -> None:
    tokenizer = WordTokenizer.fit(["dog"], 1, max_tokens=16)
    ids = tokenizer(["dog " * 10_000])[0]
    assert ids.tolist() == [1, *[4] * 14, 2]
    assert ids.dtype == torch.int64


def test_a_hub_tokenizer_cuts_saves_and_loads(tmp_path: Path, shared_models: Path) -> None:
    name = shared_models / "all-MiniLM-L6-v2"
    tokenizer = HubTokenizer.load(name, max_tokens=16)
    rows = tokenizer(["dog " * 10_000, "a dog"])
    assert [len(row) for row in rows] == [16, 4]
    assert rows[0][-1] == rows[1][-1]
    assert tokenizer([]) == []
    assert tokenizer.check(["a 🦖", "a dog"]) == "tokenizer: 25.0% of the tokens of 2 training captions are unknown"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path, "hf:x", max_tokens=16)
    assert all(map(torch.equal, rows, again(["dog " * 10_000, "a dog"])))
    assert HubTokenizer.load(name, max_tokens=10_000).max_tokens == 512, "positions that the encoder has"


@pytest.mark.parametrize("damaged", [False, True])
def test_a_missing_or_damaged_hub_tokenizer_is_refused(tmp_path: Path, shared_models: Path, damaged: bool) -> None:
    if damaged:
        HubTokenizer.load(shared_models / "all-MiniLM-L6-v2").save(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=rf"^{tmp_path}: [^\n]+$"):
        HubTokenizer.load(tmp_path)


def test_rows_are_padded_at_the_end() -> None:
    values, mask = pad([torch.tensor([5, 6]), torch.tensor([7])])
    assert mask is not None
    assert values.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[True, True], [True, False]]
    assert pad([torch.ones(2, 3), torch.zeros(2, 3)]).mask is None
