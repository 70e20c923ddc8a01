"""Certificates against double loops, against attacks that try to break them, and against the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.padded import Padded
from training.errors import InputError
from training.evaluation.ranks import retrieval_ranks
from training.models.config import TowerConfig
from training.models.tower import Backbone, Tower
from training.robustness import certificates
from training.robustness.certificates import LinearHead, certified_radii, certified_recall, certify, linear_head
from training.robustness.certificates import critical_perturbation as critical_of
from training.robustness.norms import L1, L2, LINF, Norm

NORMS = pytest.mark.parametrize("norm", [L1, L2, LINF], ids=lambda norm: norm.name)
DUALS = {"l1": float("inf"), "l2": 2.0, "linf": 1.0}


class Case(NamedTuple):
    head: LinearHead
    features: Tensor
    gallery: Tensor
    own: Tensor

    def kept(self, features: Tensor, query: int, k: int) -> Tensor:
        """Bool ``(B,)``: whether one of the query's own items is in the top k, ties pessimistic."""
        embeddings = F.normalize(features @ self.head.weight.T + self.head.bias, dim=-1)
        scores = embeddings @ self.gallery.T
        best = scores[:, self.own[query]].amax(dim=1, keepdim=True)
        return (scores[:, ~self.own[query]] >= best).sum(dim=1) < k


