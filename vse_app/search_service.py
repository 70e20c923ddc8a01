"""One search engine for many threads: queries that arrive together are answered together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from index.errors import GalleryError
from index.gallery import Gallery
from index.items import Item
from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from vse_app import limits
from vse_app.latency import Latency
from vse_app.limits import Busy
from vse_app.queries import Options, Query, check_text, told
from vse_app.search_engine import Facts, Result, SearchEngine
from vse_app.uploads import UPLOADS, current_upload, keep_upload, tidy_uploads

TOGETHER = 32
"""So many queries are embedded and searched for together at most."""
WAITING = 512
"""Requests beyond these are refused."""

T = TypeVar("T")
_DEFAULT = Options()


class Unavailable(GalleryError):
    """The gallery that is served cannot be read any more, whatever is asked."""


@dataclass(kw_only=True)
class _Asked(Generic[T]):
    answer: Future[T] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


@dataclass(kw_only=True)
class _Search(_Asked[list[Result]]):
    query: Query
    options: Options


@dataclass(kw_only=True)
class _Call(_Asked[Any]):
    function: Callable[[SearchEngine], Any]


class SearchService:
    """Searches a gallery for any number of threads, follows its changes, and changes it.

    One thread of its own holds the engine. Whatever has arrived while it was at work is embedded and searched for
    in one go next, so a single client waits for nobody, and many share passes through the text tower. The gallery is
    open for reading; it is opened for writing only while something is added or removed, so other programs may change
    it too, and what they change is seen by the next search.

    Attributes:
        checksum: Of the model in memory.
        cut: From this probability on a result is likely; None for a gallery without calibration.
        corrects_hubs: Whether the gallery has a query bank.
        closed: Set when the service ends, for whatever else uses its model.
        uploads: Folder for pictures that come without a file of their own.

    Args:
        directory: The gallery.
        latency: Where to count; None counts in an object of its own.
        model: Where the gallery's model is now, if it was moved.
        bfloat16: See :class:`~vse_app.search_engine.SearchEngine`.

    Raises:
        GalleryError: If there is no gallery, or it is damaged.
        InputError: If its model cannot be loaded.
    """

    def __init__(
        self,
        directory: Path,
        latency: Latency | None = None,
        *,
        model: Path | None = None,
        bfloat16: bool = False,
    ) -> None:
        self.directory = directory
        self.uploads = directory / UPLOADS
        self.latency = latency or Latency()
        self._engine = SearchEngine.open(directory, model=model, bfloat16=bfloat16)
        try:
            self._engine.model.eval()  # loaded now rather than by the first search
        except BaseException:
            self._engine.close()
            raise
        self.checksum = self._engine.gallery.model.get("checksum", "")
        self._follow()
        self._changing, self._asking = Lock(), Lock()
        self._tidy = False
        self.closed = Event()
        self._asked: Queue[_Search | _Call | None] = Queue(WAITING)
        self._thread = Thread(target=self._work, name="search", daemon=True)
        self._thread.start()

    @property
    def model(self) -> DualEncoder:
        """What embeds texts and pictures.

        Raises:
            GalleryError: If the gallery was made anew with another model.
        """
        return self._engine.model

    def submit(self, query: Query, options: Options = _DEFAULT) -> Future[list[Result]]:
        """Ask for the best pictures for a query; the answer is what the engine returns or raises.

        Raises:
            Busy: If too many are waiting.
            InputError: If more results are asked for than a server gives.
        """
        if options.k > limits.RESULTS:
            raise InputError(f"search: k is {told(options.k)}; ask for 1 to {limits.RESULTS} results")
        asked = _Search(query=query, options=options)
        self._ask(asked)
        return asked.answer

    def search(self, query: Query, options: Options = _DEFAULT) -> list[Result]:
        """As :meth:`submit`, waiting for the answer."""
        return self.submit(query, options).result()

    def call(self, function: Callable[[SearchEngine], T]) -> Future[T]:
        """Have the engine's thread call a function with the engine, between searches.

        Raises:
            Busy: If too many are waiting.
        """
        asked = _Call(function=function)
        self._ask(asked)
        return asked.answer

    def add(self, pictures: Sequence[Image.Image], facts: Facts) -> list[int]:
        """Keep pictures beside the gallery and add them, in the calling thread; seen by the next search.

        Args:
            pictures: From :func:`~vse_app.uploads.read_upload`.
            facts: What to keep with each of them.

        Returns:
            Their ids; a picture that is there already is not kept twice, but takes the caption and the metadata
            that are given.

        Raises:
            InputError: If the caption is too long.
            GalleryError: If another program is writing to the gallery, or the disk is full.
        """
        if facts.caption is not None:
            check_text("caption", facts.caption, limits.TEXT)
        with self._writing() as gallery:
            paths: list[Path] = []
            try:
                for picture in pictures:
                    paths.append(keep_upload(picture, self.uploads).resolve())
                known = {item.path: item for _, item in gallery.items(gallery.ids_of([str(path) for path in paths]))}
                given = {path: _kept(facts, known.get(str(path))) for path in paths}
                report = SearchEngine(gallery, self.model).add(paths, given, find_moved=False)
                if report.quarantine.refused:
                    raise GalleryError(f"picture: {report.quarantine.refused[0][1]}")
                return [int(gallery.ids_of([str(path)])[0]) for path in paths]
            except BaseException:
                for path in paths:
                    if not len(gallery.ids_of([str(path)])):
                        path.unlink(missing_ok=True)
                raise

    def remove(self, ids: Sequence[int]) -> int:
        """Remove items, as :meth:`add` adds; returns how many were there. Files go only if :meth:`add` kept them.

        Raises:
            GalleryError: As :meth:`add`, or if the gallery was made anew with another model: ids are others by then.
        """
        with self._writing() as gallery:
            paths = [Path(item.path) for _, item in gallery.items(np.array(sorted(set(ids)), np.int64))]
            count = gallery.remove(ids)
            for path in paths:
                if path.parent == self.uploads.resolve():
                    path.unlink(missing_ok=True)
        return count

    def file_of(self, item: Item) -> Path:
        """The file of an item, also where a gallery of an earlier version was moved."""
        return current_upload(Path(item.path), self.uploads)

    def tidy(self) -> None:
        """Clear up after a server that was killed, unless another program is writing to the gallery just now."""
        with suppress(GalleryError), self._writing():
            pass

    @contextmanager
    def _writing(self) -> Iterator[Gallery]:
        with self._changing, Gallery.open(self.directory, writable=True) as gallery:
            gallery.check_model(self.checksum)
            if not self._tidy:
                tidy_uploads(gallery)
                self._tidy = True
            yield gallery

    def close(self) -> None:
        """Answer what is waiting, then close the gallery."""
        with self._asking:  # so that nothing is asked once the thread has been told to end
            self.closed.set()
        if self._thread.is_alive():
            self._asked.put(None)
            self._thread.join()

    def __enter__(self) -> SearchService:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, asked: _Search | _Call) -> None:
        with self._asking:
            if self.closed.is_set():
                raise Busy("the server is shutting down")
            try:
                self._asked.put_nowait(asked)
            except Full:
                raise Busy(f"{WAITING} requests are waiting already; try again in a second") from None

    def _work(self) -> None:
        with self._engine:
            while (first := self._asked.get()) is not None:
                batch = [first]
                while len(batch) < TOGETHER:
                    try:
                        asked = self._asked.get_nowait()
                    except Empty:
                        break
                    if asked is None:
                        self._asked.put(None)  # to be met again once these are answered
                        break
                    batch.append(asked)
                self._answer([asked for asked in batch if asked.answer.set_running_or_notify_cancel()])

    def _answer(self, batch: list[_Search | _Call]) -> None:
        now = time.perf_counter()
        for asked in batch:
            self.latency.observe("wait", now - asked.since)
        try:
            if self._engine.gallery.refresh():
                self._follow()
        except Exception as error:  # whatever it is, it must not end the thread that all wait for
            for asked in batch:
                asked.answer.set_exception(Unavailable(str(error)) if isinstance(error, GalleryError) else error)
            return
        searches = [asked for asked in batch if isinstance(asked, _Search)]
        if searches:
            self.latency.batch.observe(len(searches))
            self._search(searches)
        for asked in batch:
            if isinstance(asked, _Call):
                _settle(asked.answer, partial(asked.function, self._engine))

    def _follow(self) -> None:
        self.latency.pictures.set(len(self._engine.gallery))
        relevance = self._engine.relevance
        self.cut = relevance.cut if relevance else None
        self.corrects_hubs = bool(relevance and relevance.bank)

    def _search(self, searches: list[_Search]) -> None:
        try:
            with self.latency.timed("embed"):
                vectors = self._engine.embed([asked.query for asked in searches])
        except Exception as error:
            if len(searches) == 1:
                searches[0].answer.set_exception(error)
            else:  # one bad query must not spoil the others
                for asked in searches:
                    self._search([asked])
            return
        alike: dict[str, list[int]] = {}
        for row, asked in enumerate(searches):
            alike.setdefault(repr(asked.options), []).append(row)  # by value, 1 and true were one condition
        for rows in alike.values():
            options = searches[rows[0]].options
            try:
                with self.latency.timed("search"):
                    answers = self._engine.search(
                        [searches[row].query for row in rows],
                        options.k,
                        where=options.where,
                        collapse_at=options.collapse_at,
                        correct_hubs=options.correct_hubs,
                        vectors=vectors[rows],
                    )
            except Exception as error:
                for row in rows:
                    searches[row].answer.set_exception(error)
            else:
                for row, answer in zip(rows, answers, strict=True):
                    searches[row].answer.set_result(answer)


def _kept(facts: Facts, item: Item | None) -> Facts:
    """Facts that are given, and for what is not those of the picture's item."""
    if item is None:
        return facts
    return Facts(item.caption if facts.caption is None else facts.caption, facts.metadata or item.metadata)


def _settle(answer: Future[Any], function: Callable[[], Any]) -> None:
    try:
        answer.set_result(function())
    except Exception as error:
        answer.set_exception(error)
