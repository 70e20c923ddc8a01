"""What each sampler's batches would do to the variance of the gradient, measured along a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import Config
from training.models.tower import evaluating
from training.sampling.clustering import Allocation, Clusters, Floats, Labels, fit_clusters
from training.sampling.gradient_factors import record_factors
from training.sampling.redundancy import duplicate_groups
from training.sampling.stratified import ImportanceBatches, StratifiedBatches, WeightedBatches
from training.sampling.variance import Bias, GradientVariance, VarianceReport, batch_variance, gradient_bias
from training.trainer import Trainer

SWEEPS = 20  # of a clustering; a refresh in training, which begins with the last labels, makes fewer
SKETCH = 256  # numbers that stand for a gradient: more than in training, for here they are the measurement


@dataclass(frozen=True)
class Measured:
    """One sampler at given weights.

    Attributes:
        ratio: Variance of its mini-batch gradient over that of uniform batches, from the gradients of all pairs.
        report: The same variance from a number of drawn batches. Where few pairs have most of the gradient it is
            noisy, and so is its interval.
        bias: Of its mean gradient against that of all pairs.
    """

    ratio: float
    report: VarianceReport
    bias: Bias


@dataclass(frozen=True)
class Point:
    """All samplers after a number of epochs.

    Attributes:
        epoch: 0 is before training.
        samplers: By name; ``uniform`` first.
    """

    epoch: int
    samplers: dict[str, Measured]


@dataclass(frozen=True)
class Redundancy:
    """Which training pairs are alike to the untrained model.

    Compared are the gradients of each pair's own similarity, which no negatives disturb, by their direction in
    each layer: one layer's gradient may be too short to tell in the sum.

    Attributes:
        clusters: Of all pairs.
        groups: Pairs with nearly the same direction in each layer, indices into the captions; largest group first.
    """

    clusters: Clusters
    groups: list[Labels]


class GradientStudy:
    """Replays a run with uniform batches and measures other samplers on the way, all at the same weights.

    The gradient is that of the pairs' losses against a fixed pool of negatives with respect to the layers
    that samplers look at, sketched, without dropout, whose noise no choice of pairs removes. Clusters and scores are
    fresh at each point; how they age shows in the log of a run that trains with them.

    Args:
        config: The run's configuration, with ``data``.
        draws: Batches per sampler and point.
    """

    def __init__(self, config: Config, draws: int = 200) -> None:
        self.config, self.draws = config, draws
        self._directory = TemporaryDirectory()  # removed with this object
        out = str(Path(self._directory.name) / "run")
        clusters = replace(config.clusters, sketch=SKETCH)
        settings = replace(config, out=out, clusters=clusters, sampler="uniform", patience=0, tensorboard=False)
        self.trainer = Trainer(settings)
        self.sampling = self.trainer.gradient_sampling("clustered")
        self._everything = np.arange(len(self.trainer.pairs))

    def redundancy(self, tolerance: float = 1e-3) -> Redundancy:
        """See the class :class:`Redundancy`. To be asked for before :meth:`points`.

        Args:
            tolerance: Largest relative distance of a copy: 0.001 finds what is the same to an untrained model, 0.02
                also what looks alike to it.
        """
        with evaluating(self.trainer.model):
            sketches = torch.cat([self._directions(items) for items in self.sampling.chunks(self._everything)]).numpy()
        clusters = fit_clusters(sketches, self.config.clusters.count, seed=self.config.seed)
        return Redundancy(clusters, duplicate_groups(sketches, tolerance))

    def _directions(self, items: Labels) -> Tensor:
        """Directions of the gradients of the items' own similarities, one layer's beside the other's."""
        of = self.sampling
        batch = self.trainer.pairs[items.tolist()].to(self.trainer.device)
        layers = record_factors(of.layers, lambda: of.loss.similarity.pairs(*of.embed(batch)))
        return torch.cat([F.normalize(of.sketch([layer]), dim=1) for layer in layers], dim=1).float().cpu()

    def points(self, epochs: int) -> Iterator[Point]:
        """Measure before training and after each of ``epochs`` epochs."""
        yield self.measure(0)
        for epoch in range(1, epochs + 1):
            self.trainer.fit(epochs=epoch)
            yield self.measure(epoch)

    def measure(self, epoch: int) -> Point:
        """Measure every sampler at the current weights."""
        sketches, losses = self.sampling.gradients(self._everything, self.sampling.draw_negatives(epoch))
        exact, rows, uniform = sketches.double().mean(dim=0), sketches.numpy(), 0.0
        measured: dict[str, Measured] = {}
        for name, batches in self.samplers(rows, losses.double().numpy()).items():
            draws = [next(batches.epoch(number)) for number in range(self.draws)]
            collected = GradientVariance(batches.batch_size)
            gradients = [(torch.from_numpy(d.weights) @ sketches[d.indices].double()) / len(d.indices) for d in draws]
            for gradient in gradients:
                collected.add([gradient])
            report = collected.report(seed=self.config.seed)
            bias = gradient_bias(iter(gradients).__next__, lambda: exact, len(draws))
            variance = batch_variance(rows, batches.weights, batches.strata, batches.expected)
            uniform = uniform if measured else variance
            measured[name] = Measured(variance / uniform if uniform > 0 else 1.0, report, bias)
        return Point(epoch, measured)

    def samplers(self, sketches: Floats, losses: Floats) -> dict[str, WeightedBatches]:
        """All samplers that are compared, from fresh gradients ``(N, m)`` and losses ``(N,)``."""
        config, size, seed = self.sampling.config, self.sampling.batch_size, self.config.seed
        lengths = np.linalg.norm(sketches, axis=1).astype(np.float64)
        one = np.zeros(len(sketches), dtype=np.int64)
        samplers: dict[str, WeightedBatches] = {
            "uniform": StratifiedBatches(one, size, seed=seed),
            "doubled batch": StratifiedBatches(one, 2 * size, seed=seed),
            "importance by loss": ImportanceBatches(losses, size, config.mix, seed),
            "importance by gradient": ImportanceBatches(lengths, size, config.mix, seed),
        }
        for allocation in get_args(Allocation):
            clusters = fit_clusters(sketches, config.count, allocation, max_sweeps=SWEEPS, seed=seed)
            deviations = np.sqrt(clusters.scatter / clusters.sizes)
            batches = StratifiedBatches(clusters.labels, size, allocation, deviations, config.mix, seed)
            samplers[f"clustered, {allocation}"] = batches
        return samplers
