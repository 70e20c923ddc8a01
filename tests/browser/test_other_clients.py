"""The same server, asked by programs: MCP clients, the Python example, curl."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import anyio
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from page_server import Served

CLIENT = Path(__file__).parents[2] / "docs" / "client.py"
TOOLS = {"search_pictures", "more_like", "audit_record", "health"}


def mcp(served: Served, tool: str, arguments: dict[str, Any]) -> tuple[set[str], Any]:
    """Names of the tools, and what one of them answers."""

    async def ask() -> tuple[set[str], Any]:
        async with (
            streamablehttp_client(f"{served.address}gradio_api/mcp/") as (receive, send, _),
            ClientSession(receive, send) as session,
        ):
            await session.initialize()
            tools = {of.name for of in (await session.list_tools()).tools}
            answer = await session.call_tool(tool, arguments)
            text = answer.content[0].text  # type: ignore[union-attr]
            return tools, text if answer.isError else json.loads(text)

    return anyio.run(ask)


def test_mcp_tools_are_the_four_and_find_what_the_api_finds(served: Served) -> None:
    tools, found = mcp(served, "search_pictures", {"text": served.captions[3], "k": 3})
    assert tools == TOOLS
    with urlopen(f"{served.address}search?k=3&text={served.captions[3].replace(' ', '+')}") as answer:
        direct = json.load(answer)["results"]
    assert [one["id"] for one in found] == [one["id"] for one in direct]
    _, similar = mcp(served, "more_like", {"item": found[0]["id"], "k": 2})
    assert len(similar) == 2
    assert found[0]["id"] not in [one["id"] for one in similar]
    assert mcp(served, "health", {})[1]["status"] == "ok"
    assert mcp(served, "audit_record", {})[1]["threats"]
    assert "is empty" in mcp(served, "search_pictures", {"text": " "})[1]


def test_another_name_for_this_machine_is_refused(served: Served) -> None:
    """DNS rebinding: a stranger's page whose name now leads here."""
    for path in ("search?text=disc", ""):
        with pytest.raises(HTTPError) as caught:
            urlopen(Request(served.address + path, headers={"Host": "evil.example"}))
        assert caught.value.code == 400


def test_the_example_client(served: Served) -> None:
    command = [sys.executable, str(CLIENT), served.address, served.captions[0]]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    with urlopen(f"{served.address}search?k=5&text={quote(served.captions[0])}") as answer:
        found = [one["caption"] for one in json.load(answer)["results"]]
    assert [caption in line for caption, line in zip(found, printed.splitlines(), strict=True)] == [True] * 5
