"""``metrics.jsonl`` of a run, and TensorBoard's events where they are wanted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from training.errors import InputError
from training.files import sync

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends one JSON record per line.

    Args:
        out: The run directory.
        tensorboard: Whether floats also become events.

    Raises:
        InputError: If TensorBoard is wanted and missing.
    """

    def __init__(self, out: Path, tensorboard: bool = False) -> None:
        self._file = out / METRICS_FILE
        self._writer = _writer(out) if tensorboard else None

    def write(self, step: int, seconds: float, record: dict[str, Any]) -> None:
        """Append a record, which says its ``kind``."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 1), **record}) + "\n")
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{record['kind']}/{name}", value, step)

    def sync(self) -> int:
        """Put on disk what is written so far; returns its bytes."""
        if not self._file.exists():
            return 0
        sync(self._file)
        sync(self._file.parent)
        return self._file.stat().st_size

    def cut(self, size: int) -> None:
        """Forget what came after so many bytes: a resumed run writes it again.

        Of a log that ends earlier or is damaged the whole records before that are kept; stderr says what is lost.
        """
        written = self._file.read_bytes()[:size] if self._file.exists() else b""
        kept = written
        if len(written) < size or b"\0" in written:
            intact = written.partition(b"\0")[0]
            kept = intact[: intact.rfind(b"\n") + 1]
            lost = size - len(kept)
            print(f"{self._file}: its last {lost:,} bytes are lost; the log goes on without them", file=sys.stderr)
        if self._file.exists():
            os.truncate(self._file, len(kept))

    def close(self) -> None:
        """Flush the events."""
        if self._writer is not None:
            self._writer.close()


def _writer(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("tensorboard is not installed; pip install 'vse-app[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"))
