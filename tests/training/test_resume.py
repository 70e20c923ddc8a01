from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_run, before_step, metrics, with_loss, with_optim

from training.checkpoint import load_state
from training.config import Config, LossConfig, OptimConfig, read_toml
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.trainer import Trainer
from vse_app.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_existing_run_is_not_overwritten(config: Config) -> None:
    Trainer(config).fit()
    out = Path(config.out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        Trainer(config)
    (out / "state" / "last.safetensors").unlink()
    with pytest.raises(InputError, match="holds a run already"):
        Trainer(config)
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())


def pictures(out: Path) -> Config:
    """Everything random at once: crops, dropout on both sides, a curriculum that ends in the second epoch."""
    return Config(
        data="scenes:60",
        out=str(out),
        augment="crop",
        model=ModelConfig(
            image=ImageTowerConfig(size=32, dropout=0.5),
            text=TextTowerConfig(word_dim=8, head="linear", dropout=0.3),
            dim=16,
        ),
        loss=LossConfig(warmup_epochs=1.5),
        optim=OptimConfig(lr=1e-3, epochs=2, batch_size=32, schedule="cosine"),
        checkpoint_every=3,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    Trainer(pictures(out)).fit()
    return out


@pytest.mark.parametrize("stop", [2, 4, 13])
def test_a_stopped_run_resumes_to_the_same_bits(stop: int, uninterrupted: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop_there(step: int) -> None:
        if step == stop:
            raise Stopped

    with pytest.raises(Stopped):
        before_step(Trainer(pictures(tmp_path)), stop_there).fit()
    Trainer(pictures(tmp_path), resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)
    assert Trainer(pictures(tmp_path), resume=True).fit()["rsum"] > 0  # a finished run stays as it is
    assert_same_run(tmp_path, uninterrupted)


def test_a_killed_run_resumes_to_the_same_bits(config: Config, tmp_path: Path) -> None:
    config = replace(with_optim(config, epochs=60), checkpoint_every=3)
    Trainer(config).fit()
    out = tmp_path / "killed"
    state = out / "state" / "last.safetensors"
    config = replace(config, out=str(out))
    script = (
        "import sys\nfrom dataclasses import replace\nfrom pathlib import Path\nimport torch\n"
        "from training.config import read_toml\nfrom training.trainer import Trainer\n"
        "torch.set_num_threads(1)\n"
        "Trainer(replace(read_toml(Path(sys.argv[1])), out=sys.argv[2]), resume=sys.argv[3] == 'resume').fit()\n"
    )
    steps = []
    for resume in ("new", "resume"):
        seen = state.stat().st_mtime_ns if state.exists() else None
        command = [sys.executable, "-c", script, str(tmp_path / "run" / "config.toml"), str(out), resume]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == seen):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
        steps.append(load_state(state)[1]["step"])
    assert steps[0] <= steps[1] < 300
    Trainer(config, resume=True).fit()
    assert_same_run(out, tmp_path / "run")


def test_a_run_killed_before_its_first_step_can_be_resumed(config: Config, tmp_path: Path) -> None:
    Trainer(config)
    Trainer(config, resume=True).fit()
    Trainer(replace(config, out=str(tmp_path / "whole"))).fit()
    assert_same_run(Path(config.out), tmp_path / "whole")


def test_a_moved_run_resumes_and_another_configuration_is_refused(config: Config, tmp_path: Path) -> None:
    Trainer(config)
    moved = Path(config.out).rename(tmp_path / "moved")
    Trainer(replace(config, out=str(moved)), resume=True)
    other = with_optim(replace(config, out=str(moved)), lr=0.5)
    with pytest.raises(InputError, match=r"last\.safetensors: .*optim\.lr: 0\.01 ≠ 0\.5"):
        Trainer(other, resume=True)
    assert read_toml(moved / "config.toml").optim.lr == 0.01
    with pytest.raises(InputError, match="no state to resume from"):
        Trainer(replace(config, out=str(tmp_path / "nowhere")), resume=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["sum", "infonce", "sigmoid"])
def test_every_loss_trains_and_resumes(name: str, config: Config, tmp_path: Path) -> None:
    config = with_loss(config, name=name)
    Trainer(config).fit()
    half = replace(config, out=str(tmp_path / "half"))

    def stop(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        before_step(Trainer(half), stop).fit()
    Trainer(half, resume=True).fit()
    assert_same_run(tmp_path / "half", Path(config.out))


def test_a_full_disk_leaves_the_previous_state_and_ends_in_one_line(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(replace(config, checkpoint_every=1))
    state = Path(config.out) / "state" / "last.safetensors"
    step = Trainer._train_step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(self: Trainer, batch: Any) -> dict[str, float]:
        if self.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", fill_the_disk)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["train", "--resume", "--out", config.out])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "last.safetensors" in error
    assert "File too large" in error
    assert load_state(state)[1]["step"] == 3
    assert list(state.parent.iterdir()) == [state]


def test_what_a_killed_run_left_unfinished_goes_when_it_is_resumed(config: Config) -> None:
    Trainer(config).fit()
    out = Path(config.out)
    before = sorted(out.rglob("*"))
    (out / f".{os.getpid()}.tmp").mkdir()
    for folder in (out / f".{os.getpid()}.tmp", out / "state"):
        (folder / f".last.safetensors.{os.getpid()}.tmp").write_bytes(b"half")
    Trainer(config, resume=True).fit()
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("damage", ["shorter", "zeros", "gone", "longer"])
def test_a_damaged_log_is_kept_up_to_its_last_whole_record(
    damage: str, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(config).fit(epochs=1)
    log = Path(config.out) / "metrics.jsonl"
    whole = log.read_bytes()
    damaged = {"shorter": whole[:-30], "zeros": whole[:-30] + bytes(30), "longer": whole + bytes(9)}
    if damage == "gone":
        log.unlink()
    else:
        log.write_bytes(damaged[damage])
    Trainer(config, resume=True)
    kept = log.read_bytes() if log.exists() else b""
    said = capsys.readouterr().err
    if damage == "longer":
        assert (kept, said) == (whole, "")
    else:
        assert kept == (whole[: whole[:-30].rfind(b"\n") + 1] if damage != "gone" else b"")
        assert said == f"{log}: its last {len(whole) - len(kept):,} bytes are lost; the log goes on without them\n"
    Trainer(config, resume=True).fit()
    for line in log.read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_weights_of_another_moment_than_the_state_are_not_called_the_best(config: Config) -> None:
    run = Trainer(config)
    run.fit(epochs=1)
    with torch.no_grad():
        next(run.model.parameters()).zero_()
    run.model.save_pretrained(config.out)
    resumed = Trainer(config, resume=True)
    assert resumed.best is None
    best = resumed.fit()
    log = [record for record in metrics(Path(config.out)) if record["kind"] == "validation"]
    assert best.items() <= log[-1].items(), "the best of what was validated since"
    (Path(config.out) / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: not the weights that the run wrote"):
        Trainer(config, resume=True)
