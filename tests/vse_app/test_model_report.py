from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from training.config import Config, to_toml
from vse_app.model_report import ModelReport, read_report
from vse_app.report_parts import Section
from vse_app.web.charts import Series, line_chart

GALLERY: dict[str, Any] = {
    "items": 600,
    "dim": 16,
    "metric": "cosine",
    "model": {"name": "/somewhere/runs/scenes", "checksum": "sha256:abc"},
    "search": "exact, not tuned",
}
HOSTILE = "<script>alert(1)</script>"
WHERE = "scenes:120 [test], 12 images, 1,060 captions"
PARTS = ("summary", "recall", "training", "sampler", "audit", "card")


def metrics(rsum: float = 325.0, split: str = "test", data: str = "scenes:120") -> dict[str, Any]:
    direction = {"r1": 8.3, "r5": 41.7, "r10": 75.0, "medr": 6, "meanr": 10.8}
    counts = {"images": 12, "captions": 1060, "rsum": rsum, "ties": 0}
    return {"data": data, "split": split, **counts, "i2t": direction, "t2i": direction}


def audit_record(data: str = "scenes:120") -> dict[str, Any]:
    def rate(value: float | None) -> dict[str, float | None]:
        return {"value": value, "low": value, "high": value}

    point = {name: rate(12.5) for name in ("r1", "r5", "r10", "asr1")} | {"asr10": rate(None), "medr": 4.0}
    curve = [{"epsilon": 0.0, **point}, {"epsilon": 2 / 255, **point}]
    row = {"radius": 0.1, "certified": 12.5, "attacked": 50.0}
    middle = {"value": 0.0056, "low": 0.005, "high": None}
    return {
        **{"data": data, "split": "test", "images": 12, "captions": 1060, "model": "sha256:abc"},
        "config": {"norm": "linf", "seed": 0, "steps": 50},
        "trustworthy": True,
        "checks": [
            {"number": n, "name": f"name {n}", "passed": True, "explanation": f"said {n}"} for n in range(1, 14)
        ],
        "threats": {
            "query-image": {"queries": 8, "curve": curve, "epsilon50": middle, "unbroken": 1},
            "gallery-promote": {"queries": 1, "curve": curve},
            "query-text": {"queries": 1, "clean": point, "attacked": point},
            "corruption": {"queries": 1, "r1": {"fog": {}}, "clean": rate(50.0), "mean_r1": 25.0},
        },
        "certificates": {"l2": {"table": [row], "flips": 0, "tried": 10200}},
    }


def variance_record() -> dict[str, Any]:
    sampler = {"ratio": 1.0, "draws": 20, "variance": 2.0, "low": 1.0, "high": 3.0}
    points = [{"epoch": epoch, "samplers": {"uniform": sampler, HOSTILE: sampler}} for epoch in range(4)]
    counts = {"images": 96, "captions": 480, "copies": 2}
    return {"data": "scenes:120", "split": "train", **counts, "groups": [["a#1", "a#4"]], "points": points}


