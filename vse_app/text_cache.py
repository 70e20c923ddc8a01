"""Embeddings of the texts that were asked for most recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

_TOGETHER, _AT_ONCE = 8, 2


class TextCache:
    """Embeds texts, and remembers them; for one thread at a time.

    Args:
        encode: Texts to float32 ``(N, D)``; called from threads of its own when there are many.
        size: So many are remembered.
    """

    def __init__(self, encode: Callable[[Sequence[str]], NDArray[np.float32]], size: int = 10_000) -> None:
        self._encode, self._size = encode, size
        self._known: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="embed")

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings float32 ``(N, D)``; raises what ``encode`` raises."""
        # Alike in length, so that few are padded far; a few at a time, so that more than one core works.
        unknown = sorted((text for text in set(texts) if text not in self._known), key=lambda text: (len(text), text))
        parts = [unknown[start : start + _TOGETHER] for start in range(0, len(unknown), _TOGETHER)]
        encoded = self._pool.map(self._encode, parts) if len(parts) > 1 else map(self._encode, parts)
        for part, vectors in zip(parts, encoded, strict=True):
            self._known.update(zip(part, vectors, strict=True))
        for text in texts:
            self._known.move_to_end(text)
        rows = np.stack([self._known[text] for text in texts])
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return rows

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
