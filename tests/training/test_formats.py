from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data.corpus import Corpus
from training.data.formats import coco_annotations, folder, karpathy, load_corpus
from training.errors import InputError

COUNTS = range(1, 10)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


def refusal(spec: Path | str, split: str) -> str:
    with pytest.raises(InputError) as caught:
        load_corpus(str(spec), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sentences_of(corpus: Corpus) -> dict[str, list[str]]:
    """File name (or image id) to captions, through the owners."""
    names = [Path(image.name).name for image in corpus.images] or corpus.image_ids
    grouped: dict[str, list[str]] = {name: [] for name in names}
    for caption, image in zip(corpus.captions, corpus.owner, strict=True):
        grouped[names[image]].append(caption)
    return grouped


def write_karpathy(root: Path, splits: list[str], pictures: str = "images", **extra: Any) -> dict[str, Any]:
    """One image per split name, the i-th with i % 9 + 1 sentences; returns what was written."""
    sentid, images = 0, []
    for i, split in enumerate(splits):
        sentences = []
        for j in range(i % 9 + 1):
            sentences.append({"raw": f"picture {i} sentence {j} .", "tokens": ["picture"], "sentid": sentid})
            sentid += 1
        images.append({"split": split, "filename": f"p{i}.jpg", "imgid": i, "sentences": sentences, **extra})
        picture(root / pictures / f"p{i}.jpg")
    content = {"images": images, "dataset": "toy"}
    (root / "dataset_toy.json").write_text(json.dumps(content))
    return content


def rewrite(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("pictures", ["images", ".", "val2014", "images/val2014"])
def test_karpathy_keeps_every_sentence_wherever_the_pictures_lie(tmp_path: Path, pictures: str) -> None:
    write_karpathy(tmp_path, ["train"] * 9 + ["test"], pictures, filepath="val2014")
    corpus = karpathy.read(tmp_path, "train")
    assert corpus.image_ids == [f"p{i}" for i in range(9)]
    assert sentences_of(corpus) == {
        f"p{i}.jpg": [f"picture {i} sentence {j} ." for j in range(n)] for i, n in enumerate(COUNTS)
    }
    assert corpus.caption_ids == [str(i) for i in range(sum(COUNTS))]
    assert corpus.images[0].load().size == (2, 2)


def test_karpathy_splits_are_counted_joined_and_all(tmp_path: Path) -> None:
    write_karpathy(tmp_path, ["train"] * 20 + ["restval"] * 7 + ["val"] * 3 + ["test"] * 2)
    counts = {s: len(load_corpus(str(tmp_path), s).image_ids) for s in ("train", "restval", "val", "test", "all")}
    assert counts == {"train": 20, "restval": 7, "val": 3, "test": 2, "all": 32}
    joined = load_corpus(f"karpathy:{tmp_path}", "train+restval")
    assert (joined.split, len(joined.image_ids)) == ("train+restval", 27)
    assert karpathy.read(tmp_path / "dataset_toy.json", "val").image_ids == ["p27", "p28", "p29"]


def test_karpathy_falls_back_on_tokens_and_numbers(tmp_path: Path) -> None:
    content = write_karpathy(tmp_path, ["train", "train"])
    content["images"][0]["sentences"] = [{"tokens": ["two", "words"]}]
    content["images"][1]["filename"] = "other/p0.jpg"
    picture(tmp_path / "images/other/p0.jpg")
    rewrite(tmp_path / "dataset_toy.json", content)
    corpus = karpathy.read(tmp_path, "train")
    assert corpus.captions[0] == "two words"
    assert corpus.image_ids == ["0", "1"]
    assert corpus.caption_ids == ["0#0", "1#0", "1#1"]


def test_karpathy_refusals_name_file_and_record(tmp_path: Path) -> None:
    path = tmp_path / "dataset_toy.json"
    content = write_karpathy(tmp_path, ["train", "train", "val"])
    assert "choose from train (2 images), val (1 images), or all" in refusal(tmp_path, "test")

    (tmp_path / "images/p1.jpg").unlink()
    assert refusal(tmp_path, "train").startswith(f"{path}: images[1]: picture 'p1.jpg' is not in")

    for key in ("split", "filename", "sentences"):
        broken = json.loads(json.dumps(content))
        del broken["images"][2][key]
        rewrite(path, broken)
        assert refusal(tmp_path, "val").startswith(f"{path}: images[2]: {key!r} is missing")
    content["images"][2]["sentences"][1] = {"sentid": 5}
    rewrite(path, content)
    assert refusal(tmp_path, "val").startswith(f"{path}: images[2].sentences[1]: 'tokens' is missing")

    rewrite(path, [1, 2])
    assert refusal(tmp_path, "val").startswith(f"{path}: 'images' is missing")
    path.write_text('{"images": [\n{"split": }]}')
    assert refusal(tmp_path, "val").startswith(f"{path}: not valid JSON at line 2, column 11")
    path.write_bytes(b'{\n"images": "\xff"}')
    assert refusal(tmp_path, "val").startswith(f"{path}: line 2 is not UTF-8")

    path.with_name("dataset_b.json").write_text("{}")
    assert "found dataset_b.json, dataset_toy.json" in refusal(tmp_path, "val")
    assert "found none" in refusal(f"karpathy:{tmp_path / 'images'}", "val")


def test_flickr8k_has_its_published_size(flickr8k: Path) -> None:
    for split, images, captions in (("train", 6000, 30_000), ("val", 1000, 5000)):
        corpus = load_corpus(str(flickr8k), split)
        assert (len(corpus.image_ids), len(corpus)) == (images, captions)
        assert np.bincount(corpus.owner).tolist() == [5] * images


def write_coco(root: Path, name: str = "val2014", pictures: str | None = None, folder: str = "annotations") -> Any:
    """Nine images with 1 to 9 captions, the annotations in reverse; returns what was written."""
    images = [{"id": 100 + i, "file_name": f"{name}_{i}.jpg"} for i in range(9)]
    annotations = [
        {"image_id": 100 + i, "id": 10 * i + j, "caption": f"picture {i} caption {j}"}
        for i, n in enumerate(COUNTS)
        for j in range(n)
    ][::-1]
    for image in images:
        picture(root / (pictures or name) / str(image["file_name"]))
    (root / folder).mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations}
    rewrite(root / folder / f"captions_{name}.json", content)
    return content


@pytest.mark.parametrize("pictures", [None, "images/val2014", "images", "."])
@pytest.mark.parametrize("annotations", ["annotations", "."])
def test_coco_follows_image_ids_not_order(tmp_path: Path, pictures: str | None, annotations: str) -> None:
    write_coco(tmp_path, pictures=pictures, folder=annotations)
    corpus = coco_annotations.read(tmp_path, "val")
    assert corpus.split == "val2014"
    assert corpus.image_ids == [str(100 + i) for i in range(9)]
    assert {name: sorted(captions) for name, captions in sentences_of(corpus).items()} == {
        f"val2014_{i}.jpg": [f"picture {i} caption {j}" for j in range(n)] for i, n in enumerate(COUNTS)
    }
    assert corpus.caption_ids[:2] == ["88", "87"]


def test_coco_years_are_told_apart(tmp_path: Path) -> None:
    for name in ("train2014", "val2014", "val2017"):
        write_coco(tmp_path, name)
    assert coco_annotations.read(tmp_path, "val2017").images[0].name.endswith("val2017/val2017_0.jpg")
    assert coco_annotations.read(tmp_path, "train").split == "train2014"
    assert "several years of split 'val'; choose from train2014, val2014, val2017" in refusal(tmp_path, "val")
    assert "no split 'test'; choose from train2014" in refusal(tmp_path, "test")


def test_coco_refusals_name_file_and_record(tmp_path: Path) -> None:
    path = tmp_path / "annotations/captions_val2014.json"
    content = write_coco(tmp_path)
    rewrite(path, {**content, "annotations": content["annotations"][:-1]})
    assert "image '100' has no caption" in refusal(tmp_path, "val")
    stray = {"image_id": 7, "id": 1, "caption": "nowhere"}
    rewrite(path, {**content, "annotations": [*content["annotations"], stray]})
    assert refusal(tmp_path, "val").startswith(f"{path}: annotations[45]: image_id 7 is not among the images")
    rewrite(path, {**content, "annotations": [{"image_id": 100, "id": 1}]})
    assert refusal(tmp_path, "val").startswith(f"{path}: annotations[0]: 'caption' is missing")
    rewrite(path, {**content, "images": [*content["images"], {"id": 1}]})
    assert refusal(tmp_path, "val").startswith(f"{path}: images[9]: 'file_name' is missing")
    rewrite(path, {"images": []})
    assert refusal(tmp_path, "val").startswith(f"{path}: 'annotations' is missing")
    rewrite(path, content)
    (tmp_path / "val2014/val2014_3.jpg").unlink()
    assert refusal(tmp_path, "val").startswith(f"{path}: images[3]: picture 'val2014_3.jpg' is not in")


def own_photos(root: Path) -> list[tuple[str, list[str]]]:
    """Nine pictures in two folders with 1 to 9 captions, as (relative path, captions)."""
    photos = [(f"{'trip/' * (n % 2)}p{n}.jpg", [f"picture {n}, caption {j}" for j in range(n)]) for n in COUNTS]
    for name, _ in photos:
        picture(root / name)
    return photos


@pytest.mark.parametrize("layout", ["csv", "csv with BOM and CRLF", "jsonl", "sidecars"])
def test_every_folder_layout_holds_the_same(tmp_path: Path, layout: str) -> None:
    photos = own_photos(tmp_path)
    if layout == "sidecars":
        for name, captions in photos:
            (tmp_path / name).with_suffix(".txt").write_bytes(("\r\n".join(captions) + "\n\n").encode("utf-8-sig"))
        (tmp_path / "readme.txt").write_text("no picture beside me")
    elif layout == "jsonl":
        records = [
            {"image": name, "captions": captions} if len(captions) > 1 else {"image": name, "caption": captions[0]}
            for name, captions in photos
        ]
        (tmp_path / "captions.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    else:
        encoding, newline = ("utf-8-sig", "\r\n") if "BOM" in layout else ("utf-8", "\n")
        with (tmp_path / "captions.csv").open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, lineterminator=newline)
            writer.writerow(["Filename", "text"])
            writer.writerows([name, caption] for name, captions in photos for caption in captions)
    corpus = load_corpus(str(tmp_path), "all")
    assert sorted(corpus.image_ids) == sorted(name for name, _ in photos)
    assert sentences_of(corpus) == {Path(name).name: captions for name, captions in photos}
    parts = [
        len(load_corpus(str(tmp_path), split).image_ids) for split in {folder.split_of(f"p{n}.jpg") for n in COUNTS}
    ]
    assert sum(parts) == 9


def test_hashed_splits_take_80_10_10_percent() -> None:
    counts = Counter(folder.split_of(f"IMG_{i}.jpg") for i in range(10_000))
    assert abs(counts["train"] - 8000) < 150
    assert abs(counts["val"] - 1000) < 120
    assert abs(counts["test"] - 1000) < 120
    # Fixed for good: a change would move pictures that were tested on into training.
    assert [folder.split_of(f"IMG_{i}.jpg") for i in range(4)] == ["val", "train", "train", "train"]


def test_given_splits_and_ids_are_kept(tmp_path: Path) -> None:
    for name in ("a.jpg", "images/b.jpg"):
        picture(tmp_path / name)
    table = tmp_path / "captions.csv"
    table.write_text('id,image,caption,split\nx,a.jpg,one,train\ny,b.jpg,two,dev\nz,a.jpg,"three, quoted",train\n')
    train = folder.read(tmp_path, "train")
    assert (train.image_ids, train.captions, train.caption_ids) == (
        ["a.jpg"],
        ["one", "three, quoted"],
        ["x", "z"],
    )
    assert folder.read(tmp_path, "dev").image_ids == ["images/b.jpg"]
    assert "choose from dev (1 images), train (1 images), or all" in refusal(tmp_path, "test")
    table.unlink()
    records = [
        {"image": "a.jpg", "caption": "one", "split": "s"},
        {"image": "b.jpg", "caption": "two", "split": "t"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert folder.read(tmp_path, "t").image_ids == ["images/b.jpg"]


def test_the_bar_separated_table_of_flickr30k_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    table = tmp_path / "captions.csv"
    table.write_text('image_name| comment_number| comment\na.jpg| 0| A "dog", running .\na.jpg| 1| Two .\n')
    assert folder.read(tmp_path, "all").captions == ['A "dog", running .', "Two ."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.jpg,fine\nmissing.jpg,x\n", "line 3: picture 'missing.jpg' is not in"),
        ("image,caption\na.jpg,fine\nb.jpg,a dog, running\n", "line 3: 3 fields for 2 columns"),
        ("image,caption\n/photos/a.jpg,x\n", "line 2: /photos/a.jpg is absolute; write it relative to"),
        ("image,caption\na.jpg,fine\nb.jpg, \n", "line 3: the caption is empty"),
        ("image,caption,split\na.jpg,x,train\na.jpg,y,val\n", "line 3: a.jpg is in splits 'train' and 'val'"),
        ("image,caption,split\na.jpg,x,\n", "line 2: the split is empty"),
        ("picture,words\na.jpg,x\n", "line 1 must name the columns image and caption, not 'picture,words'"),
        ("", "line 1 must name the columns"),
        ('image,caption\na.jpg,"never closed\n', "unexpected end of data; correct the quoting"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "captions.csv").write_text(text)
    found = refusal(tmp_path, "all")
    assert found.startswith(f"{tmp_path / 'captions.csv'}: ")
    assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"caption": "x"}', "line 2: 'image' is missing"),
        ('{"image": "b.jpg"}', "line 2: 'caption' is missing"),
        (
            '{"image": "b.jpg", "captions": ["x", 3]}',
            "line 2: 'captions' must be a list of strings, not contain 3",
        ),
        (
            '{"image": "b.jpg", "caption": "x", "split": "val"}',
            "line 2: some records have a 'split' and some none",
        ),
        ('{"image": "c.jpg", "caption": "x"}', "line 2: picture 'c.jpg' is not in"),
        ('["b.jpg", "x"]', "line 2: 'image' is missing"),
    ],
)
def test_bad_json_lines_are_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "captions.jsonl").write_text(f'{{"image": "a.jpg", "caption": "fine"}}\n{line}\n')
    found = refusal(tmp_path, "all")
    assert found.startswith(f"{tmp_path / 'captions.jsonl'}: ")
    assert message in found


