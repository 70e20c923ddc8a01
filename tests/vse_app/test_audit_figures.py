from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from training.errors import InputError
from training.robustness import summary
from training.robustness.corruptions import CORRUPTIONS
from training.robustness.spectrum import radial_spectrum
from vse_app import audit_figures
from vse_app.audit_figures import write_figures

EPSILONS = (0.0, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255)
ALL = {"curve.png", "shifts.png", "spectrum.png", "flips.png", "corruptions.png", "certificates.png"}


@dataclass
class StubAudit:
    """What the figures need to know of an audit."""

    corpus: Any
    shown_epsilon: int = 3

    def picture(self, row: int) -> Tensor:
        y, x = torch.meshgrid(torch.linspace(0, 1, 128), torch.linspace(0, 1, 128), indexing="ij")
        return torch.stack([x, y, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.02 * (row % 5 + 1)).float()])


@pytest.fixture
def audit() -> StubAudit:
    sentence = "a brown dog leaps over fallen logs while two children in bright jackets watch from the wet grass"
    words = sentence.split()
    captions = [" ".join(words[: 3 + 3 * (c % 6)]) + f" number {c} ." for c in range(60)]
    return StubAudit(SimpleNamespace(captions=captions, owner=np.arange(60) // 5))


def curve(name: str, rng: np.random.Generator, queries: int, width: int = 1) -> dict[str, Any]:
    """Ranks that grow (of ``gallery-promote``: shrink) with ε, summarised as the audit does."""
    scale = np.array([4, 12, 40, 150, 700, 2500])[:, None, None]
    if name == "gallery-promote":
        scale = scale[::-1] // 4
    # One draw for all ε, so that the ranks are monotone.
    ranks = (scale * rng.exponential(0.6, (queries, width)) ** 2).astype(np.int64).clip(max=4999)
    changed = np.array([[0] + 5 * [queries]] * 2)
    return {**summary.curve(EPSILONS, ranks, ranks, changed, name), "ranks": ranks.tolist()}


def make_record(out: Path, audit: StubAudit, every: bool = True) -> dict[str, Any]:
    """A record with all threats or ``query-image`` alone, and the pictures of its flips."""
    rng = np.random.default_rng(0)
    threats = {"query-image": curve("query-image", rng, 200)}
    radii = rng.exponential(1.2 / 255, 90)
    threats["query-image"] |= summary.query_extras(radii, rng.random((6, 200, 2)))
    radius, mean = radial_spectrum(torch.from_numpy(rng.normal(size=(3, 128, 128))))
    amplitude = [(epsilon * mean).tolist() for epsilon in EPSILONS]
    threats["query-image"]["spectrum"] = {"radius": radius.tolist(), "amplitude": amplitude}
    (out / "parts").mkdir(parents=True, exist_ok=True)
    flips = []
    for number in range(6):
        file, texts = f"query-image-{number // 2:03}.safetensors", audit.corpus.captions
        images = torch.stack([audit.picture(row) for row in (number // 2 * 2, number // 2 * 2 + 1)])
        noise = torch.from_numpy(rng.choice([-2 / 255, 2 / 255], images.shape)).float()
        save_file({"adversarial": (images + noise).clamp(0, 1)}, out / "parts" / file)
        before = [texts[5 * number], texts[40 + number], texts[5 * number + 3]]
        after = [texts[30 + number], texts[59], texts[50 - number]]
        flip = {"image": f"{number}.jpg", "row": number, "file": file, "place": number % 2, "epsilon": 2 / 255}
        flips.append({**flip, "rank": 10 ** (3 - number // 2) + number, "before": before, "after": after})
    threats["query-image"]["flips"] = flips
    certificates: dict[str, Any] = {"reason": "the image head is not linear"}
    if every:
        threats["gallery-owner"] = curve("gallery-owner", rng, 50, 5)
        threats["gallery-promote"] = curve("gallery-promote", rng, 50)
        parts: dict[str, dict[str, Any]] = {"clean": {"0": rng.integers(0, 3, (50, 1))}}
        parts |= {name: {s: rng.integers(0, 2 + int(s), (50, 1)) for s in "135"} for name in CORRUPTIONS}
        changed = {name: dict.fromkeys("135", 50) for name in CORRUPTIONS}
        threats["corruption"] = summary.corruptions([parts], [changed], [str(n) for n in range(50)])
        shares = ((0, 45.5, 45.5), (0.25, 38, 39), (0.5, 31.5, 33), (1, 22.5, 27), (2, 8, 14.5), (4, 0.5, 3.5))
        certificates = {}
        for name, median in (("linf", 0.00173), ("l2", 0.0612), ("l1", 1.94)):
            rows = [{"radius": share * median, "certified": low, "attacked": high} for share, low, high in shares]
            certificates[name] = {"median": median, "table": rows, "tried": 10_200, "flips": 0}
    return {
        "data": "karpathy:flickr8k",
        "split": "val",
        "images": 1000,
        "captions": 5000,
        "config": {"norm": "linf"},
        "trustworthy": True,
        "threats": threats,
        "certificates": certificates,
    }


def sizes(out: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    """Every figure is a PNG that decodes and is neither small nor blank, and nothing else was left there."""
    found = {}
    for name in names:
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
            picture.load()
            assert picture.convert("L").getextrema()[0] < 60
            found[name] = picture.size
    assert all(600 < width < 2000 and 300 < height < 2000 for width, height in found.values()), found
    assert {path.name for path in out.iterdir()} == {*names, "parts"}
    return found


def test_every_figure_is_written(audit: StubAudit, tmp_path: Path) -> None:
    record = make_record(tmp_path, audit)
    names = write_figures(record, audit, tmp_path)  # type: ignore[arg-type]
    assert set(names) == ALL
    assert len(names) == len(ALL)
    found = sizes(tmp_path, names)
    record["threats"].pop("query-image")
    assert found["curve.png"][0] > sizes_of_curve(record, audit, tmp_path / "gallery")


def sizes_of_curve(record: dict[str, Any], audit: StubAudit, out: Path) -> int:
    (out / "parts").mkdir(parents=True)
    names = write_figures(record, audit, out)  # type: ignore[arg-type]
    assert set(names) == ALL - {"shifts.png", "spectrum.png", "flips.png"}
    return sizes(out, names)["curve.png"][0]


def test_absent_threats_are_not_drawn(audit: StubAudit, tmp_path: Path) -> None:
    record = make_record(tmp_path, audit, every=False)
    names = write_figures(record, audit, tmp_path)  # type: ignore[arg-type]
    assert set(names) == {"curve.png", "shifts.png", "spectrum.png", "flips.png"}
    sizes(tmp_path, names)
    record["threats"] = {"query-text": {}}
    assert write_figures(record, audit, tmp_path) == []  # type: ignore[arg-type]


def test_the_sheet_shows_input_attack_and_difference_where_there_are_files(audit: StubAudit, tmp_path: Path) -> None:
    record = make_record(tmp_path, audit, every=False)
    write_figures(record, audit, tmp_path)  # type: ignore[arg-type]
    sheet = np.asarray(Image.open(tmp_path / "flips.png")).astype(int)
    clean = sheet[68:268, 14:214]
    expected = (audit.picture(0) * 255).permute(1, 2, 0).numpy()[64, 64]
    assert np.abs(clean[100, 100] - expected).max() <= 3
    difference = sheet[68:268, 442:642][60:140, 60:140]  # where nothing is cut at 0 or 1
    assert set(np.unique(difference[..., :2])) <= {107, 108, 147, 148}
    (tmp_path / "parts" / "query-image-001.safetensors").unlink()
    write_figures(record, audit, tmp_path)  # type: ignore[arg-type]
    fewer = Image.open(tmp_path / "flips.png").size
    assert fewer == (sheet.shape[1], sheet.shape[0] - 2 * 214)
    for path in (tmp_path / "parts").iterdir():
        path.unlink()
    assert "flips.png" not in write_figures(record, audit, tmp_path)  # type: ignore[arg-type]


def test_what_was_not_changed_is_a_gap(audit: StubAudit, tmp_path: Path) -> None:
    record = make_record(tmp_path, audit)
    assert "unchanged" not in [text.get_text() for text in audit_figures._corruptions(record).axes[0].texts]
    record["threats"]["corruption"]["changed"]["fog"]["3"] = 0
    heat = audit_figures._corruptions(record).axes[0]
    assert [text.get_text() for text in heat.texts].count("unchanged") == 1
    assert heat.images[0].get_array().mask.sum() == 1
    for name in ("query-image", "gallery-owner", "gallery-promote"):
        record["threats"][name]["curve"][2]["changed"] = 0
    for axes in audit_figures._curves(record).axes:
        assert [np.flatnonzero(np.isnan(line.get_ydata())).tolist() for line in axes.lines[:2]] == [[2], [2]]
    for severities in record["threats"]["corruption"]["changed"].values():
        severities.update(dict.fromkeys("135", 0))
    record["threats"]["corruption"]["mean_r1"] = None
    assert "corruptions.png" in write_figures(record, audit, tmp_path)  # type: ignore[arg-type]


def test_what_is_missing_does_not_crash(audit: StubAudit, tmp_path: Path) -> None:
    record = make_record(tmp_path, audit)
    query = record["threats"]["query-image"]
    for point in record["threats"]["gallery-promote"]["curve"]:
        point["asr1"] = {"value": None, "low": None, "high": None}
    query["curve"][1]["r1"] = {"value": None, "low": None, "high": None}
    query["flips"] = []
    record["trustworthy"] = False
    record["certificates"]["l2"] = {"median": None, "table": [], "tried": 0, "flips": 0}
    record["threats"]["corruption"]["clean"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    for figures in record["threats"]["corruption"]["r1"].values():
        figures["3"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    for epsilon50 in (None, {"value": None, "low": 0.01, "high": None}, {"value": 0.01, "low": 0.002, "high": None}):
        query["epsilon50"] = epsilon50
        names = write_figures(record, audit, tmp_path)  # type: ignore[arg-type]
        assert set(names) == ALL - {"flips.png"}
    sizes(tmp_path, names)
    record["certificates"] = dict.fromkeys(("linf", "l2", "l1"), record["certificates"]["l2"])
    query["ranks"] = np.zeros((6, 3, 1), dtype=int).tolist()
    query["spectrum"]["amplitude"] = np.zeros((6, 24)).tolist()
    assert set(write_figures(record, audit, tmp_path)) == {"curve.png", "shifts.png", "corruptions.png"}  # type: ignore[arg-type]


@pytest.mark.parametrize(("norm", "epsilons"), [("l2", (0.0, 0.5, 2.0)), ("fourier-linf[0,0.25]", (0.0, 1.0, 3.0))])
def test_other_norms(norm: str, epsilons: tuple[float, ...], audit: StubAudit, tmp_path: Path) -> None:
    record = make_record(tmp_path, audit)
    record["config"]["norm"] = norm
    for name in ("query-image", "gallery-owner", "gallery-promote"):
        of = record["threats"][name]
        of["curve"], of["ranks"] = of["curve"][: len(epsilons)], of["ranks"][: len(epsilons)]
        for point, epsilon in zip(of["curve"], epsilons, strict=True):
            point["epsilon"] = epsilon
    audit.shown_epsilon = 1
    for flip in record["threats"]["query-image"]["flips"]:
        flip["epsilon"] = 0.5
    names = write_figures(record, audit, tmp_path)  # type: ignore[arg-type]
    assert set(names) == ALL
    sizes(tmp_path, names)


def test_missing_matplotlib(audit: StubAudit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_record(tmp_path, audit)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        InputError, match=r"^matplotlib is not installed; pip install 'vse-app\[plots\]' or add --no-plot$"
    ):
        write_figures(record, audit, tmp_path)  # type: ignore[arg-type]
