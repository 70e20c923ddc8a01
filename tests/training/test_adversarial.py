"""Training on perturbed pictures: what is minimised, what changes, and what it buys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audited import draw, solve
from tiny_runs import assert_same_run, metrics

from training.adversarial import AdversarialTraining
from training.config import AdversarialConfig, Config, LossConfig, OptimConfig, parse_epsilon, read_toml
from training.data.batches import Batch
from training.data.formats import load_corpus
from training.data.padded import Padded, pad
from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.robustness.audit import Audit, AuditConfig
from training.trainer import Trainer, build_loss


@pytest.fixture(scope="module")
def undefended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("undefended")
    data = draw(folder / "pictures")
    return solve(data, folder / "run"), data


def defence(undefended: tuple[Path, str], out: Path, method: str, **changes: Any) -> Config:
    """Fine-tuning of the undefended run."""
    config = replace(read_toml(undefended[0] / "config.toml"), out=str(out), init=str(undefended[0]))
    adversarial = AdversarialConfig(method=method, epsilon="12/255", steps=2)  # type: ignore[arg-type]
    optim = OptimConfig(lr=1e-3, epochs=10, batch_size=24, schedule="constant")
    return replace(config, adversarial=adversarial, optim=optim, **changes)


def attacked_recall(run: Path, data: str, out: Path) -> tuple[float, float]:
    """Clean R@1 and R@1 at 8/255, in percent."""
    config = AuditConfig(("query-image",), queries=24, epsilons=(8 / 255,), steps=10, trials=1)
    found = Audit(DualEncoder.from_pretrained(run, "cpu"), load_corpus(data, "all"), config, out).run()
    clean, attacked = (of["r1"]["value"] for of in found["threats"]["query-image"]["curve"])
    return clean, attacked


@pytest.mark.parametrize("method", ["fare", "supervised"])
def test_it_makes_the_model_harder_to_fool(undefended: tuple[Path, str], method: str, tmp_path: Path) -> None:
    run, data = undefended
    Trainer(defence(undefended, tmp_path / "run", method)).fit()
    before = attacked_recall(run, data, tmp_path / "before")
    after = attacked_recall(tmp_path / "run", data, tmp_path / "after")
    assert after[0] > 75
    assert before[1] < 25 < 75 < after[1]


def test_fare_leaves_captions_where_they_are(undefended: tuple[Path, str], tmp_path: Path) -> None:
    config = defence(undefended, tmp_path / "run", "fare")
    Trainer(replace(config, optim=replace(config.optim, epochs=1))).fit()
    corpus = load_corpus(undefended[1], "all")
    before, after = (
        encode_corpus(DualEncoder.from_pretrained(run, "cpu"), corpus) for run in (undefended[0], tmp_path / "run")
    )
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_fare_loss_is_the_distance_at_the_perturbed_pictures(undefended: tuple[Path, str], tmp_path: Path) -> None:
    trainer = Trainer(defence(undefended, tmp_path / "run", "fare"))
    assert trainer.adversarial is not None
    batch = trainer.pairs[[0, 1, 5, 9]].to(trainer.device)
    value, _ = trainer.adversarial(batch, step=3)
    with torch.no_grad():
        clean = trainer.model.eval().image_tower(batch.images.values)
    assert torch.allclose(clean, trainer.adversarial.anchors[batch.image_ids.cpu()].to(clean), atol=1e-5)  # type: ignore[index]
    assert float(value) > 0.01  # at the clean pictures it would be 0
    again, _ = trainer.adversarial(batch, step=3)
    other, _ = trainer.adversarial(batch, step=4)
    assert float(again) == float(value) != float(other)
    value.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in trainer.model.image_tower.parameters())
    assert all(p.grad is None for p in trainer.model.text_tower.parameters())


def test_supervised_loss_rises_under_the_attack(undefended: tuple[Path, str], tmp_path: Path) -> None:
    trainer = Trainer(defence(undefended, tmp_path / "run", "supervised"))
    assert trainer.adversarial is not None
    batch = trainer.pairs[list(range(0, 48, 2))].to(trainer.device)
    trainer.model.eval()
    clean = trainer.loss(*trainer._embed(batch), batch.image_ids).value
    assert float(trainer.adversarial(batch, 0).value) > float(clean) * 1.05


def test_it_resumes_bit_for_bit(undefended: tuple[Path, str], tmp_path: Path, one_thread: None) -> None:
    config = defence(undefended, tmp_path / "whole", "supervised")
    config = replace(config, optim=replace(config.optim, epochs=3))
    Trainer(config).fit()
    halves = replace(config, out=str(tmp_path / "halves"))
    Trainer(halves).fit(epochs=1)
    Trainer(halves, resume=True).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_the_last_weights_are_kept(undefended: tuple[Path, str], tmp_path: Path) -> None:
    config = defence(undefended, tmp_path / "run", "fare")
    trainer = Trainer(replace(config, optim=replace(config.optim, epochs=3)))
    best = trainer.fit()
    last = [line for line in metrics(tmp_path / "run") if line["kind"] == "validation"][-1]
    assert best["rsum"] == last["rsum"]
    saved = DualEncoder.from_pretrained(tmp_path / "run", "cpu").state_dict()
    assert all(torch.equal(saved[name], value.cpu()) for name, value in trainer.model.state_dict().items())


def test_what_cannot_be_done_is_refused(undefended: tuple[Path, str], config: Config, tmp_path: Path) -> None:
    good = defence(undefended, tmp_path / "run", "fare")
    with pytest.raises(InputError, match="add --init RUN"):
        Trainer(replace(good, init=""))
    with pytest.raises(InputError, match="leave out --sampler"):
        Trainer(replace(good, sampler="clustered"))
    with pytest.raises(InputError, match="other towers"):
        Trainer(replace(good, model=replace(good.model, image=ImageTowerConfig(size=32))))
    with pytest.raises(InputError, match="takes precomputed features"):
        Trainer(replace(config, adversarial=AdversarialConfig(method="supervised")))
    with pytest.raises(InputError, match=r"ε = 8: pixels go from 0 to 1, so must ε; write 8/255"):
        Trainer(replace(good, adversarial=AdversarialConfig(method="fare", epsilon="8")))


def test_epsilons_are_fractions() -> None:
    assert parse_epsilon("8/255") == 8 / 255
    assert parse_epsilon("0.5") == 0.5
    for text in ("x", "1/0", "-1/255", "nan", "inf", "1/2/3", ""):
        with pytest.raises(InputError, match="ε = "):
            parse_epsilon(text)


@pytest.mark.parametrize("owners", [[0, 0, 0], [0, 0, 1]])
@pytest.mark.parametrize("name", ["curriculum", "max", "sum", "infonce", "sigmoid"])
@pytest.mark.parametrize("method", ["fare", "supervised"])
def test_a_batch_of_one_picture_has_nothing_to_attack_and_trains(method: Any, name: Any, owners: list[int]) -> None:
    torch.manual_seed(0)
    towers = ModelConfig(ImageTowerConfig(size=16), TextTowerConfig(word_dim=4, min_count=1), dim=8)
    words = WordTokenizer.fit(["a b c"], min_count=1)
    model = DualEncoder(towers, words)
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)[owners]
    batch = Batch(Padded(pixels), pad(words(["a", "b", "c"])), torch.tensor(owners), torch.arange(3))
    seen: list[torch.Tensor] = []
    model.image_tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = build_loss(LossConfig(name=name), model.similarity, 1)
    anchors = torch.randn(2, 8) if method == "fare" else None

    def embed_texts(batch: Batch) -> torch.Tensor:
        return model.text_tower(*batch.texts)

    attack = AdversarialTraining(AdversarialConfig(method), model, loss, embed_texts, anchors, seed=0)
    value = attack(batch, 0).value
    value.backward()  # type: ignore[no-untyped-call]
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.image_tower.parameters() if p.grad is not None)
    attacked = not torch.equal(seen[-1], pixels.float() / 255)
    assert attacked == (method == "fare" or owners[-1] == 1)
