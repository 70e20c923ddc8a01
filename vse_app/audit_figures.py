"""The record of an audit as figures: recall against ε, rank shifts, spectrum, flips, corruptions and certificates.

Every line differs from its neighbours in dash and marker, and every area in lightness, not in colour alone: the
figures hold in black-and-white print and for colour-blind readers.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

from training.files import replacing
from training.robustness.norms import FourierLInf, parse_norm
from training.robustness.spectrum import radial_frequency, radial_mean
from training.robustness.summary import unchanged
from vse_app.audit_report import radius
from vse_app.contact_sheet import FRAME, INK, PAPER
from vse_app.figures import BLACK, BLUE, GREY, NORM_NAMES, ORANGE, new_figure, save_figure, tidy

if TYPE_CHECKING:
    from training.robustness.audit import Audit

TILE, GAP, TEXT_WIDTH, LINE, MARGIN = 200, 14, 330, 24, 6
CAPTION = (TILE - LINE) // 3
"""Height of one of three captions below a heading, beside a picture."""
GAIN = 10
"""What differences of pixels are multiplied by to be seen."""


def write_figures(record: dict[str, Any], audit: Audit, out: Path) -> list[str]:
    """Draw what the record has figures of.

    Args:
        record: What ``audit`` has found.
        audit: Knows the pictures and the captions.
        out: Folder of the audit, with its parts.

    Returns:
        Names of the files written there.

    Raises:
        InputError: If matplotlib is not installed.
    """
    figures = {
        "curve.png": _curves(record),
        "shifts.png": _shifts(record, audit.shown_epsilon),
        "spectrum.png": _spectrum(record, audit),
        "corruptions.png": _corruptions(record),
        "certificates.png": _certificates(record),
    }
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, out / name)
    written = [name for name, figure in figures.items() if figure is not None]
    sheet = _flips(record, audit, out)
    if sheet is None:
        return written
    with replacing(out / "flips.png") as temporary:
        sheet.save(temporary, format="PNG")
    return [*written, "flips.png"]


def _heading(record: dict[str, Any]) -> str:
    gallery = f"gallery of {record['images']:,} images and {record['captions']:,} captions"
    return f"{record['data']} [{record['split']}], {gallery}"


def _warning(record: dict[str, Any]) -> str:
    """A figure travels without its report; that its attack may be broken goes with it."""
    return "\nNOT TRUSTWORTHY: a check of the attack failed" if record["trustworthy"] is False else ""


def _values(points: Sequence[dict[str, Any]], figure: str, of: str = "value") -> NDArray[np.float64]:
    """One figure at every ε, with gaps: for None, as JSON may have it, and where no picture was changed."""
    idle = [point["epsilon"] > 0 and point.get("changed") == 0 for point in points]
    values = [None if gap else point[figure][of] for gap, point in zip(idle, points, strict=True)]
    return np.array(values, dtype=np.float64)


def _curves(record: dict[str, Any]) -> Any:
    """Recall under attack against ε, queries to the left and gallery pictures to the right."""
    threats, norm = record["threats"], record["config"]["norm"]
    query, owner, promote = (threats.get(name) for name in ("query-image", "gallery-owner", "gallery-promote"))
    panels = (query is not None) + (owner is not None or promote is not None)
    if not panels:
        return None
    figure = new_figure(5.2 * panels if panels > 1 else 6.4, 5)
    first, last = figure.subplots(1, panels, squeeze=False)[0, [0, -1]]
    if query is not None:
        _line(first, query["curve"], "r1", BLACK, "-o", "R@1, 95 % interval", band=True)
        _line(first, query["curve"], "r5", BLUE, "--s", "R@5")
        _line(first, query["curve"], "r10", ORANGE, ":^", "R@10")
        _mark_epsilon50(first, query, norm)
        _dress(first, query["curve"], norm, "recall of own captions, %")
        first.set_title(f"query-image: {query['queries']:,} perturbed pictures search", fontsize=9)
    names = []
    if owner is not None:
        _line(last, owner["curve"], "r1", BLACK, "-o", "R@1 of gallery-owner, 95 % interval", band=True)
        names.append(f"gallery-owner ({owner['queries']:,})")
    if promote is not None:
        label = "success@1 of gallery-promote, 95 % interval"
        _line(last, promote["curve"], "asr1", BLUE, "--D", label, band=True)
        names.append(f"gallery-promote ({promote['queries']:,})")
    if names:
        _dress(last, (owner or promote or {})["curve"], norm, "share of searches, %")
        last.set_title(f"captions search: {', '.join(names)}", fontsize=9)
    bound = "R@K: an upper bound of robust recall, a better attack may lower it"
    if promote is not None:
        bound += "; success: a lower bound"
    figure.suptitle(f"{_heading(record)}\n{bound}{_warning(record)}", fontsize=9 if panels > 1 else 8)
    return figure


def _line(
    axes: Any, points: list[dict[str, Any]], of: str, colour: str, style: str, label: str, band: bool = False
) -> None:
    # Levels are evenly spaced: radii mostly double, and a logarithm has no place for 0.
    places = range(len(points))
    axes.plot(places, _values(points, of), style, color=colour, markersize=5, label=label, clip_on=False, zorder=3)
    if band:
        low, high = (_values(points, of, end) for end in ("low", "high"))
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def _steps(epsilon: float, norm: str) -> float:
    return 255 * epsilon if norm == "linf" else epsilon


def _dress(axes: Any, points: list[dict[str, Any]], norm: str, label: str) -> None:
    tidy(axes)
    unit = "ε · 255 (ℓ∞, in 8-bit steps)" if norm == "linf" else f"ε ({NORM_NAMES.get(norm, norm)})"
    axes.set(xlabel=unit, ylabel=label, ylim=(0, 100), xlim=(-0.15, len(points) - 0.85))
    ticks = [f"{_steps(point['epsilon'], norm):.3g}" for point in points]
    axes.set_xticks(range(len(points)), ticks, rotation=45 if len(points) > 8 else 0)
    # Below the axes: a robust model's lines fill the place that a fragile one's leave free.
    columns = 2 if len(axes.get_legend_handles_labels()[0]) > 2 else 1
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=8)


def _mark_epsilon50(axes: Any, query: dict[str, Any], norm: str) -> None:
    found, epsilons = query["epsilon50"], [point["epsilon"] for point in query["curve"]]
    if found is None or found["value"] is None:
        missing = "ε50: no clean query ranks first" if found is None else "ε50 is beyond the largest ε"
        axes.plot([], [], " ", label=missing)
        return
    low, high = (None if found[end] is None else _steps(found[end], norm) for end in ("low", "high"))
    interval = f"{'?' if low is None else f'{low:.2g}'} – {'beyond' if high is None else f'{high:.2g}'}"
    place = np.interp(found["value"], epsilons, range(len(epsilons)))
    label = f"ε50 = {_steps(found['value'], norm):.2g} ({interval})"
    axes.axvline(place, color=GREY, linestyle="-.", linewidth=1.5, label=label)


def _shifts(record: dict[str, Any], shown: int) -> Any:
    """How many ranks the pictures' own captions have moved, at two radii."""
    found = record["threats"].get("query-image")
    if found is None:
        return None
    ranks, norm = np.asarray(found["ranks"])[..., 0], record["config"]["norm"]  # (E + 1, N)
    places = sorted({shown, len(ranks) - 1})
    shifts = ranks[places] - ranks[0]
    powers = [2**n for n in range(int(shifts.max(initial=1)).bit_length() + 1)]
    edges = [-np.inf, 0, *powers]  # below 0, 0, 1, 2–3, 4–7 …
    labels = ["up", "0", *("1" if low == 1 else f"{low:,}–{2 * low - 1:,}" for low in powers[:-1])]
    counts = np.stack([np.histogram(row, edges)[0] for row in shifts]) * 100 / shifts.shape[1]
    kept = slice(0 if counts[:, 0].any() else 1, None)  # an attack hardly ever raises a rank
    counts, labels = counts[:, kept], labels[kept]
    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    width = 0.8 / len(places)
    for number, (place, row, colour, hatch) in enumerate(
        zip(places, counts, (ORANGE, BLUE), ("", "///"), strict=False)
    ):
        left = np.arange(len(row)) + (number - (len(places) - 1) / 2) * width
        label = f"ε = {radius(found['curve'][place]['epsilon'], norm)}, median {np.median(shifts[number]):,.0f}"
        axes.bar(left, row, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
    tidy(axes)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="rank under attack − clean rank of the best own caption", ylabel="share of queries, %")
    axes.set_xticks(range(len(labels)), labels, rotation=45 if len(labels) > 6 else 0)
    axes.legend(frameon=False, fontsize=9)
    bound = f"query-image, {found['queries']:,} queries; shifts are lower bounds of what an attacker can reach"
    figure.suptitle(f"{_heading(record)}\n{bound}{_warning(record)}", fontsize=9)
    return figure


