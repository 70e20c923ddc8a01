"""An audit after a power cut at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from audited import draw
from power_cut import bad_states, recording

from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.data.text import WordTokenizer
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.robustness import audit as audit_module
from training.robustness.audit import Audit, AuditConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = AuditConfig(("query-image", "query-text"), queries=6, others=4, epsilons=(0.1,), steps=2, trials=1)


@pytest.fixture
def audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DualEncoder, Corpus]:
    monkeypatch.setattr(audit_module, "CHUNK", 2)
    torch.manual_seed(0)
    corpus = load_corpus(draw(tmp_path / "pictures"), "all")
    tower = ImageTowerConfig(size=16)
    config = ModelConfig(image=tower, text=TextTowerConfig(word_dim=16, min_count=1), dim=32)
    return DualEncoder(config, WordTokenizer.fit(corpus.captions, 1, 8)), corpus


def run(audited: tuple[DualEncoder, Corpus], out: Path) -> str:
    record: dict[str, Any] = Audit(*audited, SMALL, out).run()
    return json.dumps({**record, "seconds": 0})


@pytest.mark.parametrize("most", [4, pytest.param(None, marks=pytest.mark.soak)])
def test_an_audit_ends_with_the_same_record_after_a_power_cut_at_any_moment(
    most: int | None, audited: tuple[DualEncoder, Corpus], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    with recording(tmp_path / "disk") as recorder:
        record = run(audited, tmp_path / "disk" / "run" / "audit")
        recorder.acknowledge()

    def look(directory: Path, acknowledged: int) -> None:
        assert run(audited, directory / "run" / "audit") == record
        parts = directory / "run" / "audit" / "parts"
        for path in (tmp_path / "disk" / "run" / "audit" / "parts").iterdir():
            assert (parts / path.name).read_bytes() == path.read_bytes()

    bad = bad_states(recorder, look, tmp_path, most)
    assert not bad, bad[:3]
