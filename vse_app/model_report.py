"""What the files of a run and of its audit say about a model, in words and figures for whoever opens the page."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.items import JSON
from training.config import Config, from_dict
from vse_app.audit_summary import read_audit
from vse_app.report_parts import Curve, Section, Table, measured_on, number, pictures, span

DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a file that is not as it was written may raise."""
VARIANCE_FIGURES = {
    "variance.png": "Each sampler's gradient variance against epochs of training",
    "copies.png": "Pictures of the largest groups of training pairs that are alike; the kept one is framed",
}


@dataclass(frozen=True)
class ModelReport:
    """Everything the page shows of a model."""

    summary: Section
    recall: Section
    training: Section
    sampler: Section
    audit: Section
    card: Section


def read_report(run: Path | None, audit: Path | None, gallery: Mapping[str, JSON]) -> ModelReport:
    """Read what there is; what is missing or damaged becomes a line in its section.

    Args:
        run: Run directory.
        audit: What ``vse audit --out`` wrote; where it is None, ``RUN/audit``.
        gallery: What ``Gallery.info()`` returned.
    """
    run = run or Path("no-run")
    audit = audit or run / "audit"
    evaluate, train = "vse evaluate RUN --data DATA --json RUN/test.json", "vse train RECIPE --data DATA --out RUN"
    summary = _read("config.toml", train, lambda into: _summary(into, _config(run)))
    gallery_part = _read("the gallery's description", "vse index GALLERY info", lambda into: _gallery(into, gallery))
    summary.facts += gallery_part.facts
    summary.notes += gallery_part.notes
    return ModelReport(
        summary,
        _read("evaluation", evaluate, lambda into: _recall(into, run)),
        _read("metrics.jsonl", train, lambda into: _training(into, run)),
        _read("sampler report", "vse variance RUN", lambda into: _sampler(into, run / "variance")),
        _read("audit", "vse audit RUN --data DATA --out DIR", lambda into: read_audit(into, audit, gallery)),
        _read("model card", train, lambda into: into.text.append(_card(run / "README.md"))),
    )


def _read(name: str, mend: str, fill: Callable[[Section], None]) -> Section:
    section = Section()
    try:
        fill(section)
    except (FileNotFoundError, NotADirectoryError):
        return Section(notes=[*section.notes, f"no {name} yet: {mend}"])
    except DAMAGE as error:  # nothing of a damaged file is shown: a verdict without its figures would mislead
        why = f"damaged or half-written ({type(error).__name__}); write it again: {mend}"
        return Section(notes=[*section.notes, f"{name}: {why}"])
    return section


def _config(run: Path) -> Config:
    path = run / "config.toml"
    return from_dict(tomllib.loads(path.read_text(encoding="utf-8")), path.name)


def _summary(into: Section, config: Config) -> None:
    for name, side in (("Picture tower", config.model.image), ("Sentence tower", config.model.text)):
        frozen = ", frozen" if side.frozen else ""
        into.facts.append((name, f"{side.encoder}{frozen}, {side.pooling} pooling, head: {side.head}"))
    into.facts.append(("Common space", f"{config.model.dim} dimensions, {config.model.similarity} similarity"))
    contrastive = config.loss.name in ("infonce", "sigmoid")
    setting = f"temperature {config.loss.temperature:g}" if contrastive else f"margin {config.loss.margin:g}"
    into.facts.append(("Loss", f"{config.loss.name}, {setting}, batches of {config.optim.batch_size:,} pairs"))
    into.facts.append(("Trained on", f"{config.data} [{config.train_split}]"))


def _gallery(into: Section, info: Mapping[str, JSON]) -> None:
    if not info:
        into.notes.append("no gallery yet: vse index GALLERY add PICTURES --model RUN")
        return
    model: Any = info["model"]
    name, checksum = Path(str(model.get("name", "?"))).name, str(model.get("checksum", ""))
    into.facts.append(("Gallery", f"{info['items']:,} pictures, {info['dim']} dimensions, {info['metric']}"))
    into.facts.append(("Search", f"{info['search']}"))
    into.facts.append(("Gallery's model", f"{name} {checksum[:19]}"))


