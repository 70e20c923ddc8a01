from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from training.data.corpus import Corpus
from training.data.formats import load_corpus, precomputed
from training.errors import InputError

COUNTS = range(1, 10)


def refusal(root: Path, split: str) -> str:
    with pytest.raises(InputError) as caught:
        load_corpus(str(root), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_precomputed(root: Path, split: str, features: NDArray[Any], captions: int, repeat: int = 1) -> None:
    root.mkdir(exist_ok=True)
    np.save(root / f"{split}_ims.npy", np.repeat(features, repeat, axis=0))
    (root / f"{split}_caps.txt").write_text("".join(f"caption {c}\n" for c in range(captions)))


@pytest.mark.parametrize("shape", [(7, 4), (7, 3, 4)])
@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
def test_both_precomputed_layouts_hold_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], block_bytes: int
) -> None:
    monkeypatch.setattr(precomputed, "_BLOCK_BYTES", block_bytes)
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    write_precomputed(tmp_path, "test", features, 35)
    write_precomputed(tmp_path, "testall", features, 35, repeat=5)
    for split in ("test", "testall"):
        corpus = load_corpus(str(tmp_path), split)
        assert corpus.features is not None
        assert isinstance(corpus.features, np.memmap)
        assert np.array_equal(corpus.features, features)
        assert corpus.owner.tolist() == [c // 5 for c in range(35)]
        assert corpus.captions == [f"caption {c}" for c in range(35)]


@pytest.mark.parametrize("repeat", [1, 5])
def test_dev_is_cut_to_its_first_captions_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repeat: int
) -> None:
    features = np.arange(1002, dtype=np.float32)[:, None]
    write_precomputed(tmp_path, "dev", features, 5010, repeat)
    corpus = load_corpus(f"precomputed:{tmp_path}", "val")
    assert corpus.split == "dev"
    assert corpus.features is not None
    assert np.array_equal(corpus.features, features[:1000])
    assert len(corpus) == 5000
    assert "dev cut to its first 5000 of 5010 captions (1000 images)" in capsys.readouterr().err
    assert len(precomputed.read(tmp_path, "dev", dev_limit=6000)) == 5010
    assert capsys.readouterr().err == ""


def test_written_features_are_read_back_with_any_number_of_captions(tmp_path: Path) -> None:
    owner = np.repeat(np.arange(9), list(COUNTS))[::-1].astype(np.int64)
    features = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float16)
    corpus = Corpus(
        name="toy",
        split="val",
        image_ids=[str(i) for i in range(9)],
        captions=[f"a\u2028b\n  c\t{c}" for c in range(45)],
        caption_ids=[str(c) for c in range(45)],
        owner=owner,
        features=features,
    )
    for _ in range(2):
        precomputed.write(tmp_path / "new", "val", features, corpus)
    assert sorted(os.listdir(tmp_path / "new")) == ["dev_caps.txt", "dev_ims.npy", "dev_owners.npy"]
    again = precomputed.read(tmp_path / "new", "dev", dev_limit=10)
    assert again.features is not None
    assert np.array_equal(again.features, features)
    assert np.array_equal(again.owner, owner)
    assert again.captions == [f"a b c {c}" for c in range(45)]
    with pytest.raises(InputError, match="8 feature rows for 9 images"):
        precomputed.write(tmp_path / "other", "val", features[:8], corpus)
    precomputed.check_absent(tmp_path / "new", "train")
    for name in ("dev_caps.txt", "dev_ims.npy", "dev_owners.npy"):
        with pytest.raises(InputError, match=r"dev_.*: is there already; choose another --out"):
            precomputed.check_absent(tmp_path / "new", "val")
        (tmp_path / "new" / name).unlink()
    precomputed.check_absent(tmp_path / "new", "val")


