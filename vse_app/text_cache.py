"""Embeddings of the texts that were asked for most recently."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

_TOGETHER, _AT_ONCE = 8, 2
_OVERHEAD = 300  # bytes that Python takes for an entry beside its vector


class TextCache:
    """Embeds texts, and remembers them; for one thread at a time.

    Args:
        encode: Texts to float32 ``(N, D)``; called from threads of its own when there are many.
        most_bytes: What is remembered takes at most so much memory, however long the texts are.
    """

    def __init__(self, encode: Callable[[Sequence[str]], NDArray[np.float32]], most_bytes: int = 32 << 20) -> None:
        self._encode, self._most_bytes = encode, most_bytes
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="embed")

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings float32 ``(N, D)``; raises what ``encode`` raises."""
        keys = {text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts}
        # Alike in length, so that few are padded far; a few at a time, so that more than one core works.
        unknown = sorted((text for text in keys if keys[text] not in self._known), key=lambda text: (len(text), text))
        parts = [unknown[start : start + _TOGETHER] for start in range(0, len(unknown), _TOGETHER)]
        encoded = self._pool.map(self._encode, parts) if len(parts) > 1 else map(self._encode, parts)
        for part, vectors in zip(parts, encoded, strict=True):
            for text, vector in zip(part, vectors, strict=True):
                self._known[keys[text]] = vector.copy()  # or one would keep all that were made with it
        for key in keys.values():
            self._known.move_to_end(key)
        rows = np.stack([self._known[keys[text]] for text in texts])
        while len(self._known) * (rows[0].nbytes + _OVERHEAD) > self._most_bytes:
            self._known.popitem(last=False)
        return rows

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
