"""Where weights come from: a local mirror first, then the hub; and how they are told apart."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.errors import InputError


def locate(name: str) -> str:
    """A local directory for ``name`` if there is one, else ``name`` itself for the hub.

    ``name`` may be a directory. Otherwise its last part is looked for in the directory that the environment
    variable ``VSE_MODELS`` names, so that one recipe serves with and without a network.
    """
    if Path(name).is_dir():
        return name
    mirror = os.environ.get("VSE_MODELS")
    if mirror:
        candidate = Path(mirror).expanduser() / name.rstrip("/").split("/")[-1]
        if candidate.is_dir():
            return str(candidate)
    return name


def first_line(error: Exception) -> str:
    """What an exception of a library says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unavailable(name: str, error: Exception) -> InputError:
    """A one-line account of a model that could not be loaded."""
    return InputError(
        f"{name}: cannot be loaded ({first_line(error)}); check the name, the network, or set VSE_MODELS to a "
        "directory that holds it"
    )


def checksum(module: nn.Module) -> str:
    """SHA-256 over parameters and buffers in name order, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def portable(config: Any) -> dict[str, Any]:
    """A transformers configuration as JSON data, without the path it was read from."""
    record: dict[str, Any] = config.to_dict()
    record.pop("_name_or_path", None)
    return record


def quiet_transformers() -> None:
    """Loading a backbone without its classifier is intended: no report, no bar."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