def test_pictures_without_caption_are_refused_with_their_number(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("the only caption\n")
    assert refusal(tmp_path, "all").startswith(f"{tmp_path / 'b.jpg'}: no caption (2 such pictures)")
    (tmp_path / "captions.csv").write_text("image,caption\nb.jpg,x\n")
    assert refusal(tmp_path, "all").startswith(f"{tmp_path / 'a.jpg'}: no caption (2 such pictures)")
    (tmp_path / "captions.jsonl").touch()
    assert "both captions.csv and captions.jsonl" in refusal(tmp_path, "all")


def test_the_kind_is_detected_or_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both").mkdir()
    write_coco(tmp_path / "both", "val2014")
    assert load_corpus("~/both", "val2014").name == "coco:both"
    write_karpathy(tmp_path / "both", ["val"])
    assert load_corpus("both", "val").name == "karpathy:both"
    assert load_corpus("both/dataset_toy.json", "val").name == "karpathy:both"
    assert load_corpus("coco:~/both", "val").name == "coco:both"
    (tmp_path / "odd:name").mkdir()
    write_karpathy(tmp_path / "odd:name", ["val"])
    assert load_corpus("odd:name", "val").name == "karpathy:odd:name"


def test_scenes_are_counted() -> None:
    corpus = load_corpus("scenes:60", "train+val")
    assert (corpus.name, corpus.split) == ("scenes:60", "train+val")
    for bad in ("scenes:", "scenes:0", "scenes:-3", "scenes:many"):
        assert "not a number of images; write e.g. scenes:6000" in refusal(bad, "train")
    assert "split 'dev'" in refusal("scenes:60", "dev")


def test_data_that_cannot_be_named_are_refused(tmp_path: Path) -> None:
    for name in ("a\0b", "caf\udce9"):
        assert "rename the folder" in refusal(f"folder:{tmp_path}/{name}", "train")
    kinds = "karpathy, coco, precomputed, folder, dedup, scenes"
    assert f"unknown kind 'lmdb'; choose from {kinds}" in refusal("lmdb:x", "train")
    assert "missing: no such file or folder" in refusal(tmp_path / "missing", "train")
    assert "missing: no such file or folder" in refusal(f"coco:{tmp_path / 'missing'}", "train")
    message = refusal(tmp_path, "train")
    for sign in ("dataset*.json (karpathy)", "captions_*.json", "*_caps.txt (precomputed)", "captions.csv"):
        assert sign in message
    (tmp_path / "file.txt").touch()
    assert "file.txt: not a folder" in refusal(f"folder:{tmp_path / 'file.txt'}", "train")
    write_karpathy(tmp_path, ["train"])
    assert "no images in split ''" in refusal(tmp_path, "train+")
    assert "occurs twice" in refusal(tmp_path, "train+train")
