"""The record of an audit as tables for people, and as JSON and Parquet for machines."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from training.files import replacing, write_text
from training.robustness.summary import unchanged

logger = logging.getLogger(__name__)

TITLES = {
    "query-image": "query-image: a perturbed picture searches for its captions",
    "gallery-owner": "gallery-owner: a perturbed picture hides from its own captions",
    "gallery-promote": "gallery-promote: a perturbed picture rises for a caption of another one",
    "query-text": "query-text: an edited caption searches for its picture",
    "corruption": "corruption: a degraded picture searches for its captions, R@1",
}
BOUNDS = {
    "recall": "R@K under attack is an upper bound of what stays against every attack: a better one may lower it",
    "success": "attack success and rank shift are lower bounds of what an attacker can reach",
    "epsilon50": "ε50 is an upper bound of the radius that breaks half of the clean hits",
    "certified": "certified R@1 is a lower bound of what stays, and holds against every perturbation of the features",
    "interval": "95 % intervals are exact: Clopper-Pearson over pictures, all captions of one counting once; for ε50 "
    "those of the sign test",
    "space": "pixels in [0, 1] at the network's input size; 8-bit: the perturbed picture rounded, as an upload is",
}


def format_report(record: dict[str, Any]) -> str:
    """Tables of all threats, the checks, and whether to trust the figures."""
    config = record["config"]
    lines = [
        f"{record['data']} [{record['split']}]: {record['images']:,} images, {record['captions']:,} captions, "
        f"norm {config['norm']}, seed {config['seed']}"
    ]
    for name, found in record["threats"].items():
        lines += ["", f"{TITLES[name]} ({found['queries']} searches)"]
        if name == "corruption":
            lines += _corruption(found)
        elif name == "query-text":
            lines += _text(found)
        else:
            lines += _curve(found, config["norm"], promote=name == "gallery-promote")
        if name == "query-image":
            lines.append(_epsilon50(found, config["norm"]))
    lines += ["", *_certificates(record["certificates"])]
    if record["checks"]:
        lines += ["", "checks of the attack"]
        lines += [
            f"  {'pass' if check['passed'] else 'FAIL'} {check['number']:2} {check['name']}: {check['explanation']}"
            for check in record["checks"]
        ]
        failed = [str(check["number"]) for check in record["checks"] if not check["passed"]]
        verdict = f"NOT TRUSTWORTHY: check {', '.join(failed)} failed; the attack may be broken, not the model robust"
        lines.append(verdict if failed else "all checks passed")
    lines += ["", *(f"{text}." for text in BOUNDS.values())]
    return "\n".join(lines)


def radius(epsilon: float, norm: str) -> str:
    """ε as it is spoken of: in 8-bit steps in ℓ∞, as it is in other norms."""
    return f"{255 * epsilon:g}/255" if norm == "linf" else f"{epsilon:g}"


def _curve(found: dict[str, Any], norm: str, promote: bool) -> list[str]:
    lines = [
        f"  {'ε':>9}  {'R@1':>5} {'95 %':^13} {'8-bit':>6} {'R@5':>6} {'R@10':>6} {'medR':>6} "
        f"{'success@1':>10} {'@10':>6} {'shift':>8} {'p90':>7}"
    ]
    for of in found["curve"]:
        r1, asr = of["r1"], [of[f"asr{k}"]["value"] for k in (1, 10)]
        shown = ["–" if rate is None else f"{rate:.1f}" for rate in asr]
        eight = "–" if of["epsilon"] and of.get("changed_8bit") == 0 else f"{of['r1_8bit']['value']:.1f}"
        lines.append(
            f"  {radius(of['epsilon'], norm):>9}  {r1['value']:5.1f} {r1['low']:5.1f} – {r1['high']:5.1f} "
            f"{eight:>6} {of['r5']['value']:6.1f} {of['r10']['value']:6.1f} {of['medr']:6.0f} "
            f"{shown[0]:>10} {shown[1]:>6} {of['shift']['median']:8.0f} {of['shift']['p90']:7.0f}"
        )
    if not promote:
        lines.append(f"  area under R@1(ε), clean = 1: {found['area']:.3f}")
    return [*lines, *_changed(found, norm)]


def _changed(found: dict[str, Any], norm: str) -> list[str]:
    """Radii at which some pictures stayed as they were, or are so again after rounding to 8 bits."""
    lines = []
    for counts, what in (("changed", "the attack changed"), ("changed_8bit", "rounding to 8 bits left changed")):
        few = [
            f"{of[counts]} at {radius(of['epsilon'], norm)}"
            for of in found["curve"]
            if of["epsilon"] and counts in of and of[counts] < found["pictures"]
        ]
        if few:
            lines.append(f"  of {found['pictures']} pictures {what} {', '.join(few)}; with none, nothing was measured")
    return lines


def _epsilon50(found: dict[str, Any], norm: str) -> str:
    middle = found["epsilon50"]
    if middle is None:
        return "  ε50: no clean query ranks first"
    shown = {
        name: "beyond the largest ε" if value is None else radius(round(value, 6), norm)
        for name, value in middle.items()
    }
    return f"  ε50: {shown['value']} ({shown['low']} – {shown['high']}); {found['unbroken']} clean hits never broken"


def _text(found: dict[str, Any]) -> list[str]:
    lines = [f"  {'':8}{'R@1':>6} {'95 %':^13} {'R@5':>6} {'R@10':>6} {'medR':>6} {'success@1':>10}"]
    for name in ("clean",) if unchanged(found) else ("clean", "attacked"):
        of = found[name]
        r1, asr = of["r1"], of["asr1"]["value"]
        lines.append(
            f"  {name:8}{r1['value']:6.1f} {r1['low']:5.1f} – {r1['high']:5.1f} {of['r5']['value']:6.1f} "
            f"{of['r10']['value']:6.1f} {of['medr']:6.0f} {'–' if asr is None else format(asr, '.1f'):>10}"
        )
    lines += [f"  “{of['caption']}” → “{of['edited']}”: rank {of['rank'] + 1}" for of in found["worst"][:3]]
    if "editable" in found:
        lines.append(f"  {edited(found)}")
    return lines


def edited(found: dict[str, Any]) -> str:
    """How many captions ``query-text`` could edit, and edited, in words."""
    text = f"{found['changed']:,} of {found['queries']:,} captions were edited"
    if not found["editable"]:
        return f"{text}: none has a word that the rules let it edit, so nothing was measured"
    return f"{text}; {found['queries'] - found['editable']:,} have no word that the rules let it edit"


def _corruption(found: dict[str, Any]) -> list[str]:
    severities = list(next(iter(found["r1"].values())))
    clean, idle = found["clean"], unchanged(found)
    lines = [f"  {'severity':20}" + "".join(f"{severity:>7}" for severity in severities)]
    for name, of in found["r1"].items():
        shown = ("–" if f"{name} {at}" in idle else f"{of[at]['value']:.1f}" for at in severities)
        lines.append(f"  {name:20}" + "".join(f"{value:>7}" for value in shown))
    mean = "–" if found["mean_r1"] is None else f"{found['mean_r1']:.1f}"
    relative = "" if found["relative"] is None else f", {found['relative']:.2f} of the clean one"
    interval = f"{clean['low']:.1f} – {clean['high']:.1f}"
    lines.append(f"  clean R@1 {clean['value']:.1f} ({interval}); mean {mean}{relative}")
    if idle:
        lines.append(f"  –: no picture was changed, so nothing was measured; not in the mean: {', '.join(idle)}")
    few = [
        f"{name} {severity}: {count}"
        for name, counts in found.get("changed", {}).items()
        for severity, count in counts.items()
        if 0 < count < found["queries"]
    ]
    if few:
        lines.append(f"  changed fewer than all {found['queries']} pictures: {', '.join(few)}")
    return lines


def _certificates(found: dict[str, Any]) -> list[str]:
    if "reason" in found:
        return [f"no certificates: {found['reason']}"]
    lines = ["certificates: R@1 under perturbations of the backbone's features, the gallery fixed"]
    for norm, of in found.items():
        if not of["table"]:
            lines.append(f"  {norm:5} no query ranks first")
            continue
        lines.append(f"  {norm:5} radius    " + "".join(f"{row['radius']:9.3g}" for row in of["table"]))
        for name in ("certified", "attacked"):
            lines.append(f"  {'':5} {name:10}" + "".join(f"{row[name]:9.1f}" for row in of["table"]))
        lines.append(f"  {'':5} {of['flips']} of {of['tried']:,} perturbations inside these radii lose a query")
    return lines


def write_files(record: dict[str, Any], out: Path) -> list[str]:
    """``audit.json``, the printed report as ``audit.txt``, and ``queries.parquet`` where pyarrow is installed."""
    write_text(
        out / "audit.json", json.dumps({**record, "bounds": BOUNDS}, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_text(out / "audit.txt", format_report(record) + "\n")
    written = ["audit.json", "audit.txt"]
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        logger.info("queries.parquet is left out: pyarrow is not installed; pip install 'vse-app[exchange]'")
        return written
    with replacing(out / "queries.parquet") as temporary:
        parquet.write_table(arrow.Table.from_pylist(rows(record)), temporary)
    return [*written, "queries.parquet"]


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per search and level of attack: threat, id, search, level, epsilon, and zero-based rank."""
    found = []
    for threat, of in record["threats"].items():
        if threat == "corruption":
            levels = {
                f"{name}-{severity}": ranks for name, at in of["ranks"].items() for severity, ranks in at.items()
            }
            for level, ranks in levels.items():
                found += [_row(threat, key, 0, level, None, rank) for key, rank in zip(of["ids"], ranks, strict=True)]
            continue
        epsilons = [0.0, None] if threat == "query-text" else [at["epsilon"] for at in of["curve"]]
        for epsilon, at in zip(epsilons, of["ranks"], strict=True):
            level = "edited" if epsilon is None else "clean" if epsilon == 0 else "attacked"
            for key, ranks in zip(of["ids"], at, strict=True):
                found += [
                    _row(threat, key, search, level, epsilon, rank) for search, rank in enumerate(ranks) if rank >= 0
                ]
    return found


def _row(threat: str, key: str, search: int, level: str, epsilon: float | None, rank: int) -> dict[str, Any]:
    return {"threat": threat, "id": key, "search": search, "level": level, "epsilon": epsilon, "rank": rank}
