"""The audit on a small model: what it records, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audited import draw, solve

from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.errors import InputError
from training.evaluation.ranks import retrieval_ranks
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.robustness import audit as audit_module
from training.robustness import corruptions
from training.robustness.audit import Audit, AuditConfig
from training.robustness.balls import Ball
from training.robustness.curves import AttackSettings, Curve, attack_curve, smallest_epsilon
from training.robustness.norms import LINF, FourierLInf
from training.robustness.spectrum import radial_frequency, radial_mean, radial_spectrum
from vse_app.audit_report import format_report

SMALL = AuditConfig(
    queries=24, others=8, epsilons=(1 / 255, 12 / 255, 24 / 255), steps=10, trials=3, severities=(3,), seed=1
)


@pytest.fixture(scope="session")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("audited")
    data = draw(folder / "pictures")
    return solve(data, folder / "run"), data


@pytest.fixture
def model(audited: tuple[Path, str]) -> DualEncoder:
    return DualEncoder.from_pretrained(audited[0], "cpu")


@pytest.fixture(scope="session")
def corpus(audited: tuple[Path, str]) -> Corpus:
    return load_corpus(audited[1], "all")


@pytest.fixture(scope="session")
def record(audited: tuple[Path, str], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    loaded = DualEncoder.from_pretrained(audited[0], "cpu")
    return Audit(loaded, corpus, SMALL, tmp_path_factory.mktemp("audit")).run()


def test_clean_ranks_are_those_of_the_evaluation(record: dict[str, Any], model: DualEncoder, corpus: Corpus) -> None:
    ranks = retrieval_ranks(*encode_corpus(model, corpus), corpus.owner)
    found = record["threats"]["query-image"]
    rows = [corpus.image_ids.index(name) for name in found["ids"]]
    assert sorted(rows) == list(range(24))
    assert [rank for (rank,) in found["ranks"][0]] == ranks.i2t[rows].tolist()
    assert found["curve"][0]["r1"]["value"] == pytest.approx(100 * np.mean(ranks.i2t == 0))
    assert found["curve"][0]["epsilon"] == 0
    assert found["curve"][0]["asr1"]["value"] == 0


def test_every_threat_bites(record: dict[str, Any]) -> None:
    threats = record["threats"]
    for name in ("query-image", "gallery-owner"):
        recalls = [of["r1"]["value"] for of in threats[name]["curve"]]
        assert recalls[0] > 60
        assert recalls[-1] < recalls[0] / 2
    promoted = threats["gallery-promote"]["curve"]
    assert promoted[0]["asr1"]["value"] == 0
    assert promoted[-1]["medr"] < promoted[0]["medr"]
    assert threats["query-text"]["attacked"]["r1"]["value"] <= threats["query-text"]["clean"]["r1"]["value"]
    assert len(threats["corruption"]["r1"]) >= 10
    assert 0 <= threats["corruption"]["mean_r1"] <= 100


def test_all_fourteen_checks_are_there_and_decide(record: dict[str, Any]) -> None:
    assert [check["number"] for check in record["checks"]] == list(range(1, 15))
    failed = [check for check in record["checks"] if not check["passed"]]
    assert record["trustworthy"] == (not failed)
    assert not [check for check in failed if check["number"] in (1, 2, 3, 8, 9, 10, 11, 12, 14)], failed


def test_every_threat_says_what_it_changed(record: dict[str, Any]) -> None:
    for name in audit_module.PICTURE_THREATS:
        of = record["threats"][name]
        count = len(of["ids"])
        assert of["pictures"] == count
        for counts in ("changed", "changed_8bit"):
            assert [at[counts] for at in of["curve"]] == [0, *[count] * len(SMALL.epsilons)]
    text = record["threats"]["query-text"]
    assert 0 < text["changed"] <= text["editable"] <= len(text["ids"])
    for severities in record["threats"]["corruption"]["changed"].values():
        assert severities == {"3": SMALL.others}


@pytest.fixture
def no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "certify", lambda *args, **settings: {"reason": "not asked for"})


@pytest.mark.parametrize("kind", ["attack", "corruption", "captions"])
@pytest.mark.usefixtures("no_certificates")
def test_what_changed_nothing_is_not_taken_for_robustness(
    kind: str, model: DualEncoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threats = ("query-image", "query-text", "corruption")
    config = replace(SMALL, threats=threats, queries=4, others=2, steps=2, trials=1)
    if kind == "attack":  # less than float32 pixels can hold, and less than rounding to 8 bits leaves
        config = replace(config, epsilons=(1e-12, 0.3 / 255, 0.1))
    elif kind == "corruption":
        idle = {**corruptions.CORRUPTIONS, "fog": lambda image, severity, generator: image + 1e-7}
        monkeypatch.setattr(corruptions, "CORRUPTIONS", idle)
        monkeypatch.setattr(audit_module, "CORRUPTIONS", idle)
    else:
        corpus = replace(corpus, captions=["一只 狗" if n % 2 else "a red box" for n in range(len(corpus.captions))])
    found = Audit(model, corpus, config, tmp_path).run()
    check = found["checks"][-1]
    assert (check["number"], check["passed"], found["trustworthy"]) == (14, False, False)
    image, text, damage = (found["threats"][name] for name in threats)
    printed = format_report(found)
    if kind == "attack":
        assert [of["changed"] for of in image["curve"]] == [0, 0, 4, 4]
        assert [of["changed_8bit"] for of in image["curve"]] == [0, 0, 0, 4]  # the pictures have whole grey levels
        clean, _, *recalls = (of["r1"]["value"] for of in image["curve"])
        radii = [0, *config.epsilons[1:]]
        assert image["area"] == pytest.approx(np.trapezoid([clean, *recalls], radii) / (radii[-1] * clean))
        assert "query-image (ε = 1e-12)" in check["explanation"]
        assert re.search("of 4 pictures the attack changed 0 at .*; with none, nothing was measured", printed)
        assert re.search("of 4 pictures rounding to 8 bits left changed 0 at .*, 0 at 0.3/255;", printed)
        assert len(re.findall(r"/255 .*\d {6}– ", printed)) == 2  # where the column of 8 bits has no figure
    elif kind == "corruption":
        assert damage["changed"]["fog"] == {"3": 0}
        others = [of["3"]["value"] for name, of in damage["r1"].items() if name != "fog"]
        assert damage["mean_r1"] == pytest.approx(np.mean(others))
        assert re.search(r"fog +–\n", printed)
        assert "not in the mean: fog 3" in printed
    else:
        assert (text["editable"], text["changed"]) == (0, 0)
        assert "0 of 2 captions were edited: none has a word" in printed
        assert "  attacked" not in printed.split("query-text")[1].split("corruption")[0]


def test_certified_never_exceeds_attacked(record: dict[str, Any]) -> None:
    for of in record["certificates"].values():
        assert of["table"][0]["certified"] == pytest.approx(of["table"][0]["attacked"], abs=1e-9)
        assert of["table"][0]["certified"] > 0
        assert all(row["certified"] <= row["attacked"] + 1e-9 for row in of["table"])
        assert any(row["certified"] > 0 for row in of["table"][1:])
        assert any(row["attacked"] < of["table"][0]["attacked"] for row in of["table"])
        assert (of["tried"], of["flips"]) == (10_200, 0)


def test_smallest_epsilon_lies_on_the_curve(record: dict[str, Any]) -> None:
    found = record["threats"]["query-image"]
    ranks = np.asarray(found["ranks"])[..., 0]
    radii = [of["epsilon"] for of in found["curve"]]
    for row, smallest in enumerate(found["smallest_epsilon"]):
        lost = np.flatnonzero(ranks[:, row] > 0)
        if not len(lost):
            assert smallest is None
        elif lost[0] == 0:
            assert smallest == 0
        else:
            assert radii[lost[0] - 1] < smallest <= radii[lost[0]] * (1 + 1e-6)


def test_flips_show_what_was_found(record: dict[str, Any], corpus: Corpus) -> None:
    flips = record["threats"]["query-image"]["flips"]
    assert flips
    assert all(flip["epsilon"] == SMALL.epsilons[1] for flip in flips)
    for flip in flips:
        own = [c for c, i in zip(corpus.captions, corpus.owner, strict=True) if corpus.image_ids[i] == flip["image"]]
        assert flip["before"][0] in own
        assert flip["after"][0] not in own
        assert flip["rank"] > 0


def test_spectrum_is_that_of_the_perturbations(
    record: dict[str, Any], model: DualEncoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = record["threats"]["query-image"]["spectrum"]
    amplitude = np.asarray(found["amplitude"])
    assert amplitude.shape == (1 + len(SMALL.epsilons), len(found["radius"]))
    assert (amplitude[0] == 0).all()
    edges = np.append(np.asarray(found["radius"]) - 2**0.5 / 48 - 1e-9, 2)
    counts = np.histogram(radial_frequency(16, 16), edges)[0]
    assert (amplitude[1:] @ counts / counts.sum() <= SMALL.epsilons).all()  # by Parseval
    assert (np.diff(amplitude.mean(1)) > 0).all()
    audit = Audit(model, corpus, replace(SMALL, norm="fourier-linf/f[0,0.5]"), tmp_path)
    norm = audit.settings.norm
    assert isinstance(norm, FourierLInf)
    limits = radial_mean(norm.shares(radial_frequency(16, 16))).mean.numpy()
    curves: list[Curve] = []

    def keeping(*args: Any) -> Curve:
        curves.append(attack_curve(*args))
        return curves[-1]

    monkeypatch.setattr(audit_module, "attack_curve", keeping)
    part = audit._picture("query-image", list(range(8)), 0)
    images = audit._fetch(list(range(8)))
    for (radius, mean), points, epsilon in zip(part["spectra"], curves[0].points, curves[0].epsilons, strict=True):
        assert radius == found["radius"]
        np.testing.assert_allclose(mean, radial_spectrum(points - images).mean, rtol=1e-6)
        assert (np.asarray(mean) <= epsilon * limits + 1e-6).all()


@pytest.mark.usefixtures("no_certificates")
def test_a_killed_audit_goes_on_and_ends_the_same(
    model: DualEncoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(audit_module, "CHUNK", 5)
    config = replace(SMALL, threats=("query-image", "query-text"), queries=12)

    def without_times(found: dict[str, Any]) -> str:
        return json.dumps({**found, "seconds": 0})

    whole = Audit(model, corpus, config, tmp_path / "whole").run()
    killed = Audit(model, corpus, config, tmp_path / "killed")
    attack = audit_module.attack_curve
    calls = []

    def die(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attack(*args)

    monkeypatch.setattr(audit_module, "attack_curve", die)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert (tmp_path / "killed" / "parts" / "query-image-001.json").exists()
    calls.clear()
    monkeypatch.setattr(audit_module, "attack_curve", lambda *args: (calls.append(1), attack(*args))[1])
    resumed = Audit(model, corpus, config, tmp_path / "killed").run()
    assert len(calls) == 1
    assert without_times(resumed) == without_times(whole)


def test_another_audit_in_the_folder_is_refused(model: DualEncoder, corpus: Corpus, tmp_path: Path) -> None:
    Audit(model, corpus, SMALL, tmp_path)
    with pytest.raises(InputError, match="other settings; choose another --out"):
        Audit(model, corpus, replace(SMALL, seed=2), tmp_path)
    with torch.no_grad():
        next(model.image_tower.parameters()).add_(1)
    with pytest.raises(InputError, match="other weights"):
        Audit(model, corpus, SMALL, tmp_path)


def test_strong_breaks_more_and_curves_fall(model: DualEncoder, corpus: Corpus, tmp_path: Path) -> None:
    audit = Audit(model, corpus, SMALL, tmp_path)
    rows = list(range(0, 24, 3))
    images = audit._fetch(rows)
    threat = audit.threat("query-image", rows, images)
    weak = AttackSettings(steps=1, method="pgd")
    strong = replace(weak, method="apgd", steps=4, strong=True)
    weak_left, strong_left = (
        (attack_curve(threat, images, (2 / 255, 3 / 255), settings).ranks[..., 0] == 0).sum(1)
        for settings in (weak, strong)
    )
    assert (np.diff(weak_left) <= 0).all()
    assert (np.diff(strong_left) <= 0).all()
    assert strong_left.sum() <= weak_left.sum() - 4  # far from equal: the strong attack's random part may differ


def test_warm_starts_never_lose_what_a_smaller_ball_gave(model: DualEncoder, corpus: Corpus, tmp_path: Path) -> None:
    audit = Audit(model, corpus, SMALL, tmp_path)
    rows = list(range(8))
    images = audit._fetch(rows)
    threat = audit.threat("query-image", rows, images)
    radii = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
    curve = attack_curve(threat, images, radii, AttackSettings(steps=3, least=0))
    lost = curve.ranks[1:, :, 0] > 0
    assert (lost[1:] >= lost[:-1]).all()
    for ranks, points in zip(curve.ranks, curve.points, strict=True):
        with torch.no_grad():
            assert (threat.ranks(threat.embed(points)) == ranks).all()
    for epsilon, points in zip(curve.epsilons, curve.points, strict=True):
        assert float(Ball(LINF, epsilon).violation(points, images).norm.max()) <= 1e-6
    smallest = smallest_epsilon(threat, images, curve, AttackSettings())
    assert ((smallest == 0) == (curve.ranks[0, :, 0] > 0)).all()


def test_bad_input_is_refused_in_one_line(model: DualEncoder, corpus: Corpus, tmp_path: Path) -> None:
    for changes, message in (
        ({"epsilons": (8.0,)}, "pixels go from 0 to 1"),
        ({"epsilons": (0.2, 0.1)}, "ascending"),
        ({"epsilons": (0.0, 0.1)}, "above 0"),
        ({"threats": ("query-smell",)}, "'query-smell' is unknown; choose from query-image"),
        ({"queries": 0}, "at least 1"),
        ({"norm": "l7"}, "'l7' is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            AuditConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no competitors"):
        Audit(model, corpus.subset([0]), SMALL, tmp_path / "one")
    with torch.no_grad():
        for parameter in model.image_tower.head.parameters():
            parameter.zero_()
        model.image_tower.head[-1].bias.fill_(1.0)  # type: ignore[index,operator,union-attr]
    with pytest.raises(InputError, match="collapsed"):
        Audit(model, corpus, SMALL, tmp_path / "collapsed")


def test_towers_without_pictures_are_refused(tiny_features: str, config: Any, tmp_path: Path) -> None:
    from training.trainer import Trainer

    blind = Trainer(config).model
    with pytest.raises(InputError, match="cannot encode pictures"):
        Audit(blind, load_corpus(tiny_features, "val"), SMALL, tmp_path / "blind")
