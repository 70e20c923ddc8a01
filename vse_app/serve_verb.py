"""``vse serve``: a gallery as a web page and an API. Heavy imports wait until it is run."""

from __future__ import annotations

import argparse
import os
from typing import Any

from vse_app.terminal import path

PASSWORD = "VSE_PASSWORD"


def add_parser(verbs: Any) -> None:
    """Add the verb to the program's subparsers."""
    verb = verbs.add_parser(
        "serve",
        help="a gallery as a web page, an HTTP API and MCP tools",
        description=f"Search, look and attack in a browser. The environment variable {PASSWORD}=USER:PASSWORD asks "
        "everybody for a password; set it before you let other machines in with --host 0.0.0.0.",
    )
    verb.add_argument("gallery", type=path)
    verb.add_argument(
        "--run",
        "--model",
        dest="model",
        type=path,
        default=None,
        metavar="RUN",
        help="where the gallery's model is now, if it was moved",
    )
    verb.add_argument("--audit", type=path, default=None, help="folder that vse audit wrote (default: RUN/audit)")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    verb.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which the server may be asked, beside its address; may be repeated",
    )
    verb.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="proxy in front of the server, whose X-Forwarded-For, -Host and -Proto are believed; may be repeated",
    )
    verb.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: 7860)")
    verb.add_argument("--read-only", action="store_true", help="let nobody add or remove pictures")
    verb.add_argument("--bfloat16", action="store_true", help="embed texts faster, on processors that can")
    verb.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    require_gradio()
    from vse_app.server import Serving, serve

    password = os.environ.get(PASSWORD) or None
    serving = Serving(
        args.gallery,
        run=args.model,
        audit=args.audit,
        host=args.host,
        port=args.port,
        read_only=args.read_only,
        bfloat16=args.bfloat16,
        password=password,
        allowed_hosts=tuple(args.allow_host),
        trusted_proxies=tuple(args.trusted_proxy),
    )
    serve(serving, lambda address: print(f"{args.gallery} is served at {address} (Ctrl+C stops)", flush=True))


def require_gradio() -> None:
    """Check that what the page needs is there.

    Raises:
        InputError: If it is not, with the mend.
    """
    from importlib.util import find_spec

    from training.errors import InputError

    if find_spec("gradio") is None:
        raise InputError("serve: the page needs Gradio; install it with pip install 'vse-app[demo]'")