def test_captions_are_never_paired_with_the_features_of_another_export(tmp_path: Path) -> None:
    def toy(first: str, second: str) -> Corpus:
        features = np.array([[ord(first)], [ord(second)]], np.float32)
        return Corpus("toy", "val", [first, second], [first, second], ["1", "2"], np.arange(2), features=features)

    old, new = toy("a", "b"), toy("b", "a")
    seen = set()
    for moves in range(9):
        directory = tmp_path / str(moves)
        assert old.features is not None
        precomputed.write(directory, "val", old.features, old)
        with pytest.MonkeyPatch.context() as patch:
            done = 0

            def killed(change: Any, *arguments: Any) -> None:
                nonlocal done
                done += 1
                if done > moves:  # noqa: B023 (called in this round)
                    raise KeyboardInterrupt
                change(*arguments)

            for name in ("rename", "replace"):
                patch.setattr(os, name, partial(killed, getattr(os, name)))
            with suppress(KeyboardInterrupt):
                assert new.features is not None
                precomputed.write(directory, "val", new.features, new)
        assert precomputed.splits(directory) == ["dev"]
        found = precomputed.read(directory, "dev")
        assert found.features is not None
        pairs = [
            (caption, chr(int(found.features[row, 0])))
            for caption, row in zip(found.captions, found.owner, strict=True)
        ]
        assert all(caption == picture for caption, picture in pairs), moves
        seen.add(tuple(found.captions))
    assert seen == {("a", "b"), ("b", "a")}


def test_caption_lines_end_at_newlines_only(tmp_path: Path) -> None:
    write_precomputed(tmp_path, "test", np.ones((1, 2), np.float32), 0)
    lines = ["\ufeffone\u2028still one", "two\r", "th\x85ree", "four\x0cfour", "fünf"]
    (tmp_path / "test_caps.txt").write_bytes("\n".join(lines).encode())
    captions = load_corpus(str(tmp_path), "test").captions
    assert captions == ["one\u2028still one", "two", "th\x85ree", "four\x0cfour", "fünf"]


def test_precomputed_refusals_name_file_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precomputed, "_BLOCK_BYTES", 100)
    ims = tmp_path / "test_ims.npy"
    features = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    write_precomputed(tmp_path, "test", features, 40, repeat=5)
    assert "no train_caps.txt; choose a split from test" in refusal(tmp_path, "train")

    rows = np.repeat(features, 5, axis=0)
    rows[33] += 1
    np.save(ims, rows)
    assert refusal(tmp_path, "test").startswith(f"{ims}: rows 30 to 34 should repeat")
    for value in (np.nan, np.inf):
        rows[33, 2] = value
        np.save(ims, rows)
        assert refusal(tmp_path, "test").startswith(f"{ims}: row 33 is not finite")

    for count in (7, 20, 39, 41, 80):
        np.save(ims, np.ones((count, 4), np.float32))
        assert refusal(tmp_path, "test").startswith(f"{ims}: {count} rows for 40 captions")
    for bad in (np.ones((8, 4), np.int64), np.ones(8), np.ones((8, 0))):
        np.save(ims, bad)
        assert refusal(tmp_path, "test").startswith(f"{ims}: ")
    np.save(ims, np.array([{}], dtype=object), allow_pickle=True)
    assert refusal(tmp_path, "test").startswith(f"{ims}: not a whole .npy array")
    np.save(ims, features)
    ims.write_bytes(ims.read_bytes()[:-4])
    assert refusal(tmp_path, "test").startswith(f"{ims}: not a whole .npy array")
    ims.write_bytes(b"")
    assert refusal(tmp_path, "test").startswith(f"{ims}: not a whole .npy array")
    ims.unlink()
    assert refusal(tmp_path, "test").startswith(f"{ims}: no such file")


def test_owners_are_checked(tmp_path: Path) -> None:
    write_precomputed(tmp_path, "test", np.ones((2, 3), np.float32), 3)
    owners = tmp_path / "test_owners.npy"
    for bad in (np.array([0, 1]), np.array([0.0, 1.0, 1.0])):
        np.save(owners, bad)
        assert refusal(tmp_path, "test").startswith(f"{owners}: ")
    np.save(owners, np.array([0, 1, 2]))
    assert "caption 'test#3' belongs to no image" in refusal(tmp_path, "test")
    np.save(owners, np.array([0, 0, 0]))
    assert "image 'test/1' has no caption" in refusal(tmp_path, "test")