def _spectrum(record: dict[str, Any], audit: Audit) -> Any:
    """Mean amplitude of the perturbations against radial frequency at every ε, and what the norm allows there."""
    found = record["threats"].get("query-image")
    if found is None or not np.any(found["spectrum"]["amplitude"]):  # a logarithm has no place for 0
        return None
    name, norm = record["config"]["norm"], parse_norm(record["config"]["norm"])
    limits = None
    if isinstance(norm, FourierLInf):  # in bins as well: an edge of the band lies within one
        shares = radial_mean(norm.shares(radial_frequency(*audit.picture(0).shape[-2:]))).mean
        limits = shares.where(shares > 0, math.nan)
    figure = new_figure(7.2, 4.4)
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    centres, amplitude = found["spectrum"]["radius"], found["spectrum"]["amplitude"]
    radii = [point["epsilon"] for point in found["curve"]]
    colours = colormaps["viridis"](np.linspace(0.85, 0, len(radii)))
    for place in range(len(radii) - 1, 0, -1):  # the legend in the order of the lines
        means = _steps(1, name) * np.asarray(amplitude[place])
        # Outside a band there is rounding only, which would stretch the axis over many decades.
        means[means <= means.max() / 1000] = np.nan
        style, label = ("-o", "--s", ":^", "-.D")[place % 4], f"ε = {radius(radii[place], name)}"
        axes.plot(centres, means, style, color=colours[place], markersize=4, label=label)
        if limits is not None:
            axes.plot(centres, radii[place] * limits, color=colours[place], linewidth=0.8)
    if isinstance(norm, FourierLInf):
        axes.plot([], [], color=GREY, linewidth=0.8, label="limit, mean of the bin")
        if norm.band is not None:
            axes.axvspan(*norm.band, color=GREY, alpha=0.15, linewidth=0, label="allowed band")
    tidy(axes)
    unit = "8-bit steps" if name == "linf" else "pixels in [0, 1]"
    axes.set(xlabel="radial frequency, 1 = Nyquist: half a cycle per pixel", xlim=(0, math.sqrt(2)), yscale="log")
    axes.set_ylabel(f"mean |δ̂|, orthonormal 2-D DFT, {unit}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    kind = f"spectrum of perturbations in {NORM_NAMES.get(name, name)}"
    figure.suptitle(
        f"{_heading(record)}\nquery-image, {found['queries']:,} queries: {kind}{_warning(record)}", fontsize=9
    )
    return figure


def _corruptions(record: dict[str, Any]) -> Any:
    """R@1 of every corruption and severity as a heat map with its numbers."""
    found = record["threats"].get("corruption")
    if found is None:
        return None
    names, severities, clean = list(found["r1"]), list(next(iter(found["r1"].values()))), found["clean"]
    idle = unchanged(found)  # a gap: what changed no picture measured nothing
    values = np.array(
        [[None if f"{n} {s}" in idle else found["r1"][n][s]["value"] for s in severities] for n in names],
        dtype=np.float64,
    )
    figure = new_figure(6.2, 1.9 + 0.3 * len(names))
    axes = figure.subplots()
    top = max(float(np.nanmax(values, initial=1)), clean["value"] or 0)
    picture = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.55 * top else "black"
        text = "unchanged" if np.isnan(value) else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(severities)), severities)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("severity")
    bar = figure.colorbar(picture, ax=axes, label="R@1, %; the line is the clean one", pad=0.03)
    bar.ax.axhline(clean["value"], color="#d55e00", linewidth=3)
    bar.outline.set_visible(False)
    mean = "–" if found["mean_r1"] is None else f"{found['mean_r1']:.1f}"
    means = f"clean R@1 {clean['value']:.1f} ({clean['low']:.1f} – {clean['high']:.1f}), mean {mean}"
    figure.suptitle(f"{_heading(record)}\ncorruption, {found['queries']:,} queries: {means}", fontsize=9)
    return figure