def write(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Every file that the page reads, as the commands write them."""
    run = tmp_path / "run"
    write(run / "test.json", metrics())
    write(run / "vocabulary.json", ["a", "b"])
    write(run / "audit" / "audit.json", audit_record())
    write(run / "variance" / "variance.json", variance_record())
    (run / "config.toml").write_text(to_toml(Config(data="scenes:120", out="run")), encoding="utf-8")
    (run / "README.md").write_text("---\nlibrary_name: vse\n---\n# Card\n", encoding="utf-8")
    lines: list[dict[str, Any]] = [{"step": step, "kind": "train", "loss": 4 - step / 100} for step in (0, 50, 100)]
    lines += [{"step": 60, "kind": "validation", **metrics(300.0, "val")}]
    lines += [{"step": 90, "kind": "validation", **metrics(290.0, "val")}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name in ("audit/curve.png", "variance/copies.png"):
        Image.new("RGB", (4, 4)).save(run / name)
    return run


def sections(report: ModelReport) -> Iterator[Section]:
    return (getattr(report, part) for part in PARTS)


def test_everything_that_is_there(run: Path) -> None:
    report = read_report(run, None, GALLERY)
    assert [section.notes for section in sections(report)] == [[]] * 6
    facts = dict(report.summary.facts)
    assert "gru" in facts["Sentence tower"]
    assert facts["Gallery"] == "600 pictures, 16 dimensions, cosine"
    assert "/somewhere" not in str(report.summary)
    assert report.recall.tables[0].rows[0] == ("picture → captions", "8.3", "41.7", "75.0", "6.0", "10.8")
    assert [curve.steps for curve in report.training.curves] == [(0, 50, 100), (60, 90)]
    assert "step 60, rSum 300.0" in report.training.text[0]
    assert [table.caption.split(":")[0] for table in report.sampler.tables[:2]] == ["before training", "after epoch 3"]
    assert report.sampler.tables[0].rows[0] == ("uniform", "1.000", "0.50 – 1.50", "20")
    assert report.audit.verdict == "trustworthy: 13 of 13 checks pass"
    assert report.audit.tables[0].rows[1][:3] == ("2/255", "12.5", "12.5 – 12.5")
    assert report.audit.tables[1].rows[0][3:] == ("–", "–")
    assert any("beyond the largest ε" in fact for _, fact in report.audit.facts)
    assert len(report.audit.pictures) == len(report.sampler.pictures) == 1
    assert report.card.text == ["# Card\n"]


def test_every_figure_says_what_it_was_measured_on(run: Path) -> None:
    report = read_report(run, None, GALLERY)
    for section, where in ((report.recall, WHERE), (report.audit, WHERE), (report.sampler, "[train], 96 images, 480")):
        assert all(where in table.caption for table in section.tables)
        assert all(where in picture.alt for picture in section.pictures)
    assert all("searches" in table.caption for table in report.audit.tables[:3])
    assert "scenes:120 [val], 12 images, 1,060 captions" in report.training.curves[1].title
    assert "scenes:120 [train]" in report.training.curves[0].title


def test_validation_stands_in_for_an_evaluation(run: Path) -> None:
    (run / "test.json").unlink()
    table = read_report(run, None, GALLERY).recall.tables[0]
    assert "[val], 12 images, 1,060 captions; rSum 300.0" in table.caption
    assert "expect less elsewhere" in table.caption
    config = (run / "config.toml").read_text(encoding="utf-8").replace('method = "none"', 'method = "fare"')
    (run / "config.toml").write_text(config, encoding="utf-8")
    assert "rSum 290.0" in read_report(run, None, GALLERY).recall.tables[0].caption  # the last weights are kept


@pytest.mark.parametrize("where", ["none", "missing", "empty", "file"])
def test_nothing_there(where: str, tmp_path: Path) -> None:
    place = tmp_path / where
    if where == "empty":
        place.mkdir()
    elif where == "file":
        place.write_text("no folder")
    report = read_report(None if where == "none" else place, None, {})
    assert all(section.notes for section in sections(report))
    assert report.audit.notes == ["no audit yet: vse audit RUN --data DATA --out DIR"]
    assert report.audit.verdict == ""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "{}", "\x00\xff", "[" * 9999, '{"i2t": 3, "data": []}']
)
def test_damage_is_one_line(text: str, run: Path) -> None:
    names = ("config.toml", "test.json", "metrics.jsonl", "README.md", "variance/variance.json", "audit/audit.json")
    for name in names:
        (run / name).write_bytes(text.encode("latin-1"))
    report = read_report(run, None, {"model": 3})
    assert report.audit.verdict == ""
    assert len(report.audit.notes) == len(report.sampler.notes) == 1
    assert all("\n" not in note for section in sections(report) for note in section.notes)


def test_a_line_that_a_kill_cut_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 150, "kind": "tra')
    training = read_report(run, None, GALLERY).training
    assert training.curves[0].steps == (0, 50, 100)
    assert "1 damaged" in training.notes[0]


def test_trust_needs_every_check(run: Path) -> None:
    record = audit_record()
    record["checks"][2]["passed"] = False  # whatever the summary says
    write(run / "audit" / "audit.json", record)
    audit = read_report(run, None, GALLERY).audit
    assert audit.trustworthy is False
    assert audit.verdict.startswith("NOT trustworthy: 12 of 13")
    write(run / "audit" / "audit.json", record | {"checks": [], "trustworthy": None})
    audit = read_report(run, None, GALLERY).audit
    assert audit.trustworthy is None
    assert "not checked" in audit.verdict


def test_what_changed_nothing_is_said(run: Path) -> None:
    record = audit_record()
    assert "nothing was" not in str(read_report(run, None, GALLERY).audit)  # of older records it is not known
    for name, of in record["threats"].items():
        if "curve" in of:
            of["curve"][1]["changed"] = 0
        elif name == "query-text":
            of |= {"changed": 0, "editable": 0}
        else:
            of |= {"changed": {"fog": {"1": 0, "3": 4}}, "mean_r1": None}
    write(run / "audit" / "audit.json", record)
    audit = read_report(run, None, GALLERY).audit
    assert audit.notes == []
    said = "\n".join(audit.text)
    for name in ("query-image", "gallery-promote"):
        assert re.search(f"{name}: nothing was changed, so nothing was measured, by ε = ", said), name
    assert "none has a word that the rules let it edit, so nothing was measured" in said
    assert "corruption: nothing was changed, so nothing was measured, by fog 1." in said
    assert "– on average" in str(audit.facts)
    edited = next(table for table in audit.tables if "query-text" in table.caption)
    assert [row[0] for row in edited.rows] == ["clean"]
    for table in audit.tables:
        if table.columns[0] == "ε":
            assert set(table.rows[1][1:]) == {"–"}
            assert table.rows[0][1] != "–"


def test_an_audit_of_other_weights_is_said(run: Path) -> None:
    gallery = GALLERY | {"model": {"name": "other", "checksum": "sha256:def"}}
    assert "other weights" in read_report(run, None, gallery).audit.notes[0]


def test_only_small_pngs_are_shown(run: Path) -> None:
    (run / "audit" / "curve.png").write_bytes(b"\x89PNG\r\n" + bytes(4 << 20))
    (run / "variance" / "copies.png").write_text(HOSTILE)
    report = read_report(run, None, GALLERY)
    assert "curve.png: larger" in report.audit.notes[0]
    assert "copies.png: not a PNG" in report.sampler.notes[0]
    assert not report.audit.pictures
    assert not report.sampler.pictures


def test_files_cannot_write_markup(run: Path) -> None:
    pytest.importorskip("gradio")
    from vse_app.web.model_tab import section_html

    write(run / f"{HOSTILE.replace('/', '')}.json", metrics(split=HOSTILE, data=HOSTILE))
    record = audit_record(HOSTILE)
    record["checks"][0]["explanation"] = HOSTILE
    write(run / "audit" / "audit.json", record)
    report = read_report(run, None, GALLERY | {"search": HOSTILE})
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            tags.append(tag)

    for section in sections(report):
        html = section_html("title", "said", section)
        Reader().feed(html)
        assert ("&lt;script&gt;" in html) == (section not in (report.training, report.card))
    assert "script" not in tags
    assert tags.count("caption") == tags.count("table") > 5
    assert tags.count("img") == 2


def test_the_tab_is_built_whatever_there_is(run: Path, tmp_path: Path) -> None:
    gradio = pytest.importorskip("gradio")
    from vse_app.web.model_tab import model_tab

    write(run / "half.json", metrics(data="\ud800"))
    for place in (run, tmp_path / "nowhere", None):
        with gradio.Blocks(analytics_enabled=False) as page, gradio.Tab("Model"):
            model_tab(place, None, GALLERY)
        json.dumps(page.get_config_file(), ensure_ascii=False).encode("utf-8")


def chart(*series: Series, **options: Any) -> ElementTree.Element:
    """Drawn, and read as XML."""
    return ElementTree.fromstring(line_chart(series, title="a & b", x_label="x", y_label="<y>", **options))


def tags(drawn: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return drawn.findall(f".//{{http://www.w3.org/2000/svg}}{name}")


def test_a_chart_has_every_point_and_gaps_for_nan() -> None:
    drawn = chart(Series("one", range(6), [1, 2, math.nan, 4, math.nan, 6]), markers=True)
    assert len(tags(drawn, "circle")) == 4
    line = next(path.get("d", "") for path in tags(drawn, "path") if "stroke-linecap" in path.attrib)
    assert (line.count("M"), line.count("L")) == (3, 1)
    svg = tags(drawn, "title")[0]
    assert svg.text == "a & b"
    assert [title.text for title in tags(drawn, "title")][1] == "one: 1 at x 0"


def test_lines_are_told_apart_without_colour() -> None:
    drawn = chart(*(Series(f"line {n}", [0, 1], [n / 100, n / 100]) for n in range(5)))
    dashes = {path.get("stroke-dasharray") for path in tags(drawn, "path") if "stroke-linecap" in path.attrib}
    assert len(dashes) == 5
    names = sorted(float(text.get("y", "")) for text in tags(drawn, "text") if (text.text or "").startswith("line "))
    assert len(names) == 5
    assert min(b - a for a, b in pairwise(names)) >= 14.9


def test_logarithmic_axes() -> None:
    drawn = chart(Series("one", [0, 0.5, 1, 2, 4], [0, 1, 10, 100, 1000]), log_x=True, log_y=True, markers=True)
    texts = [text.text or "" for text in tags(drawn, "text")]
    assert {"1", "10", "100", "1,000"} <= set(texts)
    assert "x (0 is not shown)" in texts
    assert len(tags(drawn, "circle")) == 4
    heights = [float(circle.get("cy", "")) for circle in tags(drawn, "circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[5.0], [0.0, 0.0], [1e99, -1e99, 1.0], [1e308, -1e308, 2.0], [math.inf, 3.0], [1, 1 + 1e-15], [1e-99, 1e99]],
)
def test_odd_values_are_drawn(values: list[float], log: bool) -> None:
    drawn = chart(Series("one", values, values), log_x=log, log_y=log)
    assert "nan" not in ElementTree.tostring(drawn, encoding="unicode")


def test_nothing_to_show_is_said() -> None:
    for series in ((), (Series("none", [], []),), (Series("gap", [1], [math.nan]),)):
        assert "nothing to show" in "".join(chart(*series).itertext())
