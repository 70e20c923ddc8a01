"""``vse variance``: what each sampler would do to the gradient's variance, and which training pairs are alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training.data.corpus import Corpus
from training.files import replacing, write_text
from vse_app.contact_sheet import Row, contact_sheet
from vse_app.figures import new_figure, save_figure, tidy
from vse_app.gradient_study import Point, Redundancy

SHOWN = 8  # groups of copies that are listed, and pictures of each
COLOURS = ["#000000", "#8c8c8c", "#8c510a", "#e69f00", "#0072b2", "#009e73", "#cc79a7"]


def format_point(point: Point) -> str:
    """A small table: variance over that of uniform batches with its interval, and what else is known."""
    when = f"after epoch {point.epoch}" if point.epoch else "before training"
    lines = [f"{when:24}{'÷ uniform':>10}  {'drawn, 95 %':^13}{'normalised':>11}{'noise scale':>13}  mean gradient"]
    for name, of in point.samplers.items():
        report = of.report
        drawn = point.samplers["uniform"].report.variance
        scale = 1 / drawn if drawn > 0 else 0.0
        between = f"{report.low * scale:.3f}–{report.high * scale:.3f}"
        lines.append(
            f"{name:24}{of.ratio:10.3f}  {between:^13}{report.normalised:11.3f}{report.noise_scale:13.1f}  "
            f"{'biased' if of.bias.significant else 'unbiased'}"
        )
    return "\n".join(lines)


def format_redundancy(found: Redundancy, corpus: Corpus) -> str:
    """How much of the data is copies, and the largest groups of them."""
    copies = sum(len(group) - 1 for group in found.groups)
    clusters = found.clusters
    lines = [
        f"{len(clusters.sizes)} clusters explain {clusters.explained:.0%} of the gradients' scatter; "
        f"{copies:,} of {len(corpus):,} pairs ({copies / len(corpus):.2%}) are copies of another"
    ]
    for group in found.groups[:SHOWN]:
        lines.append(f"{len(group):7,} × “{corpus.captions[group[0]]}”")
    return "\n".join(lines)


def to_json(points: Sequence[Point], found: Redundancy, corpus: Corpus, data: str, split: str) -> dict[str, Any]:
    """Everything that was found, for machines."""
    return {
        "data": data,
        "split": split,
        "images": len(corpus.image_ids),
        "captions": len(corpus),
        "explained": found.clusters.explained,
        "copies": sum(len(group) - 1 for group in found.groups),
        "groups": [[corpus.caption_ids[pair] for pair in group] for group in found.groups],
        "points": [
            {
                "epoch": point.epoch,
                "samplers": {
                    name: {"ratio": of.ratio, **of.report.to_json(), "bias": of.bias._asdict()}
                    for name, of in point.samplers.items()
                },
            }
            for point in points
        ],
    }


def kept_weights(found: Redundancy, corpus: Corpus) -> dict[str, int]:
    """Caption ids to keep, and how many pairs each stands for: the first of each group, and all that are in none."""
    weights = dict.fromkeys(corpus.caption_ids, 1)
    for group in found.groups:
        weights[corpus.caption_ids[group[0]]] = len(group)
        for pair in group[1:]:
            del weights[corpus.caption_ids[pair]]
    return weights


def write_plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Variance, and variance over that of uniform batches, against epochs.

    Raises:
        InputError: If matplotlib is not installed.
    """
    figure = new_figure(9, 4.2)
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    left, right = figure.subplots(1, 2)
    epochs = [point.epoch for point in points]
    for name, colour in zip(points[0].samplers, COLOURS, strict=True):
        of = [point.samplers[name] for point in points]
        left.plot(epochs, [m.report.variance for m in of], color=colour, marker="o", markersize=3, label=name)
        left.fill_between(
            epochs, [m.report.low for m in of], [m.report.high for m in of], color=colour, alpha=0.15, linewidth=0
        )
        right.plot(epochs, [m.ratio for m in of], color=colour, marker="o", markersize=3)
    for axes, label in ((left, "variance of the mini-batch gradient"), (right, "variance ÷ uniform")):
        axes.set(xlabel="epochs of training", ylabel=label, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def write_sheet(found: Redundancy, corpus: Corpus, path: Path) -> bool:
    """Pictures of the largest groups, the kept one framed; False where there are no groups or no pictures."""
    groups = found.groups[:SHOWN]
    if not groups or not corpus.images:
        return False
    with TemporaryDirectory() as folder:
        rows = []
        for number, group in enumerate(groups):
            files = []
            for place, pair in enumerate(group[:SHOWN]):
                files.append(Path(folder) / f"{number}-{place}.png")
                corpus.images[corpus.owner[pair]].load().save(files[-1])
            rows.append(Row(f"{len(group):,} alike: “{corpus.captions[group[0]]}”", files, own=files[0]))
        with replacing(path) as temporary:
            contact_sheet(rows).save(temporary, format="PNG")
    return True


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Indented JSON, whole or not at all."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
