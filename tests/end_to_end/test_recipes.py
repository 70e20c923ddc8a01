"""Every recipe trains, shortened, on generated data in the layout that it is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from training.data.formats.scenes import write_scenes
from vse_app.cli import main

TINY = ["--model.dim", "16", "--optim.epochs", "1", "--optim.batch-size", "32", "--model.image.size", "32"]
MOBILENET = "torchvision:mobilenet_v2"  # stands in for the ResNet, whose weights are not at hand


@pytest.fixture(autouse=True)
def _mirror(shared_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSE_MODELS", str(shared_models))


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    """Karpathy's layout of Flickr: every picture in ``images``."""
    write_scenes(tmp_path / "flickr", 40, 0)
    return tmp_path / "flickr"


@pytest.fixture
def coco(flickr: Path, tmp_path: Path) -> Path:
    """Karpathy's layout of COCO: pictures in two folders, some of the validation ones kept for training."""
    root = tmp_path / "coco"
    (file,) = flickr.glob("dataset*.json")
    dataset = json.loads(file.read_text(encoding="utf-8"))
    for number, image in enumerate(dataset["images"]):
        image["filepath"] = "train2014" if image["split"] == "train" and number % 4 else "val2014"
        if image["split"] == "train" and image["filepath"] == "val2014":
            image["split"] = "restval"
        (root / image["filepath"]).mkdir(parents=True, exist_ok=True)
        shutil.move(flickr / "images" / image["filename"], root / image["filepath"] / image["filename"])
    (root / "dataset_coco.json").write_text(json.dumps(dataset), encoding="utf-8")
    return root


def train(recipe: str, data: str, out: Path, *settings: str) -> Any:
    main(["train", recipe, "--data", data, "--out", str(out), *TINY, *settings])
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(record for record in logged if record["kind"] == "validation")


@pytest.mark.parametrize("loss", ["infonce", "curriculum"])
def test_flickr8k_frozen(flickr: Path, tmp_path: Path, loss: str) -> None:
    metrics = train("flickr8k_frozen", f"karpathy:{flickr}", tmp_path / "run", "--loss.name", loss)
    assert (metrics["images"], metrics["captions"]) == (4, 20)


def test_flickr8k_robust(flickr: Path, tmp_path: Path) -> None:
    train("flickr8k_frozen", f"karpathy:{flickr}", tmp_path / "small")
    metrics = train("flickr8k_robust", f"karpathy:{flickr}", tmp_path / "run", "--init", str(tmp_path / "small"))
    assert (metrics["images"], metrics["captions"]) == (4, 20)


def test_flickr8k_vsepp(flickr: Path, tmp_path: Path) -> None:
    features = tmp_path / "precomp"
    encoder = "hf:timm/tf_efficientnet_lite0.in1k"
    main(["features", f"karpathy:{flickr}", "--image-encoder", encoder, "--size", "32", "--out", str(features)])
    metrics = train("flickr8k_vsepp", f"precomputed:{features}", tmp_path / "run", "--model.text.min-count", "1")
    assert (metrics["images"], metrics["captions"]) == (4, 20)


def test_flickr30k_vsepp(flickr: Path, tmp_path: Path) -> None:
    metrics = train("flickr30k_vsepp", f"karpathy:{flickr}", tmp_path / "run", "--model.image.encoder", MOBILENET)
    assert metrics["split"] == "val"


def test_coco_vsepp(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = train("coco_vsepp", f"karpathy:{coco}", tmp_path / "run", "--model.image.encoder", MOBILENET)
    assert (metrics["images"], metrics["captions"]) == (4, 20)
    main(["evaluate", str(tmp_path / "run"), "--data", f"karpathy:{coco}", "--split", "test", "--folds", "2"])
    assert "mean of 2 folds" in capsys.readouterr().out
