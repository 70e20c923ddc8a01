"""The training loop: corpus in, run directory out."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from training.adversarial import AdversarialTraining
from training.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from training.config import Config, LossConfig, check_ranges, to_toml
from training.data.batches import Batch, Pairs, ShuffledBatches, load_epoch
from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.data.text import VOCABULARY_FILE, HubTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from training.errors import InputError
from training.evaluation.protocols import evaluate
from training.files import current_files, file_sha256, recover, replacing_files, write_text
from training.gradient_sampling import GradientSampling, factored_layers
from training.losses import CollapseDetector, Curriculum, InfoNCE, Loss, SigmoidLoss, SumOfHinges
from training.model_card import model_card
from training.models.dual_encoder import WEIGHTS_FILE, DualEncoder
from training.models.features import corpus_encoder, corpus_inputs
from training.models.hub import locate
from training.models.similarity import Similarity
from training.models.tower import default_device
from training.optimizer import build_optimizer, set_learning_rate
from training.provenance import provenance, saved_provenance
from training.run_log import RunLog
from training.sampling.decision import Decision
from training.sampling.stratified import ImportanceBatches

logger = logging.getLogger(__name__)

CONFIG_FILE, STATE_FILE = "config.toml", "state/last.safetensors"


def build_tokenizer(config: Config, corpus: Corpus) -> Tokenizer:
    """A vocabulary fitted on ``corpus``, the training split, or the text encoder's own tokenizer."""
    text = config.model.text
    if text.encoder.startswith("hf:"):
        return HubTokenizer.load(locate(text.encoder[3:]), text.max_tokens)
    return WordTokenizer.fit(corpus.captions, text.min_count, text.max_tokens)


def build_loss(config: LossConfig, similarity: Similarity, steps_per_epoch: int) -> Loss:
    """The loss that the configuration names. ``max`` is a curriculum that is over when training begins."""
    if config.name in ("curriculum", "max"):
        warmup = max(1, round(config.warmup_epochs * steps_per_epoch))
        start = -warmup if config.name == "max" else 0
        return Curriculum(warmup, similarity, config.margin, config.reduction, start=start)
    if config.name == "sum":
        return SumOfHinges(similarity, config.margin, config.reduction)
    kind = InfoNCE if config.name == "infonce" else SigmoidLoss
    return kind(similarity, temperature=config.temperature)


