from __future__ import annotations

import doctest
import importlib
import logging
import math

import pytest
import torch
from torch import Tensor

from training.errors import InputError
from training.losses import CollapseDetector, Curriculum, Loss, MaxOfHinges, SumOfHinges, hinge
from training.losses.base import find_negatives, same_image
from training.models import similarity as similarity_module
from training.models.similarity import COSINE, ORDER, SIMILARITIES, Similarity

MARGIN = 0.2
IDS = {
    "distinct": [0, 1, 2, 3, 4, 5, 6],
    "repeated": [3, 1, 3, 7, 1, 3, 9],
    "all but one the same": [5, 5, 5, 2, 5, 5, 5],
}
similarities = pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
batches = pytest.mark.parametrize("ids", IDS.values(), ids=IDS)


def embeddings(batch: int = 7, dimensions: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, captions = torch.randn(2, batch, dimensions, dtype=torch.float64, generator=generator)
    normalize = torch.nn.functional.normalize
    return normalize(images).requires_grad_(), normalize(captions).requires_grad_()


def score(similarity: Similarity, image: Tensor, caption: Tensor) -> Tensor:
    if similarity is COSINE:
        return torch.stack([i * c for i, c in zip(image, caption, strict=True)]).sum()
    return -torch.stack([(c - i).clamp(min=0) ** 2 for i, c in zip(image, caption, strict=True)]).sum().sqrt()


def naive_hinges(similarity: Similarity, images: Tensor, captions: Tensor, ids: list[int], hardest: bool) -> Tensor:
    """The published sums, one score at a time."""
    batch = range(len(ids))
    total = images.new_zeros(())
    for b in batch:
        positive = score(similarity, images[b], captions[b])
        others = [j for j in batch if ids[j] != ids[b]]
        over_captions = [MARGIN + score(similarity, images[b], captions[j]) - positive for j in others]
        over_images = [MARGIN + score(similarity, images[i], captions[b]) - positive for i in others]
        for costs in (over_captions, over_images):
            if hardest:
                costs = [max(costs, key=Tensor.item)] if costs else []
            total = total + sum(cost.clamp(min=0) for cost in costs)
    return total


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


@similarities
@batches
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", [SumOfHinges, MaxOfHinges])
def test_value_and_gradient_are_those_of_the_triple_loop(
    kind: type[SumOfHinges | MaxOfHinges], similarity: Similarity, ids: list[int], reduction: hinge.Reduction
) -> None:
    images, captions = embeddings()
    value = kind(similarity, MARGIN, reduction)(images, captions, torch.tensor(ids)).value
    naive = naive_hinges(similarity, images, captions, ids, hardest=kind is MaxOfHinges)
    if reduction == "mean":
        naive = naive / len(ids)
    torch.testing.assert_close(value, naive)
    torch.testing.assert_close(gradients(value, images, captions), gradients(naive, images, captions))


@similarities
@batches
def test_statistics_are_those_of_a_loop(similarity: Similarity, ids: list[int]) -> None:
    images, captions = (tensor.detach() for tensor in embeddings())
    batch = range(len(ids))
    scores = [[float(score(similarity, images[i], captions[j])) for j in batch] for i in batch]
    negatives = [[j for j in batch if ids[j] != ids[b]] for b in batch]
    hardest = [(max(scores[b][j] for j in negatives[b]), scores[b][b]) for b in batch if negatives[b]]
    hardest += [(max(scores[i][b] for i in negatives[b]), scores[b][b]) for b in batch if negatives[b]]
    allowed = torch.tensor([scores[b][j] for b in batch for j in negatives[b]], dtype=torch.float64)
    expected = {
        "positive": sum(scores[b][b] for b in batch) / len(ids),
        "hardest": sum(negative for negative, _ in hardest) / len(hardest),
        "active": sum(negative + MARGIN > positive for negative, positive in hardest) / len(hardest),
        "spread": float(allowed.std(correction=0)),
    }
    for kind in (SumOfHinges, MaxOfHinges):
        statistics = kind(similarity, MARGIN)(images, captions, torch.tensor(ids)).statistics
        assert statistics.floats() == pytest.approx(expected)


def test_max_of_hinges_touches_only_the_hardest_negatives() -> None:
    images = torch.eye(6, dtype=torch.float64).requires_grad_()
    captions = torch.eye(6, dtype=torch.float64)
    captions[3, 0] = 0.9  # caption 3 is hard for image 0, and image 0 for caption 3
    captions.requires_grad_()
    loss = MaxOfHinges(margin=MARGIN)
    image_gradient, caption_gradient = gradients(loss(images, captions, torch.arange(6)).value, images, captions)
    assert image_gradient.any(1).tolist() == [True, False, False, True, False, False]
    assert caption_gradient.any(1).tolist() == [True, False, False, True, False, False]


@similarities
@pytest.mark.parametrize("kind", [SumOfHinges, MaxOfHinges])
def test_equal_embeddings_give_the_collapse_value_and_finite_gradients(
    kind: type[SumOfHinges | MaxOfHinges], similarity: Similarity
) -> None:
    batch = 6
    images = torch.full((batch, 4), 0.5, dtype=torch.float64, requires_grad=True)
    captions = torch.full((batch, 4), 0.5, dtype=torch.float64, requires_grad=True)
    value, statistics = kind(similarity, MARGIN)(images, captions, torch.arange(batch))
    per_anchor = batch - 1 if kind is SumOfHinges else 1
    assert value.item() == pytest.approx(2 * batch * per_anchor * MARGIN)
    assert all(gradient.isfinite().all() for gradient in gradients(value, images, captions))
    assert statistics.spread == 0
    assert statistics.active == 1


@similarities
@pytest.mark.parametrize("kind", [SumOfHinges, MaxOfHinges])
def test_five_captions_of_one_image_have_no_loss(
    kind: type[SumOfHinges | MaxOfHinges], similarity: Similarity
) -> None:
    images, captions = embeddings(5)
    value, statistics = kind(similarity, MARGIN)(images, captions, torch.full((5,), 8))
    assert value == 0
    assert not any(gradient.any() for gradient in gradients(value, images, captions))
    assert all(map(math.isfinite, statistics.floats().values()))


@similarities
@pytest.mark.parametrize("kind", [SumOfHinges, MaxOfHinges])
def test_permuting_the_batch_permutes_the_gradient(
    kind: type[SumOfHinges | MaxOfHinges], similarity: Similarity
) -> None:
    images, captions = embeddings()
    ids, order = torch.tensor(IDS["repeated"]), torch.tensor([4, 2, 6, 0, 1, 5, 3])
    loss = kind(similarity, MARGIN)
    value = loss(images, captions, ids).value
    permuted = loss(images[order], captions[order], ids[order]).value
    torch.testing.assert_close(value, permuted)
    torch.testing.assert_close(gradients(value, images, captions), gradients(permuted, images, captions))


def test_order_similarity_has_a_finite_gradient_where_a_caption_is_dominated() -> None:
    images, _ = embeddings(3)
    dominated = (images.detach() - 1).requires_grad_()
    scores = ORDER.scores(images, dominated)
    assert torch.equal(scores.diagonal(), torch.zeros(3, dtype=torch.float64))
    image_gradient, caption_gradient = gradients(scores.diagonal().sum(), images, dominated)
    assert not image_gradient.any()
    assert not caption_gradient.any()


@similarities
def test_the_forms_of_a_similarity_agree(similarity: Similarity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_module, "BLOCK_ELEMENTS", 80)  # two captions at a time
    images, captions = embeddings(8)
    scores = similarity.scores(images, captions[:7])
    naive = torch.stack(
        [torch.stack([score(similarity, image, caption) for caption in captions[:7]]) for image in images]
    )
    weights = torch.randn(8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(scores, naive)
    torch.testing.assert_close(
        gradients((scores * weights).sum(), images, captions),
        gradients((naive * weights).sum(), images, captions),
    )
    torch.testing.assert_close(similarity.pairs(images[:7], captions[:7]), naive.diagonal())

    rows, columns = torch.tensor([0, 0, 5, 7, 0]), torch.tensor([1, 1, 6, 0, 2])  # one entry twice
    known = naive[rows, columns].detach()
    entries = similarity.entries(known, images, captions, rows, columns)
    torch.testing.assert_close(entries, known)
    naive = torch.stack([score(similarity, images[r], captions[c]) for r, c in zip(rows, columns, strict=True)])
    torch.testing.assert_close(
        gradients((entries * weights[0, :5]).sum(), images, captions),
        gradients((naive * weights[0, :5]).sum(), images, captions),
    )


@pytest.mark.parametrize("rows", [1, 3, 7])
@batches
def test_blocks_of_rows_find_the_same_negatives(rows: int, ids: list[int]) -> None:
    images, captions = embeddings()
    scores, image_ids = images @ captions.T, torch.tensor(ids)
    for whole, blocked in zip(
        find_negatives([scores], image_ids), find_negatives(torch.split(scores, rows), image_ids), strict=True
    ):
        torch.testing.assert_close(blocked, whole)


def test_max_of_hinges_searches_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, captions = embeddings()
    whole = MaxOfHinges()(images, captions, torch.arange(7)).value
    monkeypatch.setattr(hinge, "BLOCK_ROWS", 3)
    blocked = MaxOfHinges()(images, captions, torch.arange(7)).value
    torch.testing.assert_close(blocked, whole)
    torch.testing.assert_close(gradients(blocked, images, captions), gradients(whole, images, captions))


def test_the_first_of_tied_negatives_is_chosen() -> None:
    negatives = find_negatives(torch.split(torch.zeros(5, 5), 2), torch.arange(5))
    assert negatives.caption.tolist() == negatives.image.tolist() == [1, 0, 0, 0, 0]


@batches
def test_excluded_entries_are_those_of_equal_ids(ids: list[int]) -> None:
    image_ids = torch.tensor(ids)
    excluded = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    excluded[same_image(image_ids)] = True
    assert torch.equal(excluded, image_ids[:, None] == image_ids)


def test_a_nan_is_not_hidden() -> None:
    images, captions = embeddings()
    images.data[2] = math.nan
    assert MaxOfHinges()(images, captions, torch.arange(7)).value.isnan()


@pytest.mark.parametrize("loss", [SumOfHinges(), MaxOfHinges(), Curriculum(2)], ids=lambda loss: type(loss).__name__)
def test_bfloat16_is_scored_in_float32(loss: Loss) -> None:
    images, captions = (tensor.detach().bfloat16().requires_grad_() for tensor in embeddings())
    loss.advance(1)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(images, captions, torch.arange(7)).value
    torch.testing.assert_close(value, loss(images.float(), captions.float(), torch.arange(7)).value)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients(value, images, captions))


def test_curriculum_moves_from_the_mean_hinge_to_the_hardest() -> None:
    images, captions = embeddings()
    ids = torch.tensor(IDS["repeated"])
    mean = SumOfHinges(margin=MARGIN)(images, captions, ids).value / 6
    hardest = MaxOfHinges(margin=MARGIN)(images, captions, ids).value
    loss = Curriculum(warmup_steps=4, margin=MARGIN)
    for step, alpha in [(0, 0.0), (1, 0.25), (4, 1.0), (90, 1.0)]:
        loss.advance(step)
        value = loss(images, captions, ids).value
        expected = (1 - alpha) * mean + alpha * hardest
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            gradients(value, images, captions),
            torch.autograd.grad(expected, (images, captions), retain_graph=True),
        )


