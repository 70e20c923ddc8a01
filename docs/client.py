"""Ask a server that ``vse serve`` runs, with nothing but the standard library.

python docs/client.py http://127.0.0.1:7860 "two dogs in the snow"
"""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen


def search(server: str, text: str, k: int = 5) -> list[dict[str, Any]]:
    """The ``k`` best pictures for a text, best first."""
    with urlopen(f"{server.rstrip('/')}/search?{urlencode({'text': text, 'k': k})}", timeout=30) as answer:
        results: list[dict[str, Any]] = json.load(answer)["results"]
    return results


if __name__ == "__main__":
    for found in search(*sys.argv[1:3]):
        print(f"{found['score']:.3f}  {found['name']}  {found['caption'] or ''}")
