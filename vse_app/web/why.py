"""Why a picture came up: where in it the words are seen, and which words matter."""

from __future__ import annotations

import base64
from html import escape

from anyio import to_thread
from PIL import Image

from training.data.images import decode
from training.errors import InputError
from training.models.explanation import explain, overlay
from vse_app.api import Api
from vse_app.decoding import Turns, decoding
from vse_app.queries import find_item
from vse_app.uploads import to_jpeg
from vse_app.web.cards import Record

SIDE = 384
_MOST_WORDS = 24
_explaining = Turns(2, 16, 20.0)

# Every map is there already; a word only shows its own.
ON_LOAD = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-word]');
  if (!button) return;
  element.querySelectorAll('button[data-word]').forEach(b => b.setAttribute('aria-pressed', b === button));
  element.querySelectorAll('img[data-word]').forEach(i => i.hidden = i.dataset.word !== button.dataset.word);
});
"""


async def why(api: Api, record: Record, text: str) -> str:
    """The explanation of a result as HTML.

    Args:
        api: Whose model and gallery.
        record: The result.
        text: What was looked for; empty takes the picture's caption.

    Raises:
        InputError: If the picture was removed meanwhile or cannot be read, there are no words, or no map of the model.
        Busy: If too many pictures are being read.
    """
    words = text or record["caption"] or ""
    if not words:
        raise InputError("there are no words to explain; search with some, or give the picture a caption")
    words = " ".join(words.split()[:_MOST_WORDS])
    return await to_thread.run_sync(_html, api, record, words)


def _html(api: Api, record: Record, text: str) -> str:
    item = api.service.call(lambda engine: find_item(engine.gallery, record["id"])).result()
    with _explaining.turn():
        with decoding.turn():
            picture = decode(api.service.file_of(item))
        found = explain(api.service.model, picture, text)
    largest = max(1e-9, float(abs(found.word_weights).max()))
    buttons = [_button(-1, "all words", "true", 0.0, "the whole text")]
    pictures = [_picture(-1, overlay(found.view, found.heat, SIDE), f"where “{text}” is seen", shown=True)]
    for number, (word, weight, heat) in enumerate(zip(found.words, found.word_weights, found.word_heat, strict=True)):
        hint = f"without it the score {'falls' if weight > 0 else 'rises'} by {abs(weight):.3f}"
        buttons.append(_button(number, word, "false", float(weight) / largest, hint))
        pictures.append(_picture(number, overlay(found.view, heat, SIDE), f"where “{word}” is seen", shown=False))
    return (
        '<section class="vse-why" aria-label="Explanation">'
        f"<div>{''.join(pictures)}</div><div><h3>Why {escape(record['name'])}?</h3>"
        f"<p>Similarity <strong>{found.score:.3f}</strong>. Warm places speak for the words, dark ones say nothing or "
        "speak against them. Choose a word to see its own map; the stronger its colour, the more the score falls "
        f'without it.</p><div class="vse-words">{"".join(buttons)}</div></div></section>'
    )


def _button(number: int, word: str, pressed: str, share: float, hint: str) -> str:
    strength = f"--vse-strength: {max(0.0, share):.2f}"
    return (
        f'<button type="button" class="vse-chip vse-word" data-word="{number}" aria-pressed="{pressed}" '
        f'style="{strength}" title="{hint}">{escape(word)}</button>'
    )


def _picture(number: int, image: Image.Image, alt: str, *, shown: bool) -> str:
    encoded = base64.b64encode(to_jpeg(image)).decode()
    hidden = "" if shown else " hidden"
    return f'<img data-word="{number}" alt="{escape(alt)}" src="data:image/jpeg;base64,{encoded}"{hidden}>'
