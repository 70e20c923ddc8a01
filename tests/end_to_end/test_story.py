"""What a user does, with nothing but the program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.config import Config, OptimConfig, read_toml
from training.trainer import Trainer
from vse_app import demo
from vse_app.cli import main


def test_from_data_to_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def vse(*arguments: object) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    def answer(*arguments: object) -> Any:
        return json.loads(vse(*arguments, "--json"))

    scenes, run, gallery = tmp_path / "scenes", tmp_path / "run", tmp_path / "gallery"
    data = f"karpathy:{scenes}"
    vse("data", "scenes", scenes, "--count", 60)
    assert "no problems" in vse("data", "check", data)
    vse(
        "train",
        "scenes",
        "--data",
        data,
        "--out",
        run,
        "--optim.epochs",
        1,
        "--model.dim",
        32,
        "--model.image.size",
        32,
    )
    metrics = json.loads(vse("evaluate", run, "--data", data, "--split", "test", "--json", "-"))
    assert (metrics["images"], metrics["captions"]) == (6, 30)

    photos = tmp_path / "photos"
    shutil.copytree(scenes / "images", photos / "holiday")
    whole = sorted((photos / "holiday").iterdir())
    Image.open(whole[0]).resize((400, 300)).save(photos / "large.jpg")
    Image.open(whole[1]).convert("L").save(photos / "grey.PNG")
    (photos / "notes.txt").write_text("not a picture and not called one")
    truncated, text, empty = photos / "truncated.jpg", photos / "text.jpg", photos / "empty.png"
    truncated.write_bytes((photos / "large.jpg").read_bytes()[:2000])
    text.write_text("I am a letter")
    empty.touch()

    report = answer("index", gallery, "add", photos, "--model", run)
    assert (report["added"], report["unchanged"], report["items"]) == (62, 0, 62)
    assert {refusal["path"] for refusal in report["refused"]} == {str(truncated), str(text), str(empty)}
    assert all(refusal["reason"] for refusal in report["refused"])

    for picture in (whole[0], photos / "grey.PNG"):
        best = answer("search", gallery, "--image", picture, "-k", 3)
        assert (len(best), best[0]["path"]) == (3, str(picture))
        assert best[0]["score"] == pytest.approx(1, abs=1e-4)
    hits = answer("search", gallery, "a red disc left of a blue square")
    assert len(hits) == 10
    assert hits == sorted(hits, key=lambda hit: -hit["score"])
    assert str(whole[0]) in vse("search", gallery, "a red disc", "-k", 62)

    again = answer("index", gallery, "add", photos)
    assert (again["added"], again["unchanged"], again["items"]) == (0, 62, 62)
    assert len(again["refused"]) == 3

    assert "1 removed, 0 not there; 61 pictures" in vse("index", gallery, "remove", whole[0])
    assert whole[0].exists()
    assert str(whole[0]) not in vse("search", gallery, "a red disc", "-k", 62)
    info = answer("index", gallery, "info")
    assert (info["items"], info["dim"], info["metric"]) == (61, 32, "cosine")
    assert info["model"]["name"] == str(run)


def test_demo_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_toml(demo.RECIPE)
    short = Config(model=recipe.model, loss=recipe.loss, optim=OptimConfig(lr=1e-3, epochs=1))
    monkeypatch.setattr(demo, "read_toml", lambda path: short)
    main(["demo", "--out", str(tmp_path), "--scenes", "200", "--no-browser"])
    told = capsys.readouterr().out
    assert "scenes:200 [test]: 20 images, 100 captions" in told
    assert f"{tmp_path / 'gallery'}: 20 pictures" in told
    with Image.open(tmp_path / "searches.png") as sheet:
        assert sheet.height > 4 * 100
    weights = (tmp_path / "run" / "model.safetensors").stat()

    def no_step(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "_train_step", no_step)
    demo.run_demo(tmp_path, 200)
    assert f"{tmp_path / 'gallery'}: 20 pictures" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