def test_curriculum_falls_back_and_resumes(caplog: pytest.LogCaptureFixture) -> None:
    loss = Curriculum(warmup_steps=10)
    loss.advance(50)
    with caplog.at_level(logging.WARNING):
        loss.fall_back()
    assert "step 50: back to the sum of hinges" in caplog.text
    assert loss.alpha == 0
    resumed = Curriculum(warmup_steps=10)
    resumed.load_state_dict(loss.state_dict())
    resumed.advance(53)
    assert resumed.alpha == pytest.approx(0.3)


def test_curriculum_of_a_single_pair_is_zero() -> None:
    images, captions = embeddings(1)
    assert Curriculum(5)(images, captions, torch.tensor([0])).value == 0


def watch(loss: Loss, images: Tensor, captions: Tensor, detector: CollapseDetector) -> str | None:
    numbers = loss(images, captions, torch.arange(len(images))).statistics.floats()
    return detector.observe(numbers["positive"], numbers["hardest"], numbers["spread"])


def test_detector_reports_a_collapse_once_per_patience_and_survives_a_resume() -> None:
    loss, detector = MaxOfHinges(margin=MARGIN), CollapseDetector(MARGIN, patience=4)
    centre = torch.nn.functional.normalize(torch.ones(1, 64), dim=1)
    generator = torch.Generator().manual_seed(0)
    reports = []
    for step in range(9):
        images, captions = centre + 1e-6 * torch.randn(2, 32, 64, generator=generator)
        value = loss(images, captions, torch.arange(32)).value
        assert value.item() == pytest.approx(2 * 32 * MARGIN, rel=0.01)
        reports.append(watch(loss, images, captions, detector))
        if step == 1:
            state = detector.state_dict()
            detector = CollapseDetector(MARGIN, patience=4)
            detector.load_state_dict(state)
    assert [report is not None for report in reports] == [False, False, False, True] * 2 + [False]
    assert str(reports[3]).startswith("collapsed for 4 steps")


