from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from training.robustness.linear import study
from training.robustness.linear.study import OPTIMISERS, QUICK, Study
from vse_app.cli import main

SMALL = replace(
    QUICK, dim=40, ratios=(4, 8), steps=2000, net_ratios=(8,), net_steps=4000, sweep_ratios=(4,), sweep_steps=1500
)


def test_each_optimiser_wins_in_its_own_norm() -> None:
    record = Study(SMALL).run()
    rows = [row for row in record["margins"] if row["name"] in OPTIMISERS]
    assert len(rows) == 2 * 3
    for row in rows:
        own = OPTIMISERS[row["name"]]
        assert row["shares"][own] > 0.9
        assert max(row["shares"].values()) < 1 + 1e-6
        for other in rows:
            if other["ratio"] == row["ratio"] and other is not row:
                assert other["shares"][own] < row["shares"][own] - 0.1
        stay = row["stay"][own]
        assert stay == sorted(stay, reverse=True)
        assert stay[0] == 1
    net, linear = record["nets"]
    assert net["shares"]["fourier-l1"] > linear["shares"]["fourier-l1"] + 0.1
    lost = {row["share"]: row["robust_error"] for row in record["adversarial"]}
    assert lost[0] == lost[0.5] == 0 < lost[1.1]
    assert json.loads(json.dumps(record)) == json.loads(json.dumps(Study(SMALL).run()))


def test_the_verb_writes_tables_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "QUICK", SMALL)
    main(["bias", "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for heading in ("Optimisers, 2,000 steps", "convolutions, two layers", "λ = 0.1", "ε = 1.1 ε*"):
        assert heading in printed
    assert (tmp_path / "bias.txt").read_text().strip() in printed
    assert json.loads((tmp_path / "bias.json").read_text())["config"]["dim"] == 40
    for name in ("optimisers.png", "sweeps.png", "fourier.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800


def test_no_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bias", "--seeds", "0"])
    assert capsys.readouterr().err.strip() == "vse: bias: dimensions, ratios, seeds and steps must be above 0"
