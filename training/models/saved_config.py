"""``config.json`` of a model folder, read as a stranger's: in bounds, and borne out before it takes memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from training.config import check_ranges, from_dict
from training.errors import InputError
from training.models.config import ModelConfig

CONFIG_FILE, FORMAT = "config.json", 1
MOST_TENSORS = 5_000
"""Backbones with more weight tensors are refused; large public ones have about a thousand."""
MOST_NUMBER = 2**27
"""Larger whole numbers in a backbone's architecture are refused: libraries make lists and tables of such lengths."""


class SavedConfig(NamedTuple):
    """What ``config.json`` says.

    Attributes:
        model: The settings.
        architectures: Of both backbones, by tower.
        frozen: Checksums of frozen backbones, by tower.
        vocabulary: Hash of the captions that a word vocabulary was fitted on.
    """

    model: ModelConfig
    architectures: dict[str, Any]
    frozen: dict[str, Any]
    vocabulary: object


def read_config(path: Path) -> SavedConfig:
    """Read a model's ``config.json``.

    Raises:
        InputError: If it is none, of another format, or holds numbers that no model can have.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise InputError(f"{path}: format {record['format']}, this version reads {FORMAT}; update vse")
        settings = {key: record[key] for key in ("image", "text", "dim", "similarity", "absolute")}
        architectures, frozen = record["architectures"], record["frozen"]
        for name, value in (
            ("frozen", frozen),
            ("architectures", architectures),
            *((f"architectures.{side}", architectures[side]) for side in ("image", "text")),
        ):
            if not isinstance(value, dict):
                raise TypeError(f"{name} is no object")
        _check_numbers(architectures)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the directory that vse train wrote") from None
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a model configuration ({error}); restore the run's own file") from None
    config = from_dict({"model": settings}, str(path))
    try:
        check_ranges(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return SavedConfig(config.model, architectures, frozen, record.get("vocabulary"))


def _check_numbers(value: object) -> None:
    if isinstance(value, int) and abs(value) > MOST_NUMBER:
        raise ValueError(f"{value} is beyond {MOST_NUMBER}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(inner)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are built inside have shapes and no memory.

    Raises:
        InputError: When there are more than :data:`MOST_TENSORS` tensors of weights.
    """
    count = 0

    def watch(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > MOST_TENSORS:
            raise InputError(f"more than {MOST_TENSORS:,} weight tensors")

    handle = register_module_parameter_registration_hook(watch)
    try:
        with torch.device("meta"):
            yield
    finally:
        handle.remove()
