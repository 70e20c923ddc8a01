"""Small changes to configurations, and comparisons of runs, for the tests of the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from training.checkpoint import load_state
from training.config import Config
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.trainer import Trainer

TOWERS = ModelConfig(
    image=ImageTowerConfig(encoder="precomputed"), text=TextTowerConfig(word_dim=8, min_count=1), dim=16
)


def with_optim(config: Config, **changes: Any) -> Config:
    return replace(config, optim=replace(config.optim, **changes))


def with_loss(config: Config, **changes: Any) -> Config:
    return replace(config, loss=replace(config.loss, **changes))


def before_step(trainer: Trainer, action: Callable[[int], None]) -> Trainer:
    """Run ``action`` with the step's number before each step."""
    step = trainer._train_step

    def wrapped(batch: Any) -> dict[str, float]:
        action(trainer.step)
        return step(batch)

    trainer._train_step = wrapped  # type: ignore[method-assign]
    return trainer


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-equal weights, loss and optimizer state, random state, best weights and log, wherever the data lies."""
    (x, x_record), (y, y_record) = (load_state(out / "state" / "last.safetensors") for out in (a, b))
    assert x.keys() == y.keys()
    for group in x:
        assert x[group].keys() == y[group].keys()
        for name in x[group]:
            assert torch.equal(x[group][name], y[group][name]), f"{group}/{name}"
    for key in ("step", "validations_since_best", "detector"):
        assert x_record[key] == y_record[key], key
    assert x_record["best"] | {"data": ""} == y_record["best"] | {"data": ""}
    assert torch.equal(*(load_file(out / "state" / "last.safetensors")["random/cpu"] for out in (a, b)))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert [line | {"data": ""} for line in metrics(a)] == [line | {"data": ""} for line in metrics(b)]