def a_case(seed: int = 0, queries: int = 12, owned: int = 1, rest: int = 20, width: int = 24, dim: int = 8) -> Case:
    """A head that retrieves most queries, its gallery ordered at random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head, features = LinearHead(normal(dim, width), normal(dim)), normal(queries, width)
    near = F.normalize(features @ head.weight.T + head.bias, dim=1).repeat_interleave(owned, 0)
    near = near + 0.1 * normal(queries * owned, dim)
    owner = torch.cat([torch.arange(queries).repeat_interleave(owned), torch.full((rest,), -1)])
    order = torch.randperm(len(owner), generator=generator)
    gallery = F.normalize(torch.cat([near, normal(rest, dim)]), dim=1)[order]
    return Case(head, features, gallery, owner[order] == torch.arange(queries)[:, None])


def brute_force(case: Case, norm: Norm, k: int) -> Tensor:
    """Spec in a double loop over pairs, without bounds on rounding."""
    radii = []
    for feature, own in zip(case.features, case.own, strict=True):
        embedding = case.head.weight @ feature + case.head.bias
        best = 0.0
        for p in torch.nonzero(own).flatten():
            distances = []
            for j in torch.nonzero(~own).flatten():
                difference = case.gallery[p] - case.gallery[j]
                margin = float(difference @ embedding)
                rate = float(torch.linalg.vector_norm(case.head.weight.T @ difference, DUALS[norm.name]))
                distances.append(margin / rate if rate and margin > 0 else float("inf") if margin > 0 else 0.0)
            best = max(best, sorted(distances)[k - 1] if len(distances) >= k else float("inf"))
        radii.append(best)
    return torch.tensor(radii, dtype=torch.float64)


def optimised(case: Case, query: int, norm: Norm, radius: float, k: int, count: int, seed: int) -> Tensor:
    """Perturbations ``(count, F)`` of at most the radius, by ascent on a rival's score over the best own one.

    Every other one goes for a rival of its own: towards the k-th best alone, all might run into one dead end.
    """
    aims = (torch.arange(count) // 2 % int((~case.own[query]).sum()))[:, None]
    start = torch.randn(count, case.features.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    delta = norm.project(radius * start, radius)
    for step in range(40):
        delta.requires_grad_()
        scores = ((case.features[query] + delta) @ case.head.weight.T + case.head.bias) @ case.gallery.T
        foreign = scores[:, ~case.own[query]]
        rival = foreign.gather(1, aims)[:, 0]
        rival[::2] = foreign[::2].topk(k, dim=1).values[:, -1]
        (gradient,) = torch.autograd.grad((rival - scores[:, case.own[query]].amax(dim=1)).sum(), delta)
        delta = norm.project((delta + radius / (1 + step) * norm.steepest(gradient)).detach(), radius)
    return delta


@NORMS
@pytest.mark.parametrize(("owned", "k"), [(1, 1), (1, 3), (4, 1), (4, 5), (1, 31), (1, 32)])
def test_a_double_loop_finds_the_same(norm: Norm, owned: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "BLOCK_RIVALS", 2)
    monkeypatch.setattr(certificates, "BLOCK_QUERIES", 5)
    case = a_case(k, queries=12 if owned == 1 else 6, owned=owned)
    found, direct = certified_radii(*case, norm, k), brute_force(case, norm, k)
    assert found.dtype == torch.float64
    assert (found <= direct).all()
    torch.testing.assert_close(found, direct, rtol=1e-9, atol=0)
    assert int((found > 0).sum()) >= 5
    assert bool(torch.isinf(found).all()) == (k == 32)  # there are only 31 foreign items


@NORMS
def test_most_pairs_are_never_formed(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "BLOCK_RIVALS", 8)
    formed, rates = [], certificates._Pairs.rates

    def counting(pairs: Any, item: int, rivals: Tensor) -> Tensor:
        formed.append(len(rivals))
        return rates(pairs, item, rivals)

    monkeypatch.setattr(certificates._Pairs, "rates", counting)
    case = a_case(rest=1000)
    torch.testing.assert_close(certified_radii(*case, norm), brute_force(case, norm, 1), rtol=1e-9, atol=0)
    assert sum(formed) < 0.2 * 12 * 1011


@NORMS
def test_the_radius_is_exact_for_one_own_item(norm: Norm) -> None:
    case = a_case(rest=188)
    certificate = certify(*case, norm)
    critical = critical_of(case.head, case.gallery, certificate, norm)
    torch.testing.assert_close(norm.measure(critical), certificate.radii)
    retrieved = torch.nonzero(certificate.radii).flatten().tolist()
    assert len(retrieved) >= 6
    for query in retrieved:
        scale = torch.tensor([[0.0], [0.5], [0.999], [1.001]], dtype=torch.float64)
        kept = case.kept(case.features[query] + scale * critical[query], query, k=1)
        assert kept.tolist() == [True, True, True, False]


@NORMS
@pytest.mark.parametrize(("owned", "k"), [(1, 1), (5, 1), (1, 3), (5, 3)])
def test_nothing_inside_the_radius_breaks_a_certificate(norm: Norm, owned: int, k: int) -> None:
    case = a_case(seed=1, queries=4, owned=owned)
    certificate = certify(*case, norm, k)
    critical = critical_of(case.head, case.gallery, certificate, norm)
    broken = 0
    for query in torch.nonzero(certificate.radii).flatten().tolist():
        radius = float(certificate.radii[query])
        inside = 0.9999 * radius
        directions = torch.randn(10_000, 24, generator=torch.Generator().manual_seed(query)).double()
        on_sphere = directions * (inside / norm.measure(directions))[:, None]
        attacked = optimised(case, query, norm, inside, k, 200, query)
        assert norm.measure(attacked).max() <= inside * (1 + 1e-6)
        for delta in (on_sphere, attacked, 0.9999 * critical[query : query + 1]):
            assert case.kept(case.features[query] + delta, query, k).all()
        # The attack is one that finds what there is: with one own item it succeeds just beyond.
        beyond = optimised(case, query, norm, 1.05 * radius, k, 200, query)
        broken += not case.kept(case.features[query] + beyond, query, k).all()
    assert (owned, k) != (1, 1) or broken == int((certificate.radii > 0).sum())


@NORMS
@pytest.mark.parametrize("k", [1, 2, 5])
def test_without_a_perturbation_it_is_the_recall(norm: Norm, k: int) -> None:
    """On small integers, whose scores are exact and often tied."""
    generator = torch.Generator().manual_seed(k)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    head = LinearHead(integers(4, 6), integers(4))
    features, gallery = integers(60, 6), integers(180, 4)
    owner = torch.arange(180) // 3
    ranks = retrieval_ranks(features @ head.weight.T + head.bias, gallery, owner.numpy())
    assert ranks.i2t_tied.any()
    radii = certified_radii(head, features, gallery, owner == torch.arange(60)[:, None], norm, k)
    assert torch.equal(radii > 0, torch.from_numpy(ranks.i2t < k))
    assert float(certified_recall(radii, [0.0])) == (ranks.i2t < k).mean() > 0


@NORMS
def test_a_float32_tower_gives_the_recall_of_the_trained_model(norm: Norm) -> None:
    case = a_case(seed=2, queries=40, owned=2)
    owner = case.own.double().argmax(dim=0)
    mine = case.own.any(dim=0)
    images = F.normalize(case.features.float() @ case.head.weight.T.float() + case.head.bias.float(), dim=1)
    gallery = case.gallery[mine].float()
    ranks = retrieval_ranks(images, gallery, owner[mine].numpy())
    radii = certified_radii(case.head, case.features.float(), gallery, case.own[:, mine], norm)
    assert float(certified_recall(radii, [0.0])) == (ranks.i2t < 1).mean()


@NORMS
def test_a_collapsed_model_retrieves_nothing(norm: Norm) -> None:
    case = a_case()
    collapsed = F.normalize(torch.ones(1, 8, dtype=torch.float64)).expand(len(case.gallery), 8)
    certificate = certify(case.head, case.features, collapsed, case.own, norm)
    assert (certificate.radii == 0).all()
    assert (certificate.item == -1).all()
    assert not critical_of(case.head, collapsed, certificate, norm).any()


@NORMS
def test_recall_falls_with_epsilon_and_rises_with_k(norm: Norm) -> None:
    case = a_case(owned=3)
    epsilons = torch.linspace(0, 2, 50).tolist()
    radii = torch.stack([certified_radii(*case, norm, k) for k in range(1, 8)])
    assert (radii[1:] >= radii[:-1]).all()
    curves = torch.stack([certified_recall(some, epsilons) for some in radii])
    assert (curves[:, 1:] <= curves[:, :-1]).all()
    assert (curves[1:] >= curves[:-1]).all()
    assert curves[0, 0] > curves[0, -1]


def test_recall_counts_radii_above_epsilon() -> None:
    radii = torch.tensor([0.0, 0.5, 1.0, torch.inf], dtype=torch.float64)
    assert certified_recall(radii, [0.0, 0.5, 0.9, 1.0]).tolist() == [0.75, 0.5, 0.5, 0.25]


@NORMS
def test_more_own_items_never_shrink_a_radius(norm: Norm) -> None:
    case = a_case(owned=5)
    all_of_them = certified_radii(*case, norm)
    for query, own in enumerate(case.own):
        for item in torch.nonzero(own).flatten():
            rest = ~case.own[query]
            rest[item] = True
            right = F.one_hot(item, len(rest))[rest].bool()
            one = certified_radii(case.head, case.features[[query]], case.gallery[rest], right[None], norm)
            assert float(one) <= float(all_of_them[query]) * (1 + 1e-12)


@NORMS
def test_copies_in_the_gallery(norm: Norm) -> None:
    case = a_case()
    radii = certified_radii(*case, norm)
    assert int((radii > 0).sum()) > 6
    twice = torch.cat([case.gallery, case.gallery])
    # Copies that are right as well change nothing; with foreign ones R@2 is the first at which a rival counts.
    torch.testing.assert_close(
        certified_radii(case.head, case.features, twice, torch.cat([case.own, case.own], 1), norm), radii
    )
    foreign = torch.cat([case.own, torch.zeros_like(case.own)], dim=1)
    assert (certified_radii(case.head, case.features, twice, foreign, norm) == 0).all()
    torch.testing.assert_close(certified_radii(case.head, case.features, twice, foreign, norm, k=2), radii)


@NORMS
def test_items_that_differ_by_what_no_feature_reaches(norm: Norm) -> None:
    """A zero row of W leaves its bias alone: a constant lead is never lost, and a constant tie never won."""
    case = a_case(rest=0, queries=2)
    weight, bias = torch.cat([case.head.weight, torch.zeros(1, 24)]), torch.cat([case.head.bias, torch.ones(1)])
    item = torch.cat([case.gallery[:1], torch.zeros(1, 1)], dim=1)
    lower = item - torch.eye(9, dtype=torch.float64)[-1]
    own = torch.tensor([[True, False], [False, True]])
    certificate = certify(LinearHead(weight, bias), case.features, torch.cat([item, lower]), own, norm)
    assert certificate.radii.tolist() == [float("inf"), 0.0]
    assert certificate.rival.tolist() == [-1, -1]
    nothing = LinearHead(torch.zeros(8, 24), torch.zeros(8))
    assert not certified_radii(nothing, case.features, case.gallery, case.own, norm).any()


@NORMS
def test_near_copies_are_not_lost_in_rounding(norm: Norm) -> None:
    """Rivals 1e-9 from the own item: the radius comes from differences, not from two large scores."""
    case = a_case(queries=4, rest=0)
    embedding = F.normalize(case.features[:1] @ case.head.weight.T + case.head.bias)
    generator = torch.Generator().manual_seed(3)
    near = embedding + 1e-9 * F.normalize(torch.randn(20, 8, generator=generator, dtype=torch.float64))
    gallery = torch.cat([embedding, near])
    own = torch.arange(21)[None] == 0
    one = Case(case.head, case.features[:1], gallery, own)
    found, direct = certified_radii(*one, norm), brute_force(one, norm, 1)
    assert (found <= direct * (1 + 1e-9)).all()
    torch.testing.assert_close(found, direct, rtol=1e-3, atol=0)


@NORMS
@pytest.mark.parametrize("exponent", [-250, -170, -100, 100, 170, 250])
@pytest.mark.parametrize("scaled", ["head", "weight and features", "gallery", "features"])
def test_no_scale_makes_a_certificate_unsound(scaled: str, exponent: int, norm: Norm) -> None:
    """The radius has the unit of the features; a factor of anything else is in margin and rate alike."""
    case, scale = a_case(owned=2), 10.0**exponent
    expected = certified_radii(*case, norm)
    head, features, gallery, own = case
    if scaled == "head":
        head = LinearHead(head.weight * scale, head.bias * scale)
    elif scaled == "weight and features":
        head, features, expected = LinearHead(head.weight * scale, head.bias), features / scale, expected / scale
    elif scaled == "gallery":
        gallery = gallery * scale
    else:
        head, features = LinearHead(head.weight, head.bias * scale), features * scale
        expected = expected * scale
    assert (expected > 0).any()
    torch.testing.assert_close(certified_radii(head, features, gallery, own, norm), expected, rtol=1e-7, atol=0)


class Stub(Backbone):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.dim, self.architecture = dim, {}
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, values: Tensor, mask: Tensor | None) -> Padded:
        return Padded(values * self.scale, mask)


CONFIG = TowerConfig(encoder="stub", dropout=0.5)
STANDARDISE = {"normalise_features": "standardise"}
POOLED = {"pooling": "mean+max"} | STANDARDISE


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, STANDARDISE, {"head": "none"}, {"head": "none"} | STANDARDISE, {"pooling": "mean+max"}, POOLED]
)
def test_the_folded_head_is_that_of_the_tower(changes: dict[str, Any], normalise: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, frozen=frozen, normalise=normalise, **changes)
    tower = Tower(Stub(), config, 6 if config.head == "none" else 4, absolute=False)
    for linear in (module for module in tower.head.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.bias)
    tokens = 3 + 2 * torch.randn(50, 7, 6)
    tower.train()(tokens)  # gives the standardisation statistics to remember
    head = linear_head(tower)
    features = tower.eval().features(tokens).values
    assert (tower.standardise is None) == ("normalise_features" not in changes)
    ours = features.double() @ head.weight.T + head.bias
    theirs = tower.project(features).double()
    torch.testing.assert_close(F.normalize(ours, dim=1), F.normalize(theirs, dim=1), rtol=0, atol=2e-6)
    if not normalise:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "absolute", "named"),
    [
        ({"head": "mlp"}, False, "mlp head"),
        ({"pooling": "gpo"}, False, "gpo pooling"),
        ({"normalise_features": "l2"}, False, "l2-normalised features"),
        ({}, True, "absolute value"),
    ],
)
def test_heads_that_are_not_linear_are_refused(changes: dict[str, Any], absolute: bool, named: str) -> None:
    with pytest.raises(InputError, match=f"^stub: .*{named}.*; train with .*$") as caught:
        linear_head(Tower(Stub(), replace(CONFIG, **changes), 4, absolute))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "k", "message"),
    [
        ({"features": torch.zeros(12, 23)}, 1, "features are"),
        ({"gallery": torch.zeros(32, 9)}, 1, "features are"),
        ({"own": torch.ones(12, 31, dtype=torch.bool)}, 1, "features are"),
        ({"own": torch.ones(12, 32)}, 1, "bool own"),
        ({"own": torch.zeros(12, 32, dtype=torch.bool)}, 1, r"query 0 has no own item \(12 such"),
        ({"features": torch.full((12, 24), torch.nan)}, 1, "features: a value is not finite"),
        ({}, 0, "k: 0 is not positive"),
    ],
)
def test_unusable_input_is_refused(changes: dict[str, Any], k: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        certified_radii(*a_case()._replace(**changes), L2, k)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "epsilon"), [(0, 0.0), (3, -1.0), (3, float("nan"))])
def test_recall_of_nothing_is_refused(count: int, epsilon: float) -> None:
    with pytest.raises(InputError, match="give queries and norms"):
        certified_recall(torch.ones(count), [epsilon])
