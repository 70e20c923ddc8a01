"""The web page, mounted beside the API on one server."""

from __future__ import annotations

import json
import os
from asyncio import wrap_future
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
os.environ.setdefault("MPLBACKEND", "agg")  # or Gradio, asking which it is, would load pyplot within somebody's call

import gradio as gr
from fastapi import FastAPI

from vse_app.api import Api
from vse_app.queries import Options, Query, condition_lines, parse_conditions
from vse_app.search_engine import SearchEngine
from vse_app.uploads import MAX_BYTES
from vse_app.web.model_tab import model_tab
from vse_app.web.page_guards import GuardedBlocks, OpenRoutes, SessionBlocks
from vse_app.web.robustness_tab import RobustnessTab
from vse_app.web.scratch import UPLOADS_KEPT, install
from vse_app.web.search_tab import SearchTab

if TYPE_CHECKING:
    from vse_app.server import Serving

HERE = Path(__file__).parent
EXAMPLES = 6
_SHORT, _LONG = 12, 70


def mount_page(app: FastAPI, api: Api, serving: Serving) -> None:
    """Put the page at ``/`` and the MCP tools at ``/gradio_api/mcp/``.

    Args:
        app: With the API's routes, which come first.
        api: What the page shows.
        serving: Where run and audit lie.
    """
    page = build_page(api, serving)
    install(app, page.upload_file_set)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=_theme(),
        css_paths=[HERE / "page.css", HERE / "model_tab.css"],
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=[],
        run_history=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=find_spec("mcp") is not None,
    )
    page.state_holder.blocks = SessionBlocks(page.default_config)
    # Mounted, the page would take every path that the API has with another method, or a slash more.
    mount = app.router.routes.pop()
    app.router.default = OpenRoutes(mount.app)  # type: ignore[attr-defined]


def build_page(api: Api, serving: Serving) -> gr.Blocks:
    """The page's three tabs and the functions that MCP clients call."""
    info, examples = api.service.call(_facts).result()
    name = serving.gallery.resolve().name
    title = f"{name} · vse"
    with GuardedBlocks(api.line, title=title, analytics_enabled=False, delete_cache=(60, UPLOADS_KEPT)) as page:
        gr.HTML(_header(name, info), elem_id="vse-header")
        with gr.Tabs() as tabs:
            with gr.Tab("Search", id="search"):
                search = SearchTab(api, examples)
            with gr.Tab("Robustness", id="robustness"):
                robustness = RobustnessTab(api, serving.audit)
            with gr.Tab("Model", id="model"):
                model_tab(serving.run, serving.audit, info)
        search.connect_page(page)
        robustness.connect(search, tabs)
        _tools(api)
    page.queue(max_size=64)
    return page


def _facts(engine: SearchEngine) -> tuple[dict[str, Any], list[str]]:
    """What is said of a gallery, and short captions of it, drawn evenly, as examples."""
    ids = engine.gallery.snapshot.ids()
    some = ids[:: max(1, len(ids) // (8 * EXAMPLES))]
    captions = [item.caption for _, item in engine.gallery.items(some) if item.caption]
    short = [caption for caption in dict.fromkeys(captions) if _SHORT <= len(caption) <= _LONG]
    return engine.gallery.info(), short[:: max(1, len(short) // EXAMPLES)][:EXAMPLES]


def _header(name: str, info: dict[str, Any]) -> str:
    return (
        f"<header><h1>{escape(name)}</h1><p>{info['items']:,} pictures, searched by what they show. "
        "And how easily is that fooled?</p></header>"
    )


def _tools(api: Api) -> None:
    """What MCP clients and ``gradio_client`` may call; their docstrings become the tools' descriptions.

    They answer with JSON as text, because Gradio would hand objects to MCP clients as Python writes them.
    """

    async def answer(query: Query, options: Options) -> str:
        return json.dumps([api.record(result) for result in await wrap_future(api.service.submit(query, options))])

    async def search_pictures(text: str, k: int = 10, where: str = "") -> str:
        """Search the picture gallery by a sentence that describes what a picture shows.

        Args:
            text: What to look for, for example "two dogs play in the snow".
            k: How many results, 1 to 200.
            where: Conditions on the pictures, one a line, for example "year>=2019"; empty for none.
        """
        return await answer(Query(text=text), Options(k, parse_conditions(condition_lines(where))))

    async def more_like(item: int, k: int = 10) -> str:
        """Find pictures that resemble one of the gallery.

        Args:
            item: Id of the picture, from an earlier search.
            k: How many results, 1 to 200.
        """
        return await answer(Query(like=item), Options(k))

    async def audit_record() -> str:
        """How easily the search is fooled: what the audit of its model measured, as one JSON object."""
        return json.dumps(api.audit_record())

    async def health() -> str:
        """Whether the server is well: number of pictures, checksum of the model, version."""
        return json.dumps(await api.health_record())

    for tool in (search_pictures, more_like, audit_record, health):
        gr.api(tool, queue=False)  # MCP calls of functions that queue would come back to this server by HTTP


def _theme() -> gr.themes.Base:
    """Fonts that every machine has: nothing is fetched."""
    sans: Sequence[str] = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    mono: Sequence[str] = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=sans, font_mono=mono, radius_size="md")
    return theme.set(  # darker than Gradio's, whose contrast is too low to read
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        color_accent="*primary_700",
    )
