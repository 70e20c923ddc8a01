"""A resumed run meets what it was started with, or says what has changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_hub import WORDS, save_encoder, save_tokenizer
from tiny_runs import assert_same_run, before_step, with_optim

from training.config import AdversarialConfig, Config, OptimConfig, to_toml
from training.data.corpus import Corpus
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.provenance import provenance
from training.trainer import Trainer
from vse_app.train_arguments import read_arguments

pytestmark = pytest.mark.usefixtures("one_thread")
STATE = Path("state", "last.safetensors")


@pytest.fixture
def data(tiny_features: str, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_features.split(":")[1], tmp_path / "data"))


@pytest.fixture
def config(config: Config, data: Path) -> Config:
    return replace(config, data=f"precomputed:{data}")


def hub(config: Config, folder: Path, frozen: bool) -> Config:
    text = TextTowerConfig(f"hf:{folder}", "mean", head="linear", frozen=frozen)
    return replace(config, model=replace(config.model, text=text))


def stopped(config: Config, step: int = 6) -> Path:
    """A run that was stopped before a step; five make an epoch."""

    def stop(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        before_step(Trainer(replace(config, checkpoint_every=1)), stop).fit()
    return Path(config.out)


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def refusal(config: Config) -> str:
    """The line that a resumed run ends with; it must have written nothing."""
    before = contents(Path(config.out))
    with pytest.raises(InputError, match=r"^[^\n]+$") as refused:
        Trainer(config, resume=True)
    assert contents(Path(config.out)) == before
    return str(refused.value)


def reword(folder: Path, name: str, change: Callable[[list[str]], list[str]]) -> None:
    path = folder / name
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def one_number(folder: Path, name: str) -> None:
    values = np.load(folder / name)
    values[3, 2] += 1e-3
    np.save(folder / name, values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: reword(d, "train_caps.txt", lambda c: ["aa colour0 shape0", *c[1:]]), "[train]: the captions"),
        (lambda d: reword(d, "train_caps.txt", lambda c: [c[0], c[2], c[1], *c[3:]]), "[train]: the captions"),
        (lambda d: reword(d, "dev_caps.txt", lambda c: ["a colour0", *c[1:]]), "[dev]: the captions"),
        (lambda d: one_number(d, "train_ims.npy"), "[train]: the images"),
        (lambda d: one_number(d, "dev_ims.npy"), "[dev]: the images"),
        (
            lambda d: [
                np.save(d / "train_ims.npy", np.load(d / "train_ims.npy")[:23]),
                reword(d, "train_caps.txt", lambda c: c[:115]),
            ],
            "[train]: 115 captions of 23 images, but 120 captions of 24 images when",
        ),
    ],
)
def test_other_data_is_refused(change: Callable[[Path], object], told: str, config: Config, data: Path) -> None:
    Trainer(config)
    change(data)
    line = refusal(config)
    assert line.startswith(f"precomputed:{data.name} {told}")
    assert "restore the data" in line


def test_every_part_of_a_split_is_in_its_provenance() -> None:
    def split(**changes: Any) -> dict[str, str]:
        parts: dict[str, Any] = {
            "image_ids": ["x", "y"],
            "captions": ["a", "b"],
            "caption_ids": ["1", "2"],
            "owner": np.array([0, 1]),
            "features": np.eye(2, dtype=np.float32),
        }
        return provenance(Corpus(name="data", split="train", **(parts | changes)))

    assert split() == split(image_ids=["renamed", "too"])
    for changes, part in (
        ({"owner": np.array([1, 0])}, "pairs"),
        ({"weights": np.array([1.0, 2.0])}, "pairs"),
        ({"captions": ["b", "a"]}, "captions"),
        ({"features": np.eye(2, dtype=np.float32)[::-1]}, "images"),
        ({"features": np.eye(2)}, "images"),
        ({"features": np.eye(2, dtype=np.float32)[:, None]}, "images"),
    ):
        assert {name for name, value in split(**changes).items() if value != split()[name]} == {part}


def test_a_frozen_encoder_that_was_exchanged_is_refused(config: Config, tmp_path: Path) -> None:
    folder = save_tokenizer(save_encoder(tmp_path / "encoder"))
    config = hub(config, folder, frozen=True)
    Trainer(config)
    save_encoder(folder, seed=1)
    assert f"hf:{folder} has other weights here than when the model was trained (text tower)" in refusal(config)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_goes_on_with_its_own_tokenizer_and_architecture(frozen: bool, config: Config, tmp_path: Path) -> None:
    folder = save_tokenizer(save_encoder(tmp_path / "encoder"))
    whole = replace(hub(config, folder, frozen), out=str(tmp_path / "whole"))
    Trainer(whole).fit()
    config = hub(config, folder, frozen)
    stopped(config)
    save_tokenizer(folder, WORDS[:5] + WORDS[5:][::-1])
    if not frozen:
        shutil.rmtree(folder)
    Trainer(config, resume=True).fit()
    assert_same_run(Path(config.out), tmp_path / "whole")


@pytest.mark.parametrize("encoder", ["gru", "hf"])
def test_a_vocabulary_that_was_exchanged_is_refused(encoder: str, config: Config, tmp_path: Path) -> None:
    if encoder == "hf":
        config = hub(config, save_tokenizer(save_encoder(tmp_path / "encoder")), frozen=True)
    Trainer(config)
    out = Path(config.out)
    if encoder == "hf":
        save_tokenizer(out, WORDS[:5] + WORDS[5:][::-1])
    else:
        record = json.loads((out / "vocabulary.json").read_text())
        (out / "vocabulary.json").write_text(json.dumps(record | {"words": record["words"][::-1]}))
    assert re.match(rf"{re.escape(config.out)}: captions get other token ids", refusal(config))


def test_a_model_to_begin_with_is_not_needed_again(config: Config, tmp_path: Path) -> None:
    first = replace(config, out=str(tmp_path / "first"))
    Trainer(first).fit()
    config = replace(config, init=first.out)
    Trainer(replace(config, out=str(tmp_path / "whole"))).fit()
    stopped(config)
    shutil.rmtree(first.out)
    Trainer(config, resume=True).fit()
    assert_same_run(Path(config.out), tmp_path / "whole")


def test_the_anchors_of_fare_come_from_the_same_model(tmp_path: Path) -> None:
    towers = ModelConfig(ImageTowerConfig(size=32), TextTowerConfig(word_dim=8, min_count=1), dim=16)
    first = Config("scenes:40", str(tmp_path / "first"), model=towers, optim=OptimConfig(epochs=1, batch_size=32))
    Trainer(first).fit()
    config = replace(first, out=str(tmp_path / "fare"), init=first.out, adversarial=AdversarialConfig("fare"))
    Trainer(config)
    moved = Path(first.out).rename(tmp_path / "moved")
    with pytest.raises(InputError, match="no such directory"):
        Trainer(config, resume=True)
    Trainer(replace(config, init=str(moved)), resume=True)
    weights = load_file(moved / "model.safetensors")
    weights["image_tower.head.1.bias"] += 1e-3
    save_file(weights, moved / "model.safetensors")
    assert refusal(replace(config, init=str(moved))).startswith(
        f"{moved}: other weights than when the run was started"
    )


def test_what_does_not_change_the_result_may_change(config: Config, data: Path, tmp_path: Path) -> None:
    Trainer(replace(config, out=str(tmp_path / "whole"))).fit()
    stopped(config)
    moved = data.rename(tmp_path / "elsewhere")
    given = ["--data", f"precomputed:{moved}", "--workers", "1", "--checkpoint-every", "2", "--patience", "9"]
    resumed, _ = read_arguments(["--resume", "--out", config.out, *given])
    assert (resumed.data, resumed.workers, resumed.checkpoint_every, resumed.patience) == (
        f"precomputed:{moved}",
        1,
        2,
        9,
    )
    Trainer(replace(resumed, workers=0), resume=True).fit()
    assert_same_run(Path(config.out), tmp_path / "whole")
    assert (Path(config.out) / "config.toml").read_text() == to_toml(replace(resumed, workers=0))


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_a_run_of_more_epochs_is_the_longer_run(schedule: Any, config: Config, tmp_path: Path) -> None:
    config = with_optim(config, schedule=schedule, decay_epochs=1)
    Trainer(with_optim(replace(config, out=str(tmp_path / "whole")), epochs=3)).fit()
    Trainer(config).fit()
    Trainer(with_optim(config, epochs=3), resume=True).fit()
    assert_same_run(Path(config.out), tmp_path / "whole")
    assert "3.00 epochs are done already" in refusal(config)


def test_more_epochs_of_a_cosine_are_another_run(config: Config) -> None:
    config = with_optim(config, schedule="cosine")
    Trainer(config)
    assert "optim.epochs: 2 ≠ 3, by which the cosine schedule goes" in refusal(with_optim(config, epochs=3))


@pytest.mark.parametrize("validated", [False, True])
def test_a_state_of_an_earlier_version_goes_on_and_says_what_is_not_checked(
    validated: bool, config: Config, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(config, 6 if validated else 3)
    with safe_open(str(out / STATE), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["record"])
    del record["provenance"]
    save_file(tensors, out / STATE, {"record": json.dumps(record)})
    words = (out / "vocabulary.json").read_bytes()
    if not validated:  # earlier versions wrote it with the first weights
        (out / "vocabulary.json").unlink()
    reword(data, "train_caps.txt", lambda captions: ["aa colour0 shape0", *captions[1:]] if validated else captions)
    trainer = Trainer(config, resume=True)
    assert "still the same is not checked" in capsys.readouterr().out
    trainer.fit()
    assert (out / "vocabulary.json").read_bytes() == words, "the vocabulary that the weights were trained with"


def test_a_backbone_that_was_trained_does_not_hide_behind_a_frozen_name(config: Config, tmp_path: Path) -> None:
    folder = save_tokenizer(save_encoder(tmp_path / "encoder"))
    first = with_optim(replace(hub(config, folder, frozen=False), out=str(tmp_path / "first")), backbone_lr=1e-2)
    Trainer(first).fit()
    with pytest.raises(InputError, match=rf"^{first.out}: its text backbone has been trained[^\n]*frozen False$"):
        Trainer(replace(hub(config, folder, frozen=True), init=first.out))
    Trainer(replace(hub(config, folder, frozen=False), init=first.out))