def _certificates(record: dict[str, Any]) -> Any:
    """Certified and attacked R@1 against the radius: the truth lies between them."""
    found = record["certificates"]
    tables = {} if "reason" in found else {norm: of["table"] for norm, of in found.items() if of["table"]}
    if not tables:
        return None
    figure = new_figure(max(3.4 * len(tables), 6.8), 4)
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, (norm, table) in zip(panels, tables.items(), strict=True):
        radii, certified, attacked = (
            np.array([row[of] for row in table], dtype=np.float64) for of in ("radius", "certified", "attacked")
        )
        axes.fill_between(radii, certified, attacked, color=GREY, alpha=0.25, linewidth=0, label="between: not known")
        axes.plot(radii, attacked, "--s", color=BLUE, markersize=5, label="attacked: an upper bound", clip_on=False)
        axes.plot(radii, certified, "-o", color=BLACK, markersize=5, label="certified: a lower bound", clip_on=False)
        tidy(axes)
        axes.set(xlabel=f"radius, {NORM_NAMES.get(norm, norm)}", ylim=(0, None), xlim=(0, None))
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_ylabel("R@1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{_heading(record)}\nperturbed features of the backbone, the gallery fixed", fontsize=9)
    return figure


def _flips(record: dict[str, Any], audit: Audit, out: Path) -> Image.Image | None:
    """One line per flip: clean picture, perturbed picture, their difference, and what both find."""
    flips = record["threats"].get("query-image", {}).get("flips", [])
    flips = [flip for flip in flips if (out / "parts" / flip["file"]).is_file()]
    if not flips:
        return None
    font = _font(13)
    columns = [GAP + place * (TILE + GAP) for place in range(3)]
    columns += [columns[2] + TILE + GAP + place * (TEXT_WIDTH + GAP) for place in range(2)]
    top = GAP + 2 * LINE + 6
    size = columns[-1] + TEXT_WIDTH + GAP, top + len(flips) * (TILE + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    norm = NORM_NAMES.get(record["config"]["norm"], record["config"]["norm"])
    lead = f"{_heading(record)}: queries that found an own caption first, and what an attack in {norm} makes of them"
    draw.text((GAP, GAP), _fitted(draw, lead, size[0] - 2 * GAP, 1, _font(15)), fill=INK, font=_font(15))
    heads = ["clean", "adversarial", f"difference × {GAIN}, grey: 0", "✓ framed: describes the picture", ""]
    for left, head in zip(columns, heads, strict=True):
        draw.text((left, GAP + LINE + 6), head, fill=INK, font=font)
    for line, flip in enumerate(flips):
        y = top + line * (TILE + GAP)
        clean = audit.picture(flip["row"])
        adversarial = load_file(out / "parts" / flip["file"])["adversarial"][flip["place"]]
        pictures = (clean, adversarial, 0.5 + GAIN * (adversarial - clean))
        for left, picture, resample in zip(columns, map(_to_picture, pictures), (3, 3, 0), strict=False):
            # The difference is not smoothed: neighbouring pixels of opposite sign would cancel.
            sheet.paste(picture.resize((TILE, TILE), Image.Resampling(resample)), (left, y))
        own = {audit.corpus.captions[c] for c in np.flatnonzero(audit.corpus.owner == flip["row"]).tolist()}
        epsilon = radius(flip["epsilon"], record["config"]["norm"])
        after = f"after, ε = {epsilon}: own caption at rank {flip['rank'] + 1:,}"
        for left, head, found in zip(
            columns[3:], ("before: own caption at rank 1", after), (flip["before"], flip["after"]), strict=True
        ):
            draw.text((left, y), _fitted(draw, head, TEXT_WIDTH, 1, font), fill=INK, font=font)
            for place, caption in enumerate(found):
                _caption(draw, left, y + LINE + place * CAPTION, caption, caption in own)
    return sheet


def _caption(draw: ImageDraw.ImageDraw, left: int, top: int, caption: str, own: bool) -> None:
    box = (left, top, left + TEXT_WIDTH, top + CAPTION - 5)
    draw.rounded_rectangle(box, 5, "#e3f4ed" if own else PAPER, FRAME if own else "#d0d0d0", 3 if own else 1)
    font = _font(13)
    whole = re.sub(r" (?=[.,])", "\u00a0", caption)  # no full stop on a line of its own
    text = _fitted(draw, f"{'✓' if own else '✗'} {whole}", TEXT_WIDTH - 2 * MARGIN - 4, 3, font)
    middle = (left + MARGIN + 2, (box[1] + box[3]) // 2)
    draw.multiline_text(middle, text, fill=INK, font=font, spacing=1, anchor="lm")


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's: Pillow's own has no ε, and few of the letters that captions may be written in."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int, lines: int, font: ImageFont.FreeTypeFont) -> str:
    """Text broken, and cut if need be, so that it fits: letters differ in width, so they are measured."""
    for letters in range(max(len(text), 5), 4, -1):
        broken = textwrap.fill(text, letters, max_lines=lines, placeholder=" …")
        if draw.multiline_textbbox((0, 0), broken, font=font)[2] <= width:
            break
    return broken


def _to_picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
