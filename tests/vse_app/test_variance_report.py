from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.formats import load_corpus
from vse_app.cli import main


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noisy pictures with two captions each; one picture and its first caption are there nine more times."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    lines = ["image,caption,split"]
    for number in range(12):
        pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
        names = [f"picture{number}.png"] + [f"copy{c}.png" for c in range(9) if number == 0]
        for name in names:
            Image.fromarray(pixels).save(folder / name)
            lines.append(f"{name},word{number} shape{number % 5},train")
        lines.append(f"picture{number}.png,other{number} side{number % 3},train")
    for number in range(4):
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"val{number}.png")
        lines.append(f"val{number}.png,word{number},val")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    main(
        f"train --data folder:{photos} --out {out} --model.image.size 32 --model.dim 16 --model.text.word-dim 8 "
        "--model.text.min-count 1 --optim.epochs 2 --optim.batch-size 8 --clusters.count 6".split()
    )
    return out


def test_the_whole_report(photos: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    main(["variance", str(run), "--draws", "20", "--dedup", str(kept)])
    printed = capsys.readouterr().out
    assert "9 of 33 pairs (27.27%) are copies of another" in printed
    assert "10 × “word0 shape0”" in printed
    for heading in ("before training", "after epoch 1", "after epoch 2"):
        assert heading in printed
    record = json.loads((run / "variance" / "variance.json").read_text())
    assert (record["images"], record["captions"], record["copies"]) == (21, 33, 9)
    assert len(record["groups"]) == 1
    for point in record["points"]:
        uniform = point["samplers"]["uniform"]
        assert uniform["ratio"] == 1
        assert point["samplers"]["doubled batch"]["ratio"] == pytest.approx(0.5)
        assert point["samplers"]["clustered, proportional"]["ratio"] <= 1.02
        for name, of in point["samplers"].items():
            assert of["variance"] / uniform["variance"] == pytest.approx(of["ratio"], rel=1), name  # 20 draws
            assert 0 <= of["normalised"] <= 1
    for name in ("variance.png", "copies.png"):
        with Image.open(run / "variance" / name) as picture:
            assert min(picture.size) > 100
    corpus = load_corpus(f"dedup:{kept}", "train")
    assert corpus.weights is not None
    assert (len(corpus), len(corpus.image_ids), corpus.weights.sum()) == (24, 12, 33)
    main(["train", "--data", f"dedup:{kept}", "--out", str(tmp_path / "run"), "--optim.epochs", "1"])


def test_the_run_is_left_as_it_was(run: Path, tmp_path: Path) -> None:
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "variance" not in p.parts}
    main(["variance", str(run), "--epochs", "0", "--draws", "8", "--out", str(tmp_path / "report")])
    assert {p: p.read_bytes() for p in files} == files
    points = json.loads((tmp_path / "report" / "variance.json").read_text())["points"]
    assert [point["epoch"] for point in points] == [0]


def test_without_matplotlib(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = ["variance", str(run), "--epochs", "0", "--draws", "8", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "pip install 'vse-app[plots]' or add --no-plot" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # before it has worked for minutes
    main([*command, "--no-plot"])
    assert (tmp_path / "variance.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/config.toml: "),
        (["RUN", "--draws", "3"], "--draws 3: "),
        (["RUN", "--epochs", "-1"], "--epochs -1: "),
    ],
)
def test_bad_input(arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["variance", *(str(run) if a == "RUN" else a for a in arguments)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
