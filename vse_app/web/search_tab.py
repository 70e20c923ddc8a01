"""The search tab: by words, by picture, by both, or more like one; why; export; add and remove."""

from __future__ import annotations

import time
from asyncio import wrap_future
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from anyio import to_thread

from training.errors import InputError
from vse_app import limits
from vse_app.api import MOST_UPLOADS, Api, changing
from vse_app.queries import Options, Query, check_text, condition_lines, parse_conditions
from vse_app.search_engine import Facts
from vse_app.web import calls, why
from vse_app.web.cards import Record, cards, empty, status
from vse_app.web.page_guards import REFUSALS
from vse_app.web.upload import Upload, Uploads, read

SAME = 0.95
"""Cosine from which pictures are near-duplicates."""
_RESULTS, _MOST_RESULTS = 12, 100
_AT_ONCE = 32
# Buttons inside cards are plain HTML; what they ask for reaches Python as one event.
_ON_LOAD = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (!button) return;
  const card = button.closest('[data-id]');
  const asked = {action: button.dataset.action, text: button.dataset.text || '', id: card ? +card.dataset.id : 0};
  if (asked.action === 'remove' && !confirm(`Remove ${card.dataset.name} from the gallery?`)) return;
  trigger('click', asked);
});
"""


class SearchTab:
    """Built inside ``with gr.Tab``.

    Args:
        api: What searches.
        examples: Texts to try.

    Attributes:
        results: Cards; their buttons trigger ``click`` with an ``action`` and an ``id``.
    """

    def __init__(self, api: Api, examples: Sequence[str]) -> None:
        self._api, self._service = api, api.service
        self._welcome = empty("What are you looking for?", examples)
        self._layout()
        self._connect()

    def _layout(self) -> None:
        with gr.Row(elem_classes="vse-bar"):
            self.text = gr.Textbox(
                "",
                placeholder="Describe a picture, and press Enter",
                label="What to look for",
                show_label=False,
                scale=8,
                autofocus=True,
                max_length=limits.TEXT,
                elem_id="vse-text",
            )
            self.go = gr.Button("Search", variant="primary", scale=1, min_width=96, elem_id="vse-search")
        with gr.Row():
            with gr.Accordion("With a picture", open=False, elem_id="vse-with-picture"):
                self.picture = Upload(
                    sources=["upload", "clipboard"],
                    label="Find pictures like this one",
                    height=220,
                    elem_id="vse-picture",
                )
                self.weight = gr.Slider(0, 1, 0.5, step=0.05, label="Say of the words beside the picture")
            with gr.Accordion("Filter and options", open=False):
                self.where = gr.Textbox(
                    "",
                    label="Filter",
                    info="Conditions such as `year>=2019` or `path~*/holiday/*`, one a line",
                    lines=2,
                    max_length=limits.TEXT,
                    elem_id="vse-where",
                )
                self.k = gr.Slider(1, _MOST_RESULTS, _RESULTS, step=1, label="Results")
                calibrated = self._service.cut is not None
                self.likely = gr.Checkbox(label="Only what is above the calibrated cut", visible=calibrated)
                self.collapse = gr.Checkbox(label="Show near-duplicates once")
                self.hubs = gr.Checkbox(
                    label="Push back pictures that come up for everything", visible=self._service.corrects_hubs
                )
        self.said = gr.HTML(status(""), elem_id="vse-said")
        self.why = gr.HTML("", elem_id="vse-why", js_on_load=why.ON_LOAD)
        self.results = gr.HTML(self._welcome, elem_id="vse-results", js_on_load=_ON_LOAD)
        with gr.Row(elem_classes="vse-export"):
            gr.Button("Copy link", size="sm").click(None, js="() => vse.copyLink()")
            gr.Button("Export CSV", size="sm").click(None, js="() => vse.exportResults('csv')")
            gr.Button("Export JSON", size="sm").click(None, js="() => vse.exportResults('json')")
        with gr.Accordion("This search as a call", open=False):
            self.calls = gr.HTML("", elem_id="vse-calls")
        if not self._api.read_only:
            with gr.Accordion("Add pictures to the gallery", open=False, elem_id="vse-add"):
                self.files = Uploads(
                    label=f"JPEG, PNG, WebP, GIF or BMP; up to {MOST_UPLOADS}",
                    file_count="multiple",
                    elem_id="vse-files",
                )
                self.caption = gr.Textbox("", label="A sentence about them", max_length=limits.TEXT)
                self.add = gr.Button("Add", elem_id="vse-add-button")
        self.like, self.found = gr.State(None), gr.State([])
        self.again = gr.Number(0, visible="hidden", label="Searches", precision=0)  # each change of it is a search
        self.link = gr.Textbox("", visible="hidden", label="Link", elem_id="vse-link")

    def _connect(self) -> None:
        quick = {"api_visibility": "private", "concurrency_limit": _AT_ONCE}
        asked = [
            self.text,
            self.picture,
            self.weight,
            self.k,
            self.where,
            self.likely,
            self.collapse,
            self.hubs,
            self.like,
        ]
        shown = [self.results, self.said, self.why, self.found, self.link, self.calls]
        for event in (self.text.submit, self.go.click, self.picture.upload):
            event(_another, self.again, [self.again, self.like], queue=False, api_visibility="private")
        self.again.change(self._search, asked, shown, show_progress="minimal", **quick).then(
            None, self.link, js="link => vse.remember(link)"
        )
        acted = [self.again, self.like, self.text, self.picture, self.said, self.why]
        self.results.click(self._act, [self.again, self.found, self.text], acted, show_progress="hidden", **quick)
        if not self._api.read_only:
            self.add.click(
                self._add, [self.files, self.caption, self.again], [self.said, self.files, self.again], **quick
            )

    def connect_page(self, page: gr.Blocks) -> None:
        """Run the query in the page's address, if there is one, when the page is opened."""
        given = [self.text, self.k, self.where, self.likely, self.collapse, self.hubs, self.like, self.again]
        page.load(self._opened, None, given, api_visibility="private", queue=False)

    async def _search(
        self,
        text: str | None,
        picture: str | None,
        weight: float,
        k: float,
        where: str | None,
        likely: bool,
        collapse: bool,
        hubs: bool,
        like: int | None,
        request: gr.Request,
    ) -> list[Any]:
        try:
            check_text("text", text or "", limits.TEXT)  # a field may be None
            text, conditions = (text or "").strip(), condition_lines(where or "")
            if not (text or picture or like):
                return [self._welcome, status(""), "", [], "", ""]
            options = Options(int(k), parse_conditions(conditions), SAME if collapse else None, hubs)
            image = await to_thread.run_sync(read, picture) if picture and not like else None
            query = Query(like=like) if like else Query(text=text or None, image=image, weight=weight)
            started = time.perf_counter()
            answer = await wrap_future(self._service.submit(query, options))
        except REFUSALS as error:
            return [gr.skip(), status(self._api.line(error), "error"), "", gr.skip(), gr.skip(), gr.skip()]
        seconds = time.perf_counter() - started
        asked: dict[str, Any] = {"text": text, "like": like, "k": int(k), "where": conditions}
        asked |= {"collapse": SAME if collapse else None, "querybank": "true" if hubs else None}
        records = [self._api.record(result) for result in answer]
        grid = cards(records, self._service.cut, changeable=not self._api.read_only, likely_only=likely)
        asked = {key: value for key, value in asked.items() if value}
        link = "" if image else urlencode({**asked, "likely": "true"} if likely else asked, doseq=True)
        return [
            grid,
            status(_summary(records, seconds, like)),
            "",
            records,
            link,
            calls.calls(asked, _address(request), image is not None),
        ]

    def _opened(self, request: gr.Request) -> list[Any]:
        given = request.query_params
        text, like = str(given.get("text") or "")[: limits.TEXT], _number(given.get("like"), limits.IDS)
        if not text and like is None:
            return [gr.skip()] * 8  # what was typed meanwhile stays
        return [
            text,
            min(_MOST_RESULTS, max(1, _number(given.get("k"), limits.IDS) or _RESULTS)),
            "\n".join(given.getlist("where"))[: limits.TEXT],
            _is_on(given.get("likely")),
            _is_on(given.get("collapse")),
            _is_on(given.get("querybank")) and self._service.corrects_hubs,
            like,
            1,
        ]

    async def _act(self, again: int, found: list[Record], text: str | None, event: gr.EventData) -> dict[Any, Any]:
        """What a button in a card asks for, as far as it is for this tab."""
        action, item = str(event.action), int(event.id)
        record = next((record for record in found if record["id"] == item), None)
        search = {self.again: again + 1}
        try:
            if action == "example":
                return search | {self.text: str(event.text)[: limits.TEXT], self.like: None, self.picture: None}
            if action == "like" and record:
                return search | {self.like: item, self.text: "", self.picture: None}
            if action == "remove" and record and not self._api.read_only:
                await to_thread.run_sync(changing, self._service.remove, [item])
                return search
            if action == "why" and record:
                return {self.why: await why.why(self._api, record, (text or "").strip())}
        except REFUSALS as error:
            return {self.said: status(self._api.line(error), "error")}
        return {self.said: gr.skip()}

    async def _add(self, files: list[str] | None, caption: str | None, again: int) -> list[Any]:
        if not files:
            return [status("Choose pictures to add first.", "error"), gr.skip(), gr.skip()]
        refused: list[str] = []
        pictures = []
        for file in files[:MOST_UPLOADS]:
            try:
                pictures.append(await to_thread.run_sync(read, file))
            except InputError as error:
                refused.append(self._api.line(error))
        try:
            if pictures:
                facts = Facts((caption or "").strip() or None)
                await to_thread.run_sync(changing, self._service.add, pictures, facts)
        except REFUSALS as error:
            return [status(self._api.line(error), "error"), gr.skip(), gr.skip()]
        if len(files) > MOST_UPLOADS:
            refused.append(f"Send at most {MOST_UPLOADS} at a time; the rest was left out.")
        said = " ".join([f"{len(pictures)} added.", *refused])
        return [status(said, "error" if refused else "plain"), None, again + 1]


def _address(request: gr.Request) -> str:
    return f"{request.url.scheme}://{request.headers.get('host', '127.0.0.1')}"


def _another(again: int) -> tuple[int, None]:
    """A new search, and not for the like of anything."""
    return again + 1, None


def _is_on(text: str | None) -> bool:
    """Whether a parameter of a link switches something on; words for no are those of the API."""
    return (text or "").strip().lower() not in ("", "0", "false", "f", "no", "n", "off")


def _number(text: str | None, end: int) -> int | None:
    """A natural number below ``end``, or None."""
    number = int(text) if text and text.isascii() and text.isdecimal() and len(text) < 20 else None
    return number if number is not None and number < end else None


def _summary(records: Sequence[Record], seconds: float, like: int | None) -> str:
    likely = sum(bool(record["likely"]) for record in records)
    known = f", {likely} likely" if any(record["likely"] is not None for record in records) else ""
    of = f" like item {like}" if like else ""
    return f"{len(records)} results{of}{known}, in {1000 * seconds:.0f} ms"
