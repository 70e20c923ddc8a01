"""The protocols against arithmetic by hand, and the tables that print them."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from training.data.corpus import Corpus
from training.errors import InputError
from training.evaluation.protocols import (
    DirectionMetrics,
    RetrievalMetrics,
    evaluate,
    evaluate_ranks,
    worst_queries,
)
from training.evaluation.ranks import Competition, ranks_from_scores, retrieval_ranks
from training.evaluation.report import format_table, markdown_table
from training.models.similarity import order_scores


def metrics(r1: float, ties: int = 0, images: int = 10) -> RetrievalMetrics:
    direction = DirectionMetrics(r1, 50.0, 70.0, 4, 9.5)
    return RetrievalMetrics(images, 5 * images, direction, direction, 2 * (r1 + 120), ties)


def random_pairs(
    images: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Embeddings with five captions per image, in shuffled order."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.arange(5 * images) // 5)
    pictures = rng.normal(size=(images, 16))
    return (
        torch.from_numpy(pictures),
        torch.from_numpy(pictures[owner] + 2 * rng.normal(size=(5 * images, 16))),
        owner,
    )


def every_order(own: int, level: int, above: int) -> list[int]:
    """The rank of the first own item in each order of own and level items, behind what scores higher."""
    items = [True] * own + [False] * level
    return [above + order.index(True) for order in itertools.permutations(items)]


def scores_of(own: int, level: int, above: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A matrix whose image 0 has ``own`` captions level with ``level`` others, below ``above``, and their owners."""
    row = [1.0] * own + [1.0] * level + [2.0] * above + [0.0]
    scores = np.full((2, len(row)), -1.0)
    scores[0] = row
    scores[1, -1] = 3.0
    return scores, np.array([0] * own + [1] * (level + above + 1))


