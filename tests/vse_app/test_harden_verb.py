"""``vse harden`` as a user runs it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import colours
import pytest
from PIL import Image

from training.robustness.linear.head_training import ATTACKS
from training.robustness.linear.retrieval_heads import HEAD_OPTIMIZERS, HEAD_REGULARIZERS
from vse_app import harden_verb
from vse_app.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    data = colours.draw(tmp_path_factory.mktemp("photos"), 24)
    return data, colours.train(data, tmp_path_factory.mktemp("runs") / "run")


def harden(trained: tuple[str, Path], out: Path, *more: str) -> dict[str, Any]:
    data, run = trained
    splits = ["--train-split", "all", "--split", "all"]
    main(["harden", str(run), "--data", data, "--out", str(out), *splits, *more])
    record: dict[str, Any] = json.loads((out / "harden.json").read_text(encoding="utf-8"))
    return record


def recall(run: Path, data: str, file: Path) -> dict[str, float]:
    main(["evaluate", str(run), "--data", data, "--split", "all", "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    return {"clean": found["i2t"]["r1"], "clean_texts": found["t2i"]["r1"]}


def test_the_table_is_about_the_run_that_is_written(
    trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = harden(trained, tmp_path / "new", "--norm", "linf")
    printed = capsys.readouterr().out
    assert list(record["heads"]) == ["the run's own", "gradient descent", "gradient + ℓ∞ margin"]
    for label, row in record["heads"].items():
        assert f"{label:24}{row['clean']:8.1f}{row['clean_texts']:8.1f}" in printed
        for norm in ("linf", "l2", "l1"):
            assert row["clean"] >= row[norm][0] >= row[norm][1]
    data, run = trained
    for label, of in (("the run's own", run), ("gradient + ℓ∞ margin", tmp_path / "new")):
        for direction, value in recall(of, data, tmp_path / "recall.json").items():
            assert record["heads"][label][direction] == pytest.approx(value)
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "gradient + ℓ∞ margin" in card
    assert "(certified.png)" in card
    for row in record["heads"].values():
        for norm, curve in row["curves"].items():
            assert curve[0] == row["clean"]  # certified at radius 0 is found
            assert curve == sorted(curve, reverse=True)
            half = record["radii"][norm][0]
            after = next(n for n, radius in enumerate(record["curve_radii"][norm]) if radius >= half)
            assert curve[after - 1] >= row[norm][0] >= curve[after]
    with Image.open(tmp_path / "new" / "certified.png") as picture:
        assert picture.width > 800


def test_optimisers_and_penalties_have_their_rows(trained: tuple[str, Path], tmp_path: Path) -> None:
    few = ["--steps", "8", "--penalties", "0.3"]
    record = harden(trained, tmp_path / "a", "--head-optimizer", "sign", "--head-regularizer", "none", *few)
    assert list(record["heads"])[2] == "sign descent"
    assert record["penalty"] == 0
    record = harden(trained, tmp_path / "a", "--head-regularizer", "l1", *few)  # in the place of the former
    assert list(record["heads"])[2] == "gradient + l1 of W"
    assert record["penalty"] == 0.3
    record = harden(trained, tmp_path / "c", "--head-regularizer", "none", *few)
    assert len(record["heads"]) == 2


def test_without_matplotlib(
    trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "new"
    with pytest.raises(SystemExit):
        harden(trained, out)
    assert "pip install 'vse-app[plots]' or add --no-plot" in capsys.readouterr().err
    assert not out.exists()
    harden(trained, out, "--no-plot", "--head-regularizer", "none", "--steps", "2")
    assert not (out / "certified.png").exists()
    assert "certified.png" not in (out / "README.md").read_text(encoding="utf-8")


def test_the_choices_are_those_of_the_library() -> None:
    parser = argparse.ArgumentParser()
    harden_verb.add_parser(parser.add_subparsers())
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    choices = {action.dest: action.choices for action in verbs.choices["harden"]._actions}
    assert choices["head_optimizer"] == list(HEAD_OPTIMIZERS)
    assert choices["head_regularizer"] == list(HEAD_REGULARIZERS)
    assert choices["norm"] == list(ATTACKS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--head-optimizer", "sign", "--head-regularizer", "l1"], "optimizer gradient only"),
        (["--penalties", "-1"], "penalty -1"),
        (["--batch", "1"], "batch 1"),
        (["--split", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        harden(trained, tmp_path / "new", *more)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2
    assert error.startswith("vse: ")
    assert message in error
    assert not (tmp_path / "new").exists()


def test_the_run_itself_is_not_overwritten(trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harden(trained, trained[1])
    assert "holds a run, whose head would be lost" in capsys.readouterr().err
