from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import assert_same_run, before_step

from training.config import Config
from training.data.formats import available_splits, dedup, load_corpus
from training.errors import InputError
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_keeps_what_it_names_and_leaves_other_splits(tiny_features: str, tmp_path: Path) -> None:
    whole = load_corpus(tiny_features, "train")
    kept = {whole.caption_ids[7]: 3, whole.caption_ids[2]: 1, whole.caption_ids[100]: 9}
    file = tmp_path / "kept.json"
    dedup.write(file, tiny_features, "train", kept)
    for spec in (f"dedup:{file}",):
        corpus = load_corpus(spec, "train")
        assert [corpus.caption_ids[i] for i in range(3)] == list(kept)
        assert corpus.weights is not None
        assert corpus.weights.tolist() == [3, 1, 9]
        assert [corpus.image_ids[o] for o in corpus.owner] == [whole.image_ids[whole.owner[c]] for c in (7, 2, 100)]
        assert len(corpus.image_ids) == len({int(whole.owner[c]) for c in (7, 2, 100)})
        assert load_corpus(spec, "val").caption_ids == load_corpus(tiny_features, "val").caption_ids
        assert available_splits(spec) == available_splits(tiny_features)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not valid JSON"),
        ({"data": "x", "split": "train"}, "'weights' is missing"),
        ({"weights": {}}, "keeps no caption"),
        ({"weights": {"nobody": 1}}, "has no caption 'nobody'; make the file anew"),
        ({"weights": {"FIRST": 0}}, "weight 0 is not a number of pairs"),
        ({"weights": {"FIRST": "many"}}, "weight 'many' is not a number of pairs"),
    ],
)
def test_unusable_files(record: object, message: str, tiny_features: str, tmp_path: Path) -> None:
    if isinstance(record, dict):
        record = {"data": tiny_features, "split": "train", **record}
        if "weights" not in record or record["data"] == "x":
            record.pop("weights", None)
        first = load_corpus(tiny_features, "train").caption_ids[0]
        record = json.dumps(record).replace("FIRST", first)
    (tmp_path / "kept.json").write_text(str(record))
    with pytest.raises(InputError, match=message) as refused:
        load_corpus(f"dedup:{tmp_path / 'kept.json'}", "train")
    assert "kept.json" in str(refused.value)


@pytest.fixture
def weighted(config: Config, tiny_features: str, tmp_path: Path) -> Config:
    captions = load_corpus(tiny_features, "train").caption_ids
    dedup.write(tmp_path / "kept.json", tiny_features, "train", dict(zip(captions, [20, *[1] * 119], strict=True)))
    return replace(config, data=f"dedup:{tmp_path / 'kept.json'}")


def test_training_meets_pairs_as_often_as_they_weigh(weighted: Config) -> None:
    trainer = Trainer(weighted)
    met = Counter(pair for epoch in range(300) for batch in trainer._order(epoch, 0) for pair in batch)
    total = sum(met.values())
    assert met[0] / total == pytest.approx(20 / 139, rel=0.05)
    assert np.mean([met[pair] for pair in range(1, 120)]) / total == pytest.approx(1 / 139, rel=0.05)


def test_a_weighted_run_resumes(weighted: Config, tmp_path: Path) -> None:
    Trainer(weighted).fit()
    half = replace(weighted, out=str(tmp_path / "half"))

    def stop(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        before_step(Trainer(half), stop).fit()
    Trainer(half, resume=True).fit()
    assert_same_run(tmp_path / "half", Path(weighted.out))


def test_weights_and_a_sampler_do_not_go_together(weighted: Config) -> None:
    with pytest.raises(InputError, match="drawn by their weights; leave out --sampler"):
        Trainer(replace(weighted, sampler="clustered"))
