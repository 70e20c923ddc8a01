"""The state of a run in one safetensors file: written whole or not at all, and nothing to unpickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer

from training.errors import InputError
from training.files import recover, replacing


def save_state(path: Path, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> None:
    """Write groups of tensors (``model``, ``optimizer``, …), all random states, and a JSON record.

    Args:
        path: Replaced only when the new state is complete.
        tensors: ``{group: {name: tensor}}``.
        record: JSON values: step, epoch, best score, …

    Raises:
        OSError: If it cannot be written; the previous state is still there.
    """
    flat = {f"{group}/{name}": tensor for group, named in tensors.items() for name, tensor in named.items()}
    flat["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        flat["random/cuda"] = torch.cuda.get_rng_state()
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in flat.items()}
    recover(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(save(contiguous, metadata={"record": json.dumps(record)}))


def load_record(path: Path) -> dict[str, Any]:
    """The JSON record alone of what :func:`save_state` wrote.

    Raises:
        InputError: If there is no state or the file is damaged.
    """
    with _reading(path) as file:
        return _record(file)


def load_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what :func:`save_state` wrote and restore the random states.

    Raises:
        InputError: If there is no state or the file is damaged.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    with _reading(path) as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = file.get_tensor(key)
        record, random = _record(file), groups.pop("random")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return groups, record


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no state to resume from; start again with another --out") from None
    except (SafetensorError, LookupError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); start again with another --out") from None


def _record(file: Any) -> dict[str, Any]:
    record = json.loads((file.metadata() or {})["record"])
    if not isinstance(record, dict):
        raise ValueError("its record is no JSON object")
    return record


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's per-parameter state as flat tensors, ``"{parameter}.{entry}"``."""
    return {
        f"{index}.{entry}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors` for an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, entry = key.partition(".")
        state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
