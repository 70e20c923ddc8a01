from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TOWERS, assert_same_run, before_step, metrics, with_loss, with_optim

from training.checkpoint import load_state
from training.config import Config, LossConfig, OptimConfig, read_toml
from training.errors import InputError
from training.losses import Curriculum, LossOutput
from training.models.config import ImageTowerConfig
from training.models.dual_encoder import DualEncoder
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def learning_rates(config: Config) -> list[list[float]]:
    """The rate of every parameter group at every step."""
    trainer = Trainer(config)
    seen: list[list[float]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    trainer.fit()
    return seen


def test_training_lowers_the_loss_and_beats_chance(config: Config) -> None:
    trainer = Trainer(with_loss(with_optim(config, epochs=21), name="max"))
    best = trainer.fit()
    losses = [line["loss"] for line in metrics(Path(config.out)) if line["kind"] == "train"]  # steps 0, 50, 100
    assert losses[2] < 0.5 * losses[0]
    # By chance R@1 + R@5 + R@10 are 67 % from captions to 24 images, and about 62 % the other way.
    assert best["rsum"] > 400


def test_run_directory(config: Config) -> None:
    best = Trainer(replace(config, seed=7)).fit()
    out = Path(config.out)
    names = {"README.md", "config.json", "config.toml", "metrics.jsonl", "model.safetensors", "state"}
    assert {path.name for path in out.iterdir()} == names | {"vocabulary.json"}
    assert [path.name for path in (out / "state").iterdir()] == ["last.safetensors"]
    assert read_toml(out / "config.toml") == replace(config, seed=7)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"rSum {best['rsum']:.1f}" in card
    assert "24 images, 120 captions" in card
    lines = metrics(out)
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 0), ("validation", 5), ("validation", 10)]
    assert {"loss", "gradient_norm", "positive", "hardest", "active", "spread", "lr"} <= lines[0].keys()
    assert max(lines[1:], key=lambda line: line["rsum"]).items() >= best.items()
    contract = {"data", "split", "images", "captions", "i2t", "t2i", "rsum", "ties"}
    assert best.keys() == contract
    assert best["i2t"].keys() == best["t2i"].keys() == {"r1", "r5", "r10", "medr", "meanr"}
    assert DualEncoder.from_pretrained(out).encode_texts(["a colour1 shape2"]).shape == (1, 16)


