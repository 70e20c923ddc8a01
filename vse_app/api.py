"""The HTTP interface: search, items, audit, health, metrics."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, FastAPI, File, Form, Request, Response, UploadFile
from fastapi import Path as InPath
from fastapi import Query as InQuery
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import Field

from index.errors import GalleryError, ModelError
from index.items import Item
from training.errors import InputError
from vse_app import limits
from vse_app.answers import REFUSALS, Added, Answer, Health, ItemRecord, Items, Removed
from vse_app.decoding import AT_ONCE, WAITING
from vse_app.limits import Busy
from vse_app.queries import Options, Query, parse_conditions
from vse_app.search_engine import Facts, Result, SearchEngine
from vse_app.search_service import SearchService, Unavailable
from vse_app.thumbnails import Thumbnails
from vse_app.uploads import MAX_BYTES, read_metadata, read_upload, too_large

LARGEST = 1600
"""Side in pixels of the largest pictures that are sent."""
MOST_ITEMS, MOST_UPLOADS = 1000, 16
MAX_BODY = MAX_BYTES * 4
"""Bytes of a request."""

# An absolute path up to its last slash; messages end a path by a colon and a space.
_PATH = re.compile(r"(?<![\w/.:-])/(?=\S)(?:[^:\n]|:(?!\s))*/")

T = TypeVar("T")
Id = Annotated[int, InPath(ge=1, lt=limits.IDS, description="id of an item")]
Conditions = list[Annotated[str, Field(max_length=limits.CONDITION)]]


class Api:
    """The routes over a search service, and the functions behind them for whoever is in the same process.

    Args:
        service: What searches.
        run: The model's run directory, if it has one.
        audit: ``audit.json`` of the model, if there is one.
        read_only: Refuse to add and remove.
        show_paths: Tell where files are; for servers that only this machine reaches.
    """

    def __init__(
        self,
        service: SearchService,
        *,
        run: Path | None = None,
        audit: Path | None = None,
        read_only: bool = False,
        show_paths: bool = False,
    ) -> None:
        self.service, self.audit_file, self.read_only, self.show_paths = service, audit, read_only, show_paths
        folders = {service.directory: "gallery", audit.parent if audit else None: "audit", run: "run"}
        self._folders = {str(way): name for at, name in folders.items() if at for way in (at, at.resolve())}
        self.thumbnails = Thumbnails()
        # Threads of their own, for who waits for a turn shall not keep others from theirs.
        self._drawing = CapacityLimiter(2 * (AT_ONCE + WAITING))

    def install(self, app: FastAPI) -> None:
        """Add the routes, and one-line answers for everything that is refused."""
        routes = APIRouter(responses=REFUSALS)
        routes.get("/search", response_model=Answer, summary="Search by text, or for more like an item")(self.search)
        routes.post("/search", response_model=Answer, summary="Search by picture, or by picture and text")(
            self.search_image
        )
        routes.get("/items", response_model=Items, summary="List items")(self.items)
        routes.post("/items", response_model=Added, summary="Add pictures")(self.add)
        routes.get("/items/{id}", response_model=ItemRecord, summary="One item")(self.item)
        routes.delete("/items/{id}", response_model=Removed, summary="Remove an item; its file stays")(self.remove)
        routes.get(
            "/items/{id}/image",
            response_class=Response,
            responses={200: {"content": {"image/jpeg": {}}, "description": "the picture, without its metadata"}},
            summary="An item's picture",
        )(self.picture)
        routes.get("/audit", summary="How easily the model is fooled: what vse audit measured")(self.audit)
        routes.get("/health", response_model=Health, summary="Whether the server is well")(self.health)
        routes.get(
            "/metrics",
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}},
            summary="Latency of each stage",
        )(self.metrics)
        methods: dict[str, set[str]] = {}
        for route in routes.routes:
            if isinstance(route, APIRoute):
                methods.setdefault(route.path, {"OPTIONS"}).update(route.methods or ())
        for path, allowed in methods.items():
            routes.options(path, include_in_schema=False)(
                _telling(allowed | ({"HEAD"} if "GET" in allowed else set()))
            )
        app.include_router(routes)
        for kind in (InputError, GalleryError, Busy, Refused):
            app.add_exception_handler(kind, self._refuse)
        app.add_exception_handler(RequestValidationError, _misfit)

    async def search(
        self,
        text: Annotated[str | None, InQuery(max_length=limits.TEXT, description="what to look for")] = None,
        like: Annotated[
            int | None, InQuery(ge=1, lt=limits.IDS, description="id of an item to find the like of")
        ] = None,
        k: Annotated[int, InQuery(ge=1, le=limits.RESULTS, description="how many results")] = 10,
        where: Annotated[
            Conditions,
            InQuery(max_length=limits.CONDITIONS, description="conditions that must all hold, such as year>=2019"),
        ] = [],  # noqa: B006  (FastAPI copies it)
        collapse: Annotated[
            float | None,
            InQuery(
                ge=limits.LEAST_ALIKE,
                le=limits.MOST_ALIKE,
                description="cosine from which pictures count as the same one",
            ),
        ] = None,
        querybank: Annotated[bool, InQuery(description="push back pictures that come up for everything")] = False,
    ) -> Response:
        """Give a text or the id of an item."""
        return await self._answer(Query(text=text, like=like), _options(k, where, collapse, querybank))

    async def search_image(
        self,
        image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF or BMP; it is not kept")],
        text: Annotated[str | None, Form(max_length=limits.TEXT, description="what to look for besides")] = None,
        weight: Annotated[float, Form(ge=0, le=1, description="say of the text beside the picture")] = 0.5,
        k: Annotated[int, Form(ge=1, le=limits.RESULTS)] = 10,
        where: Annotated[Conditions, Form(max_length=limits.CONDITIONS)] = [],  # noqa: B006
        collapse: Annotated[float | None, Form(ge=limits.LEAST_ALIKE, le=limits.MOST_ALIKE)] = None,
        querybank: Annotated[bool, Form()] = False,
    ) -> Response:
        """Send the picture as a multipart form."""
        options = _options(k, where, collapse, querybank)
        picture = await _read(image)
        return await self._answer(Query(text=text or None, image=picture, weight=weight), options)

    async def items(
        self,
        offset: Annotated[int, InQuery(ge=0, lt=limits.IDS)] = 0,
        limit: Annotated[int, InQuery(ge=1, le=MOST_ITEMS)] = 100,
        where: Annotated[Conditions, InQuery(max_length=limits.CONDITIONS)] = [],  # noqa: B006
    ) -> Response:
        """All items, or those for which the conditions hold."""
        conditions = parse_conditions(where)

        def read(engine: SearchEngine) -> tuple[int, list[tuple[int, Item]]]:
            gallery = engine.gallery
            ids = gallery.ids_where(conditions) if conditions else gallery.snapshot.ids()
            return len(ids), list(gallery.items(ids[offset : offset + limit]))

        total, found = await _soon(self.service.call(read))
        return _json({"items": [self._record(key, item) for key, item in found], "total": total})

    async def item(self, id: Id) -> Response:
        """What is known of an item."""
        return _json(self._record(id, await self._item(id)))

    async def picture(
        self, id: Id, side: Annotated[int, InQuery(ge=16, le=LARGEST, description="longest side in pixels")] = LARGEST
    ) -> Response:
        """As JPEG, drawn anew from the pixels; never the file itself."""
        item = await self._item(id)
        try:
            content = await to_thread.run_sync(self._draw, self.service.file_of(item), side, limiter=self._drawing)
        except InputError as error:  # which would tell where the file is
            raise Refused(404, f"item {id}: its file is gone or no picture any more; remove the item") from error
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    async def add(
        self,
        images: Annotated[list[UploadFile], File(min_length=1, max_length=MOST_UPLOADS)],
        caption: Annotated[
            str | None, Form(max_length=limits.TEXT, description="a sentence about all of them")
        ] = None,
        metadata: Annotated[str, Form(max_length=20_000, description="a JSON object, kept with each of them")] = "{}",
    ) -> Response:
        """Send the pictures as a multipart form; they are kept without their metadata, at most 1600 pixels long."""
        self._refuse_if_read_only()
        facts = Facts(caption or None, read_metadata(metadata))
        pictures = [await _read(image) for image in images]
        return _json({"ids": await to_thread.run_sync(changing, self.service.add, pictures, facts)})

    async def remove(self, id: Id) -> Response:
        """The file stays where it is, unless it came over this interface."""
        self._refuse_if_read_only()
        if not await to_thread.run_sync(changing, self.service.remove, [id]):
            raise Refused(404, f"item {id}: is not in the gallery; list what is with /items")
        return _json({"removed": 1})

    async def audit(self) -> Response:
        """The record that ``vse audit`` writes."""
        return _json(await to_thread.run_sync(self.audit_record))

    def audit_record(self) -> dict[str, Any]:
        """As :meth:`audit`, for whoever is in the same process."""
        if not self.audit_file:
            raise Refused(404, "there is no audit; make one with vse audit, and serve it with --audit DIR")
        try:
            record: dict[str, Any] = json.loads(self.audit_file.read_bytes())
        except (OSError, ValueError) as error:
            raise Refused(500, f"{self.audit_file.name}: cannot be read ({error}); run vse audit again") from error
        return record

    async def health(self) -> Response:
        """Answers once the engine does."""
        return _json(await self.health_record())

    async def health_record(self) -> dict[str, Any]:
        """As :meth:`health`, for whoever is in the same process."""

        def count(engine: SearchEngine) -> int:
            engine.check_model()
            return len(engine.gallery)

        items = await _soon(self.service.call(count))
        return {"status": "ok", "pictures": items, "model": self.service.checksum, "version": version("vse-app")}

    async def metrics(self) -> Response:
        """Counters since the server started."""
        return Response(self.service.latency.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def record(self, result: Result) -> dict[str, Any]:
        """A result as :class:`~vse_app.answers.Found`."""
        return {
            "id": result.id,
            **self._known(result.id, result.item),
            "score": result.score,
            "probability": result.probability,
            "likely": result.likely,
            "alike": result.alike,
            "duplicates": [hit.id for hit in result.duplicates],
        }

    async def _answer(self, query: Query, options: Options) -> Response:
        started = time.perf_counter()
        results = await _soon(self.service.submit(query, options))
        milliseconds = 1000 * (time.perf_counter() - started)
        answer = {"results": [self.record(result) for result in results], "cut": self.service.cut}
        return _json({**answer, "milliseconds": round(milliseconds, 3)})

    async def _item(self, id: int) -> Item:
        def read(engine: SearchEngine) -> Item | None:
            return next((item for _, item in engine.gallery.items(np.array([id]))), None)

        item = await _soon(self.service.call(read))
        if item is None:
            raise Refused(404, f"item {id}: is not in the gallery; list what is with /items")
        return item

    def _known(self, id: int, item: Item) -> dict[str, Any]:
        path = Path(item.path)
        return {
            "name": path.name,
            "path": item.path if self.show_paths else None,
            "caption": item.caption,
            "metadata": item.metadata,
            "image": f"items/{id}/image",
        }

    def _record(self, id: int, item: Item) -> dict[str, Any]:
        return {"id": id, **self._known(id, item), "size": item.size, "sha256": item.sha256}

    def _draw(self, path: Path, side: int) -> bytes:
        with self.service.latency.timed("picture"):
            return self.thumbnails.read(path, side)

    def _refuse(self, request: Request, error: Exception) -> JSONResponse:
        code = _status(error)
        return JSONResponse({"detail": self.line(error)}, code, {"retry-after": "1"} if code == 503 else None)

    def line(self, error: Exception) -> str:
        """What is wrong in one line, which can be sent whatever a file or field is called.

        Strangers are not told where files lie: of a path no more is left than the last name.
        """
        line = " ".join(str(error).encode(errors="replace").decode().split())
        if not self.show_paths:
            for folder, name in self._folders.items():
                line = re.sub(rf"(?<![\w/.-]){re.escape(folder)}(?=[/:])", name, line)
            line = _PATH.sub("", line)
        return line[:1000]

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise Refused(403, "this server does not let its gallery be changed")


class Refused(ValueError):
    """A request that is answered with this status and one line."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def _status(error: Exception) -> int:
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, Busy | Unavailable | ModelError):
        return 503
    cause = error.__cause__ if isinstance(error, GalleryError) else None
    if isinstance(cause, BlockingIOError):  # another writer has the lock
        return 409
    return 503 if isinstance(cause, OSError | sqlite3.Error) else 400


