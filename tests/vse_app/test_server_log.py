from __future__ import annotations

import io
import logging
import sys

import pytest

from vse_app import server_log
from vse_app.server_log import LONGEST, MOST_A_MINUTE, Bounded, PlainLines, escaped


def logger() -> tuple[logging.Logger, io.StringIO]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(PlainLines())
    handler.addFilter(Bounded())
    made = logging.Logger("test")
    made.addHandler(handler)
    return made, written


@pytest.mark.parametrize("sent", ["\x1b[31m", "\r", "\x07", "a\nb", "\u202e", "\u2028", "\x9b2J", "\ud800", "\0"])
def test_nothing_steers_the_terminal(sent: str) -> None:
    log, written = logger()
    log.warning("refused %s", sent)
    try:
        raise ValueError(f"no {sent}")
    except ValueError:
        log.exception("failed: %s", sent)
    text = written.getvalue()
    assert all(of.isprintable() or of == "\n" for of in text)
    starts = [line for line in text.splitlines() if not line.startswith("  ")]
    assert len(starts) == 2
    text.encode()


def test_text_that_can_be_read_stays() -> None:
    assert escaped("größe 図 'a' \"b\" \\") == "größe 図 'a' \"b\" \\"


def test_a_flood_is_some_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(server_log.time, "monotonic", lambda: now[0])
    log, written = logger()

    def flood(count: int) -> None:
        for n in range(count):
            log.error("too many open files: %d", n)

    flood(10_000)
    assert len(written.getvalue().splitlines()) == MOST_A_MINUTE
    log.error("something else")
    assert "something else" in written.getvalue()
    now[0] += 60
    flood(1)
    assert written.getvalue().splitlines()[-1].endswith(f"0 ({10_000 - MOST_A_MINUTE} like it left out)")


def test_all_loggers_write_this_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    server_log.set_up()
    root.handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    logging.getLogger("any.library").warning("\x1b[31m")
    assert capsys.readouterr().err.endswith("any.library: \\x1b[31m\n")


def test_what_errors_quote_is_cut_off() -> None:
    try:
        raise ValueError("x" * 5_000_000 + "\n" + "y" * 5_000_000)
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "a.py", 1, "z" * 5_000_000, None, sys.exc_info())
    written = PlainLines().format(record)
    assert max(map(len, written.split("\n"))) < LONGEST + 100
    assert len(written) < 10 * LONGEST
