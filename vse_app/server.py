"""``vse serve``: the API and the page on one port."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from starlette.formparsers import MultiPartParser

from training.errors import InputError
from vse_app import server_log
from vse_app.api import MAX_BODY, Api
from vse_app.http_connections import Connection, Server, most_connections
from vse_app.http_guards import Guards
from vse_app.http_hosts import Hosts, is_loopback
from vse_app.scratch_folder import scratch_folder
from vse_app.search_service import SearchService

PUBLIC_RATE = 20.0
"""Requests a second from one address, where other machines can reach the server."""
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_GRACE, _LATEST = 2, 5  # seconds for answers that are under way when the server is told to stop, and for its end
_BACKLOG = 128  # so many connections are accepted at a time, before any of them can be ended for another

# What is sent lies in memory, of which no more is taken at a time than Guards allow, and never on the disk.
MultiPartParser.spool_max_size = MAX_BODY


@dataclass(frozen=True)
class Serving:
    """What is served, and to whom.

    Attributes:
        gallery: Directory of the gallery.
        run: Where the gallery's model is now; None takes the place that the gallery names.
        audit: Folder that ``vse audit`` wrote; None takes the run's, if there is one.
        host: Address to listen on.
        port: 0 takes a free one.
        read_only: Refuse to add and remove.
        bfloat16: See :class:`~vse_app.search_engine.SearchEngine`.
        password: ``USER:PASSWORD``; None lets everybody in.
        allowed_hosts: Names under which the server may be asked, beside its address.
        trusted_proxies: Addresses of proxies whose word on the client, the name and the scheme counts.
    """

    gallery: Path
    run: Path | None = None
    audit: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    read_only: bool = False
    bfloat16: bool = False
    password: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.password is not None and not all(self.password.partition(":")[::2]):
            raise InputError("serve: the password is written USER:PASSWORD")
        if self.audit and not (self.audit / "audit.json").exists():
            raise InputError(f"{self.audit}: holds no audit.json; give the folder that vse audit wrote")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"serve: there is no port {self.port}; choose one from 1 to 65535, or 0 for a free one")
        Hosts.parse(self.allowed_hosts, self.trusted_proxies)

    @property
    def hosts(self) -> Hosts:
        """Its names, and whom it trusts."""
        return Hosts.parse(self.allowed_hosts, self.trusted_proxies)

    @property
    def local(self) -> bool:
        """Whether it is for this machine alone."""
        return is_loopback(self.host) and not self.allowed_hosts and not self.trusted_proxies


def create_app(service: SearchService, serving: Serving, *, page: bool = True) -> FastAPI:
    """The whole server as an ASGI application.

    Args:
        service: What searches.
        serving: The rest.
        page: With the web page and the MCP tools, which need Gradio.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # FastAPI's pages of documentation load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(
        title="vse", description="Search photographs by meaning.", docs_url=None, redoc_url=None, lifespan=lifespan
    )
    run = serving.run or Path(service.call(lambda engine: engine.gallery.model["name"]).result())
    found = run / "audit" if (run / "audit" / "audit.json").exists() else None
    serving = replace(serving, run=run if run.is_dir() else None, audit=serving.audit or found)
    api = Api(
        service,
        run=serving.run,
        audit=serving.audit / "audit.json" if serving.audit else None,
        read_only=serving.read_only,
        show_paths=serving.local,
    )
    api.install(app)
    if page:
        from vse_app.web.page import mount_page

        mount_page(app, api, serving)
    app.add_middleware(
        Guards,
        max_body=MAX_BODY,
        hosts=serving.hosts,
        rate=0 if serving.local else PUBLIC_RATE,
        password=serving.password,
        answered=service.latency.answered,
    )
    return app


def serve(serving: Serving, ready: Callable[[str], None] = print) -> None:
    """Serve until interrupted or terminated.

    Args:
        serving: What to serve.
        ready: Told the address once the server listens there.

    Raises:
        GalleryError: If there is no gallery, or it is damaged.
        InputError: If its model cannot be loaded, or the address is taken.
    """
    server_log.set_up()
    # Searches and an attack share the cores better than one of them would use all. Threads keep what they began with.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    with (
        _listen(serving.host, serving.port) as listener,
        scratch_folder() as scratch,
        SearchService(serving.gallery, model=serving.run, bfloat16=serving.bfloat16) as service,
    ):
        if not serving.read_only:
            service.tidy()
        os.environ["GRADIO_TEMP_DIR"] = scratch  # what is uploaded to the page goes with the server at the latest
        app = create_app(service, serving)
        host = f"[{serving.host}]" if ":" in serving.host else serving.host
        config = uvicorn.Config(
            app,
            http=partial(Connection, most_connections(), serving.hosts),  # type: ignore[arg-type]
            ws="none",
            proxy_headers=False,  # Guards know whom to believe
            log_config=None,
            access_log=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_GRACE,
        )
        server = Server(config, partial(_end, scratch), _LATEST)
        # Pages that are still open when it stops are cut off, which is no error.
        logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
        _return_memory()
        ready(f"http://{host}:{listener.getsockname()[1]}/")
        server.run(sockets=[listener])
    if server.interrupted:  # taking the interpreter apart would take seconds, for nothing
        _end(scratch)


def _return_memory() -> None:
    """Have memory come back that requests took: glibc would keep some 64 MB for each thread that decoded a picture,
    and the garbage collector would wait until as much is new as a quarter of all that was loaded at the start."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    gc.collect()
    gc.freeze()


def _end(scratch: str) -> None:
    """Threads that decode or search cannot be interrupted; what they do is written in one step, or not at all."""
    shutil.rmtree(scratch, ignore_errors=True)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of a named protocol, or asyncio would leave Nagle's delay on.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InputError(f"{host}:{port}: {error.strerror}; choose another --host or --port") from error
    return listener
