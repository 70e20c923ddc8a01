"""What ``vse data check`` finds beyond records that cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.errors import InputError
from vse_app.cli import main
from vse_app.data_check import check_data

Row = tuple[str, str, str]  # picture, caption, split


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)


def as_karpathy(root: Path, rows: list[Row]) -> str:
    images = [{"filename": name, "split": split, "sentences": [{"raw": text}]} for name, text, split in rows]
    (root / "dataset_x.json").write_text(json.dumps({"images": images}))
    return f"karpathy:{root}"


def as_coco(root: Path, rows: list[Row]) -> str:
    for split in {split for _, _, split in rows}:
        here = [(n, name, text) for n, (name, text, at) in enumerate(rows) if at == split]
        images = [{"id": n, "file_name": name} for n, name, _ in here]
        annotations = [{"id": n, "image_id": n, "caption": text} for n, _, text in here]
        (root / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return f"coco:{root}"


def as_csv(root: Path, rows: list[Row]) -> str:
    (root / "captions.csv").write_text("image,caption,split\n" + "".join(",".join(row) + "\n" for row in rows))
    return f"folder:{root}"


Layout = Callable[[Path, list[Row]], str]
LAYOUTS = [as_karpathy, as_coco, as_csv]
ROWS = [("0.png", "a red one", "train"), ("1.png", "a dark one", "train"), ("2.png", "no one", "test")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for n in range(4):
        picture(tmp_path / "images" / f"{n}.png", n)
    (tmp_path / "images" / "3.png").unlink()
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_good_data_have_no_problems(root: Path, layout: Layout) -> None:
    report = check_data(layout(root, ROWS), None)
    assert report.problems == []
    assert {split.split: split.images for split in report.splits} == {"train": 2, "test": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_another_split_is_a_problem(root: Path, layout: Layout) -> None:
    (root / "images" / "3.png").write_bytes((root / "images" / "0.png").read_bytes())
    (problem,) = check_data(layout(root, [*ROWS, ("3.png", "another", "test")]), None).problems
    for told in ("0.png [train]", "3.png [test]", "are the same picture (1 such pictures)"):
        assert told in problem


@pytest.mark.parametrize("layout", [as_karpathy, as_coco])
def test_a_file_in_two_splits_is_a_problem(root: Path, layout: Layout) -> None:
    (problem,) = check_data(layout(root, [*ROWS, ("0.png", "again", "test")]), None).problems
    for told in ("0.png [train]", "0.png [test]", "are the same picture (1 such pictures)"):
        assert told in problem


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_the_same_split_is_noted(root: Path, layout: Layout) -> None:
    (root / "images" / "3.png").write_bytes((root / "images" / "0.png").read_bytes())
    report = check_data(layout(root, [*ROWS, ("3.png", "another", "train")]), None)
    assert report.problems == []
    note = f"the same picture as {root}/images/3.png, yet each other's negatives (1 such copies)"
    assert (f"{root}/images/0.png", note) in report.notes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_that_all_say_the_same_are_a_problem(root: Path, layout: Layout) -> None:
    picture(root / "images" / "3.png", 3)
    rows = [(name, "a dog", split) for name, _, split in [*ROWS, ("3.png", "", "train")]]
    (problem,) = check_data(layout(root, rows), None).problems
    assert problem.endswith("[train]: all 3 pictures say 'a dog'; caption each")


def test_sentences_of_several_pictures_are_counted(root: Path) -> None:
    picture(root / "images" / "3.png", 3)
    report = check_data(as_csv(root, [*ROWS, ("3.png", ROWS[0][1], "train")]), None)
    assert {split.split: split.shared_captions for split in report.splits} == {"train": 1, "test": 0}
    assert report.problems == []
    assert ("train", "1 sentences describe several pictures, each other's negatives") in report.notes


def test_the_share_of_unknown_words_is_told(tmp_path: Path) -> None:
    for split, captions in (
        ("train", ["red disc"] * 5 + ["red hat"] * 5 + ["rare hat"] * 5),
        ("dev", ["red rare sky"] * 5),
    ):
        np.save(tmp_path / f"{split}_ims.npy", np.eye(len(captions) // 5, 3))
        (tmp_path / f"{split}_caps.txt").write_text("\n".join(captions))
    train = (tmp_path / "train_caps.txt").read_text().replace("rare hat", "odd hat", 2)
    (tmp_path / "train_caps.txt").write_text(train)
    report = check_data(f"precomputed:{tmp_path}", None)
    assert {split.split: split.unknown_words for split in report.splits} == {
        "train": pytest.approx(5 / 30),
        "dev": pytest.approx(2 / 3),
    }
    text = report.text()
    assert "note     train: vocabulary: 3 words seen at least 4 times; 16.7% of the words of 15" in text
    assert "note     dev: 66.7% of all words are <unk> to that vocabulary" in text


def test_a_vocabulary_that_training_refuses_is_told_with_the_remedy(root: Path) -> None:
    report = check_data(as_csv(root, ROWS), None)
    assert "; fit one with a lower model.text.min_count, or take an hf: text encoder" in dict(report.notes)["train"]


def test_what_a_reader_leaves_out_is_noted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(20):
        picture(tmp_path / f"{n}.png", n)
        (tmp_path / f"{n}.txt").write_text(f"caption {n}")
    (tmp_path / "gone.txt").write_text("a caption")
    main(["data", "check", f"folder:{tmp_path}"])
    printed = capsys.readouterr()
    assert printed.out.count(f"note     {tmp_path}/gone.txt: no picture of that name can be read; left out\n") == 1
    assert printed.err == ""
    main(["data", "check", f"folder:{tmp_path}", "--json"])
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["notes"][0]["path"] == f"{tmp_path}/gone.txt"
    assert len(record["splits"]) == len(record["notes"]) - 1 > 1


@pytest.mark.parametrize(
    ("table", "told"), [("dataset_x.json", "karpathy"), ("x_caps.json", "precomputed"), ("captions.json", "coco")]
)
def test_data_without_a_split_are_refused(tmp_path: Path, table: str, told: str) -> None:
    (tmp_path / table).write_text('{"images": [], "annotations": []}')
    with pytest.raises(InputError, match="no images in any split"):
        check_data(f"{told}:{tmp_path}", None)


def test_pictures_behind_a_link_are_named_with_the_refusal(tmp_path: Path) -> None:
    picture(tmp_path / "real" / "p.png", 0)
    (tmp_path / "real" / "p.txt").write_text("a caption")
    data = tmp_path / "data"
    data.mkdir()
    (data / "album").symlink_to(tmp_path / "real")
    told = (
        f"{data}: no pictures with captions; 1 linked folder left out, as {data}/album; move what is wanted into the"
    )
    with pytest.raises(InputError) as refused:
        check_data(f"folder:{data}", None)
    assert str(refused.value).startswith(told)
    picture(data / "q.png", 1)
    (data / "q.txt").write_text("another caption")
    assert any(
        where == str(data) and "1 linked folder left out" in note
        for where, note in check_data(f"folder:{data}", None).notes
    )


def test_files_of_types_that_cannot_be_read_are_counted_by_type(tmp_path: Path) -> None:
    picture(tmp_path / "p.png", 0)
    (tmp_path / "p.txt").write_text("a caption")
    for name in ("a.nef", "b.NEF", "c.mov"):
        (tmp_path / name).write_bytes(b"raw")
    (tmp_path / "a.txt").write_text("a caption of a picture that is left out")
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "@eaDir" / "x.txt").write_text("no caption")
    notes = check_data(f"folder:{tmp_path}", None).notes
    assert (str(tmp_path), "3 files of types that cannot be read: .nef 2, .mov 1") in notes
    assert [where for where, note in notes if "no picture of that name" in note] == [f"{tmp_path}/a.txt"]


def test_names_that_are_no_utf8_are_checked(tmp_path: Path) -> None:
    broken = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        Path(os.fsdecode(broken + b".txt")).write_text("a caption")
    except OSError:
        pytest.skip("this file system has no such names")
    Path(os.fsdecode(broken + b".png")).write_bytes(b"no picture")
    picture(tmp_path / "p.png", 0)
    (tmp_path / "p.txt").write_text("another one")
    (problem,) = check_data(f"folder:{tmp_path}", None).problems
    assert problem.startswith(f"{tmp_path}/caf")
    assert ".png: not a readable picture" in problem
