"""A search as the calls that do the same: curl, Python, MCP."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from shlex import quote
from typing import Any
from urllib.parse import urlencode


def calls(asked: Mapping[str, Any], here: str, with_picture: bool = False) -> str:
    """HTML with one block per way to ask.

    Args:
        asked: Parameters of ``/search``.
        here: Address of the server, without a slash at its end.
        with_picture: Whether a picture goes with them.
    """
    asked = asked or {"text": "two dogs in the snow", "k": 10}
    if with_picture:
        pairs = [(key, one) for key, value in asked.items() for one in (value if isinstance(value, list) else [value])]
        # With -F, a value that begins with @ or < would send a file of that name.
        fields = " ".join(f"--form-string {quote(f'{key}={value}')}" for key, value in pairs)
        curl = f"curl -F image=@picture.jpg {fields} {here}/search"
        ask = f'httpx.post("{here}/search", files={{"image": open("picture.jpg", "rb")}}, data={dict(asked)!r})'
    else:
        curl = f"curl {quote(f'{here}/search?{urlencode(asked, doseq=True)}')}"
        ask = f'httpx.get("{here}/search", params={dict(asked)!r})'
    python = f'import httpx\n\nfor result in {ask}.json()["results"]:\n    print(result["score"], result["name"])'
    mcp = f'{{"mcpServers": {{"vse": {{"url": "{here}/gradio_api/mcp/"}}}}}}'
    blocks = (("curl", curl), ("Python", python), ("MCP client: this server, its tool search_pictures", mcp))
    return "".join(f"<h4>{title}</h4><pre tabindex='0'><code>{escape(code)}</code></pre>" for title, code in blocks)
