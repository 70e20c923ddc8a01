"""A run after a power cut at any moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from power_cut import Recorder, bad_states, recording
from tiny_runs import assert_same_run, with_optim

from training.checkpoint import load_state
from training.config import Config
from training.models.dual_encoder import DualEncoder
from training.trainer import STATE_FILE, WEIGHTS_FILE, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS = 3


def work(config: Config, root: Path) -> Recorder:
    """Acknowledged are the start and every epoch."""
    with recording(root) as recorder:
        run = Trainer(replace(config, out=str(root / "runs" / "a")))
        recorder.acknowledge()
        for epoch in range(EPOCHS):
            run.fit(epochs=epoch + 1)
            recorder.acknowledge()
    return recorder


def look(directory: Path, acknowledged: int, config: Config, whole: Path) -> None:
    out = directory / "runs" / "a"
    if acknowledged or (out / STATE_FILE).exists():
        assert load_state(out / STATE_FILE)[1]["step"] >= 5 * (acknowledged - 1)
        if acknowledged > 1 or (out / WEIGHTS_FILE).exists():
            DualEncoder.from_pretrained(out)
    Trainer(replace(config, out=str(out)), resume=(out / STATE_FILE).exists()).fit()
    assert b"\0" not in (out / "metrics.jsonl").read_bytes()
    assert_same_run(out, whole)
    assert not list(out.rglob(".*")), "left behind"


@pytest.mark.parametrize("most", [10, pytest.param(None, marks=pytest.mark.soak)])
def test_a_run_resumes_to_the_same_bits_after_a_power_cut_at_any_moment(
    most: int | None, config: Config, tmp_path: Path
) -> None:
    config = replace(with_optim(config, epochs=EPOCHS), checkpoint_every=2)
    Trainer(replace(config, out=str(tmp_path / "whole"))).fit()
    (tmp_path / "disk").mkdir()
    recorder = work(config, tmp_path / "disk")
    bad = bad_states(
        recorder,
        lambda directory, acknowledged: look(directory, acknowledged, config, tmp_path / "whole"),
        tmp_path,
        most,
    )
    assert not bad, bad[:3]
