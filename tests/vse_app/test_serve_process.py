"""The server as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from served import Place

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told_whoever_is_connected(number: signal.Signals, place: Place, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "vse_app.cli", "serve", str(place.gallery), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("w") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as process:  # fmt: skip
        assert process.stdout
        said = process.stdout.readline()
        found = re.search(r":(\d+)/", said)
        assert found, said + log.read_text()
        head = b"GET /gradio_api/heartbeat/a HTTP/1.1\r\nHost: localhost\r\n"
        post = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nabc"
        open_ones = [socket.create_connection(("127.0.0.1", int(found[1])), timeout=20) for _ in range(4)]
        for sent, client in zip((head + b"\r\n", head, post, b"\x1b[31m\r\n\r\n"), open_ones, strict=True):
            client.sendall(sent)
        for answering in (open_ones[0], open_ones[3]):
            assert answering.recv(100).startswith(b"HTTP/1.1 ")
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        for client in open_ones:
            client.close()
    assert list((tmp_path / "tmp").glob("vse-serve-*")) == []
    assert "Traceback" not in log.read_text()
    assert "\x1b" not in log.read_text()
