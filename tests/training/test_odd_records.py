"""Records that real files hold now and then: read with the right values, or refused in one line that names them."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.corpus import Corpus
from training.data.formats import available_splits, dedup, folder, load_corpus
from training.data.formats.records import text_lines
from training.errors import InputError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path, "PNG")


def refusal(spec: Path | str, split: str = "all") -> str:
    with pytest.raises(InputError) as caught:
        load_corpus(str(spec), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def as_karpathy(root: Path, name: str, caption: str) -> tuple[str, str]:
    record = {"split": "all", "filename": name, "sentences": [{"raw": caption}]}
    (root / "dataset_x.json").write_text(json.dumps({"images": [record]}))
    return f"karpathy:{root}", f"{root}/dataset_x.json: images[0]"


def as_karpathy_tokens(root: Path, name: str, caption: str) -> tuple[str, str]:
    record = {"split": "all", "filename": name, "sentences": [{"tokens": caption.split(" ")}]}
    (root / "dataset_x.json").write_text(json.dumps({"images": [record]}))
    return f"karpathy:{root}", f"{root}/dataset_x.json: images[0]"


def as_coco(root: Path, name: str, caption: str) -> tuple[str, str]:
    content = {"images": [{"id": 0, "file_name": name}], "annotations": [{"id": 0, "image_id": 0, "caption": caption}]}
    (root / "captions_all.json").write_text(json.dumps(content))
    return f"coco:{root}", f"{root}/captions_all.json: "


def as_json_lines(root: Path, name: str, caption: str) -> tuple[str, str]:
    (root / "captions.jsonl").write_text(json.dumps({"image": name, "captions": [caption]}))
    return f"folder:{root}", f"{root}/captions.jsonl: line 1"


def as_csv(root: Path, name: str, caption: str) -> tuple[str, str]:
    (root / "captions.csv").write_text(f"image,caption\n{name},{caption}\n")
    return f"folder:{root}", f"{root}/captions.csv: line 2"


def as_sidecar(root: Path, name: str, caption: str) -> tuple[str, str]:
    (root / name).with_suffix(".txt").write_text(caption)
    return f"folder:{root}", f"{root}/{Path(name).stem}.txt: line 1"


def as_features(root: Path, name: str, caption: str) -> tuple[str, str]:
    np.save(root / "all_ims.npy", np.ones((1, 2), np.float32))
    (root / "all_caps.txt").write_text("\n".join([caption] * 5))
    return f"precomputed:{root}", f"{root}/all_caps.txt: line 1"


Layout = Callable[[Path, str, str], tuple[str, str]]
JSON_LAYOUTS = [as_karpathy, as_karpathy_tokens, as_coco, as_json_lines]
TABLES = [*JSON_LAYOUTS, as_csv]
EVERY = [*TABLES, as_sidecar, as_features]


@pytest.mark.parametrize("layout", EVERY)
def test_every_layout_reads_a_plain_record(tmp_path: Path, layout: Layout) -> None:
    picture(tmp_path / "p.png")
    assert set(load_corpus(layout(tmp_path, "p.png", "a cat")[0], "all").captions) == {"a cat"}


@pytest.mark.parametrize(
    ("layout", "caption", "told"),
    [
        *((layout, "a cat \ud83d", r"half a character (\ud83d)") for layout in JSON_LAYOUTS),
        *((layout, "a c\0t", "a NUL character") for layout in EVERY),
    ],
)
def test_captions_that_nothing_can_store_are_refused_by_record(
    tmp_path: Path, layout: Layout, caption: str, told: str
) -> None:
    picture(tmp_path / "p.png")
    spec, where = layout(tmp_path, "p.png", caption)
    message = refusal(spec)
    assert message.startswith(where)
    assert told in message


@pytest.mark.parametrize("caption", ["\udc00", "a\0b"])
def test_a_corpus_made_by_hand_is_checked_alike(caption: str) -> None:
    with pytest.raises(InputError, match=r"^toy \[all\]: caption 'c' holds .+; remove it$"):
        Corpus("toy", "all", ["i"], [caption], ["c"], np.array([0]), features=np.ones((1, 2)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/etc/hostname", "is absolute"),
        (r"C:\photos\p.png", "is absolute"),
        ("../p.png", "leads out of the data's folder"),
        ("x/../../p.png", "leads out of the data's folder"),
        (r"..\p.png", "leads out of the data's folder"),
        ("gone.png", "is not in"),
    ],
)
@pytest.mark.parametrize("layout", TABLES)
def test_pictures_lie_inside_the_data(tmp_path: Path, layout: Layout, name: str, told: str) -> None:
    picture(tmp_path / "p.png")
    (tmp_path / "data" / "images").mkdir(parents=True)
    spec, where = layout(tmp_path / "data", name, "a cat")
    message = refusal(spec)
    assert message.startswith(where)
    assert told in message


@pytest.mark.parametrize("filepath", ["..", "/", "x/../..", r"..\.."])
def test_karpathys_filepath_lies_inside_the_data(tmp_path: Path, filepath: str) -> None:
    picture(tmp_path / "p.png")
    (tmp_path / "data").mkdir()
    record = {"split": "all", "filename": "p.png", "filepath": filepath, "sentences": [{"raw": "a cat"}]}
    (tmp_path / "data" / "dataset_x.json").write_text(json.dumps({"images": [record]}))
    assert refusal(tmp_path / "data").startswith(f"{tmp_path}/data/dataset_x.json: images[0]: ")


NFC, NFD = "Café Müller/né.png", unicodedata.normalize("NFD", "Café Müller/né.png")
MIXED = f"Café Müller/{unicodedata.normalize('NFD', 'né.png')}"


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        (NFC, NFD),
        (NFD, NFC),
        (MIXED, NFD),
        (NFC, MIXED),
        (r"sub\p.png", "sub/p.png"),
        (r"sub\né.png", unicodedata.normalize("NFD", "sub/né.png")),
        ("./x/../p.png", "p.png"),
        (r"a\b.png", r"a\b.png"),
    ],
)
@pytest.mark.parametrize("layout", TABLES)
def test_names_are_found_in_other_spellings(tmp_path: Path, layout: Layout, written: str, stored: str) -> None:
    picture(tmp_path / stored)
    corpus = load_corpus(layout(tmp_path, written, "a cat")[0], "all")
    assert [image.name for image in corpus.images] == [str(tmp_path / stored)]


def test_of_two_equivalent_names_the_exact_one_is_taken_and_no_other(tmp_path: Path) -> None:
    first, second, third = "\u1e69.png", "s\u0323\u0307.png", "s\u0307\u0323.png"
    for name in (first, second):
        picture(tmp_path / name)
    (tmp_path / "captions.csv").write_text(f"image,caption\n{first},one\n{second},two\n")
    corpus = load_corpus(f"folder:{tmp_path}", "all")
    assert dict(zip(corpus.image_ids, corpus.captions, strict=True)) == {first: "one", second: "two"}
    (tmp_path / "captions.csv").write_text(f"image,caption\n{third},one\n")
    assert "fits 2 names" in refusal(f"folder:{tmp_path}")


def test_a_file_name_that_is_no_utf8_has_a_split_and_a_printable_id(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        Path(os.fsdecode(raw + b".txt")).write_text("a small café")
    except OSError:
        pytest.skip("this file system has no such names")
    picture(Path(os.fsdecode(raw + b".png")))
    corpus = load_corpus(f"folder:{tmp_path}", "all")
    assert corpus.image_ids == [r"caf\udce9.png"]
    assert folder.splits(tmp_path) == [folder.split_of("caf\udce9.png")]
    assert corpus.images[0].load().size == (2, 2)
    corpus.fingerprint("image").encode()
    " ".join([*corpus.caption_ids, *corpus.image_ids]).encode()


DEEP = "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize("value", [DEEP, "9" * 5000, "[1,", "nul"], ids=["deep", "5,000 digits", "cut", "word"])
@pytest.mark.parametrize("kind", ["karpathy", "coco", "json lines", "dedup"])
def test_json_that_cannot_be_parsed_is_one_line(tmp_path: Path, kind: str, value: str) -> None:
    path, spec = {
        "karpathy": ("dataset_x.json", f"karpathy:{tmp_path}"),
        "coco": ("captions_all.json", f"coco:{tmp_path}"),
        "json lines": ("captions.jsonl", f"folder:{tmp_path}"),
        "dedup": ("kept.json", f"dedup:{tmp_path}/kept.json"),
    }[kind]
    (tmp_path / path).write_text(f'{{"images": {value}}}')
    message = refusal(spec)
    assert message.startswith(f"{tmp_path}/{path}: ")
    assert len(message) < 400


@pytest.mark.parametrize(
    "weight", ["true", "Infinity", "-Infinity", "NaN", "1e308", "1e999", "7" * 400, "0.5", "null"]
)
def test_weights_are_numbers_of_pairs(tmp_path: Path, weight: str) -> None:
    as_features(tmp_path, "", "a cat")
    kept = tmp_path / "kept.json"
    kept.write_text(f'{{"data": "precomputed:{tmp_path}", "split": "all", "weights": {{"all#1": {weight}}}}}')
    message = refusal(f"dedup:{kept}")
    assert message.startswith(f"{kept}: caption 'all#1': weight ")
    assert len(message) < 400


@pytest.mark.parametrize("length", [1, 2, 3])
def test_dedup_files_in_a_circle_are_refused(tmp_path: Path, length: int) -> None:
    files = [tmp_path / f"kept{n}.json" for n in range(length)]
    for n, file in enumerate(files):
        dedup.write(file, f"dedup:{files[(n + 1) % length]}", "all", {"all#1": 1})
    assert "leads from one dedup file to another without end" in refusal(f"dedup:{files[0]}")
    with pytest.raises(InputError, match="without end"):
        available_splits(f"dedup:{files[0]}")


def test_a_dedup_file_of_a_dedup_file_is_read(tmp_path: Path) -> None:
    as_features(tmp_path, "", "a cat")
    dedup.write(tmp_path / "1.json", f"precomputed:{tmp_path}", "all", {"all#1": 2, "all#2": 3})
    dedup.write(tmp_path / "2.json", f"dedup:{tmp_path}/1.json", "all", {"all#2": 5})
    corpus = load_corpus(f"dedup:{tmp_path}/2.json", "all")
    assert (corpus.caption_ids, corpus.weights is not None and corpus.weights.tolist()) == (["all#2"], [5])


def test_what_is_left_out_is_said_once_through_dedup_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "p.png")
    for name in ("p.txt", "gone.txt"):
        (tmp_path / name).write_text("a cat")
    dedup.write(tmp_path / "1.json", f"folder:{tmp_path}", "all", {"p.png#0": 1})
    dedup.write(tmp_path / "2.json", f"dedup:{tmp_path}/1.json", "all", {"p.png#0": 1})
    load_corpus(f"dedup:{tmp_path}/2.json", "all")
    assert capsys.readouterr().err.count("gone.txt") == 1


def bars(rows: list[str]) -> str:
    return "image_name| comment_number| comment\n" + "\n".join(rows) + "\n"


def test_the_published_row_without_its_second_bar_is_read_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "2199200615.jpg")
    rows = [f"2199200615.jpg| {n}| Sentence {n} ." for n in range(4)]
    rows.append("2199200615.jpg| 4   A dog runs across the grass .")
    (tmp_path / "captions.csv").write_text(bars(rows))
    corpus = load_corpus(f"folder:{tmp_path}", "all")
    assert corpus.captions == [*(f"Sentence {n} ." for n in range(4)), "A dog runs across the grass ."]
    said = f"{tmp_path}/captions.csv: line 6: has no second bar; read as number 4 and caption 'A dog runs across the"
    assert said in capsys.readouterr().err
    assert corpus.notes[0].startswith(said)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("p.jpg,a dog, running", '3 fields for 2 columns; put captions that contain "," in double quotes'),
        ("p.jpg", "1 fields for 2 columns; write all of them, or remove the row"),
    ],
)
def test_one_malformed_row_of_many_is_set_aside_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, told: str
) -> None:
    picture(tmp_path / "p.jpg")
    good = [f"p.jpg,sentence {n}" for n in range(150)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *good[:70], bad, *good[70:]]))
    corpus = load_corpus(f"folder:{tmp_path}", "all")
    assert corpus.captions == [f"sentence {n}" for n in range(150)]
    assert capsys.readouterr().err == f"{tmp_path}/captions.csv: line 72: {told}; left out\n"


@pytest.mark.parametrize("good", [2, 98])
def test_malformed_rows_stop_reading_where_they_are_many(tmp_path: Path, good: int) -> None:
    picture(tmp_path / "p.jpg")
    rows = ["p.jpg,sentence"] * good + ["p.jpg,a dog, running"] * 2
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    assert f"captions.csv: line {good + 2}: 3 fields for 2 columns" in refusal(f"folder:{tmp_path}")


def test_a_malformed_row_stops_reading_where_its_picture_has_no_other(tmp_path: Path) -> None:
    for name in ("p.jpg", "q.jpg"):
        picture(tmp_path / name)
    rows = ["p.jpg,sentence"] * 200 + ["q.jpg,a dog, running"]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    assert "captions.csv: line 202: 3 fields for 2 columns" in refusal(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("header", "column"),
    [("image,caption,caption", "caption"), ("image,caption,Image", "image"), ("id,image,caption,ID", "id")],
)
def test_a_column_named_twice_is_refused(tmp_path: Path, header: str, column: str) -> None:
    (tmp_path / "captions.csv").write_text(f"{header}\n")
    assert f"captions.csv: line 1 names 2 columns {column!r}; rename all but one" in refusal(f"folder:{tmp_path}")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_are_named(tmp_path: Path, separator: str) -> None:
    (tmp_path / "captions.csv").write_text(f"image{separator}caption\n")
    assert "separate columns by commas" in refusal(f"folder:{tmp_path}")


def test_sidecars_without_a_picture_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(8):
        picture(tmp_path / f"p{n}.png")
        (tmp_path / f"p{n}.txt").write_text("a cat")
    for n in range(8, 15):
        (tmp_path / f"p{n}.txt").write_text("a cat")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "p.txt").write_text("a cat")
    corpus = load_corpus(f"folder:{tmp_path}", "all")
    assert len(corpus) == 8
    assert sorted(corpus.notes) == sorted(
        f"{tmp_path}/p{n}.txt: no picture of that name can be read; left out" for n in range(8, 15)
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    assert said[-1] == f"2 more such notes; `vse data check folder:{tmp_path}` has all"


def test_a_split_may_have_a_plus_or_be_called_all(tmp_path: Path) -> None:
    splits = {"train+extra": "a", "all": "b", "val": "c", "train": "d", "extra": "e"}
    for caption in splits.values():
        picture(tmp_path / f"{caption}.png")
    rows = "\n".join(f"{caption}.png,{caption},{split}" for split, caption in splits.items())
    (tmp_path / "captions.csv").write_text(f"image,caption,split\n{rows}\n")
    for split, caption in splits.items():
        assert load_corpus(f"folder:{tmp_path}", split).captions == [caption]
    assert load_corpus(f"folder:{tmp_path}", "val+train").captions == ["c", "d"]


@pytest.mark.parametrize("bad", [True, 1.0, None, [1]])
@pytest.mark.parametrize("key", ["image", "annotation", "owner"])
def test_coco_ids_are_integers_or_text(tmp_path: Path, key: str, bad: object) -> None:
    def write(**ids: object) -> str:
        ids = {"image": 1, "annotation": 1, "owner": 1} | ids
        images = [{"id": ids["image"], "file_name": "p.png"}]
        annotations = [{"id": ids["annotation"], "image_id": ids["owner"], "caption": "a cat"}]
        (tmp_path / "captions_all.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        return f"coco:{tmp_path}"

    picture(tmp_path / "p.png")
    assert "is missing or not of type int" in refusal(write(**{key: bad}))
    assert load_corpus(write(image="x7", owner="x7", annotation="c"), "all").image_ids == ["x7"]


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\r\n", "\n  \n\r\n"])
def test_blank_lines_after_the_last_caption_are_no_captions(tmp_path: Path, end: str) -> None:
    as_features(tmp_path, "", "a cat")
    (tmp_path / "all_caps.txt").write_bytes(("\n".join(f"caption {n}" for n in range(5)) + end).encode())
    assert load_corpus(f"precomputed:{tmp_path}", "all").captions == [f"caption {n}" for n in range(5)]


def test_an_empty_line_among_captions_is_named(tmp_path: Path) -> None:
    as_features(tmp_path, "", "a cat")
    (tmp_path / "all_caps.txt").write_text("one\ntwo\n\nfour\nfive\nsix\n")
    assert refusal(f"precomputed:{tmp_path}").startswith(f"{tmp_path}/all_caps.txt: line 3 is empty")


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "longdouble"])
def test_features_beyond_single_precision_are_refused(tmp_path: Path, dtype: str) -> None:
    as_features(tmp_path, "", "a cat")
    for value, fits in ((1e38, True), (1e39, False), (-1e39, False)):
        np.save(tmp_path / "all_ims.npy", np.array([[1.0, value]], dtype))
        if fits:
            load_corpus(f"precomputed:{tmp_path}", "all")
        else:
            assert "all_ims.npy: row 0 is not finite in single precision" in refusal(f"precomputed:{tmp_path}")


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("\ufeffa\u2028b\r\nc\x85d\x0c\ne\rf".encode())
    assert list(text_lines(tmp_path / "t.txt")) == [(1, "a\u2028b"), (2, "c\x85d\x0c"), (3, "e\rf")]
