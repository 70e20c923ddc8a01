"""The protocols against arithmetic by hand, and the tables that print them."""

from __future__ import annotations

import json
from dataclasses import asdict

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
from training.evaluation.ranks import ranks_from_scores, retrieval_ranks
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
