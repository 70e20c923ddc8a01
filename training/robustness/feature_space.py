"""Certified R@1 beside attacked R@1, both under perturbations of the frozen backbone's features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from training.models.similarity import COSINE
from training.robustness.attacks import apgd
from training.robustness.balls import Ball
from training.robustness.certificates import LinearHead, certified_radii, linear_head
from training.robustness.norms import L1, L2, LINF, Norm
from training.robustness.retrieval_threats import QueryImage
from training.robustness.summary import percent

RADII = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Radii of the table, in multiples of the median certified radius of the clean hits."""
INSIDE = 0.999
RANDOM, OPTIMISED = 10_000, 200
"""Perturbations within :data:`INSIDE` of the certified radii that are tried: the certificate is wrong if one flips."""


def certify(
    model: DualEncoder, features: Tensor, captions: Tensor, own: Tensor, steps: int = 30, seed: int = 0
) -> dict[str, Any]:
    """Certificates of image queries in ℓ∞, ℓ2 and ℓ1, and how attacks on the same features fare.

    Args:
        model: With a linear image head and the cosine; elsewhere the reason is returned in place of figures.
        features: Pooled features ``(Q, F)`` of the queries, see :meth:`Tower.features`.
        captions: Embeddings of all captions ``(G, D)``.
        own: bool ``(Q, G)``; who describes whom.
        steps: Gradient steps of the attack.
        seed: Decides random perturbations.

    Returns:
        For each norm: ``median`` radius of the clean hits, ``table`` of ``{radius, certified, attacked}`` in percent,
        and ``tried`` perturbations inside the certified radii with the number of ``flips`` among them; or ``reason``.
    """
    if model.similarity.name != "cosine":
        return {"reason": "the order similarity is not linear in the embedding"}
    try:
        head = linear_head(model.image_tower)
    except InputError as error:
        return {"reason": str(error)}
    features, captions, own = features.double().cpu(), captions.double().cpu(), own.cpu()
    return {norm.name: _one_norm(head, features, captions, own, norm, steps, seed) for norm in (LINF, L2, L1)}


def _one_norm(
    head: LinearHead, features: Tensor, captions: Tensor, own: Tensor, norm: Norm, steps: int, seed: int
) -> dict[str, Any]:
    radii = certified_radii(head, features, captions, own, norm)
    hits = (radii > 0) & radii.isfinite()
    if not bool(hits.any()):
        return {"median": None, "table": [], "tried": 0, "flips": 0}
    median = float(radii[hits].median())
    threat = threat_on(head, features, captions, own)
    table, start = [], features
    for radius in [share * median for share in RADII]:
        ball = Ball(norm, radius, -torch.inf, torch.inf)
        found = apgd(threat.objective(), features, ball, steps, start=start, least=0, batch_size=256)
        kept = int((threat.ranks(threat.embed(found.points))[:, 0] == 0).sum())
        proven = int((radii > radius).sum())
        shares = {"certified": percent(proven, len(radii)), "attacked": percent(kept, len(radii))}
        table.append({"radius": radius, **shares})
        start = found.points
    tried, flips = search_inside(head, features[hits], captions, own[hits], norm, radii[hits], steps, seed)
    return {"median": median, "table": table, "tried": tried, "flips": flips}


def threat_on(head: LinearHead, features: Tensor, captions: Tensor, own: Tensor) -> QueryImage:
    """``query-image`` with the features themselves, float64 ``(Q, F)``, in the place of pictures."""

    def embed(points: Tensor) -> Tensor:
        return F.normalize(points @ head.weight.T + head.bias, dim=1)

    targets = torch.zeros(len(features), 1, dtype=torch.int64)
    return QueryImage(embed, COSINE, captions, own, targets)


def search_inside(
    head: LinearHead,
    features: Tensor,
    captions: Tensor,
    own: Tensor,
    norm: Norm,
    radii: Tensor,
    steps: int = 30,
    seed: int = 0,
    random: int = RANDOM,
    optimised: int = OPTIMISED,
) -> tuple[int, int]:
    """Look for perturbations that a certificate says do not exist.

    Args:
        head: Of the image tower.
        features: float64 ``(Q, F)``.
        captions: float64 ``(G, D)``.
        own: bool ``(Q, G)``.
        norm: Of the perturbation.
        radii: float64 ``(Q,)``, certified, positive and finite.
        steps: Of the optimised ones.
        seed: Decides the random ones, and where the optimised ones begin.
        random: Random perturbations at the radius, over all queries.
        optimised: Optimised ones.

    Returns:
        How many perturbations were tried, and how many of them lose the query.
    """
    generator = torch.Generator().manual_seed(seed)
    count, flips = len(features), 0
    for start in range(0, random, 500):
        rows = torch.arange(start, min(start + 500, random)) % count
        noise = norm.steepest(torch.randn(len(rows), features.shape[1], generator=generator, dtype=torch.float64))
        noise = noise * (norm.measure(noise).clamp(min=1e-300) ** -1 * INSIDE * radii[rows])[:, None]
        threat = threat_on(head, features[rows], captions, own[rows])
        flips += int((threat.ranks(threat.embed(features[rows] + noise)) > 0).sum())
    for start in range(0, optimised, count):
        rows = torch.arange(start, min(start + count, optimised)) % count
        threat = threat_on(head, features[rows], captions, own[rows])
        ball = Ball(norm, INSIDE * radii[rows], -torch.inf, torch.inf)
        found = apgd(threat.objective(), features[rows], ball, steps, seed=seed + start, least=0, batch_size=256)
        flips += int((threat.ranks(threat.embed(found.points)) > 0).sum())
    return random + optimised, flips
