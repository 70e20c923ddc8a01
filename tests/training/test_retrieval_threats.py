"""Threats against double loops over the whole gallery."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.errors import InputError
from training.evaluation.ranks import retrieval_ranks
from training.models.similarity import COSINE, ORDER, Similarity
from training.robustness.retrieval_threats import GalleryImage, QueryImage, QueryText

OWNER = np.array([0, 3, 0, 1, 2, 2, 2, 4, 1, 4, 5, 3])
IMAGES = 6


def embeddings(similarity: Similarity, count: int, seed: int) -> Tensor:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=1) if similarity is COSINE else x.abs()


def gallery(similarity: Similarity) -> tuple[Tensor, Tensor]:
    return embeddings(similarity, IMAGES, 0), embeddings(similarity, len(OWNER), 1)


def query(similarity: Similarity, rows: list[int]) -> tuple[QueryImage, Tensor, Tensor]:
    images, captions = gallery(similarity)
    return QueryImage.of(lambda x: x, similarity, captions, OWNER, rows, images[rows]), images[rows], captions


@pytest.mark.parametrize("similarity", [COSINE, ORDER], ids=lambda s: s.name)
def test_query_ranks_are_those_of_the_evaluation(similarity: Similarity) -> None:
    images, captions = gallery(similarity)
    threat, embedded, _ = query(similarity, [4, 0, 2])
    ranks = retrieval_ranks(images, captions, OWNER, similarity.scores)
    assert threat.ranks(embedded)[:, 0].tolist() == ranks.i2t[[4, 0, 2]].tolist()


@pytest.mark.parametrize("similarity", [COSINE, ORDER], ids=lambda s: s.name)
@pytest.mark.parametrize("goal", [1, 5])
def test_query_margin_and_goal_by_a_double_loop(similarity: Similarity, goal: int) -> None:
    rows = [4, 0, 2, 5]
    threat, _, captions = query(similarity, rows)
    moved = embeddings(similarity, 4, 7)
    found = threat.objective("margin", goal)(moved, torch.arange(4))
    for n, image in enumerate(rows):
        scores = [float(similarity.scores(moved[n : n + 1], captions[c : c + 1])) for c in range(len(OWNER))]
        own = max(s for s, owner in zip(scores, OWNER, strict=True) if owner == image)
        others = sorted((s for s, owner in zip(scores, OWNER, strict=True) if owner != image), reverse=True)
        chosen = [others[k - 1] for k in (1, 5) if k <= goal]
        assert float(found.loss[n]) == pytest.approx(sum(chosen) / len(chosen) - own)
        assert bool(found.done[n]) == (sum(s >= own for s in others) >= goal)


def test_other_losses_agree_with_the_margin_about_who_wins() -> None:
    threat, _, captions = query(COSINE, [4, 0, 2, 5])
    moved = embeddings(COSINE, 4, 7)
    rows = torch.arange(4)
    scores = moved @ captions.T
    for n, image in enumerate([4, 0, 2, 5]):
        own = scores[n][torch.from_numpy(image == OWNER)].max()
        others = scores[n][torch.from_numpy(image != OWNER)]
        first, second, third, *_ = torch.cat([own[None], others]).sort(descending=True).values
        dlr = threat.objective("dlr")(moved, rows)
        assert float(dlr.loss[n]) == pytest.approx(float((others.max() - own) / (first - third)))
        ce = threat.objective("ce")(moved, rows)
        naive = -torch.log_softmax(20 * torch.cat([own[None], others]), 0)[0]
        assert float(ce.loss[n]) == pytest.approx(float(naive))
        assert ce.done.tolist() == dlr.done.tolist() == threat.objective()(moved, rows).done.tolist()
        assert second <= first


def test_targets_are_the_best_competitors_of_the_clean_picture() -> None:
    threat, clean, captions = query(COSINE, [4, 0])
    for row, image in enumerate([4, 0]):
        scores = (clean[row] @ captions.T).masked_fill(torch.from_numpy(image == OWNER), -torch.inf)
        assert threat.targets[row].tolist() == scores.argsort(descending=True)[: threat.targets.shape[1]].tolist()
    rows = torch.arange(2)
    moved = captions[threat.targets[:, 1]]  # exactly on the second competitor
    aimed, other = (threat.objective("targeted", target=t)(moved, rows).loss for t in (1, 0))
    assert (aimed > 0).all()
    assert (aimed >= other).all()


@pytest.mark.parametrize("loss", ["margin", "dlr", "ce", "targeted"])
def test_losses_are_differentiable(loss: str) -> None:
    threat, clean, _ = query(COSINE, [4, 0])
    points = clean.clone().requires_grad_(True)
    value = threat.objective(loss, target=2)(points, torch.arange(2)).loss.sum()  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(value, points)
    for index in ((0, 1), (1, 3)):
        step = torch.zeros_like(clean)
        step[index] = 1e-6
        ends = [threat.objective(loss, target=2)(clean + s * step, torch.arange(2)).loss.sum() for s in (1, -1)]  # type: ignore[arg-type]
        assert float(slope[index]) == pytest.approx(float((ends[0] - ends[1]) / 2e-6), abs=1e-4)


def test_ties_count_against_the_query() -> None:
    captions = torch.ones(len(OWNER), 2) / 2**0.5
    threat = QueryImage.of(lambda x: x, COSINE, captions, OWNER, [0], captions[:1])
    assert threat.ranks(captions[:1]).tolist() == [[10]]


def gallery_image(similarity: Similarity, promote: bool) -> tuple[GalleryImage, Tensor, Tensor, list[list[int]]]:
    images, captions = gallery(similarity)
    rows = [2, 5, 0]
    searches = [[7], [0], [11]] if promote else [np.flatnonzero(row == OWNER).tolist() for row in rows]
    threat = GalleryImage.of(lambda x: x, similarity, images, captions, rows, searches, promote)
    return threat, images, captions, searches


@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("similarity", [COSINE, ORDER], ids=lambda s: s.name)
def test_gallery_ranks_and_margin_by_a_double_loop(similarity: Similarity, promote: bool) -> None:
    threat, images, captions, searches = gallery_image(similarity, promote)
    moved = embeddings(similarity, 3, 11)
    ranks = threat.ranks(moved)
    value = threat.objective("margin", 1)(moved, torch.arange(3))
    for n, image in enumerate([2, 5, 0]):
        changed = images.clone()
        changed[image] = moved[n]
        margins, beaten = [], []
        for place, caption in enumerate(searches[n]):
            scores = similarity.scores(changed, captions[caption : caption + 1])[:, 0]
            own, others = scores[image], torch.cat([scores[:image], scores[image + 1 :]])
            assert ranks[n, place] == int((others >= own).sum())
            margins.append(float(own - others.max() if promote else others.max() - own))
            beaten.append(bool(own > others.max()) if promote else bool(own <= others.max()))
        assert (ranks[n, len(searches[n]) :] == -1).all()
        assert float(value.loss[n]) == pytest.approx(np.mean(margins))
        assert bool(value.done[n]) == all(beaten)


def test_withstood_is_what_an_attacker_wants_otherwise() -> None:
    demoted, promoted = gallery_image(COSINE, False)[0], gallery_image(COSINE, True)[0]
    ranks = np.array([[0, 3], [2, -1], [1, 4]])
    assert demoted.withstood(ranks).tolist() == [True, False, False]
    assert promoted.withstood(ranks[:, :1]).tolist() == [False, True, True]


def test_rows_pick_pictures() -> None:
    threat, clean, _ = query(COSINE, [4, 0, 2])
    some = torch.tensor([2, 0])
    assert threat.rows(some).ranks(clean[some]).tolist() == threat.ranks(clean)[[2, 0]].tolist()
    owner = gallery_image(COSINE, False)[0]
    moved = embeddings(COSINE, 3, 11)
    assert owner.rows(some).ranks(moved[some]).tolist() == owner.ranks(moved)[[2, 0]].tolist()


def test_query_text_by_a_double_loop() -> None:
    images, captions = gallery(COSINE)
    texts = [str(c) for c in range(len(OWNER))]
    threat = QueryText(lambda some: torch.stack([captions[int(t)] for t in some]), COSINE, images, OWNER)
    margins, ranks = threat.margins(["3", "5"], np.array([0, 1])), threat.ranks(texts)
    for place, (caption, owner) in enumerate(((3, OWNER[0]), (5, OWNER[1]))):
        scores = images @ captions[caption]
        others = torch.cat([scores[:owner], scores[owner + 1 :]])
        assert margins[place] == pytest.approx(float(others.max() - scores[owner]))
    assert ranks[:, 0].tolist() == retrieval_ranks(images, captions, OWNER).t2i.tolist()


def test_images_without_captions_are_refused() -> None:
    images, captions = gallery(COSINE)
    owner = OWNER.copy()
    owner[owner == 5] = 4
    with pytest.raises(InputError, match="image 5 has no captions"):
        QueryImage.of(lambda x: x, COSINE, captions, owner, [5], images[5:])
    with pytest.raises(InputError, match="image 5 has no captions"):
        GalleryImage.of(lambda x: x, COSINE, images, captions, [5], [[]], False)
    with pytest.raises(InputError, match="no competitors"):
        GalleryImage.of(lambda x: x, COSINE, images[:1], captions, [0], [[0]], False)
