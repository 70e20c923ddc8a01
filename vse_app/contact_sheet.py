"""Search results as one picture."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE, GAP, TEXT_WIDTH = 144, 12, 300
INK, PAPER, FRAME = "#22252b", "#ffffff", "#1a936f"


@dataclass(frozen=True)
class Row:
    """A query and the pictures it found.

    Attributes:
        query: The sentence.
        results: Picture files, best first.
        own: The picture that the sentence describes, if it is known; framed where it appears.
    """

    query: str
    results: list[Path]
    own: Path | None = None


def contact_sheet(rows: list[Row]) -> Image.Image:
    """One line per query: the sentence, then its results from left to right."""
    columns = max((len(row.results) for row in rows), default=0)
    width = TEXT_WIDTH + columns * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (TILE + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=17)
    for line, row in enumerate(rows):
        top = GAP + line * (TILE + GAP)
        text = textwrap.fill(row.query, width=32, max_lines=6, placeholder=" …")
        box = draw.multiline_textbbox((0, 0), text, font=font, spacing=6)
        draw.multiline_text((GAP, top + (TILE - box[3]) // 2), text, fill=INK, font=font, spacing=6)
        for column, path in enumerate(row.results):
            left = TEXT_WIDTH + column * (TILE + GAP)
            if path == row.own:
                draw.rounded_rectangle((left - 5, top - 5, left + TILE + 4, top + TILE + 4), 7, fill=FRAME)
            with Image.open(path) as picture:
                sheet.paste(ImageOps.fit(picture.convert("RGB"), (TILE, TILE)), (left, top))
    return sheet
