"""What the command line reads and writes: arguments, lines for people, JSON for machines, progress."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def settle_streams() -> None:
    """Have what an output's encoding lacks written as an escape instead of ending the program after its work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a closed one is None
            stream.reconfigure(errors="backslashreplace")


def print_json(record: Any) -> None:
    """For machines; what the output's encoding lacks is escaped as JSON has it."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(record, indent=2)
    print(text)


def path(text: str) -> Path:
    """Type of an argument that names a file or folder.

    Raises:
        ArgumentTypeError: For what is empty, as an unset variable of a shell is, or an address of the web.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder, or . for this one")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: is no file of this machine; download it first")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text}: no file is called so")
    return Path(text)


def number(kind: type[int] | type[float], least: float, most: float | None = None) -> Callable[[str], Any]:
    """Type of an argument that is a number of this kind and range."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {_NAMES[kind]}") from None
        if not (least <= value and (most is None or value <= most)):
            above = "" if most is None else f" to {most:,}"
            raise argparse.ArgumentTypeError(f"{text}: give {least:,}{above or ' or more'}")
        return value

    return parse


_NAMES = {int: "whole number", float: "number"}


@contextmanager
def progress_bar(unit: str = "vector") -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal that begins anew with each stage."""
    from tqdm import tqdm

    with tqdm(unit=unit, unit_scale=True, leave=False, disable=None) as bar:  # no bar in a pipe
        shown = ""

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal shown
            if stage != shown:
                shown = stage
                bar.reset(total)
                bar.set_description(stage)
            bar.update(done - bar.n)

        yield progress