def test_detector_is_silent_in_healthy_training() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(16, 8, generator=generator)
    towers = [torch.nn.Linear(8, 16) for _ in range(2)]
    for tower in towers:
        torch.nn.init.normal_(tower.weight, generator=generator)
    optimizer = torch.optim.Adam([weight for tower in towers for weight in tower.parameters()], lr=0.01)
    loss, detector = Curriculum(warmup_steps=20, margin=MARGIN), CollapseDetector(MARGIN, patience=3)
    values = []
    for step in range(60):
        images, captions = (torch.nn.functional.normalize(tower(latent)) for tower in towers)
        loss.advance(step)
        value = loss(images, captions, torch.arange(16)).value
        assert watch(loss, images, captions, detector) is None
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("name", ["hinge", "curriculum", "collapse", "contrastive"])
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"training.losses.{name}"))
    assert results.attempted
    assert not results.failed


def test_bad_settings_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="margin"):
        MaxOfHinges(margin=0)
    with pytest.raises(InputError, match="reduction"):
        MaxOfHinges(reduction="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="warmup_steps"):
        Curriculum(warmup_steps=0)


def test_shapes_that_disagree_are_refused() -> None:
    images, captions = embeddings()
    with pytest.raises(ValueError, match=r"\(7, 5\), \(6, 5\), \(7,\)"):
        SumOfHinges()(images, captions[:6], torch.arange(7))