class TestExpectedTies:
    @pytest.mark.parametrize(
        ("own", "level", "above"),
        [
            (1, 1, 0),
            (1, 4, 0),
            (2, 3, 0),
            (3, 2, 1),
            (5, 1, 0),
            (1, 6, 2),
            (2, 5, 4),
            (4, 3, 9),
            (1, 0, 4),
            (2, 2, 10),
        ],
    )
    def test_one_query_equals_every_order(self, own: int, level: int, above: int) -> None:
        orders = np.array(every_order(own, level, above))
        ranks = ranks_from_scores(*scores_of(own, level, above), "expected")
        for k in range(20):
            assert ranks.images.chance(k)[0] == pytest.approx(np.mean(orders < k), abs=1e-12)
        assert ranks.i2t[0] == pytest.approx(orders.mean())
        of = DirectionMetrics.expected(Competition(*(counts[:1] for counts in ranks.images)))
        expected = DirectionMetrics.of(orders)
        assert asdict(of) == pytest.approx(asdict(expected))

    def test_a_pair_of_copies_is_found_half_of_the_time(self) -> None:
        of = evaluate_ranks(ranks_from_scores(np.ones((2, 2)), np.arange(2), "expected"))
        assert (of.i2t.r1, of.t2i.r1, of.i2t.r5, of.i2t.meanr) == (50, 50, 100, 1.5)
        five = evaluate_ranks(ranks_from_scores(np.ones((20, 100)), np.arange(100) // 5, "expected"))
        assert five.i2t.r1 == pytest.approx(5)  # of 100 captions five are right
        assert five.t2i.r10 == pytest.approx(50)
        assert five.i2t.meanr == pytest.approx(1 + 95 / 6)

    @pytest.mark.parametrize("folds", [None, 4])
    def test_equals_the_mean_over_random_orders(self, folds: int | None) -> None:
        rng = np.random.default_rng(5)
        images, captions = rng.integers(-2, 3, (40, 3)).astype(float), rng.integers(-2, 3, (120, 3)).astype(float)
        owner = rng.permutation(np.repeat(np.arange(40), 3))
        found = evaluate(images, captions, owner, folds=folds, ties="expected")
        drawn = []
        for _ in range(150):
            # Scores are whole numbers: one more dimension with noise below 1 orders all that is level at random.
            noise = torch.from_numpy(rng.random((40, 120)) / 2)

            def noisy(some: torch.Tensor, others: torch.Tensor, noise: torch.Tensor = noise) -> torch.Tensor:
                return some[:, :-1] @ others[:, :-1].T + noise[some[:, -1].long()][:, others[:, -1].long()]

            numbered = np.c_[images, np.arange(40)], np.c_[captions, np.arange(120)]
            drawn.append(evaluate(*numbered, owner, noisy, folds))
        for direction in ("i2t", "t2i"):
            for name in ("r1", "r5", "r10", "meanr"):
                values = np.array([getattr(getattr(one, direction), name) for one in drawn])
                error = abs(getattr(getattr(found, direction), name) - values.mean())
                assert error <= 4 * values.std() / len(values) ** 0.5 + 1e-9, (direction, name)
        assert all(one.ties == 0 for one in drawn)
        assert found.ties > 50

    def test_lies_between_the_extremes_and_equals_them_without_ties(self) -> None:
        rng = np.random.default_rng(6)
        scores, owner = rng.integers(0, 5, (30, 90)).astype(float), np.arange(90) // 3
        worst, mean, best = (
            evaluate_ranks(ranks_from_scores(scores, owner, ties))
            for ties in ("pessimistic", "expected", "optimistic")
        )
        assert worst.rsum < mean.rsum < best.rsum
        for direction in ("i2t", "t2i"):
            for name in ("medr", "meanr"):
                low, middle, high = (getattr(getattr(of, direction), name) for of in (best, mean, worst))
                assert low <= middle <= high
        distinct = rng.permutation(30 * 90).reshape(30, 90).astype(float)
        assert evaluate_ranks(ranks_from_scores(distinct, owner, "expected")) == evaluate_ranks(
            ranks_from_scores(distinct, owner)
        )


@pytest.mark.parametrize(("ranks", "medr"), [([0, 1], 1), ([0, 3], 2), ([0, 1, 2], 2), ([4, 5], 5), ([0.5, 0.5], 1)])
def test_median_rank_is_rounded_down_and_counted_from_one(ranks: list[float], medr: int) -> None:
    assert DirectionMetrics.of(np.array(ranks)).medr == medr


def test_recalls_count_ranks_below_k() -> None:
    of = DirectionMetrics.of(np.array([0, 1, 4, 5, 9, 10, 99, 0]))
    assert (of.r1, of.r5, of.r10) == (25.0, 50.0, 75.0)
    assert of.meanr == 128 / 8 + 1


def test_rsum_and_sizes() -> None:
    images, captions, owner = random_pairs(30)
    of = evaluate(images, captions, owner)
    assert (of.images, of.captions, of.folds, of.ties) == (30, 150, None, 0)
    assert of.rsum == of.i2t.r1 + of.i2t.r5 + of.i2t.r10 + of.t2i.r1 + of.t2i.r5 + of.t2i.r10
    assert of == evaluate_ranks(retrieval_ranks(images, captions, owner))
    assert of != evaluate(images, captions, owner, order_scores)


def test_constant_embeddings_have_no_recall_unless_ties_are_optimistic() -> None:
    images, captions, owner = torch.ones(20, 8), torch.ones(100, 8), np.arange(100) // 5
    collapsed = evaluate(images, captions, owner)
    assert (collapsed.i2t.r1, collapsed.t2i.r1, collapsed.rsum, collapsed.ties) == (0, 0, 0, 120)
    assert evaluate(images, captions, owner, ties="optimistic").rsum == 600


def test_five_folds_equal_the_mean_of_five_separate_evaluations() -> None:
    images, captions, owner = random_pairs(50)
    folded = evaluate(images, captions, owner, folds=5)
    alone = []
    for start in range(0, 50, 10):
        kept = [c for c in range(250) if start <= owner[c] < start + 10]
        scores = images[start : start + 10].numpy() @ captions[kept].numpy().T
        alone.append(evaluate_ranks(ranks_from_scores(scores, owner[kept] - start)))
    for direction in ("i2t", "t2i"):
        for name, value in asdict(getattr(folded, direction)).items():
            assert value == pytest.approx(np.mean([getattr(getattr(m, direction), name) for m in alone]))
    assert folded.rsum == pytest.approx(np.mean([m.rsum for m in alone]))
    assert (folded.images, folded.captions, folded.folds) == (50, 250, 5)
    assert folded.rsum > evaluate(images, captions, owner).rsum


def test_ties_are_added_over_folds() -> None:
    images, captions, owner = torch.ones(20, 8), torch.ones(100, 8), np.arange(100) // 5
    assert evaluate(images, captions, owner, folds=5).ties == 120


@pytest.mark.parametrize("folds", [0, -5, 3, 60])
def test_folds_must_divide_the_images(folds: int) -> None:
    with pytest.raises(InputError, match=f"{folds} folds do not divide 50 images"):
        evaluate(*random_pairs(50), folds=folds)


def test_folds_check_the_whole_test_set() -> None:
    images, captions, owner = random_pairs(10)
    with pytest.raises(InputError, match="one image index per caption"):
        evaluate(images, captions, owner[:-1], folds=5)
    images[7, 0] = torch.nan
    with pytest.raises(InputError, match="image embedding 7"):
        evaluate(images, captions, owner, folds=5)


def test_json_is_the_contract() -> None:
    images, captions, owner = random_pairs(10)
    record = json.loads(json.dumps(evaluate(images, captions, owner).to_json("scenes:10", "test")))
    assert list(record) == ["data", "split", "images", "captions", "i2t", "t2i", "rsum", "ties"]
    assert list(record["i2t"]) == list(record["t2i"]) == ["r1", "r5", "r10", "medr", "meanr"]
    assert (record["data"], record["split"], record["images"], record["captions"]) == (
        "scenes:10",
        "test",
        10,
        50,
    )
    folded = evaluate(images, captions, owner, folds=2).to_json("scenes:10", "test")
    assert list(folded) == [*record, "folds"]
    assert folded["folds"] == 2


def test_worst_queries_come_worst_first() -> None:
    corpus = Corpus(
        name="hand-made",
        split="test",
        image_ids=["a", "b", "c"],
        captions=["a cat", "a dog", "a bird", "one cat"],
        caption_ids=["a1", "b1", "c1", "a2"],
        owner=np.array([0, 1, 2, 0]),
        features=np.zeros((3, 2), dtype=np.float32),
    )
    scores = np.array([[0.9, 0.1, 0.6, 0.2], [0.3, 0.4, 0.8, 0.5], [0.2, 0.7, 0.3, 0.1]])
    worst = worst_queries(ranks_from_scores(scores, corpus.owner), corpus, n=2)
    assert [(q.id, q.image, q.captions, q.rank) for q in worst["t2i"]] == [
        ("c1", "c", ("a bird",), 2),
        ("b1", "b", ("a dog",), 1),
    ]
    assert [(q.id, q.captions, q.rank) for q in worst["i2t"]] == [
        ("b", ("a dog",), 2),
        ("c", ("a bird",), 1),
    ]
    every = worst_queries(ranks_from_scores(scores, corpus.owner), corpus)
    assert every["i2t"][-1].captions == ("a cat", "one cat")
    with pytest.raises(ValueError, match="another corpus"):
        worst_queries(ranks_from_scores(scores[:, :3], [0, 1, 2]), corpus)


def test_terminal_table_says_what_was_measured() -> None:
    images, captions, owner = random_pairs(1000)
    table = format_table(evaluate(images, captions, owner, folds=5), "coco:here", "test").splitlines()
    assert table[0] == "coco:here [test]: 1,000 images, 5,000 captions, mean of 5 folds"
    assert table[-1].endswith("; 0 of 6,000 queries tied")
    assert len({len(line) for line in table[1:4]}) == 1


def test_markdown_table_gives_mean_and_deviation_over_seeds() -> None:
    table = markdown_table(
        {"sum": [metrics(10.0)], "max": [metrics(20.0, ties=2), metrics(30.0, ties=4)]}, "scenes:10", "val"
    )
    lines = table.splitlines()
    assert lines[0] == "scenes:10 [val]: 10 images, 50 captions"
    sum_row, max_row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:])
    assert sum_row == ["sum", "1", "10.0", "50.0", "70.0", "10.0", "50.0", "70.0", "260.0", "0.0"]
    assert max_row[:3] == ["max", "2", "25.0 ± 7.1"]
    assert max_row[-2:] == ["290.0 ± 14.1", "3.0 ± 1.4"]


def test_runs_on_other_test_sets_do_not_share_a_table() -> None:
    with pytest.raises(ValueError, match="same images"):
        markdown_table({"one": [metrics(10.0)], "two": [metrics(10.0, images=20)]}, "scenes:10", "val")