def test_the_same_seed_gives_the_same_run_and_another_does_not(config: Config, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        Trainer(replace(config, out=str(tmp_path / name), seed=seed)).fit()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(config: Config) -> None:
    trainer = Trainer(replace(config, checkpoint_every=1))
    out = Path(config.out)
    best: list[bytes] = []

    def spoil(step: int) -> None:
        if step == 7:
            best.append((out / "model.safetensors").read_bytes())
            forward = trainer.loss.forward

            def poisoned(*batch: torch.Tensor) -> LossOutput:
                value, statistics = forward(*batch)
                return LossOutput(value * float("nan"), statistics)

            trainer.loss.forward = poisoned  # type: ignore[assignment,method-assign]

    with pytest.raises(InputError, match=r"step 7: loss nan.*image train/\d+, caption train#\d+.*nan_batch\.json"):
        before_step(trainer, spoil).fit()
    record = json.loads((out / "nan_batch.json").read_text())
    assert record["step"] == 7
    assert len(record["images"]) == len(record["captions"]) == 24
    corpus = trainer.train_corpus
    for image, caption in zip(record["images"], record["captions"], strict=True):
        assert corpus.owner[corpus.caption_ids.index(caption)] == corpus.image_ids.index(image)
    assert best == [(out / "model.safetensors").read_bytes()]
    tensors, saved = load_state(out / "state" / "last.safetensors")
    assert saved["step"] == 7
    assert all(tensor.isfinite().all() for tensor in tensors["model"].values())


def collapsed(config: Config) -> Trainer:
    """A run whose embeddings are all equal, and stay so."""
    text = replace(config.model.text, head="linear")
    trainer = Trainer(replace(with_optim(config, lr=0.0), model=replace(config.model, text=text)))
    with torch.no_grad():
        for tower in (trainer.model.image_tower, trainer.model.text_tower):
            last = list(tower.head.modules())[-1]
            assert isinstance(last, torch.nn.Linear)
            last.weight.zero_()
            last.bias.fill_(1)
    trainer.detector.patience = 4
    return trainer


def test_a_collapse_brings_back_the_sum_of_hinges(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trainer = collapsed(with_loss(config, name="max", warmup_epochs=2))
    alphas: list[float] = []
    loss = trainer.loss
    assert isinstance(loss, Curriculum)
    trainer.optimizer.register_step_pre_hook(lambda *_: alphas.append(loss.alpha))
    trainer.fit()
    # It is noticed at steps 3 and 7; a ramp takes ten steps.
    assert alphas == pytest.approx([1, 1, 1, 1, 0.1, 0.2, 0.3, 0.4, 0.1, 0.2])
    assert "back to the sum of hinges" in caplog.text


def test_a_collapse_may_be_reported_only(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = collapsed(with_loss(config, name="max", on_collapse="warn"))
    trainer.fit()
    assert "collapsed for 4 steps" in capsys.readouterr().out
    assert isinstance(trainer.loss, Curriculum)
    assert trainer.loss.alpha == 1


def test_sum_clipped_at_2_moves_as_the_mean_clipped_at_2_over_b(config: Config, tmp_path: Path) -> None:
    def weights(name: str, reduction: str, clip: float) -> torch.Tensor:
        run = with_optim(replace(config, out=str(tmp_path / name)), lr=1e-3, clip=clip)
        trainer = Trainer(with_loss(run, name="max", reduction=reduction))
        for group in trainer.optimizer.param_groups:
            group["eps"] = 1e-15  # all that depends on the scale of the gradient
        trainer.fit()
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    vsepp = weights("sum", "sum", 2.0)
    torch.testing.assert_close(weights("mean", "mean", 2.0 / 24), vsepp, atol=2e-5, rtol=0)
    assert (weights("unclipped", "mean", 2.0) - vsepp).abs().max() > 1e-3


def test_step_schedule_divides_by_ten(config: Config) -> None:
    rates = learning_rates(with_optim(config, epochs=4, schedule="step", decay_epochs=2))
    assert [rate[0] for rate in rates] == pytest.approx([1e-2] * 10 + [1e-3] * 10)


def test_cosine_schedule_with_warm_up(config: Config) -> None:
    rates = np.array(learning_rates(with_optim(config, epochs=4, schedule="cosine", warmup_steps=4)))[:, 0] / 1e-2
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([0.5 * (1 + np.cos(np.pi * n / 16)) for n in range(16)])


def test_constant_schedule_with_warm_up(config: Config) -> None:
    rates = learning_rates(with_optim(config, warmup_steps=5))
    assert [rate[0] for rate in rates] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2] + [1e-2] * 5)


def test_pretrained_backbones_and_biases_have_groups_of_their_own(tmp_path: Path) -> None:
    image = ImageTowerConfig(encoder="torchvision:squeezenet1_1@none", size=64)
    config = Config(
        data="scenes:20",
        out=str(tmp_path),
        model=replace(TOWERS, image=image),
        loss=LossConfig(name="infonce"),
        optim=OptimConfig(lr=0.5, backbone_lr=0.25, weight_decay=0.125),
    )
    trainer = Trainer(config)
    groups = {
        id(parameter): (group["peak_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in (*trainer.model.named_parameters(), *trainer.loss.named_parameters()):
        rate = 0.25 if name.startswith("image_tower.backbone") else 0.5
        assert groups.pop(id(parameter)) == (rate, 0.125 if parameter.ndim > 1 else 0), name
    assert not groups


def test_patience_stops_a_run_that_no_longer_improves(config: Config) -> None:
    stopping = replace(with_optim(config, lr=0.0, epochs=30), patience=3)
    Trainer(stopping).fit()
    steps = [line["step"] for line in metrics(Path(config.out)) if line["kind"] == "validation"]
    assert steps == [5, 10, 15, 20]
    Trainer(stopping, resume=True).fit()
    assert len([line for line in metrics(Path(config.out)) if line["kind"] == "validation"]) == 4


def test_validation_leaves_every_module_in_its_mode(config: Config) -> None:
    trainer = Trainer(replace(config, validate_every=2))
    modes: list[list[bool]] = []
    before_step(trainer, lambda step: modes.append([module.training for module in trainer.model.modules()])).fit()
    assert all(mode == modes[0] for mode in modes)
    assert all(modes[0])
    steps = [line["step"] for line in metrics(Path(config.out)) if line["kind"] == "validation"]
    assert steps == [2, 4, 5, 6, 8, 10]


def test_the_best_weights_are_kept_not_the_last(config: Config) -> None:
    trainer = Trainer(with_optim(config, epochs=3))

    def ruin(step: int) -> None:
        if step == 10:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.normal_()
            trainer.optimizer.param_groups[0]["peak_lr"] = 0.0

    best = before_step(trainer, ruin).fit()
    validations = [line for line in metrics(Path(config.out)) if line["kind"] == "validation"]
    assert best["rsum"] == max(line["rsum"] for line in validations) > validations[-1]["rsum"]
    assert "Weights of step 10" in (Path(config.out) / "README.md").read_text()


def test_bf16_trains_with_float32_losses_and_weights(config: Config) -> None:
    trainer = Trainer(with_optim(config, precision="bf16", epochs=8))
    inputs: list[torch.dtype] = []
    trainer.model.image_tower.head.register_forward_hook(lambda *call: inputs.append(call[2].dtype))
    assert trainer.fit()["rsum"] > 300
    assert torch.bfloat16 in inputs
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_what_cannot_be_trained_is_refused_before_anything_is_written(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for split in ("train", "dev"):
        np.save(folder / f"{split}_ims.npy", np.ones((1, 4), np.float32))
        (folder / f"{split}_caps.txt").write_text("a\n" * 5)
    for bad in (
        replace(config, data=f"precomputed:{folder}"),
        with_optim(config, epochs=0),
        with_loss(config, margin=-1.0),
        replace(config, model=replace(TOWERS, image=ImageTowerConfig(encoder="small-cnn"))),
    ):
        with pytest.raises(InputError):
            Trainer(bad)
    assert not Path(config.out).exists()
