from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import colours
import pytest

from training.robustness import audit as audit_module
from vse_app.audit_report import format_report
from vse_app.cli import main

SIZES = ["--queries", "8", "--steps", "4", "--epsilons", "2/255", "16/255", "--quick"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    colours.draw(folder, 16)
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours.train(f"folder:{photos}", tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def record(photos: Path, run: Path) -> dict[str, Any]:
    main(["audit", str(run), "--data", f"folder:{photos}", "--split", "all", *SIZES])
    found: dict[str, Any] = json.loads((run / "audit" / "audit.json").read_text(encoding="utf-8"))
    return found


def test_the_whole_report(photos: Path, run: Path, record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", str(run), "--data", f"folder:{photos}", "--split", "all", *SIZES])  # from its parts
    printed = capsys.readouterr().out
    for threat in audit_module.THREATS:
        assert f"{threat}: " in printed
    assert printed.count("16/255") >= 3
    assert "upper bound" in printed
    assert "certified" in printed
    assert "13 random search adds nothing" in printed
    assert ("all checks passed" in printed) == record["trustworthy"]
    assert ("NOT TRUSTWORTHY" in printed) != record["trustworthy"]
    assert set(record["bounds"]) >= {"recall", "success", "epsilon50", "certified"}
    assert (run / "audit" / "audit.txt").read_text(encoding="utf-8") in printed
    assert record["config"]["queries"] == 8
    assert record["config"]["others"] == 1


def test_parquet_has_a_row_for_every_search_and_level(record: dict[str, Any], run: Path) -> None:
    from pyarrow import parquet

    rows = parquet.read_table(run / "audit" / "queries.parquet").to_pylist()
    attacked = [row for row in rows if row["threat"] == "query-image"]
    assert len(attacked) == 8 * 3
    for row in attacked:
        of = record["threats"]["query-image"]
        place = [at["epsilon"] for at in of["curve"]].index(row["epsilon"])
        assert of["ranks"][place][of["ids"].index(row["id"])] == [row["rank"]]
    assert {row["level"] for row in rows if row["threat"] == "query-text"} == {"clean", "edited"}
    assert "fog-3" in {row["level"] for row in rows if row["threat"] == "corruption"}


def test_a_failed_check_marks_the_report(record: dict[str, Any]) -> None:
    broken = {**record, "checks": [{**record["checks"][0], "passed": False}, *record["checks"][1:]]}
    assert "NOT TRUSTWORTHY: check 1" in format_report(broken)


def test_json_is_json(run: Path, record: dict[str, Any]) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads((run / "audit" / "audit.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_other_norms_and_single_threats(
    photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fourier = ("fourier-linf", "fourier-linf[0,0.5]", "fourier-linf/f", "fourier-linf/f[0,0.5]")
    for norm, radius in (("l2", "0.5"), ("l1", "3"), *((name, "8/255") for name in fourier)):
        out = tmp_path / norm
        command = ["audit", str(run), "--data", f"folder:{photos}", "--split", "all", "--no-plot", "--out", str(out)]
        main(
            [
                *command,
                "--threat",
                "gallery-owner",
                "--queries",
                "3",
                "--steps",
                "3",
                "--norm",
                norm,
                "--epsilons",
                radius,
            ]
        )
        found = json.loads((out / "audit.json").read_text(encoding="utf-8"))
        assert list(found["threats"]) == ["gallery-owner"]
        assert found["trustworthy"] is None
        assert found["threats"]["gallery-owner"]["violation"] <= 1e-5
        assert norm in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilons", "8"], "ε = 8: pixels go from 0 to 1, so must ε; write 8/255"),
        (["--epsilons", "2/255", "1/255"], "ascending"),
        (["--epsilons", "some"], "not a number"),
        (["--norm", "l2"], "add --epsilons"),
        (["--norm", "l3", "--epsilons", "1"], "'l3' is unknown"),
        (["--norm", "fourier-linf/f2", "--epsilons", "1"], "fourier-linf/f, or one of the last two in a band"),
        (["--norm", "fourier-linf[0.01,0.02]", "--epsilons", "1"], "no frequency of 16 × 16 pixels lies in the band"),
        (["--threat", "query-smell"], "choose from query-image"),
        (["--queries", "-3"], "at least 1"),
        (["--characters", "0"], "characters"),
        (["--synonyms", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], message: str, photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit"
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(run), "--data", f"folder:{photos}", "--split", "all", "--out", str(out), *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.strip().count("\n") == 0
    assert not out.exists()


def test_missing_parquet_is_said(
    photos: Path, run: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with caplog.at_level("INFO"):
        main(["audit", str(run), "--data", f"folder:{photos}", "--split", "all", *SIZES, "--no-plot"])
    assert "pip install 'vse-app[exchange]'" in caplog.text
