"""Results as HTML: one card per picture, the calibrated cut drawn between them; everything from data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

Record = dict[str, Any]
"""A result as :class:`vse_app.answers.Found`."""


def cards(records: Sequence[Record], cut: float | None, *, changeable: bool, likely_only: bool = False) -> str:
    """A list of results, best first.

    Args:
        records: What was found.
        cut: From this probability on results are likely; a line is drawn where they end.
        changeable: With a button that removes a picture.
        likely_only: Leave out what is below the cut.
    """
    likely = [record for record in records if record["likely"] is not False]
    others = [] if likely_only else [record for record in records if record["likely"] is False]
    if not likely and not others:
        return empty(
            "Nothing here is likely to be what you mean. Show unlikely results too, or say it otherwise."
            if records
            else "No picture fulfils the conditions. Loosen the filter."
        )
    parts = [_card(rank, record, changeable) for rank, record in enumerate(likely, 1)]
    if others:
        above = "Nothing is likely to be what you mean; these come nearest" if not likely else "Less likely"
        parts.append(
            f'<li class="vse-cut"><span>{above}: probability below the calibrated cut of {cut:.0%}</span></li>'
        )
        parts += [_card(rank, record, changeable) for rank, record in enumerate(others, len(likely) + 1)]
    return f'<ol class="vse-grid" aria-label="Results">{"".join(parts)}</ol>'


def empty(message: str, examples: Sequence[str] = ()) -> str:
    """What stands there instead of results: a sentence, and texts to try."""
    chip = '<button type="button" class="vse-chip" data-action="example" data-text="{0}">{0}</button>'
    chips = "".join(chip.format(escape(text)) for text in examples)
    return f'<div class="vse-empty"><p>{escape(message)}</p><div class="vse-chips">{chips}</div></div>'


def status(message: str, kind: str = "plain") -> str:
    """A line that screen readers speak when it changes; ``kind`` is ``plain`` or ``error``."""
    role = 'role="alert"' if kind == "error" else 'role="status" aria-live="polite"'
    return f'<p class="vse-said vse-{kind}" {role}>{escape(message)}</p>'


def _card(rank: int, record: Record, changeable: bool) -> str:
    name, caption = escape(record["name"]), escape(record["caption"] or "")
    where = escape(record["path"] or record["name"])
    facts = [f'<span class="vse-rank">{rank}</span>']
    if record["probability"] is not None:
        mark = "vse-likely" if record["likely"] else "vse-unlikely"
        facts.append(
            f'<span class="vse-badge {mark}" title="calibrated probability that this is meant">'
            f"{record['probability']:.0%}</span>"
        )
    facts.append(f'<span class="vse-score" title="similarity to the query">{record["score"]:.3f}</span>')
    if record["alike"]:
        facts.append(f'<span class="vse-badge">+{record["alike"]} alike</span>')
    actions = [("like", "More like this"), ("why", "Why?"), ("attack", "Attack")]
    if changeable:
        actions.append(("remove", "Remove"))
    buttons = "".join(
        f'<button type="button" data-action="{action}" aria-label="{label}: {name}">{label}</button>'
        for action, label in actions
    )
    data = {
        "id": record["id"],
        "name": record["name"],
        "path": record["path"] or "",
        "caption": record["caption"] or "",
        "score": f"{record['score']:.6f}",
        "probability": "" if record["probability"] is None else f"{record['probability']:.6f}",
    }
    attributes = " ".join(f'data-{key}="{escape(str(value))}"' for key, value in data.items())
    return (
        f'<li class="vse-card" {attributes}>'
        f'<a class="vse-thumb" href="{record["image"]}" target="_blank" title="{where}">'
        f'<img src="{record["image"]}?side=320" alt="{caption or name}" loading="lazy"></a>'
        f'<div class="vse-line">{"".join(facts)}</div>'
        f'<p class="vse-caption">{caption or name}</p><div class="vse-actions">{buttons}</div></li>'
    )
