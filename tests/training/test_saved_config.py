"""Model folders of strangers: one line, and nothing allocated that the weights do not bear out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hub import save_encoder, save_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from training.data.text import HubTokenizer, WordTokenizer
from training.errors import InputError
from training.models import saved_config
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder

DEEP = "[" * 100_000
Change = Callable[[dict[str, Any]], object]


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that takes memory."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        sizes = (t.numel() * t.element_size() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_cpu)
        self.bytes = max(self.bytes, *sizes, 0)
        return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a word vocabulary, and one with a text encoder of the hub, both trained from scratch."""
    folder = tmp_path_factory.mktemp("models")
    encoder = save_tokenizer(save_encoder(folder / "encoder"))
    image = ImageTowerConfig(size=32, head="mlp", hidden=8)
    words = TextTowerConfig(min_count=1, word_dim=6)
    torch.manual_seed(0)
    DualEncoder(ModelConfig(image, words, dim=16), WordTokenizer.fit(["a dog", "a cat"], 1)).save_pretrained(
        folder / "words"
    )
    hub = ModelConfig(image, TextTowerConfig(f"hf:{encoder}", "mean", head="linear"), dim=16)
    DualEncoder(hub, HubTokenizer.load(encoder)).save_pretrained(folder / "hub")
    shutil.rmtree(encoder)
    return {"words": folder / "words", "hub": folder / "hub"}


def put(path: str, value: object) -> Change:
    """Sets a dotted path of ``config.json``."""

    def change(record: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            record = record[name]
        record[last] = value

    return change


def refusal(folder: Path) -> str:
    with LargestTensor() as largest, pytest.raises(InputError, match=r"^[^\n]+$") as refused:
        DualEncoder.from_pretrained(folder, "cpu")
    assert largest.bytes < 10 * (folder / "model.safetensors").stat().st_size
    return str(refused.value)


@pytest.mark.parametrize("kind", ["words", "hub"])
def test_what_was_saved_loads_and_takes_no_more_memory_than_its_weights(kind: str, folders: dict[str, Path]) -> None:
    with LargestTensor() as largest:
        DualEncoder.from_pretrained(folders[kind], "cpu")
    assert largest.bytes < 10 * (folders[kind] / "model.safetensors").stat().st_size


NUMBERS = [
    -(10**12),
    -1,
    0,
    100_000,
    10**6,
    10**7,
    10**10,
    10**12,
    10**300,
    1.5,
    float("nan"),
    True,
    "16",
    None,
    [],
    {},
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("dim", "image.size", "image.resize", "image.hidden", "text.word_dim")
        for value in NUMBERS
        if (name, value) != ("image.resize", 0)  # the backbone's own
    ],
)
def test_sizes_are_bounded_and_borne_out(name: str, value: object, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders["words"], tmp_path, put(name, value))
    assert str(folder) in refusal(folder)


def edited(source: Path, tmp_path: Path, change: Change) -> Path:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    return folder


ELSEWHERE: list[tuple[str, Change]] = [
    *(("words", put(name, value)) for name in ("frozen", "architectures") for value in ([], None, "x", 3, [{}])),
    *(("words", put(f"architectures.{side}", value)) for side in ("image", "text") for value in ([], None, 10**10)),
    *(("words", put(name, value)) for name in ("image", "text") for value in ([], None, "small-cnn")),
    ("words", put("image.size", 4096)),
    ("words", put("image.layers", [0] * 100_000)),
    ("words", put("image.feature_dim", 10**12)),
    ("words", put("image.encoder", "precomputed")),
    ("words", put("image.encoder", "torchvision:vit_h_14")),
    ("words", put("text.encoder", ["gru"])),
    ("words", put("text.max_tokens", 10**12)),
    ("words", put("text.pooling", ["mean"])),
    ("words", put("similarity", {})),
    ("words", put("format", [1])),
    ("hub", put("text.max_tokens", 10**7)),
    ("hub", put("text.layers", [0] * 1000)),
    ("hub", put("architectures.text", {})),
    ("hub", put("architectures.text.config", [])),
    *(
        ("hub", put(f"architectures.text.config.{name}", value))
        for name, values in {
            "hidden_size": (-1, 0, 10**5, 10**12, "x", None, []),
            "intermediate_size": (10**8, 10**12),
            "num_hidden_layers": (-1, 10**5, 10**12, None),
            "num_attention_heads": (0, -1, 3, 10**12),
            "vocab_size": (-1, 10**8, 10**12),
            "max_position_embeddings": (10**8, 10**12),
            "model_type": ("no such model", [], None, 3),
            "hidden_act": ("no such function", None),
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("kind", "change"), ELSEWHERE)
def test_whatever_else_it_says_is_one_line(
    kind: str, change: Change, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_config, "MOST_TENSORS", 500)  # soon reached
    folder = edited(folders[kind], tmp_path, change)
    line = refusal(folder)
    assert str(folder) in line or line.startswith("hf:")


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        *(
            ("words", "config.json", content)
            for content in (DEEP, '{"format": 1, "image": ' + DEEP, "9" * 5000, "null")
        ),
        *(("words", "vocabulary.json", content) for content in (DEEP, '{"words": ' + DEEP, "[]", "3", "")),
        *(("hub", "tokenizer.json", content) for content in (DEEP, "[]", "", "{}", '{"model": 3}')),
        *(("hub", "tokenizer_config.json", content) for content in (DEEP, "[]", '{"model_max_length": "x"}')),
    ],
)
def test_files_that_hold_something_else_are_one_line(
    kind: str, name: str, content: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    (folder / name).write_text(content)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "change", [{"max_tokens": "64"}, {"max_tokens": 1.5}, {"words": ["a", 3]}, {"words": {"a": 1}}]
)
def test_a_vocabulary_of_other_types_is_one_line(
    change: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["words"], tmp_path / "model"))
    record = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps(record | change))
    assert "vocabulary" in refusal(folder)


def test_a_frozen_encoder_gets_pictures_cut_as_in_training(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = save_encoder(tmp_path / "vit", ViTModel, ViTConfig(**sizes, image_size=32, patch_size=16))
    side = {"height": 32, "width": 32}
    ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.2] * 3).save_pretrained(encoder)
    towers = ModelConfig(ImageTowerConfig(f"hf:{encoder}", frozen=True), TextTowerConfig(min_count=1), dim=16)
    model = DualEncoder(towers, WordTokenizer.fit(["a dog"], 1)).eval()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size=side, image_mean=[0.9] * 3, image_std=[0.1] * 3).save_pretrained(encoder)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    loaded = DualEncoder.from_pretrained(tmp_path / "model", "cpu")
    assert torch.equal(loaded.image_tower(pixels), model.image_tower(pixels))
