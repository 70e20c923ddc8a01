"""The tab that says what the model is, how well it finds, and how easily it is fooled."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from pathlib import Path

import gradio as gr

from index.items import JSON
from vse_app.model_report import read_report
from vse_app.report_parts import Section, Table
from vse_app.web.charts import Series, line_chart

PARTS = {
    "summary": ("The model", "Two towers turn pictures and sentences into points of one space; near points match."),
    "recall": (
        "How well it finds",
        "R@K is the share of searches, in percent, with a right answer among the first K. The median rank is where "
        "the right answer stands in the middle case; 1 is best. rSum adds the six recalls: 600 would be perfect.",
    ),
    "training": (
        "How it learned",
        "The loss is what training makes small. Validation asks after each epoch how well pictures are found that "
        "were not trained on. The weights with the best rSum are kept, after adversarial training the last ones.",
    ),
    "sampler": (
        "What the training data repeats",
        "Training sees small batches, so its direction wavers. The ratio says how much it would waver if batches were "
        "drawn in another way: below 1 is steadier than drawing evenly. Copies are pairs the model cannot tell apart.",
    ),
    "audit": (
        "How easily it is fooled",
        "An attacker changes every pixel by at most ε, which the eye hardly sees, so that searches go wrong. "
        "Robust recall is what is left. The checks ask whether the attack itself works; a broken one proves nothing.",
    ),
}


def model_tab(run: Path | None, audit: Path | None, gallery: Mapping[str, JSON]) -> None:
    """Add the tab's contents to the block that is open; files are read once, now.

    Args:
        run: Run directory.
        audit: What ``vse audit --out`` wrote; where it is None, ``RUN/audit``.
        gallery: What ``Gallery.info()`` returned.
    """
    report = read_report(run, audit, gallery)
    for name, (title, explanation) in PARTS.items():
        section: Section = getattr(report, name)
        _html(section_html(title, explanation, section))
    with gr.Accordion("Model card", open=False):
        for text in report.card.text:
            gr.Markdown(text)
        if report.card.notes:
            _html(_notes(report.card))


def section_html(title: str, explanation: str, section: Section) -> str:
    """One part of the tab as HTML; everything from files is escaped."""
    parts = [f'<section class="vse-part"><h2>{escape(title)}</h2><p class="vse-lead">{escape(explanation)}</p>']
    if section.verdict:
        kind = {True: "good", False: "bad", None: "open"}[section.trustworthy]
        parts.append(f'<p class="vse-trust vse-{kind}">{escape(section.verdict)}</p>')
    parts.append(_notes(section))
    if section.facts:
        facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in section.facts)
        parts.append(f'<dl class="vse-facts">{facts}</dl>')
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    if section.checks:
        parts.append(_checks(section))
    parts.append(f'<div class="vse-tables">{"".join(map(table_html, section.tables))}</div>')
    if section.curves:
        charts = [
            line_chart([Series(of.name, of.steps, of.values)], title=of.title, x_label="step", y_label=of.name)
            for of in section.curves
        ]
        parts.append(f'<div class="vse-charts">{"".join(charts)}</div>')
    for picture in section.pictures:
        alt, data = escape(picture.alt), b64encode(picture.png).decode()
        parts.append(
            f'<figure class="vse-plate"><img src="data:image/png;base64,{data}" alt="{alt}">'
            f"<figcaption>{alt}</figcaption></figure>"
        )
    return "".join([*parts, "</section>"])


def table_html(table: Table) -> str:
    """A table that scrolls in its own box where the page is too narrow for it."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    caption = escape(table.caption)
    return (
        f'<div class="vse-scroll" tabindex="0" role="region" aria-label="{caption}"><table class="vse-table">'
        f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _html(text: str) -> None:
    # Half of a surrogate pair, which JSON may spell, would keep the whole page from being sent.
    gr.HTML(text.encode("utf-8", "replace").decode("utf-8"), js_on_load=None)


def _checks(section: Section) -> str:
    items = "".join(
        f'<li class="vse-{"good" if passed else "bad"}"><strong>{"pass" if passed else "FAIL"}</strong> '
        f"{escape(check)}</li>"
        for passed, check in section.checks
    )
    opened = "" if section.trustworthy else " open"
    return f'<details class="vse-checks"{opened}><summary>The checks, one by one</summary><ul>{items}</ul></details>'


def _notes(section: Section) -> str:
    return "".join(f'<p class="vse-note">{escape(note)}</p>' for note in section.notes)
