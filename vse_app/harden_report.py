"""What ``vse harden`` measured as a table, a figure and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from training.robustness.linear.head_training import ATTACKS, HeadPairs, TrainedHead, radii_kept
from training.robustness.linear.retrieval_heads import HeadEvaluation
from vse_app.figures import BLACK, BLUE, NORM_NAMES, ORANGE, new_figure, save_figure, tidy

FIGURE = "certified.png"
CURVE_POINTS = 61


def head_label(optimizer: str, regularizer: str, attack: str) -> str:
    """What a head is called, by how it was trained."""
    if regularizer == "none":
        return f"{optimizer} descent"
    return (
        f"{optimizer} + {NORM_NAMES[attack]} margin"
        if regularizer == "margin"
        else f"{optimizer} + {regularizer} of W"
    )


def to_record(
    about: Mapping[str, Any], heads: Mapping[str, tuple[HeadEvaluation, float]], test: HeadPairs, chosen: TrainedHead
) -> dict[str, Any]:
    """All of it as JSON has it; curves go to twice the radius at which the first head keeps a quarter of its hits.

    Args:
        about: Of the run and the data.
        heads: By label, the run's own first: as queries are images, and R@1 in [0, 1] of texts as queries.
        test: What they were measured on.
        chosen: The last of them.
    """
    own, _ = next(iter(heads.values()))
    radii = {norm: radii_kept(own.radii[norm]) for norm in ATTACKS}
    axes = {norm: [2 * of[1] * n / (CURVE_POINTS - 1) for n in range(CURVE_POINTS)] for norm, of in radii.items()}
    return {
        **about,
        "images": len(test.features),
        "captions": len(test.gallery),
        "steps": chosen.steps,
        "penalty": chosen.share,
        "radii": radii,
        "curve_radii": axes,
        "heads": {
            label: {"clean": 100 * of.clean, "clean_texts": 100 * texts}
            | {norm: _percent(of.curve(norm, radii[norm])) for norm in ATTACKS}
            | {"curves": {norm: _percent(of.curve(norm, axes[norm])) for norm in ATTACKS}}
            for label, (of, texts) in heads.items()
        },
    }


def _percent(shares: Tensor) -> list[float]:
    return [100 * share for share in shares.tolist()]


def format_table(record: dict[str, Any]) -> str:
    """Clean R@1 beside certified R@1, at the radii where the run's own head keeps a half and a quarter of its hits."""
    columns = [f"{NORM_NAMES[norm]} {radius:.3g}" for norm, radii in record["radii"].items() for radius in radii]
    lines = [
        f"{record['data']}, split {record['split']}: {record['images']:,} images as queries, "
        f"{record['captions']:,} captions.",
        "R@1 in percent, clean in both directions, and of image to text certified against perturbations of the",
        "features up to a radius, in standard deviations: where the run's own head keeps a half and a quarter.",
        "",
        f"{'head':24}{'i → t':>8}{'t → i':>8}" + "".join(f"{column:>11}" for column in columns),
    ]
    for label, row in record["heads"].items():
        certified = [share for norm in record["radii"] for share in row[norm]]
        lines.append(
            f"{label:24}{row['clean']:8.1f}{row['clean_texts']:8.1f}"
            + "".join(f"{share:11.1f}" for share in certified)
        )
    chosen = f"The last head: {record['steps']} steps"
    return "\n".join([*lines, chosen + (f", penalty {record['penalty']:g}." if record["penalty"] else ".")])


def write_figure(record: dict[str, Any], path: Path) -> None:
    """Certified R@1 against the radius, a panel per norm.

    Raises:
        InputError: If matplotlib is not installed.
    """
    figure = new_figure(10, 3.8)
    styles = ((BLACK, "--"), (ORANGE, "-."), (BLUE, "-"))
    for axes, (norm, radii) in zip(
        figure.subplots(1, len(ATTACKS), sharey=True), record["curve_radii"].items(), strict=True
    ):
        for (label, row), (colour, dash) in zip(record["heads"].items(), styles, strict=False):
            axes.plot(radii, row["curves"][norm], dash, color=colour, label=label)
        axes.set(
            xlabel=f"{NORM_NAMES[norm]} radius, standard deviations of the features",
            xlim=(0, radii[-1] or 1),
            ylim=(0, None),
        )
        axes.xaxis.label.set_fontsize(9)
        tidy(axes)
    figure.axes[0].set_ylabel("certified R@1, image to text, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"{record['data']} [{record['split']}], {record['images']:,} images, {record['captions']:,} captions",
        fontsize=10,
    )
    save_figure(figure, path)


def model_card(record: dict[str, Any], figure: bool) -> str:
    """The README.md of a hardened run."""
    return f"""---
library_name: vse
tags: [image-text-retrieval, visual-semantic-embedding]
---
# `{record["run"]}` with a hardened image head

The image head was trained anew by `vse harden`; backbones and text tower are those of the run. Certificates are about
perturbations of the image backbone's pooled features; they say nothing about pixels.

```
{format_table(record)}
```
""" + (f"\n![Certified R@1 against the radius]({FIGURE})\n" if figure else "")