class Trainer:
    """One training run.

    Everything random follows from ``config.seed`` and the position in the run, so that a run that was
    killed and resumed ends with the weights of one that was not.

    Args:
        config: The resolved configuration; ``data`` and ``out`` must be set.
        resume: Continue from the state saved in ``config.out``.

    Raises:
        InputError: For unusable data or settings, or a run directory that holds another run.
    """

    def __init__(self, config: Config, resume: bool = False) -> None:
        self.config = config
        self.out = Path(config.out)
        check_ranges(config)
        if not resume and any((self.out / name).exists() for name in (STATE_FILE, WEIGHTS_FILE)):
            raise InputError(f"{self.out}: holds a run already; add --resume or choose another --out")
        saved = saved_provenance(self.out / STATE_FILE, config) if resume else {}
        self.train_corpus = load_corpus(config.data, config.train_split)
        self.val_corpus = load_corpus(config.data, config.val_split)
        if len(self.train_corpus.image_ids) < 2:
            raise InputError(f"{config.data} [{config.train_split}]: one image has no negatives; add images")
        data = {"train": self.train_corpus, "val": self.val_corpus}
        self._provenance: dict[str, Any] = {n: provenance(corpus, saved.get(n)) for n, corpus in data.items()}
        torch.manual_seed(config.seed)
        torch.backends.cudnn.deterministic = True  # else a resumed run differs in the last bits
        self.device = default_device()
        self.model, initial = self._build_model(saved, resume)
        images, self._images_cached = corpus_inputs(self.model, self.train_corpus, "image", config.augment)
        texts, self._texts_cached = corpus_inputs(self.model, self.train_corpus, "text")
        self._provenance["token_ids"] = texts.fingerprint
        if saved and saved["token_ids"] != texts.fingerprint:
            raise InputError(f"{self.out}: captions get other token ids than before; restore the run's own tokenizer")
        self._encode_validation = corpus_encoder(self.model, self.val_corpus)
        self.pairs = Pairs(images, texts, self.train_corpus.owner, config.seed)
        self.batches = ShuffledBatches(len(self.pairs), config.optim.batch_size, config.seed)
        self.total_steps = config.optim.epochs * len(self.batches)

        self.loss = build_loss(config.loss, self.model.similarity, len(self.batches)).to(self.device)
        self.detector = CollapseDetector(config.loss.margin)
        self.optimizer = build_optimizer(config.optim, self.model, self.loss)
        self.sampling = None if config.sampler == "uniform" else self.gradient_sampling(config.sampler)
        self.adversarial = self._adversarial_training(initial)
        weights, self._by_weight = self.train_corpus.weights, None
        if weights is not None:  # pairs come as often as the duplicates that they stand for would
            self._by_weight = ImportanceBatches(weights, config.optim.batch_size, mix=0.0, seed=config.seed)
            if self.sampling is not None:
                raise InputError(f"{config.data}: its pairs are drawn by their weights; leave out --sampler")
        self.step = 0
        self.best: dict[str, Any] | None = None
        self._weights: str | None = None
        self.validations_since_best = 0
        self.seconds = 0.0
        self._started = time.monotonic()
        for folder in (self.out, (self.out / STATE_FILE).parent):
            recover(folder)
        self._log = RunLog(self.out, config.tensorboard)
        if resume:
            self._restore()
        write_text(self.out / CONFIG_FILE, to_toml(config))
        if not resume:
            with replacing_files(self.out) as complete:
                self.model.tokenizer.save(complete)
            self._save()  # from here on a killed run can be resumed

    def _build_model(self, saved: dict[str, Any], resume: bool) -> tuple[DualEncoder, DualEncoder | None]:
        """The model, of which a resumed run knows all but the weights of frozen backbones, and that of ``init``."""
        config, text = self.config, self.config.model.text
        files = current_files(self.out)
        own = bool(saved) or (resume and (files / VOCABULARY_FILE).exists())
        initial = None
        if config.init and (not own or config.adversarial.method == "fare"):
            initial = DualEncoder.from_pretrained(config.init)
            self._provenance["init"] = initial.fingerprint()
            if saved and saved["init"] != self._provenance["init"]:
                raise InputError(f"{config.init}: other weights than when the run was started; restore them")
        if own:
            tokenizer = load_tokenizer(files, text.encoder, text.max_tokens)
        else:
            tokenizer = initial.tokenizer if initial else build_tokenizer(config, self.train_corpus)
            logger.info(tokenizer.check(self.train_corpus.captions))
        known = saved.get("architectures")
        settings = _with_feature_dim(config, self.train_corpus).model
        model = DualEncoder(settings, tokenizer, pretrained=known is None, architectures=known).to(self.device)
        if saved:
            model.check_frozen(saved["frozen"], str(self.out / STATE_FILE))
        if initial and not own:
            model.take_weights(initial, config.init)
        self._provenance |= {"frozen": model.frozen, "architectures": model.architectures}
        return model, initial

    def fit(self, epochs: int | None = None) -> dict[str, Any]:
        """Train to the end, or to the point where patience runs out.

        Args:
            epochs: Stop after this epoch; another call goes on from there.

        Returns:
            The best validation metrics in the form of ``vse evaluate --json``; the weights that reached them
            are in ``model.safetensors``.

        Raises:
            InputError: If the loss or a gradient stops being finite; names the batch.
        """
        config = self.config
        end = self.total_steps if epochs is None else min(self.total_steps, epochs * len(self.batches))
        if self.sampling is not None and self.step == 0:
            self._report(self.sampling.start())
        while self.step < end and not self._out_of_patience():
            epoch, position = divmod(self.step, len(self.batches))
            loader = load_epoch(self.pairs, epoch, self._order(epoch, position), config.workers)
            bar = tqdm(
                total=len(self.pairs),
                initial=position * config.optim.batch_size,
                desc=f"epoch {epoch + 1}/{config.optim.epochs}",
                unit="pair",
                leave=False,
                disable=None,
            )
            self.model.train()
            with bar:
                for batch in loader:
                    with self.sampling.timed("training") if self.sampling is not None else nullcontext():
                        logged = self._train_step(batch)
                    bar.update(min(len(batch.pairs), config.optim.batch_size))  # without separate negatives
                    bar.set_postfix_str(f"loss {logged['loss']:.3f}", refresh=False)
                    self.step += 1
                    ends_epoch = self.step % len(self.batches) == 0
                    stale = self._update_sampling(ends_epoch)
                    if ends_epoch or (config.validate_every and self.step % config.validate_every == 0):
                        self._validate(logged)
                        self._save()
                        if self._out_of_patience():
                            break
                    elif self.step % config.checkpoint_every == 0:
                        self._save()
                    if stale:
                        break
        self._log.close()
        assert self.best is not None, "every epoch ends with a validation"
        return self.best

    def _train_step(self, batch: Batch) -> dict[str, float]:
        config = self.config.optim
        batch = batch.to(self.device)
        set_learning_rate(self.optimizer, config, self.step, len(self.batches))
        self.loss.advance(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        if self.sampling is not None:
            value, statistics = self.sampling.backward(batch)
        else:
            if self.adversarial is not None:
                value, statistics = self.adversarial(batch, self.step)
            else:
                value, statistics = self.loss(*self._embed(batch), batch.image_ids)
            value.backward()  # type: ignore[no-untyped-call]
        limit = config.clip or math.inf
        norm = clip_grad_norm_((p for g in self.optimizer.param_groups for p in g["params"]), limit)
        numbers = torch.stack([value.detach(), norm]).tolist()
        if not all(map(math.isfinite, numbers)):
            self._stop_on_nan(batch, *numbers)
        self.optimizer.step()
        logged = {"loss": numbers[0], "gradient_norm": numbers[1], **statistics.floats()}
        message = self.detector.observe(logged["positive"], logged["hardest"], logged["spread"])
        if message:
            tqdm.write(f"step {self.step}: {message}")
            if self.config.loss.on_collapse == "fall_back" and isinstance(self.loss, Curriculum):
                self.loss.fall_back()
        if self.step % 50 == 0:
            self._record("train", {**logged, "lr": self.optimizer.param_groups[0]["lr"]})
        return logged

    def _order(self, epoch: int, position: int) -> Iterator[list[int]]:
        """Index lists of the epoch's batches from ``position`` on."""
        if self._by_weight is not None:
            return (draw.indices.tolist() for draw in self._by_weight.epoch(epoch, position))
        drawn = self.sampling.epoch(epoch, position) if self.sampling is not None else None
        return drawn or self.batches.epoch(epoch, position)

    def gradient_sampling(self, kind: Literal["clustered", "importance"]) -> GradientSampling:
        """Draws by gradient over this run's pairs, model and loss."""
        layers = factored_layers(self.model.image_tower, self.model.text_tower)
        settings = kind, self.config.clusters, self.config.optim.batch_size, self.config.seed
        return GradientSampling(self.model, layers, self._embed, self.pairs, self.loss, *settings)

    def _report(self, decision: Decision) -> None:
        tqdm.write(str(decision))
        self._record("sampler", asdict(decision))

    def _update_sampling(self, ends_epoch: bool) -> bool:
        """A decision after each epoch; within it, whether the batches that are left must be other ones."""
        if self.sampling is None:
            return False
        if ends_epoch:
            self._report(self.sampling.refresh(self.step))
            return False
        stale = self.sampling.went_stale(self.step)
        if stale:
            tqdm.write(f"step {self.step}: draws by gradient are stale; uniform batches up to the end of the epoch")
        return stale

    def _adversarial_training(self, initial: DualEncoder | None) -> AdversarialTraining | None:
        config = self.config.adversarial
        if config.method == "none":
            return None
        if self.sampling is not None:
            raise InputError("adversarial training draws uniform batches; leave out --sampler")
        anchors = None
        if config.method == "fare":
            if initial is None:
                raise InputError("adversarial.method fare needs a model to stay close to; add --init RUN")
            images, cached = corpus_inputs(initial, self.train_corpus, "image")
            anchors = initial.encode("image", images, project=cached)
        return AdversarialTraining(config, self.model, self.loss, self._embed_texts, anchors, self.config.seed)

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image_tower = self.model.image_tower
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.precision == "bf16"):
            images = (image_tower.project if self._images_cached else image_tower)(*batch.images)
        return images, self._embed_texts(batch)

    def _embed_texts(self, batch: Batch) -> Tensor:
        text_tower = self.model.text_tower
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.precision == "bf16"):
            texts: Tensor = (text_tower.project if self._texts_cached else text_tower)(*batch.texts)
        return texts

    def _validate(self, logged: dict[str, float]) -> None:
        images, captions = self._encode_validation()
        metrics = evaluate(images, captions, self.val_corpus.owner, self.model.similarity.scores)
        record = metrics.to_json(self.config.data, self.config.val_split)
        # Clean recall would prefer the weights that adversarial training has changed least.
        latest = self.adversarial is not None
        better = latest or self.best is None or metrics.rsum > self.best["rsum"]
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        self._record("validation", record)
        tqdm.write(
            f"epoch {self.step / len(self.batches):5.2f}  loss {logged['loss']:8.3f}  "
            f"i2t R@1 {metrics.i2t.r1:5.1f}  t2i R@1 {metrics.t2i.r1:5.1f}  rSum {metrics.rsum:6.1f}"
            + (" *" if better else "")
        )
        if better:
            self.best = record
            card = model_card(self.config, record, self.step, self._elapsed(), len(self.train_corpus))
            self.model.save_pretrained(self.out, card)  # on disk before the state that calls it the best
            self._weights = file_sha256(self.out / WEIGHTS_FILE)
        self.model.train()

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.validations_since_best

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def _record(self, kind: str, record: dict[str, Any]) -> None:
        self._log.write(self.step, self._elapsed(), {"kind": kind, **record})

    def _save(self) -> None:
        tensors = {
            "model": self.model.trained_state(),
            "loss": self.loss.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
            "sampling": self.sampling.state_dict() if self.sampling is not None else {},
        }
        record = {
            "config": asdict(self.config),
            "provenance": self._provenance,
            "step": self.step,
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "detector": self.detector.state_dict(),
            "weights": self._weights,
            "metrics_bytes": self._log.sync(),
            "seconds": self._elapsed(),
        }
        save_state(self.out / STATE_FILE, tensors, record)

    def _restore(self) -> None:
        path = self.out / STATE_FILE
        tensors, record = load_state(path)
        if record["step"] > self.total_steps:
            epochs = record["step"] / len(self.batches)
            raise InputError(f"{path}: {epochs:.2f} epochs are done already; raise optim.epochs")
        self.model.load_trained_state(tensors["model"], str(path))
        self.loss.load_state_dict(tensors.get("loss", {}))
        restore_optimizer(self.optimizer, tensors.get("optimizer", {}))
        if self.sampling is not None:
            self.sampling.load_state_dict(tensors["sampling"])
        self.detector.load_state_dict(record["detector"])
        self.step, self.best = record["step"], record["best"]
        self.validations_since_best = record["validations_since_best"]
        self.seconds = record["seconds"]
        self._log.cut(record["metrics_bytes"])
        self._weights = record.get("weights")
        if self._weights not in (None, file_sha256(self.out / WEIGHTS_FILE)):
            self._forget_best()

    def _forget_best(self) -> None:
        """The weights beside the state are not those that it calls the best; the next validation writes them anew."""
        if self.step >= self.total_steps or self._out_of_patience():
            raise InputError(f"{self.out / WEIGHTS_FILE}: not the weights that the run wrote; restore the file")
        self.best = None

    def _stop_on_nan(self, batch: Batch, value: float, norm: float) -> None:
        captions = [self.train_corpus.caption_ids[i] for i in batch.pairs]
        images = [self.train_corpus.image_ids[i] for i in batch.image_ids.tolist()]
        file = self.out / "nan_batch.json"
        record = {"step": self.step, "loss": str(value), "gradient_norm": str(norm)}
        write_text(file, json.dumps({**record, "images": images, "captions": captions}, indent=1))
        raise InputError(
            f"{self.out}: step {self.step}: loss {value}, gradient norm {norm}; the batch (image {images[0]}, "
            f"caption {captions[0]}, …) is listed in {file}; check it or lower optim.lr"
        )


def _with_feature_dim(config: Config, corpus: Corpus) -> Config:
    """Take the width of precomputed features from the data where the configuration leaves it open."""
    image = config.model.image
    if image.encoder != "precomputed" or image.feature_dim or corpus.features is None:
        return config
    image = replace(image, feature_dim=int(corpus.features.shape[-1]))
    return replace(config, model=replace(config.model, image=image))
