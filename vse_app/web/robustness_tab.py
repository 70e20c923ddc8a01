"""The robustness tab: attack a picture and watch its rank fall."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from html import escape
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import gradio as gr
from anyio import to_thread
from gradio.context import Context
from PIL import Image

from index.gallery import Gallery
from training.data.images import decode
from training.errors import InputError
from vse_app import limits
from vse_app.api import Api
from vse_app.attack_case import THREATS, AttackRequest, AttackTarget
from vse_app.audit_summary import verdict
from vse_app.decoding import decoding
from vse_app.live_attack import Outcome, Progress, Ranked, run
from vse_app.queries import find_item
from vse_app.web.cards import status
from vse_app.web.charts import Series, line_chart
from vse_app.web.page_guards import REFUSALS
from vse_app.web.upload import Upload, read
from vse_app.web.waiting_line import WaitingLine

if TYPE_CHECKING:
    from vse_app.web.search_tab import SearchTab

NORMS = {"linf": ("ℓ∞", 1 / 255), "l2": ("ℓ2", 1.0), "l1": ("ℓ1", 100.0), "fourier-linf": ("Fourier-ℓ∞", 1.0)}
"""What a norm is called, and the ε that one unit of the slider stands for."""
MOST_WAITING, MOST_WAITING_EACH = 8, 4
"""Attacks that run or wait, of all together and of those from one address; one runs at a time."""
_WAIT, _UNREAD = 1.0, 20  # seconds between two looks, and messages after which nobody seems to be there
_LARGE = 256
_FINEST, _COARSEST = 0.125, 16


class RobustnessTab:
    """Built inside ``with gr.Tab``.

    Args:
        api: Whose model and gallery.
        audit: Folder that ``vse audit`` wrote, for the model's own curve.
    """

    def __init__(self, api: Api, audit: Path | None) -> None:
        self._api, self._model = api, _model_curve(audit)
        self._target: AttackTarget | None = None
        self._line = WaitingLine(MOST_WAITING, MOST_WAITING_EACH)
        self._page: Any = None
        gr.Markdown(
            "An attack changes each pixel by at most ε, too little to see, so that the search goes wrong. "
            "Choose a picture here, or press *Attack* below a search result."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._fields()
            with gr.Column(scale=3, min_width=320):
                self.slider = gr.ImageSlider(
                    label="Before | after", interactive=False, height=380, visible=False, elem_id="vse-slider"
                )
                with gr.Row():
                    self.difference = gr.Image(
                        label="Difference × 10", interactive=False, height=220, visible=False, buttons=[]
                    )
                    self.spectrum = gr.Image(
                        label="Its spectrum", interactive=False, height=220, visible=False, buttons=[]
                    )
                self.save = gr.DownloadButton("Save the attacked picture (PNG)", visible=False, elem_id="vse-png")
                self.curves = gr.HTML(self._curves(()), elem_id="vse-curves")
        self.ranks = gr.HTML("", elem_id="vse-ranks")
        self.item = gr.State(None)

    def _fields(self) -> None:
        self.chosen = gr.HTML(_chosen(None), elem_id="vse-chosen")
        self.epsilon = gr.Slider(
            _FINEST, _COARSEST, 4, step=_FINEST, label=_epsilon_label("linf"), elem_id="vse-epsilon"
        )
        with gr.Row():
            self.go = gr.Button("Attack", variant="primary", elem_id="vse-attack")
            self.stop = gr.Button("Stop")
        self.said = gr.HTML(status("Nothing attacked yet."), elem_id="vse-attack-said")
        self.picture = Upload(
            sources=["upload", "clipboard"], label="A picture of your own", height=160, elem_id="vse-attack-picture"
        )
        threats = [(f"{name}: {text}", name) for name, text in THREATS.items()]
        self.threat = gr.Radio(threats, value="query-image", label="Threat")
        self.text = gr.Textbox(
            "",
            label="Search to rise or fall in",
            info="Empty: the picture's own caption",
            max_length=limits.TEXT,
            visible=False,
        )
        norms = [(name, key) for key, (name, _) in NORMS.items()]
        self.norm = gr.Dropdown(norms, value="linf", label="Norm of the change")
        self.steps = gr.Slider(1, 100, 20, step=1, label="Steps of the attack")

    def connect(self, search: SearchTab, tabs: gr.Tabs) -> None:
        """React to the *Attack* buttons of the search tab, and to the fields of this one."""
        private: dict[str, Any] = {"api_visibility": "private"}
        self._page = Context.root_block
        search.results.click(self._choose, None, [self.item, self.chosen, self.picture, tabs], queue=False, **private)
        self.picture.upload(lambda: (None, _chosen(None)), None, [self.item, self.chosen], queue=False, **private)
        self.threat.change(
            lambda name: gr.update(visible=name != "query-image"), self.threat, self.text, queue=False, **private
        )
        self.norm.change(
            lambda name: gr.update(label=_epsilon_label(name)), self.norm, self.epsilon, queue=False, **private
        )
        given = [self.item, self.picture, self.threat, self.text, self.norm, self.epsilon, self.steps]
        shown = [self.said, self.slider, self.difference, self.spectrum, self.ranks, self.curves, self.save]
        # Not in Gradio's queue, which is one for all functions: attacks that wait there would shut out searches.
        running = self.go.click(self._attack, given, shown, concurrency_limit=None, show_progress="hidden", **private)
        self.stop.click(lambda: status("Stopped."), None, self.said, cancels=[running], queue=False, **private)

    def _choose(self, event: gr.EventData) -> list[Any]:
        if event.action != "attack":
            return [gr.skip()] * 4
        item = int(event.id)
        return [item, _chosen(item), None, gr.Tabs(selected="robustness")]

    async def _attack(
        self,
        item: int | None,
        sent: str | None,
        threat: str,
        text: str,
        norm: str,
        level: float,
        steps: float,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        keep = (gr.skip(),) * 6
        try:
            if item is None and sent is None:
                raise InputError("choose a picture first: press Attack below a search result, or send one")
            asked = AttackRequest(threat, norm, level * NORMS[norm][1], int(steps), (text or "").strip() or None)
            with self._line.place(request.client.host) as ahead:
                while ahead():
                    if not self._heard(request):
                        return
                    yield status(f"Waiting for {ahead()} other attack{'s' * (ahead() > 1)} …"), *keep
                    await asyncio.sleep(_WAIT)
                yield status("Embedding what it is ranked among, once …"), *keep
                target, image = await to_thread.run_sync(self._prepare, item, sent)
                async with aclosing(self._steps(target, image, asked, item)) as news:
                    async for found in news:
                        if not self._heard(request):
                            return
                        if isinstance(found, Progress):
                            where = "Measuring the curve" if found.curve else f"Step {found.step} of {found.steps}"
                            yield status(f"{where}: rank {found.rank:,}"), *keep
                        else:
                            yield self._outcome(found, asked)
        except REFUSALS as error:
            yield status(self._api.line(error), "error"), *keep

    async def _steps(
        self, target: AttackTarget, image: Image.Image, request: AttackRequest, item: int | None
    ) -> AsyncGenerator[Progress | Outcome, None]:
        """An attack, a step at a time, in threads of its own; closing it stops the attack within a step."""
        closed, stopped = self._api.service.closed, Event()
        attack = run(target, image, request, item, lambda: stopped.is_set() or closed.is_set())
        try:
            while (found := await to_thread.run_sync(next, attack, None)) is not None:
                yield found
        finally:
            stopped.set()
            with suppress(ValueError):  # if its thread is within a step, it ends after that
                await to_thread.run_sync(attack.close)

    def _heard(self, request: gr.Request) -> bool:
        """Whether somebody takes what is told; Gradio notices who goes, but not who never came."""
        told = self._page._queue.pending_messages_per_session.get(request.session_hash) if self._page else None
        return told is None or told.qsize() < _UNREAD

    def _prepare(self, item: int | None, sent: str | None) -> tuple[AttackTarget, Image.Image]:
        """The gallery as it is now, prepared once for as long as it stays the same, and the picture."""
        if self._target is None:
            self._target = AttackTarget(self._api.service.model, Gallery.open(self._api.service.directory))
        self._target.follow(self._api.service.checksum)
        if item is None:
            return self._target, read(sent or "")
        path = self._api.service.file_of(find_item(self._target.gallery, item))
        with decoding.turn():
            return self._target, decode(path)

    def _outcome(self, found: Outcome, request: AttackRequest) -> tuple[Any, ...]:
        file = Path(self.save.GRADIO_CACHE) / f"attacked-{abs(hash((request, found.seconds))):x}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        found.adversarial.save(file)
        return (
            _verdict(found),
            gr.ImageSlider(value=(found.clean, found.adversarial), visible=True),
            gr.Image(value=_enlarged(found.difference), visible=True),
            gr.Image(value=_enlarged(found.spectrum), visible=True),
            _tables(found),
            self._curves(found.curve, request),
            gr.DownloadButton(value=str(file), visible=True),
        )

    def _curves(self, curve: Sequence[tuple[float, int]], request: AttackRequest | None = None) -> str:
        parts = [self._model]
        if request:
            unit = NORMS[request.norm][1]
            ranks = Series("rank", [epsilon / unit for epsilon, _ in curve], [float(rank) for _, rank in curve])
            chart = line_chart(
                [ranks],
                title="This picture: rank of the right answer against ε",
                x_label=_epsilon_label(request.norm),
                y_label="rank",
                log_y=True,
                markers=True,
            )
            parts.insert(0, chart)
        return f'<div class="vse-columns">{"".join(parts)}</div>'


def _model_curve(audit: Path | None) -> str:
    """The model's own ε-curve and whether its checks passed, from the audit's file."""
    missing = "<p>The model has no audit of this threat yet; <code>vse audit RUN --data DATA</code> makes one.</p>"
    if audit is None:
        return missing
    try:
        record = json.loads((audit / "audit.json").read_bytes())
        found = record["threats"].get("query-image")
        if not found:
            return missing
        unit = NORMS[record["config"]["norm"]][1]
        x = [point["epsilon"] / unit for point in found["curve"]]
        lines = [Series(f"R@{k}", x, [point[f"r{k}"]["value"] for point in found["curve"]]) for k in (1, 5, 10)]
        chart = line_chart(
            lines,
            title=f"The model: recall (%) of {found['queries']} queries of {record['split']}, "
            f"{record['images']:,} pictures, {record['captions']:,} captions",
            x_label=_epsilon_label(record["config"]["norm"]),
            y_label="recall, %",
            markers=True,
        )
        return f"<div>{chart}{_badge(record)}</div>"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"<p>The audit cannot be read ({escape(str(error))}); run <code>vse audit</code> again.</p>"


def _badge(record: dict[str, Any]) -> str:
    trusted, said = verdict(record)
    kind = "vse-likely" if trusted else "vse-failed"
    failed = [f"{check['name']}: {check['explanation']}" for check in record["checks"] if not check["passed"]]
    why = "".join(f"<br>{escape(line)}" for line in failed)
    return f'<p><span class="vse-badge {kind}">{escape(said)}</span>{why}</p>'


def _verdict(found: Outcome) -> str:
    if found.rank_after == found.rank_before:
        saved = "This attack has changed nothing; a larger ε might."
    elif found.survives_8bit:
        saved = "The effect survives rounding to 8 bits, as in the PNG."
    else:
        saved = f"Rounded to 8 bits, as in the PNG, the rank is {found.rank_after_8bit:,}."
    sizes = (
        f"ℓ∞ {255 * found.norms['linf']:.2f}/255, ℓ2 {found.norms['l2']:.2f}, ℓ1 {found.norms['l1']:.0f}; "
        f"{found.seconds:.1f} s"
    )
    return (
        f'<p class="vse-verdict" role="status" aria-live="polite">Rank {found.rank_before:,} '
        f'<span aria-hidden="true">→</span><span class="vse-hidden">becomes</span> '
        f"<strong>{found.rank_after:,}</strong> of {found.among:,}</p><p>{saved} Size of the change: {sizes}.</p>"
    )


def _enlarged(picture: Image.Image) -> Image.Image:
    """Pixels of small pictures as squares that can be seen."""
    times = max(1, _LARGE // picture.width)
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def _tables(found: Outcome) -> str:
    before = _table("Before the attack", found.before, after=False)
    return f'<div class="vse-columns">{before}{_table("After it", found.after, after=True)}</div>'


def _table(title: str, rows: Sequence[Ranked], *, after: bool) -> str:
    body = "".join(
        f"<tr{' class=vse-own' if row.own else ''}><td>{row.after if after else row.before:,}</td>"
        f"<td>{escape(row.text)}{' <em>(right answer)</em>' if row.own else ''}</td>"
        f"<td>{row.score_after if after else row.score_before:.3f}</td>"
        f"<td>{row.before if after else row.after:,}</td></tr>"
        for row in rows
    )
    other = "was" if after else "becomes"
    return (
        f'<div class="vse-scroll" tabindex="0" role="region" aria-label="{title}"><table class="vse-table">'
        f'<caption>{title}</caption><thead><tr><th scope="col">Rank</th><th scope="col">Found</th>'
        f'<th scope="col">Score</th><th scope="col">{other}</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _chosen(item: int | None) -> str:
    if item is None:
        return ""
    return f'<figure class="vse-chosen"><img src="items/{item}/image?side=320" alt="The chosen picture"></figure>'


def _epsilon_label(norm: str) -> str:
    name, unit = NORMS[norm]
    return f"ε, in 1/255 ({name})" if norm == "linf" else f"ε ({name})" if unit == 1 else f"ε, in {unit:g} ({name})"
