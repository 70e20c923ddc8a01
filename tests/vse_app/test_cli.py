from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from program import Ended, Vse

from vse_app.cli import main

SMALL = ["--model.dim=8", "--model.image.size=16", "--model.text.word-dim=8", "--model.text.min-count=1"]
SMALL += ["--optim.epochs=1"]
FEATURES = [*SMALL, "--model.image.encoder=precomputed", "--optim.batch-size=4"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 scenes as files: 24 to train on, 3 to validate, 3 to test."""
    folder = tmp_path_factory.mktemp("scenes")
    main(["data", "scenes", str(folder), "--count", "30"])
    return folder


@pytest.fixture(scope="module")
def run_directory(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "--data", f"karpathy:{scenes}", "--out", str(out), *SMALL])
    return out


@pytest.fixture
def gallery(vse: Vse, scenes: Path, run_directory: Path, tmp_path: Path) -> Path:
    pictures = sorted((scenes / "images").glob("*.png"))[:5]
    assert vse("index", tmp_path / "gallery", "add", *pictures, "--model", run_directory).status == 0
    return tmp_path / "gallery"


def refused(ended: Ended, *told: object) -> None:
    """Status 2, nothing printed but one line on stderr, and that line says what is needed."""
    assert (ended.status, ended.out) == (2, "")
    assert re.fullmatch(r"vse: .+\n", ended.err), ended.err
    for text in told:
        assert str(text) in ended.err


def precomputed(folder: Path, captions: list[str], features: Any) -> str:
    folder.mkdir()
    for split in ("train", "dev", "test"):
        np.save(folder / f"{split}_ims.npy", np.asarray(features, dtype=np.float32))
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
    return f"precomputed:{folder}"


def karpathy(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Three pictures per split with two captions each, then changed for the worse."""
    (folder / "images").mkdir(parents=True)
    record: dict[str, Any] = {"images": []}
    for number, split in enumerate(["train", "val", "test"] * 3):
        name = f"p{number}.png"
        Image.new("RGB", (20, 20), (number * 20, 0, 0)).save(folder / "images" / name)
        sentences = [{"raw": f"picture {number}"}, {"raw": f"number {number}"}]
        record["images"].append({"filename": name, "split": split, "sentences": sentences})
    change(record)
    (folder / "dataset.json").write_text(json.dumps(record))
    return f"karpathy:{folder}"


def without_picture(tmp: Path) -> tuple[str, list[str]]:
    data = karpathy(tmp / "d", lambda record: record["images"][3].update(filename="gone.png"))
    return data, ["dataset.json: images[3]", "'gone.png'", "restore it or remove the record"]


def without_caption(tmp: Path) -> tuple[str, list[str]]:
    data = karpathy(tmp / "d", lambda record: record["images"][3].update(sentences=[]))
    return data, ["karpathy:d [train]", "'p3' has no caption", "caption it or remove it"]


def wrong_json(tmp: Path) -> tuple[str, list[str]]:
    data = karpathy(tmp / "d", lambda record: None)
    path = tmp / "d" / "dataset.json"
    path.write_text(path.read_text()[:-30])
    return data, ["dataset.json", "not valid JSON at line 1", "correct it"]


def missing_path(tmp: Path) -> tuple[str, list[str]]:
    return f"karpathy:{tmp / 'nowhere'}", [str(tmp / "nowhere"), "check the path"]


def unknown_kind(tmp: Path) -> tuple[str, list[str]]:
    return f"cocoa:{tmp / 'nowhere'}", ["unknown kind 'cocoa'", "choose from"]


def not_finite(tmp: Path) -> tuple[str, list[str]]:
    features = np.ones((4, 3))
    features[2, 1] = np.nan
    return precomputed(tmp / "d", ["a"] * 20, features), ["train_ims.npy: row 2 is not finite", "compute its features"]


def rows_that_do_not_divide(tmp: Path) -> tuple[str, list[str]]:
    data = precomputed(tmp / "d", ["a"] * 20, np.ones((3, 3)))
    return data, ["train_ims.npy: 3 rows for 20 captions", "owners.npy"]


def broken_picture(tmp: Path) -> tuple[str, list[str]]:
    data = karpathy(tmp / "d", lambda record: None)
    path = tmp / "d" / "images" / "p3.png"
    path.write_bytes(path.read_bytes()[:60])
    return data, [str(path), "replace or remove it"]


BAD_DATA = [
    missing_path,
    unknown_kind,
    without_picture,
    without_caption,
    wrong_json,
    not_finite,
    rows_that_do_not_divide,
    broken_picture,
]


@pytest.mark.parametrize("bad", BAD_DATA)
def test_training_on_bad_data_ends_in_one_line(
    bad: Callable[[Path], tuple[str, list[str]]], vse: Vse, tmp_path: Path
) -> None:
    data, told = bad(tmp_path)
    settings = FEATURES if data.startswith("precomputed") else SMALL
    refused(vse("train", "--data", data, "--out", tmp_path / "run", *settings), *told)
    assert not (tmp_path / "run").exists()


def test_unknown_recipe_and_settings(vse: Vse, tmp_path: Path) -> None:
    place = ["--data", "scenes:60", "--out", tmp_path / "run"]
    refused(vse("train", "no-such-recipe", *place), "no-such-recipe: no such recipe")
    recipe = tmp_path / "r.toml"
    recipe.write_text("[optim]\nlearning_rate = 1.0\n")
    refused(vse("train", recipe, *place), recipe, "'optim.learning_rate'", "known here: optimizer, lr")
    refused(vse("train", *place, "--optim.batch-size", 1), "optim.batch_size = 1 must be at least 2")
    for setting in (["--optim.speed", "3"], ["--optim.lr", "fast"], ["--loss.name", "hinge"]):
        ended = vse("train", *place, *setting)
        assert ended.status == 2
        assert setting[0] in ended.err
    assert not (tmp_path / "run").exists()


def test_resume_without_a_run_and_a_run_without_resume(vse: Vse, run_directory: Path, tmp_path: Path) -> None:
    refused(vse("train", "--resume", "--out", tmp_path / "none"), tmp_path / "none", "nothing to resume")
    refused(vse("train", "--data", "scenes:60", "--out", run_directory, *SMALL), run_directory, "add --resume")
    ended = vse("train", "--resume", "--out", run_directory)
    assert ended.status == 0
    assert "best validation rSum" in ended.out


def test_unknown_arguments_are_refused_by_every_other_verb(vse: Vse) -> None:
    ended = vse("data", "vocab", "scenes:60", "--fast")
    assert ended.status == 2
    assert "unrecognized arguments: --fast" in ended.err


def test_evaluate_writes_the_contract(vse: Vse, scenes: Path, run_directory: Path, tmp_path: Path) -> None:
    data = f"karpathy:{scenes}"
    ended = vse("evaluate", run_directory, "--data", data, "--json", tmp_path / "figures.json", "--worst", 2)
    assert ended.status == 0
    assert "[test]: 3 images, 15 captions" in ended.out
    assert "worst captions" in ended.out
    record = json.loads((tmp_path / "figures.json").read_text())
    assert list(record) == ["data", "split", "images", "captions", "i2t", "t2i", "rsum", "ties"]
    assert (record["data"], record["split"], record["images"], record["captions"]) == (data, "test", 3, 15)
    for direction in ("i2t", "t2i"):
        assert list(record[direction]) == ["r1", "r5", "r10", "medr", "meanr"]
    recalls = [record[direction][recall] for direction in ("i2t", "t2i") for recall in ("r1", "r5", "r10")]
    assert record["rsum"] == pytest.approx(sum(recalls))
    piped = vse("evaluate", run_directory, "--data", data, "--json", "-", "--worst", 2)
    assert json.loads(piped.out) == record
    assert "worst captions" in piped.err
    folds = vse("evaluate", run_directory, "--data", data, "--folds", 3, "--json", "-")
    assert json.loads(folds.out)["folds"] == 3


def test_evaluate_refuses(vse: Vse, scenes: Path, run_directory: Path, tmp_path: Path) -> None:
    data, json_file = f"karpathy:{scenes}", tmp_path / "figures.json"
    evaluate = ["evaluate", run_directory, "--json", json_file, "--data"]
    refused(vse(*evaluate, data, "--split", "dev"), "no images in split 'dev'", "train (24 images)")
    refused(vse(*evaluate, data, "--folds", 2), "2 folds do not divide 3 images", "choose a divisor")
    refused(vse(*evaluate, tmp_path / "nowhere"), tmp_path / "nowhere", "check the path")
    features = precomputed(tmp_path / "d", ["a"] * 20, np.ones((4, 3)))
    refused(vse(*evaluate, features), "precomputed:d", "the model takes pictures")
    refused(vse("evaluate", tmp_path, "--data", data), tmp_path / "config.json", "vse train")
    assert not json_file.exists()


def test_weights_of_another_configuration_are_refused(
    vse: Vse, scenes: Path, run_directory: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(run_directory, tmp_path / "run")
    config = run / "config.json"
    config.write_text(config.read_text().replace('"dim": 8', '"dim": 12'))
    refused(vse("evaluate", run, "--data", f"karpathy:{scenes}"), run / "model.safetensors", "restore")


def test_search_and_index_refuse(vse: Vse, gallery: Path, run_directory: Path, scenes: Path, tmp_path: Path) -> None:
    nowhere, picture = tmp_path / "nowhere", next((scenes / "images").iterdir())
    refused(vse("search", nowhere, "a disc"), nowhere / "gallery.json", "check the path")
    refused(vse("index", nowhere, "info"), nowhere / "gallery.json", "check the path")
    refused(vse("index", nowhere, "remove", picture), nowhere / "gallery.json", "check the path")
    refused(vse("search", gallery), "give a text, --image FILE or both")
    refused(vse("search", gallery, "a disc", "--like", 1), "give a text, --image FILE or both; or --like")
    refused(vse("search", gallery, "--like", tmp_path / "none.jpg"), "none.jpg: is not in")
    refused(vse("search", gallery, "a disc", "--where", "year"), "'year'", "FIELD=VALUE")
    refused(vse("search", gallery, "a disc", "--querybank"), "no query bank")
    refused(vse("index", gallery, "remove"), "name files or folders")
    refused(vse("index", gallery, "tune", "--queries", tmp_path / "none"), tmp_path / "none")
    refused(vse("search", gallery, "  "), "the query is empty")
    refused(vse("search", gallery, "a disc", "-k", 0), "-k", "give 1 or more")
    refused(vse("search", gallery, "--image", tmp_path / "none.jpg"), tmp_path / "none.jpg", "check the path")
    refused(vse("index", nowhere, "add", picture), nowhere, "add --model RUN")
    refused(vse("index", nowhere, "add", tmp_path / "none", "--model", run_directory), tmp_path / "none")
    refused(vse("index", nowhere, "add", picture, "--model", tmp_path / "none"), tmp_path / "none", "vse train")
    assert not nowhere.exists()


def test_a_gallery_of_another_model_is_refused(vse: Vse, scenes: Path, run_directory: Path, tmp_path: Path) -> None:
    picture, model = next((scenes / "images").iterdir()), shutil.copytree(run_directory, tmp_path / "model")
    gallery = tmp_path / "gallery"
    assert vse("index", gallery, "add", picture, "--model", model).status == 0
    before = {path: path.read_bytes() for path in gallery.rglob("*") if path.is_file()}
    shutil.rmtree(model)
    train = ["train", "--data", f"karpathy:{scenes}", "--out", model, *SMALL, "--seed", "1"]
    assert vse(*train).status == 0
    refused(vse("search", gallery, "a disc"), gallery, "build a new gallery")
    refused(vse("index", gallery, "add", picture, "--model", model), gallery, "build a new gallery")
    assert {path: path.read_bytes() for path in before} == before
    assert vse("index", gallery, "add", picture, "--model", run_directory).status == 0  # the same weights elsewhere


def test_a_model_of_features_cannot_index_pictures(vse: Vse, scenes: Path, tmp_path: Path) -> None:
    data = precomputed(tmp_path / "d", ["a b", "c d"] * 10, np.random.default_rng(0).normal(size=(4, 3)))
    assert vse("train", "--data", data, "--out", tmp_path / "run", *FEATURES).status == 0
    add = vse("index", tmp_path / "gallery", "add", scenes / "images", "--model", tmp_path / "run")
    refused(add, "trained on precomputed features")
    assert not (tmp_path / "gallery").exists()


def test_captions_of_ten_thousand_words_train(vse: Vse, tmp_path: Path) -> None:
    captions = [" ".join(f"w{(n * k) % 97}" for k in range(10_000)) for n in range(1, 21)]
    data = precomputed(tmp_path / "d", captions, np.random.default_rng(0).normal(size=(4, 3)))
    ended = vse("train", "--data", data, "--out", tmp_path / "run", *FEATURES)
    assert ended.status == 0
    checked = vse("data", "check", data, "--json")
    assert [split["longer_than_max_tokens"] for split in json.loads(checked.out)["splits"]] == [20, 20, 20]


def test_data_check_reports_every_bad_picture(vse: Vse, tmp_path: Path) -> None:
    data = karpathy(tmp_path / "d", lambda record: None)
    good = vse("data", "check", data)
    assert good.status == 0
    assert re.search(r"train +3 +6 +2 +2 +0\n", good.out)
    assert good.out.endswith("no problems\n")
    for name in ("p3.png", "p4.png"):
        (tmp_path / "d" / "images" / name).write_bytes(b"no picture")
    bad = vse("data", "check", data)
    assert bad.status == 2
    assert "2 problems" in bad.out
    problems = json.loads(vse("data", "check", data, "--json", "--split", "val").out)["problems"]
    assert [str(tmp_path / "d" / "images" / "p4.png") in problem for problem in problems] == [True]


@pytest.mark.parametrize("bad", [missing_path, without_picture, without_caption, wrong_json])
def test_data_check_names_what_training_would_refuse(
    bad: Callable[[Path], tuple[str, list[str]]], vse: Vse, tmp_path: Path
) -> None:
    data, told = bad(tmp_path)
    ended = vse("data", "check", data)
    assert ended.status == 2
    assert all(text in ended.out + ended.err for text in told)


def test_data_vocab_lists_frequent_words(vse: Vse, tmp_path: Path) -> None:
    data = precomputed(tmp_path / "d", ["red disc", "red square", "blue disc", "red disc", "Red hat"], np.ones((1, 3)))
    ended = vse("data", "vocab", data, "--min-count", 3)
    assert ended.out.split() == ["disc", "red"]
    assert "2 words seen at least 3 times" in ended.err


def test_features_train_and_evaluate(
    vse: Vse, shared_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSE_MODELS", str(shared_models))
    data, out = karpathy(tmp_path / "d", lambda record: None), tmp_path / "features"
    encoder = ["--image-encoder", "torchvision:mobilenet_v2", "--size", 64]
    missing = vse("features", data, *encoder, "--splits", "train", "dev", "--out", out)
    refused(missing, "no images in split 'dev'")
    assert not out.exists()
    ended = vse("features", data, *encoder, "--splits", "train", "val", "test", "--out", out)
    assert ended.status == 0
    assert f"{out}: dev: 3 images, 6 captions, 1280 wide" in ended.out
    before = {path: path.read_bytes() for path in out.iterdir()}
    refused(
        vse("features", data, *encoder, "--splits", "test", "--out", out), "is there already; choose another --out"
    )
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    refused(vse("features", f"precomputed:{out}", *encoder, "--out", tmp_path / "again"), "holds features already")
    refused(vse("features", data, "--image-encoder", "precomputed", "--out", tmp_path / "again"), "is not pretrained")
    assert vse("train", "--data", f"precomputed:{out}", "--out", tmp_path / "run", *FEATURES).status == 0
    evaluated = vse("evaluate", tmp_path / "run", "--data", f"precomputed:{out}", "--json", "-")
    assert json.loads(evaluated.out)["captions"] == 6


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    data = precomputed(tmp_path / "d", [f"word{n}" for n in range(20)], np.ones((4, 3)))
    command = [sys.executable, "-m", "vse_app.cli", "data", "vocab", data, "--min-count", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr is not None
    assert len(process.stderr.read().splitlines()) == 1


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
        with pytest.raises(SystemExit):
            main(["--help"])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
