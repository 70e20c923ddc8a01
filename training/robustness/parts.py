"""Long work in parts: each is on disk when it is done, and read back after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.errors import InputError
from training.files import recover, write_text

SETTINGS_FILE = "settings.json"


class Parts:
    """A folder of finished parts, with a progress bar over all of them.

    Args:
        folder: Created if needed.
        identity: What the parts depend on, ready for JSON; parts of anything else are not taken over.

    Raises:
        InputError: If the folder holds parts of something else, or a file in it is not what was written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        recover(folder)
        header = folder / SETTINGS_FILE
        self._identity = json.dumps(identity)
        wanted = json.loads(self._identity)
        if not header.exists():
            write_text(header, json.dumps(wanted, indent=1))
        found = self._json(header)
        for key in wanted:
            if not isinstance(found, dict) or found.get(key) != wanted[key]:
                raise InputError(f"{folder.parent}: holds an audit with other {key}; choose another --out")
        self.bar: tqdm[Any] = tqdm(total=0, desc="audit", unit="part", disable=None)
        self.expected = 0

    def expect(self, count: int) -> None:
        """So many parts will be asked for."""
        self.expected = self.bar.total = count
        self.bar.refresh()

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """A part's record as JSON gives it back: from the disk if it is there, else computed and written."""
        path = self.folder / f"{name}.json"
        self.bar.set_postfix_str(name)
        if path.exists():
            self.expected -= 1  # keeps the time left honest
            self.bar.total = self.expected
            self.bar.refresh()
        else:
            part = json.loads(json.dumps(compute()))
            write_text(path, json.dumps({"sha256": self._checksum(name, part), "part": part}))
            self.bar.update()
        found = self._json(path)
        if not isinstance(found, dict) or found.get("sha256") != self._checksum(name, found.get("part")):
            raise _not_written(path)
        return found["part"]

    def _checksum(self, name: str, part: Any) -> str:
        """Of a part, what it is a part of, and which, so that none is taken for another."""
        return hashlib.sha256("\n".join([self._identity, name, json.dumps(part)]).encode()).hexdigest()

    @staticmethod
    def _json(path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise _not_written(path) from None


def _not_written(path: Path) -> InputError:
    return InputError(f"{path}: not what was written; remove it and run again")
