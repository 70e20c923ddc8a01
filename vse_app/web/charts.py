"""Line charts as inline SVG: no JavaScript, at home in light and dark pages, legible without colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vse_app.web.chart_axes import axis, fits, shown

WIDTH, HEIGHT, TOP, BOTTOM, LETTER = 380, 250, 32, 206, 7.0
MOST_TOOLTIPS = 200
STYLES = [("#0072b2", "none"), ("#d55e00", "7 4"), ("#009e73", "2 4"), ("#b0568f", "9 3 2 3"), ("#7a7a7a", "4 4")]


@dataclass(frozen=True)
class Series:
    """One line. What is not finite, or has no logarithm where one is needed, leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
) -> str:
    """An HTML figure, well-formed as XML too, that takes the width it is given.

    Args:
        series: Lines; several are told apart by colour, dash and the name at their end.
        title: Caption, read out by screen readers.
        x_label: Below the axis.
        y_label: Above the axis.
        log_x: Logarithmic; places at or below zero are left out, which the label then says.
        log_y: The same for y.
        markers: Draw every point; otherwise points appear under the pointer only.
    """
    head = f'<figure class="vse-chart"><figcaption>{escape(title)}</figcaption>'
    pairs = [list(zip(of.x, of.y, strict=True)) for of in series]
    lines = [[p if fits(p[0], log_x) and fits(p[1], log_y) else None for p in line] for line in pairs]
    drawn = [point for line in lines for point in line if point]
    if not drawn:
        return f'{head}<p class="vse-note">There is nothing to show yet.</p></figure>'
    names = [of.name if len(of.name) <= 18 else f"{of.name[:17]}…" for of in series]
    right = WIDTH - (28 + LETTER * max(map(len, names)) if len(series) > 1 else 22)
    y_ticks, y_place = axis([y for _, y in drawn], log_y, BOTTOM, TOP, widen=True)
    left = 12 + LETTER * max(len(shown(tick)) for tick in y_ticks)
    x_ticks, x_place = axis([x for x, _ in drawn], log_x, left, right, widen=False)
    x_name = x_label + " (0 is not shown)" * (log_x and any(x <= 0 for line in pairs for x, _ in line))
    y_name = y_label + " (0 is not shown)" * (log_y and any(y <= 0 for line in pairs for _, y in line))
    parts = [
        f'{head}<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="13" '
        f'fill="currentColor"><title>{escape(title)}</title>',
        _text((left + right) / 2, HEIGHT - 6, x_name),
        _text(2, 14, y_name, "start"),
    ]
    for tick in y_ticks:
        parts.append(f'<path d="M{left:.1f} {y_place(tick):.1f}H{right:.1f}" stroke="currentColor" opacity="0.15"/>')
        parts.append(_text(left - 6, y_place(tick) + 4.5, shown(tick), "end"))
    parts += [_text(x_place(tick), BOTTOM + 17, shown(tick)) for tick in x_ticks]
    ends = _apart([next((y_place(p[1]) for p in reversed(line) if p), math.nan) for line in lines])
    for number, (of, name, line, end) in enumerate(zip(series, names, lines, ends, strict=True)):
        fallback, dash = STYLES[number % len(STYLES)]
        colour, path = f"var(--vse-line-{number % len(STYLES) + 1}, {fallback})", ""
        look = f'fill="none" stroke-dasharray="{dash}" stroke-width="2" style="stroke: {colour}"'
        known = [point for point in line if point]
        for before, point in zip([None, *line], line, strict=False):
            if point:  # h0 lets the round cap of a point between two gaps show
                path += f"{'L' if before else 'M'}{x_place(point[0]):.1f} {y_place(point[1]):.1f}h0"
        parts.append(f'<path d="{path}" {look} stroke-linecap="round" stroke-linejoin="round"/>')
        kind, stride = ("vse-marker", 1) if markers else ("vse-hover", len(known) // MOST_TOOLTIPS + 1)
        for x, y in known[::stride]:
            said = escape(f"{of.name}: {y:.6g} at {x_label} {x:.6g}")
            spot = f'cx="{x_place(x):.1f}" cy="{y_place(y):.1f}" r="3.5" stroke="transparent" stroke-width="8"'
            parts.append(f'<circle class="{kind}" {spot} style="fill: {colour}"><title>{said}</title></circle>')
        if len(series) > 1 and known:
            parts.append(
                f'<path d="M{right + 4:.1f} {end:.1f}h15" {look}/>{_text(right + 23, end + 4, name, "start")}'
            )
    return "".join([*parts, "</svg></figure>"])


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _apart(places: Sequence[float], least: float = 15) -> list[float]:
    """Heights of names, moved so far that none covers another."""
    moved, free = list(places), TOP - least
    known = sorted((place, number) for number, place in enumerate(places) if math.isfinite(place))
    for left, (place, number) in zip(range(len(known), 0, -1), known, strict=True):
        free = moved[number] = max(free + least, min(place, BOTTOM - (left - 1) * least))
    return moved
