from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_run, before_step, metrics, with_loss, with_optim

from training import gradient_sampling
from training.config import ClusterConfig, Config
from training.errors import InputError
from training.gradient_sampling import GradientSampling
from training.losses import NegativePool
from training.models.tower import evaluating
from training.sampling.clustering import Labels
from training.sampling.decision import Decision
from training.sampling.variance import SampledGain
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clustered(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Every epoch is drawn from clusters, whatever they are worth."""
    monkeypatch.setattr(gradient_sampling, "PAYS", 1e9)
    text = replace(config.model.text, head="linear")
    clusters = ClusterConfig(count=6, allocation="neyman", sketch=16)
    return replace(config, sampler="clustered", clusters=clusters, model=replace(config.model, text=text))


def sampling(trainer: Trainer) -> GradientSampling:
    assert trainer.sampling is not None
    return trainer.sampling


def explicit_sketches(trainer: Trainer, items: Labels, negatives: Labels) -> torch.Tensor:
    """By autograd, one item at a time, against a pool without gradient."""
    of = sampling(trainer)
    rows = []
    with evaluating(trainer.model):
        others = trainer.pairs[negatives.tolist()].to(trainer.device)
        with torch.no_grad():
            pool = NegativePool(*of.embed(others), others.image_ids)
        for item in items.tolist():
            batch = trainer.pairs[[item]].to(trainer.device)
            cost = of.loss.pair_costs(*of.embed(batch), batch.image_ids, pool)[0].sum()
            total = torch.zeros(of.sketch.size)
            for number, layer in enumerate(of.layers):
                weight, bias = torch.autograd.grad(cost, [layer.weight, layer.bias], retain_graph=True)
                gradient = torch.cat([weight, bias[:, None]], dim=1).cpu()  # (o, i + 1)
                left = of.sketch._signed(number, 0, gradient.shape[1], gradient)
                right = of.sketch._signed(number, 1, gradient.shape[0], gradient)
                total += torch.einsum("oi,im,om->m", gradient, left, right) * of.sketch.size**-0.5
            rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["max", "sum", "curriculum", "infonce", "sigmoid"])
def test_fresh_gradients_equal_autograd(name: str, clustered: Config) -> None:
    trainer = Trainer(with_loss(clustered, name=name))
    items, negatives = np.arange(0, 60, 7), np.arange(1, 120, 11)
    found, _ = sampling(trainer).fresh_gradients(items, negatives)
    torch.testing.assert_close(found, explicit_sketches(trainer, items, negatives))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_what_is_kept_in_passing_is_the_anchors_gradient(reduction: str, clustered: Config) -> None:
    """Neither the weight of a draw nor the reduction of the loss shows in it."""
    trainer = Trainer(with_loss(clustered, name="max", reduction=reduction))
    of = sampling(trainer)
    of.start()
    drawn = of.epoch(0, 0)
    assert drawn is not None
    indices = next(iter(drawn))
    anchors, negatives = np.array(indices[: of.batch_size]), np.array(indices[of.batch_size :])
    expected = explicit_sketches(trainer, anchors, negatives)
    of.backward(trainer.pairs[indices].to(trainer.device))
    torch.testing.assert_close(of.sketches[anchors], expected)


def test_weights_make_up_for_the_draws(clustered: Config) -> None:
    """Averaged over many batches, the weighted gradient of a step is that of uniform anchors."""
    trainer = Trainer(with_loss(with_optim(clustered, batch_size=24), name="sum"))
    of = sampling(trainer)
    of.start()
    assert of.batches is not None
    weight = trainer.model.image_tower.head[-1].weight  # type: ignore[index]
    negatives = np.arange(24).tolist()

    def gradient(items: list[int], weights: torch.Tensor) -> torch.Tensor:
        batch = trainer.pairs[items + negatives].to(trainer.device)
        images, captions = of.embed(batch)
        pool = NegativePool(images[len(items) :], captions[len(items) :], batch.image_ids[len(items) :])
        own = images[: len(items)], captions[: len(items)], batch.image_ids[: len(items)]
        value = of.loss.weighted(*own, pool, weights.to(trainer.device)).value / len(items)
        return torch.autograd.grad(value, weight)[0]

    trainer.model.eval()
    exact = gradient(list(range(len(trainer.pairs))), torch.ones(len(trainer.pairs)))
    draws = [next(of.batches.epoch(epoch)) for epoch in range(400)]
    each = torch.stack([gradient(d.indices.tolist(), torch.from_numpy(d.weights).float()) for d in draws])
    error = (each.mean(dim=0) - exact).norm()
    assert error < 4 * (each.var(dim=0).sum() / len(draws)).sqrt()
    assert error < 0.05 * exact.norm()


@pytest.mark.parametrize("sampler", ["clustered", "importance"])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_stopped_run_resumes_to_the_same_bits(
    sampler: str, stop: int, clustered: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_sampling, "round_up", lambda overhead: 1.0)
    config = replace(clustered, sampler=sampler, checkpoint_every=1, out=str(tmp_path / "whole"))
    Trainer(config).fit()
    half = replace(config, out=str(tmp_path / "half"))

    def stop_there(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        before_step(Trainer(half), stop_there).fit()
    Trainer(half, resume=True).fit()
    for out in (tmp_path / "whole", tmp_path / "half"):  # measured times differ
        lines = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"sampler"' not in line]
        (out / "metrics.jsonl").write_text("\n".join(lines))
    _forget_seconds(tmp_path / "whole", tmp_path / "half")
    assert_same_run(tmp_path / "half", tmp_path / "whole")


def _forget_seconds(*runs: Path) -> None:
    from safetensors.torch import load_file, safe_open, save_file

    for out in runs:
        path = out / "state" / "last.safetensors"
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["sampling/flags"] = tensors["sampling/flags"][:4].clone()
        save_file(tensors, path, metadata)


def test_epochs_for_which_it_does_not_pay_are_those_of_the_uniform_sampler(
    clustered: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_sampling, "PAYS", 0.0)
    Trainer(clustered).fit()
    uniform = replace(clustered, sampler="uniform", out=str(tmp_path / "uniform"))
    Trainer(uniform).fit()
    assert (Path(clustered.out) / "model.safetensors").read_bytes() == (
        tmp_path / "uniform" / "model.safetensors"
    ).read_bytes()
    decisions = [record for record in metrics(Path(clustered.out)) if record["kind"] == "sampler"]
    assert [d["go"] for d in decisions] == [False] * (1 + clustered.optim.epochs)


class TestDecision:
    """Real thresholds, on data with and without copies."""

    def decide(self, config: Config, copies: int, tmp_path: Path) -> Decision:
        folder = tmp_path / f"copies{copies}"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for split in ("train", "dev"):
            rows = rng.standard_normal((400 - copies, 12))
            words = [" ".join(f"word{w}" for w in rng.integers(60, size=6)) for _ in rows]
            words += [words[0]] * copies
            np.save(folder / f"{split}_owners.npy", np.append(np.arange(len(rows)), np.zeros(copies, dtype=np.int64)))
            np.save(folder / f"{split}_ims.npy", rows.astype(np.float32))
            (folder / f"{split}_caps.txt").write_text("\n".join(words) + "\n")
        config = replace(config, data=f"precomputed:{folder}", out=str(tmp_path / f"run{copies}"))
        trainer = Trainer(with_loss(with_optim(config, batch_size=64), name="sum"))
        return sampling(trainer).start()

    @pytest.mark.parametrize("allocation", ["equal", "neyman"])
    def test_says_yes_to_duplicates_and_no_without(
        self, allocation: str, clustered: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gradient_sampling, "PAYS", 0.5)
        config = replace(clustered, clusters=replace(clustered.clusters, count=16, allocation=allocation))
        yes, no = (self.decide(config, copies, tmp_path) for copies in (360, 0))
        assert (yes.go, no.go) == (True, False)
        assert "→ drawing by gradient" in str(yes)
        assert "→ uniform batches" in str(no)
        assert yes.measured < 0.25 < no.measured


def test_the_guard_turns_stale_draws_uniform_after_two_bad_checks(
    clustered: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = iter([SampledGain(1.0, 2.0), SampledGain(3.0, 2.0), SampledGain(1.0, 2.0)] + [SampledGain(3.0, 2.0)] * 90)
    monkeypatch.setattr(GradientSampling, "_probe", lambda *_: (next(gains), 1.0))
    trainer = Trainer(with_optim(clustered, batch_size=8, epochs=1))  # 15 steps, a check after each third
    sizes: list[int] = []
    step = trainer._train_step

    def record(batch: object) -> dict[str, float]:
        sizes.append(len(batch.pairs))  # type: ignore[attr-defined]
        return step(batch)  # type: ignore[arg-type]

    trainer._train_step = record  # type: ignore[method-assign]
    trainer.fit()
    assert sizes == [16] * 12 + [8] * 3, "checks at 3, 6, 9 and 12: bad, good, bad, bad"


def test_word_embeddings_stand_in_for_a_head(config: Config) -> None:
    """A GRU without a head, and features without one: the words are all there is to look at."""
    image = replace(config.model.image, head="none")
    trainer = Trainer(replace(config, model=replace(config.model, image=image, dim=10), sampler="clustered"))
    assert [type(layer) for layer in sampling(trainer).layers] == [torch.nn.Embedding]
    sampling(trainer).start()
    assert sampling(trainer).sketches.norm(dim=1).min() > 0


def test_nothing_to_look_at_is_refused(config: Config) -> None:
    trainer = Trainer(config)
    trainer.model.text_tower.backbone.requires_grad_(False)
    trainer.model.image_tower.head = torch.nn.Identity()
    with pytest.raises(InputError, match="neither tower has a linear map or word embeddings to train"):
        trainer.gradient_sampling("clustered")


@pytest.mark.parametrize("sampler", ["clustered", "importance"])
@pytest.mark.parametrize(("count", "made"), [(6, 6), (12, 12), (13, 12), (24, 12), (1000, 12)])
def test_there_are_at_most_half_as_many_clusters_as_pairs_in_a_batch(
    sampler: str, count: int, made: int, clustered: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(clustered, sampler=sampler, clusters=replace(clustered.clusters, count=count))
    of = sampling(Trainer(config))
    of.start()
    assert of.config.count == made
    assert int(of.labels.max()) < made
    assert [record.getMessage() for record in caplog.records] == [
        f"clusters.count {count}: batches of 24 are drawn from {made} clusters"
    ] * (count > made)


def test_more_clusters_of_an_earlier_version_are_made_anew(clustered: Config) -> None:
    of = sampling(Trainer(clustered))
    of.start()
    state = of.state_dict()
    of.load_state_dict(state | {"labels": torch.arange(len(of.pairs)) % 24, "scores": torch.ones(24)})
    of.refresh(5)
    assert int(of.labels.max()) < 6


def test_a_uniform_epoch_records_pairs_as_negatives_too(clustered: Config) -> None:
    trainer = Trainer(with_loss(with_optim(clustered, batch_size=60), name="sum"))
    of = sampling(trainer)
    items = np.arange(0, 120, 2)
    of.backward(trainer.pairs[items.tolist()].to(trainer.device))
    anchors, _ = of.fresh_gradients(items, items)
    as_negatives = of.sketches[items] - anchors
    assert (as_negatives.norm(dim=1) > 0.1 * anchors.norm(dim=1)).all()
