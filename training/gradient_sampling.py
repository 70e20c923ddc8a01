"""Batches drawn by gradient: keep clusters fresh, measure whether they pay, and step aside if not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.config import ClusterConfig
from training.data.batches import Batch, Pairs
from training.errors import InputError
from training.losses import Loss, LossOutput, NegativePool
from training.models.tower import Tower, evaluating
from training.sampling.clustering import Clusters, Floats, Labels, fit_clusters
from training.sampling.decision import PAYS, Decision, importance_ratio, round_up
from training.sampling.gradient_factors import FactorRecorder, GradientSketch, record_factors
from training.sampling.stratified import ImportanceBatches, StratifiedBatches, WeightedBatches
from training.sampling.variance import SampledGain, sampled_gain

logger = logging.getLogger(__name__)

MEMORY = 0.9  # weight of what is known about a pair's gradient when it passes by again
RECORDED = ("sketches", "memory", "seen", "labels", "scores")
SAMPLE = 2048  # items on which a run decides whether to look at all of them
CHUNK = 1024  # items whose gradients are taken at once
PROBES = 512  # fresh gradients on which a decision rests


class GradientSampling:
    """Decides from what the next epoch's batches are drawn.

    Before training, :meth:`start` looks at pairs' gradients once. While training goes on, :meth:`backward`
    keeps a sketch of each as it passes by, at hardly any cost. After an epoch :meth:`refresh` clusters these
    and asks fresh gradients of a few drawn pairs what the clusters are worth: clusters may be stale, the
    decision is not. During an epoch that is drawn from them :meth:`went_stale` asks again; twice a ratio
    above 1 and the rest of the epoch is uniform.

    In such an epoch a batch is B anchors with weights ``N_k / (N n_k)``, and M negatives drawn uniformly and apart
    from them. Its expected gradient is that of the loss of uniform anchors against M uniform negatives, pool
    included: that is unbiased. What is not: the loss *within* a batch that was not drawn uniformly (its value
    depends on batch-mates, no weights repair that), and anything after gradient clipping or Adam.

    Decisions go by fresh gradients at the anchors, without the part that reaches the weights through their negatives
    and without dropout; no choice of anchors removes the noise of those two. So do the first clusters. Later ones are
    made of what passed by, with dropout: in an epoch drawn by gradient of anchors, in a uniform epoch of all that
    reached the weights through a pair, as an anchor and as a negative of its batch-mates.

    Args:
        model: Holds ``layers``; switched to evaluation for fresh gradients and back.
        layers: One or more layers that :class:`FactorRecorder` takes; only their gradients are looked at.
        embed: A batch → embeddings of both sides, ``(B, D)`` each.
        pairs: The items.
        loss: The training loss.
        kind: ``clustered``, or ``importance`` for independent draws by gradient norm.
        config: Settings; at most half as many clusters as ``batch_size`` are made.
        batch_size: Items per batch.
        seed: Decides clusters and draws.

    Raises:
        InputError: If there is no layer to look at.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        embed: Callable[[Batch], tuple[Tensor, Tensor]],
        pairs: Pairs,
        loss: Loss,
        kind: Literal["clustered", "importance"],
        config: ClusterConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        if not layers:
            raise InputError(
                f"sampler = {kind}: neither tower has a linear map or word embeddings to train; add a head"
            )
        if config.count > batch_size // 2:  # a cluster that is drawn once shows nothing of its variance
            most = batch_size // 2
            logger.warning(
                "clusters.count %d: batches of %d are drawn from %d clusters", config.count, batch_size, most
            )
            config = replace(config, count=most)
        self.model, self.layers, self.embed, self.pairs, self.loss = model, layers, embed, pairs, loss
        self.kind, self.config, self.batch_size, self.seed = kind, config, batch_size, seed
        self.sketch = GradientSketch(config.sketch, seed)
        self.sketches = torch.zeros(len(pairs), config.sketch)  # of each pair's gradient, as last seen
        self.memory = torch.zeros(len(pairs), config.sketch)  # a running mean of these: what clusters are made of
        self.seen = torch.zeros(len(pairs), dtype=torch.long)  # the value of clock when each was seen last
        self.labels = torch.full((len(pairs),), -1)
        self.scores = torch.ones(1)  # what the draws go by beside the labels: deviations of clusters, norms of items
        self.batches: WeightedBatches | None = None  # None: uniform
        self.clock = self.refreshed = 0  # steps, and steps at the last refresh
        self.losing = 0  # checks in a row that found the draws worse than uniform ones
        self.seconds = {"sampling": 0.0, "training": 0.0}  # since the last refresh

    @contextmanager
    def timed(self, what: Literal["sampling", "training"]) -> Iterator[None]:
        """Adds up the time spent inside; ``training`` holds that of ``sampling``."""
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[what] += time.perf_counter() - begin

    @property
    def negatives(self) -> int:
        """Pairs M that are drawn as negatives beside the B anchors of a batch."""
        return min(self.config.pool or self.batch_size, len(self.pairs))

    def draw_negatives(self, *numbers: int) -> Labels:
        """A pool of M items, int64 ``(M,)``, a function of the seed and the numbers."""
        rng = np.random.default_rng((self.seed, *numbers))
        return rng.choice(len(self.pairs), self.negatives, replace=False)

    def epoch(self, epoch: int, start: int) -> Iterator[list[int]] | None:
        """Index lists of B anchors and M negatives, from position ``start`` on; None for a uniform epoch."""
        if self.batches is None:
            return None
        draws = enumerate(self.batches.epoch(epoch, start), start)
        return ([*draw.indices.tolist(), *self.draw_negatives(epoch, at).tolist()] for at, draw in draws)

    def backward(self, batch: Batch) -> LossOutput:
        """Loss and gradient of a training step, keeping a sketch of each pair's gradient.

        That is an anchor's in an epoch drawn by gradient. In a uniform one pairs are also each other's negatives, and
        their part in that is kept with the rest.

        Args:
            batch: B pairs of a uniform shuffle, or B anchors and M negatives of :meth:`epoch`.
        """
        count = len(batch.pairs) if self.batches is None else self.batch_size
        anchors, ids, weights = batch.pairs[:count], batch.image_ids, torch.ones(count)
        with FactorRecorder(self.layers) as recorder:
            images, captions = self.embed(batch)
            if self.batches is None:
                output = self.loss(images, captions, ids)
            else:
                weights = torch.from_numpy(self.batches.weights[anchors.numpy()]).float()
                pool = NegativePool(images[count:], captions[count:], ids[count:])
                own = images[:count], captions[:count], ids[:count]
                output = self.loss.weighted(*own, pool, weights.to(ids.device))
            output.value.backward()  # type: ignore[no-untyped-call]
        with self.timed("sampling"):
            gradients = self.sketch([layer.first(count) for layer in recorder.factors()]).float().cpu()
            gradients *= (count if self.loss.reduction == "mean" else 1) / weights[:, None]
            self.clock += 1
            self.seen[anchors] = self.clock
            self.sketches[anchors] = gradients
            self.memory[anchors] = torch.lerp(self.memory[anchors], gradients, 1 - MEMORY)
        return output

    def fresh_gradients(self, items: Labels, negatives: Labels) -> tuple[Tensor, Tensor]:
        """Sketches ``(n, m)`` of the items' gradients, and their losses ``(n,)``, at the current weights.

        Args:
            items: int64 ``(n,)``.
            negatives: int64 ``(M,)``, what they are compared with.
        """
        batch, others = (
            self.pairs[chosen.tolist()].to(next(self.model.parameters()).device) for chosen in (items, negatives)
        )

        def costs() -> Tensor:
            each = self.loss.pair_costs(*self.embed(batch), batch.image_ids, pool)[0]
            losses.append(each.detach().float().cpu())
            return each

        losses: list[Tensor] = []
        with evaluating(self.model):
            with torch.no_grad():
                pool = NegativePool(*self.embed(others), others.image_ids)
            sketches = self.sketch(record_factors(self.layers, costs)).float().cpu()
        return sketches, losses[0]

    def chunks(self, items: Labels) -> Iterator[Labels]:
        """So many items at a time as fit in memory, with a progress bar."""
        chunks = np.array_split(items, math.ceil(len(items) / CHUNK))
        yield from tqdm(chunks, desc="gradients", unit="batch", delay=2, leave=False, disable=None)

    def gradients(self, items: Labels, negatives: Labels) -> tuple[Tensor, Tensor]:
        """:meth:`fresh_gradients` of any number of items."""
        sketches, losses = zip(*(self.fresh_gradients(chunk, negatives) for chunk in self.chunks(items)), strict=True)
        return torch.cat(sketches), torch.cat(losses)

    def start(self) -> Decision:
        """Record the gradients of all items at the first weights, and decide about the first epoch.

        These tell pairs apart that training will soon have satisfied, whose gradients are all zero from then on. It
        begins with a sample, and where that shows no redundancy, ends with it.
        """
        begin = time.perf_counter()
        count, config = len(self.pairs), self.config
        items, negatives = np.random.default_rng((self.seed, 2)).permutation(count), self.draw_negatives(0)
        first, rest = items[:SAMPLE], items[SAMPLE:]
        sample, _ = self.gradients(first, negatives)
        fitted = fit_clusters(sample.numpy(), config.count, config.allocation, seed=self.seed)
        length = float(torch.linalg.vector_norm(sample, dim=1).mean())
        clustered = self.kind == "clustered"
        ratio = fitted.variance_ratio(config.allocation) if clustered else importance_ratio(fitted, length)
        if ratio * (1 + self.negatives / self.batch_size) >= PAYS:
            gain = SampledGain(ratio * fitted.total_scatter / len(first), fitted.total_scatter / len(first))
            return self._decide(fitted, fitted, length, gain, 1.0, time.perf_counter() - begin)
        self.sketches[first] = sample
        if len(rest):
            self.sketches[rest], _ = self.gradients(rest, negatives)
        self.memory.copy_(self.sketches)
        return self.refresh(0)

    def refresh(self, step: int) -> Decision:
        """Cluster what was recorded, and decide about the epoch that begins with ``step``."""
        begin = time.perf_counter()
        again = int(self.labels.min()) >= 0 and int(self.labels.max()) < self.config.count
        fitted = fit_clusters(
            self.memory.numpy(),
            self.config.count,
            self.config.allocation,
            init=self.labels.numpy() if again else "random",
            max_sweeps=1 if again else 20,
            seed=self.seed,
        )
        clusters, length = self._recent(fitted.labels)
        self.labels = torch.from_numpy(clusters.labels)
        # Duplicates were seen at different times, so some of their scatter is staleness. It shows lately or in the
        # long run, rarely in both; that of pairs which really differ shows in both.
        deviations = np.minimum(*(_shares(of) for of in (fitted, clusters)))
        lengths = torch.linalg.vector_norm(self.sketches, dim=1).double()
        self.scores = lengths if self.kind == "importance" else torch.from_numpy(deviations)
        batches = self._plan()
        gain, effective = self._probe(batches, step, PROBES)
        decision = self._decide(fitted, clusters, length, gain, effective, time.perf_counter() - begin)
        self.refreshed, self.losing, self.seconds = self.clock, 0, dict.fromkeys(self.seconds, 0.0)
        self.batches = batches if decision.go else None
        return decision

    def _decide(
        self, fitted: Clusters, clusters: Clusters, length: float, gain: SampledGain, effective: float, seconds: float
    ) -> Decision:
        pool = self.negatives / self.batch_size  # negatives cost what anchors do
        training = (self.seconds["training"] - self.seconds["sampling"]) / (1 if self.batches is None else 1 + pool)
        overhead = round_up(pool + (self.seconds["sampling"] + seconds) / training if training > 0 else pool)
        return Decision(
            clusters=len(clusters.sizes),
            largest=int(clusters.sizes.max()),
            smallest=int(clusters.sizes.min()),
            moved=sum(fitted.moved),
            explained=clusters.explained,
            equal=clusters.variance_ratio("equal"),
            proportional=clusters.variance_ratio("proportional"),
            neyman=clusters.variance_ratio("neyman"),
            importance=importance_ratio(clusters, length),
            measured=gain.ratio,
            scatter=gain.uniform,
            effective=effective,
            refresh_seconds=seconds,
            overhead=overhead,
            go=gain.ratio * (1 + overhead) < PAYS,
        )

    def _recent(self, labels: Labels) -> tuple[Clusters, float]:
        """Clusters with the statistics of what was seen in the last half epoch, scaled to all; mean length ``|g|``.

        What was seen earlier has changed since.
        """
        seen = self.seen.numpy() >= (self.refreshed + self.clock) / 2
        seen |= ~np.isin(labels, labels[seen])
        sketches, sizes = self.sketches.numpy()[seen], np.bincount(labels).astype(np.float64)
        recent = Clusters.of(sketches, labels[seen])
        scale = sizes / recent.sizes
        lengths = np.bincount(labels[seen], weights=np.linalg.norm(sketches, axis=1))
        clusters = Clusters(labels, sizes, recent.sums * scale[:, None], recent.squares * scale, recent.mean)
        return clusters, float(lengths @ scale / len(labels))

    def _plan(self) -> WeightedBatches:
        """What the next epoch draws from, if it pays."""
        mix, batch_size, scores = self.config.mix, self.batch_size, self.scores.numpy()
        if self.kind == "importance":
            return ImportanceBatches(scores, batch_size, mix, self.seed)
        return StratifiedBatches(self.labels.numpy(), batch_size, self.config.allocation, scores, mix, self.seed)

    def _probe(self, batches: WeightedBatches, step: int, count: int) -> tuple[SampledGain, float]:
        """Gain on fresh gradients of drawn items, and the effective sample size of their weights."""
        draws = batches.epoch(step + 1)  # at this step, training is in an epoch of a lower number
        chosen = [next(draws) for _ in range(min(len(batches), math.ceil(count / self.batch_size)))]
        items, weights, strata = (
            np.concatenate([getattr(draw, name) for draw in chosen]) for name in ("indices", "weights", "strata")
        )
        gradients, _ = self.fresh_gradients(items, self.draw_negatives(step + 1, 0))
        effective = float(weights.sum() ** 2 / (len(weights) * np.square(weights).sum()))
        return sampled_gain(gradients.numpy(), weights, strata, batches.expected, len(chosen)), effective

    def went_stale(self, step: int) -> bool:
        """The freshness guard, after every step: True where the rest of an epoch drawn by gradient turns uniform.

        After each quarter of the epoch it asks fresh gradients of a few drawn pairs again; draws that are
        worse than uniform ones twice in a row are given up.
        """
        if self.batches is None or step % max(1, len(self.batches) // 4):
            return False
        with self.timed("sampling"):
            gain, _ = self._probe(self.batches, step, PROBES // 2)
        self.losing = self.losing + 1 if gain.ratio > 1 else 0
        if self.losing > 1:
            self.batches = None
        return self.batches is None

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`load_state_dict` needs to go on as if nothing had happened."""
        flags = [self.batches is not None, self.losing, self.clock, self.refreshed, *self.seconds.values()]
        return {
            **{name: getattr(self, name) for name in RECORDED},
            "flags": torch.tensor(flags, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in RECORDED:
            setattr(self, name, state[name])
        drawing, *counts, sampling, training = state["flags"].tolist()
        self.losing, self.clock, self.refreshed = map(int, counts)
        self.seconds = {"sampling": sampling, "training": training}
        if drawing:
            self.batches = self._plan()


def _shares(clusters: Clusters) -> Floats:
    """Deviation of each cluster over the mean one of all items; 1 where there is none."""
    deviations = np.sqrt(clusters.scatter / clusters.sizes)
    mean = float(clusters.sizes @ deviations / clusters.sizes.sum())
    return deviations / mean if mean > 0 else np.ones_like(deviations)


def factored_layers(*towers: Tower) -> list[nn.Module]:
    """What is looked at in each tower: the last linear map of its head, else its trained word embeddings.

    The recurrent weights between a word embedding and a head have no factors here.
    """
    layers: list[nn.Module] = []
    for tower in towers:
        linear = [module for module in tower.head.modules() if isinstance(module, nn.Linear)]
        words = [
            module
            for module in tower.backbone.modules()
            if isinstance(module, nn.Embedding) and module.weight.requires_grad
        ]
        layers += linear[-1:] or words[:1]
    return layers