def _telling(methods: set[str]) -> Callable[[], Response]:
    def options() -> Response:
        """Which methods there are."""
        return Response(status_code=204, headers={"allow": ", ".join(sorted(methods))})

    return options


def _misfit(request: Request, error: Exception) -> JSONResponse:
    """What does not fit the schema, in one line like everything else."""
    assert isinstance(error, RequestValidationError)
    wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return JSONResponse({"detail": "; ".join(wrong)[:1000]}, 422)


async def _soon(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)


def changing(change: Callable[..., T], *arguments: Any) -> T:
    """Change the gallery.

    Raises:
        Refused: If there is no room, or the disk does not let it.
    """
    try:
        return change(*arguments)
    except OSError as error:
        raise Refused(503, f"cannot be kept: {error.strerror or error}") from error


async def _read(upload: UploadFile) -> Image.Image:
    name = (Path(upload.filename or "picture").name or "picture")[:200]
    if (upload.size or 0) > MAX_BYTES:
        raise InputError(too_large(name, upload.size or 0))
    return await to_thread.run_sync(read_upload, await upload.read(), name)


def _options(k: int, where: list[str], collapse: float | None, querybank: bool) -> Options:
    return Options(k, parse_conditions(where), collapse, querybank)


def _json(record: Any) -> Response:
    return Response(json.dumps(record, ensure_ascii=False, allow_nan=False), media_type="application/json")
