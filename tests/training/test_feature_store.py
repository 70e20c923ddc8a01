"""The feature cache under tokenizers that change, full disks, damage, and features that float16 cannot hold."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_hub import WORDS, save_encoder, save_tokenizer

from training.data.batches import Features, Pixels, Tokens
from training.data.corpus import Corpus
from training.data.image_transform import ImageTransform
from training.data.images import ImageFile
from training.data.text import HubTokenizer
from training.errors import InputError
from training.models import feature_store
from training.models import features as module
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from training.models.features import corpus_inputs

CAPTIONS = [f"{word} Colour{n} {'shape1 ' * (n + 1)}" for n in range(6) for word in ("A", "the", "one", "my", "its")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "CHUNK", 8)
    return tmp_path / "cache" / "features"


def build(encoder: Path, pooling: Any = "mean", tokenizer: Path | None = None, **settings: Any) -> DualEncoder:
    text = TextTowerConfig(f"hf:{encoder}", pooling, head="linear", frozen=True)
    config = ModelConfig(ImageTowerConfig("precomputed", feature_dim=4), text, dim=8)
    torch.manual_seed(0)
    return DualEncoder(config, HubTokenizer.load(tokenizer or encoder, **settings))


def corpus(captions: list[str] = CAPTIONS) -> Corpus:
    count, ids = len(captions), [str(n) for n in range(len(captions))]
    return Corpus("data", "train", ids, captions, ids, np.arange(count), features=np.zeros((count, 4)))


def cached(model: DualEncoder) -> Features:
    features, past_backbone = corpus_inputs(model, corpus(), "text")
    assert past_backbone
    assert isinstance(features, Features)
    return features


def assert_right(features: Features, model: DualEncoder) -> None:
    """They are what the backbone gives now, but for half precision."""
    tokens = Tokens(CAPTIONS, model.tokenizer)
    for index in range(len(CAPTIONS)):
        row = np.array([index])
        with torch.no_grad():
            expected = model.text_tower.features(*tokens.fetch(row, None)).values
        torch.testing.assert_close(features.fetch(row, None).values, expected, atol=4e-3, rtol=2e-3)


def rows_computed(model: DualEncoder) -> list[int]:
    """Grows by the size of each batch that goes through the text backbone."""
    rows: list[int] = []
    model.text_tower.backbone.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_another_tokenizer_gets_other_features(pooling: str, encoder: Path, tmp_path: Path) -> None:
    reversed_words = WORDS[:5] + WORDS[5:][::-1]
    tokenizers: list[dict[str, Any]] = [
        {},
        {"max_tokens": 5},
        {"tokenizer": save_tokenizer(tmp_path / "cased", do_lower_case=False)},
        {"tokenizer": save_tokenizer(tmp_path / "short", model_max_length=6)},
        {"tokenizer": save_tokenizer(tmp_path / "words", reversed_words)},
        {},
    ]
    for settings in tokenizers:
        model = build(encoder, pooling, **settings)
        assert_right(cached(model), model)


def test_the_captions_lengths_are_part_of_their_fingerprint() -> None:
    class Halves:
        max_tokens = 9

        def __init__(self, cut: int) -> None:
            self.cut = cut

        def __call__(self, captions: Any) -> list[torch.Tensor]:
            return list(torch.arange(8).split([self.cut, 8 - self.cut]))

        def save(self, directory: Path) -> None: ...

    fingerprints = {Tokens(["a", "b"], Halves(cut)).fingerprint for cut in range(2, 7)}
    assert len(fingerprints) == 5


def test_pictures_are_known_by_content_and_by_how_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(folder: Path, **changes: Any) -> str:
        transform = replace(ImageTransform(32, 40), **changes)
        return Pixels([ImageFile(folder / f"{n}.bmp") for n in range(2)], transform).fingerprint

    for folder, colours in (("a", ("red", "blue")), ("b", ("red", "blue")), ("c", ("red", "lime"))):
        (tmp_path / folder).mkdir()
        for n, colour in enumerate(colours):
            path = tmp_path / folder / f"{n}.bmp"
            Image.new("RGB", (8, 8), colour).save(path)
            os.utime(path, ns=(0, 0))  # as an archive may say
    a = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == a
    assert fingerprint(tmp_path / "c") != a
    assert fingerprint(tmp_path / "a", augment="crop") == a
    for changes in ({"size": 31}, {"resize": 41}, {"interpolation": "bilinear"}):
        assert fingerprint(tmp_path / "a", **changes) != a
    monkeypatch.setattr("training.data.batches.DECODER_VERSION", 10**6)
    assert fingerprint(tmp_path / "a") != a


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_the_room_is_really_taken_before_the_second_chunk(
    pooling: str, encoder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []

    def look(path: Path, text: str) -> None:
        status = (path.parent / "values.npy").stat()
        taken.append(status.st_blocks * 512 >= status.st_size)
        write_text(path, text)

    write_text = feature_store.write_text
    monkeypatch.setattr(feature_store, "write_text", look)
    cached(build(encoder, pooling))
    assert taken == [True] * 4


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(encoder: Path, cache: Path) -> None:
    model = build(encoder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(InputError, match=r"^[^\n]*take 960 bytes \(File too large, [^\n]*VSE_CACHE[^\n]*$"):
            cached(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["lock"]
    assert_right(cached(model), model)


def flip(name: str, position: int) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        content = bytearray((entry / name).read_bytes())
        content[position % len(content)] ^= 0x11
        (entry / name).write_bytes(content)

    return damage


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda entry: (entry / name).write_bytes(content)


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda entry: os.truncate(entry / name, size)


def remove(name: str) -> Callable[[Path], None]:
    return lambda entry: (entry / name).unlink()


def folder_instead(name: str) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        (entry / name).unlink()
        (entry / name / "inside").mkdir(parents=True)

    return damage


def edit(**changes: Any) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        record = json.loads((entry / "progress.json").read_text())
        (entry / "progress.json").write_text(json.dumps(record | changes))

    return damage


def other_array(entry: Path) -> None:
    np.save(entry / "values.npy", np.zeros((len(CAPTIONS), 3), np.float16))


DAMAGES = [
    *(flip("values.npy", position) for position in (0, 7, 37, 64, 128, 500, -1)),
    *(flip("progress.json", position) for position in (*range(0, 200, 23), -1)),
    *(write("progress.json", content) for content in (b"", b"[]", b"null", b"{}", b"\xff", b"[" * 50_000)),
    write("progress.json", b'{"rows": 30, "label": "of an earlier version"}'),
    *(write("values.npy", content) for content in (b"", b"\x93NUMPY", b"not an array")),
    *(cut("values.npy", size) for size in (10, 128, 300)),
    *(make(name) for make in (remove, folder_instead) for name in ("values.npy", "progress.json")),
    edit(checksums={"0": "x"}),
    edit(checksums={"99": 1}),
    edit(checksums={"-1": 1}),
    edit(checksums=None),
    edit(shape=[30, 3]),
    other_array,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_mended(damage: Callable[[Path], object], encoder: Path, cache: Path) -> None:
    model = build(encoder)
    first = cached(model)
    (entry,) = cache.iterdir()
    before = first.fetch(np.arange(len(CAPTIONS)), None).values
    del first
    damage(entry)
    for _ in range(2):
        assert torch.equal(cached(model).fetch(np.arange(len(CAPTIONS)), None).values, before)
    computed = rows_computed(model)
    cached(model)
    assert computed == []


def test_only_what_is_damaged_is_computed_again_and_it_is_said(
    encoder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(encoder)
    cached(model)
    (entry,) = cache.iterdir()
    flip("values.npy", 128 + 2 * 16 * 10)(entry)  # in row 10
    computed = rows_computed(model)
    cached(model)
    assert sum(computed) == 8
    (record,) = caplog.records
    assert record.getMessage() == f"{entry}: 1 of 4 chunks are damaged; their features are computed again"
    write("progress.json", b"[]")(entry)
    cached(model)
    assert caplog.records[-1].getMessage().startswith(f"{entry}: cannot be used (")
    assert sum(computed) == 8 + len(CAPTIONS)


def test_a_mended_entry_leaves_the_map_of_another_process_alone(encoder: Path, cache: Path) -> None:
    model = build(encoder)
    in_use = cached(model)
    before = in_use.fetch(np.arange(len(CAPTIONS)), None).values
    (entry,) = cache.iterdir()
    write("progress.json", b"[]")(entry)
    cached(model)
    assert torch.equal(in_use.fetch(np.arange(len(CAPTIONS)), None).values, before)


def spoil(model: DualEncoder, word: str, factor: float) -> None:
    """Multiply what the text backbone gives for captions with a word."""

    def hook(_: object, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        hit = (inputs[0] == WORDS.index(word)).any(1)
        return output._replace(values=torch.where(hit[:, None, None], output.values * factor, output.values))

    model.text_tower.backbone.register_forward_hook(hook)


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_what_float16_cannot_hold_is_kept_as_float32(pooling: str, encoder: Path) -> None:
    model = build(encoder, pooling)
    spoil(model, "colour4", 1e6)
    features = cached(model)
    assert features._values.dtype == np.float32
    assert_right(features, model)
    computed = rows_computed(model)
    assert cached(model)._values.dtype == np.float32
    assert computed == []


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_refused_by_its_record(factor: float, encoder: Path) -> None:
    model = build(encoder)
    spoil(model, "colour4", factor)
    with pytest.raises(InputError, match=r"^caption '[^\n]*Colour4[^\n]*hf:[^\n]*not finite[^\n]*$"):
        cached(model)