def _recall(into: Section, run: Path) -> None:
    for path in sorted(run.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 1 << 20 else None
            if isinstance(record, dict) and {"i2t", "t2i"} & record.keys():
                into.tables.append(_recall_table(record, path.name))
        except DAMAGE as error:
            into.notes.append(f"{path.name}: damaged or half-written ({type(error).__name__}); left out")
    if not into.tables:
        kept = _kept([record for record in _log(run, into) if record.get("kind") == "validation"], run)
        into.tables.append(_recall_table(kept, "validation, where the weights were chosen: expect less elsewhere"))


def _recall_table(record: dict[str, Any], source: str) -> Table:
    folds = f", mean of {record['folds']} folds" if record.get("folds") else ""
    rows = []
    for name, key in (("picture → captions", "i2t"), ("caption → picture", "t2i")):
        rows.append((name, *(number(record[key][figure]) for figure in ("r1", "r5", "r10", "medr", "meanr"))))
    caption = (
        f"{measured_on(record)}{folds}; rSum {number(record['rsum'])}, "
        f"{record['ties']:,} of {record['images'] + record['captions']:,} searches tied ({source})"
    )
    return Table(caption, ("search", "R@1", "R@5", "R@10", "median rank", "mean rank"), tuple(rows))


def _log(run: Path, into: Section) -> list[dict[str, Any]]:
    """Records of the training log; its last line may be one that a kill cut."""
    found, damaged = [], 0
    for line in (run / "metrics.jsonl").read_bytes().splitlines():
        try:
            record = json.loads(line)
            found.append({**record, "step": float(record["step"])})
        except DAMAGE:
            damaged += 1
    if damaged:
        into.notes.append(f"metrics.jsonl: {damaged:,} damaged or half-written lines are left out")
    return found


def _kept(validations: list[dict[str, Any]], run: Path) -> dict[str, Any]:
    """The validation of the weights that are in the run: the best, or after adversarial training the last."""
    if not validations:
        raise FileNotFoundError
    try:
        latest = _config(run).adversarial.method != "none"
    except DAMAGE:
        latest = False
    return validations[-1] if latest else max(validations, key=lambda record: float(record["rsum"]))


def _training(into: Section, run: Path) -> None:
    records = _log(run, into)
    batches = [record for record in records if record.get("kind") == "train"]
    validations = [record for record in records if record.get("kind") == "validation"]
    try:
        config = _config(run)
        size, data = config.optim.batch_size, f"{config.data} [{config.train_split}]"
        title = f"Loss of single batches of {size:,} pairs, {data}, logged every 50 steps"
    except DAMAGE:
        title = "Loss of single training batches, logged every 50 steps; config.toml would say of which data"
    losses = tuple(float(record["loss"]) for record in batches)
    into.curves.append(Curve(title, "loss", tuple(record["step"] for record in batches), losses))
    if validations:
        kept = _kept(validations, run)
        where, sums = measured_on(kept), tuple(float(record["rsum"]) for record in validations)
        title = f"Validation rSum, {where}"
        into.curves.append(Curve(title, "rSum", tuple(record["step"] for record in validations), sums))
        into.text.append(f"Kept: the weights of step {kept['step']:,.0f}, rSum {number(kept['rsum'])} ({where}).")


def _sampler(into: Section, folder: Path) -> None:
    record = json.loads((folder / "variance.json").read_text(encoding="utf-8"))
    where = measured_on(record)
    into.text.append(
        f"{record['copies']:,} of {record['captions']:,} pairs are copies of another, in {len(record['groups']):,} "
        f"groups ({where})."
    )
    points = record["points"]
    for point in points if len(points) < 3 else (points[0], points[-1]):
        when = f"after epoch {point['epoch']}" if point["epoch"] else "before training"
        uniform, rows = point["samplers"]["uniform"]["variance"], []
        for name, of in point["samplers"].items():
            scale = 1 / uniform if uniform > 0 else 0.0
            drawn = span(of["low"] * scale, of["high"] * scale, 2)
            rows.append((name, number(of["ratio"], 3), drawn, f"{of['draws']:,}"))
        columns = ("sampler", "variance ÷ uniform", "drawn, 95 %", "batches drawn")
        into.tables.append(Table(f"{when}: {where}", columns, tuple(rows)))
    groups = tuple(
        (", ".join(map(str, group[:4])) + ", …" * (len(group) > 4), f"{len(group):,}")
        for group in record["groups"][:8]
    )
    if groups:
        into.tables.append(Table(f"Largest groups of copies: {where}", ("caption ids", "pairs"), groups))
    pictures(into, folder, VARIANCE_FIGURES, where)


def _card(path: Path) -> str:
    """The model card without the table of settings that hubs read."""
    text = path.read_text(encoding="utf-8")
    _, closed, rest = text.removeprefix("---\n").partition("\n---\n")
    return rest if text.startswith("---\n") and closed else text
