"""What an audit says about a model, for whoever opens the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from index.items import JSON
from training.robustness.summary import unchanged
from vse_app.audit_report import BOUNDS, TITLES, edited, radius
from vse_app.report_parts import Section, Table, measured_on, number, pictures, span

FIGURES = {
    "curve.png": "Recall against the attack's radius ε",
    "shifts.png": "Histogram of how many ranks the attack moves pictures' own captions",
    "spectrum.png": "Mean amplitude of the perturbations against radial frequency",
    "corruptions.png": "Heat map of R@1 under noise, blur, weather and compression",
    "certificates.png": "Certified and attacked R@1 against the radius of perturbed features",
    "flips.png": "Pictures before and after the attack, and the captions that each finds",
}
RECALLS = ("R@1", "95 %", "R@5", "95 %", "R@10", "95 %", "median rank")


def verdict(record: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether an audit's record can be trusted, None if nothing was checked, and a line that says so."""
    passed = [check["passed"] is True for check in record["checks"]]
    if not passed:
        return None, "not checked: pictures were not attacked as queries, so nothing tested the attack"
    count = f"{sum(passed)} of {len(passed)} checks pass"
    if all(passed) and record["trustworthy"] is True:
        return True, f"trustworthy: {count}"
    return False, f"NOT trustworthy: {count}; the attack may be broken, not the model robust"


def read_audit(into: Section, folder: Path, gallery: Mapping[str, JSON]) -> None:
    """Read ``audit.json`` and its figures.

    Args:
        into: Where everything is added.
        folder: What ``vse audit --out`` wrote.
        gallery: What ``Gallery.info()`` returned; its model should be the one audited.

    Raises:
        Exception: Of the kinds that a missing, damaged or foreign file leads to.
    """
    record = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    where, norm = measured_on(record), record["config"]["norm"]
    into.checks = [
        (check["passed"] is True, f"{check['number']} {check['name']}: {check['explanation']}")
        for check in record["checks"]
    ]
    into.trustworthy, into.verdict = verdict(record)
    attack = f"norm {norm}, seed {record['config']['seed']}, at most {record['config']['steps']:,} steps"
    into.facts += [("Measured on", where), ("Attack", attack)]
    model = gallery.get("model")
    checksum = model.get("checksum") if isinstance(model, dict) else None
    if checksum and checksum != record["model"]:
        into.notes.append("this audit is of other weights than the gallery's: vse audit RUN --data DATA --out DIR")
    for name, found in record["threats"].items():
        said = f"{TITLES.get(name, name)}; {found['queries']:,} searches; {where}"
        if name in ("query-image", "gallery-owner"):
            rows = ((radius(of["epsilon"], norm), *_recalls(of)) for of in found["curve"])
            into.tables.append(Table(said, ("ε", *RECALLS), tuple(rows)))
        elif name == "gallery-promote":
            rows = (
                (radius(of["epsilon"], norm), *_interval(of, "asr1"), *_interval(of, "asr10")) for of in found["curve"]
            )
            columns = ("ε", "success, rank 1", "95 %", "success, top 10", "95 %")
            into.tables.append(Table(said, columns, tuple(rows)))
        elif name == "query-text":
            levels = ("clean",) if unchanged(found) else ("clean", "attacked")
            rows = ((level, *_recalls(found[level])) for level in levels)
            into.tables.append(Table(said, ("caption", *RECALLS), tuple(rows)))
            if "editable" in found:
                into.text.append(f"{name}: {edited(found)}.")
        if name == "query-image":
            title = f"ε50, which breaks half of the clean hits of {found['queries']:,} searches"
            into.facts.append((title, _epsilon50(found, norm)))
        elif name == "corruption":
            clean, ways = found["clean"], len(found["r1"])
            title = f"Degraded in {ways} natural ways, R@1 of {found['queries']:,} searches"
            into.facts.append((title, f"{number(found['mean_r1'])} on average, clean {number(clean['value'])}"))
        if name != "query-text" and (idle := unchanged(found)):
            into.text.append(f"{name}: nothing was changed, so nothing was measured, by {', '.join(idle)}.")
    _certificates(into, record["certificates"], where)
    into.text.append("; ".join(BOUNDS[name] for name in ("recall", "success", "certified")) + ".")
    pictures(into, folder, FIGURES, where)


def _recalls(of: dict[str, Any]) -> tuple[str, ...]:
    cells = tuple(cell for name in ("r1", "r5", "r10") for cell in _interval(of, name))
    return *cells, "–" if _idle(of) else number(of["medr"], 0)


def _idle(of: dict[str, Any]) -> bool:
    """Whether an attack changed no picture, so that nothing was measured."""
    return of.get("epsilon", 0) > 0 and of.get("changed") == 0


def _interval(of: dict[str, Any], name: str) -> tuple[str, str]:
    figure = of[name]
    return ("–", "–") if _idle(of) else (number(figure["value"]), span(figure["low"], figure["high"]))


def _epsilon50(found: dict[str, Any], norm: str) -> str:
    middle = found["epsilon50"]
    if middle is None:
        return "no clean search finds an own caption first"
    value, low, high = (
        "beyond the largest ε"
        if middle[of] is None
        else radius(round(middle[of] * 255, 2) / 255 if norm == "linf" else float(f"{middle[of]:.3g}"), norm)
        for of in ("value", "low", "high")
    )
    return f"{value} (95 %: {low} to {high}); {found['unbroken']:,} clean hits never broken"


def _certificates(into: Section, found: dict[str, Any], where: str) -> None:
    if "reason" in found:
        into.text.append(f"No certificates: {found['reason']}.")
        return
    for norm, of in found.items():
        rows = tuple(
            (f"{row['radius']:.3g}", number(row["certified"]), number(row["attacked"])) for row in of["table"]
        )
        said = f"Perturbed features, {norm}: {of['flips']:,} of {of['tried']:,} trials broke a certificate; {where}"
        into.tables.append(Table(said, ("radius", "R@1 certified at least", "R@1 attacked at most"), rows))
