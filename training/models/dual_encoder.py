"""The two towers together: encode, save, load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from training.data.batches import Inputs, Pixels, Tokens
from training.data.corpus import ImageSource
from training.data.image_transform import ImageTransform
from training.data.text import VOCABULARY_FILE, HubTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from training.errors import InputError
from training.files import current_files, replacing_files
from training.models.config import ModelConfig
from training.models.hub import checksum, first_line, locate, unavailable
from training.models.image_tower import PixelBackbone, build_image_backbone
from training.models.saved_config import CONFIG_FILE, FORMAT, SavedConfig, read_config, without_memory
from training.models.similarity import SIMILARITIES, Similarity
from training.models.text_tower import HubText, build_text_backbone
from training.models.tower import Tower, default_device, evaluating

WEIGHTS_FILE, CARD_FILE = "model.safetensors", "README.md"


class DualEncoder(nn.Module):
    """Image tower, text tower and the tokenizer they were trained with.

    Args:
        config: What the towers are made of.
        tokenizer: Ids for the text tower.
        pretrained: Load the backbones' pretrained weights; False when a checkpoint supplies them.
        architectures: ``{"image": …, "text": …}`` as recorded in a checkpoint.

    Example:
        >>> model = DualEncoder.from_pretrained("runs/flickr8k")            # doctest: +SKIP
        >>> images = model.encode_images([Image.open("dog.jpg")])           # doctest: +SKIP
        >>> texts = model.encode_texts(["a dog in the snow"])               # doctest: +SKIP
        >>> model.similarity.scores(images, texts)                          # doctest: +SKIP
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        pretrained: bool = True,
        architectures: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        known = architectures or {}
        self.config = config
        self.tokenizer = tokenizer
        image = build_image_backbone(config.image, pretrained or config.image.frozen, known.get("image"))
        words = len(tokenizer) if isinstance(tokenizer, WordTokenizer) else 0
        text = build_text_backbone(config.text, config.dim, words, pretrained or config.text.frozen, known.get("text"))
        if isinstance(text, HubText) and isinstance(tokenizer, HubTokenizer) and not _without_memory(text):
            text.check(config.text.encoder, tokenizer)
        self.image_tower = Tower(image, config.image, config.dim, config.absolute)
        self.text_tower = Tower(text, config.text, config.dim, config.absolute)
        self.similarity: Similarity = SIMILARITIES[config.similarity]

    @property
    def towers(self) -> dict[str, Tower]:
        """``image`` and ``text``."""
        return {"image": self.image_tower, "text": self.text_tower}

    @property
    def architectures(self) -> dict[str, Any]:
        """What is needed to build both backbones anew without their pretrained weights."""
        return {side: tower.backbone.architecture for side, tower in self.towers.items()}

    @property
    def frozen(self) -> dict[str, str]:
        """Checksums of frozen backbones by tower."""
        return {side: tower.checksum for side, tower in self.towers.items() if tower.checksum}

    def check_frozen(self, frozen: dict[str, str], origin: str) -> None:
        """Compare frozen backbones to those of training. Raises :class:`InputError`, which begins with ``origin``."""
        for side, tower in self.towers.items():
            if tower.checksum != frozen.get(side):
                raise InputError(
                    f"{origin}: {tower.config.encoder} has other weights here than when the model was trained "
                    f"({side} tower); point VSE_MODELS at the original ones"
                )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def transform(self, augment: str = "none") -> ImageTransform:
        """The picture preprocessing of the image tower.

        Raises:
            InputError: If the image tower takes precomputed features and so cannot see pictures.
        """
        backbone = self.image_tower.backbone
        if not isinstance(backbone, PixelBackbone):
            raise InputError(
                "this model was trained on precomputed features and cannot encode pictures; "
                "train one with an image encoder, e.g. --image.encoder torchvision:resnet50"
            )
        own = backbone.preprocessing
        return ImageTransform(own.size, own.resize, own.interpolation, augment)

    @torch.no_grad()
    def encode(self, side: str, inputs: Inputs, batch_size: int = 64, project: bool = False) -> Tensor:
        """Embed every row of ``inputs`` in evaluation mode; the previous mode of each module is restored.

        Args:
            side: ``image`` or ``text``.
            inputs: Pixels, token ids or features, ``N`` rows.
            batch_size: Rows at a time.
            project: ``inputs`` are features from :meth:`Tower.features`, so only the rest is to be done.

        Returns:
            float32 ``(N, D)`` on the CPU.
        """
        tower: Tower = self.image_tower if side == "image" else self.text_tower
        encode = tower.project if project else tower
        rows = []
        starts = range(0, len(inputs), batch_size)
        bar = tqdm(starts, desc=f"encode {side}s", unit="batch", delay=2, leave=False, disable=len(starts) < 2 or None)
        with evaluating(self):
            for start in bar:
                chosen = np.arange(start, min(start + batch_size, len(inputs)))
                rows.append(encode(*inputs.fetch(chosen, None).to(self.device)).float().cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.config.dim)

    def encode_images(self, images: Sequence[Image.Image | ImageSource], batch_size: int = 64) -> Tensor:
        """Pictures → embeddings float32 ``(N, D)``."""
        sources = [_Ready(image) if isinstance(image, Image.Image) else image for image in images]
        return self.encode("image", Pixels(sources, self.transform()), batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Captions → embeddings float32 ``(N, D)``. Raises :class:`InputError` for an empty one."""
        for text in texts:
            if not text.strip():
                raise InputError("the query is empty; write at least one word")
        return self.encode("text", Tokens(texts, self.tokenizer), batch_size)

    def save_pretrained(self, directory: str | Path, card: str | None = None) -> None:
        """Write ``config.json``, ``model.safetensors``, the tokenizer and the model card.

        Frozen backbones are named with their checksum, not copied. The files replace the old ones only
        once all of them are complete.

        Args:
            directory: Created if needed.
            card: Markdown for ``README.md``; without it an existing card is kept.

        Raises:
            OSError: If the directory cannot be written; what it held is still there.
        """
        record = {
            "format": FORMAT,
            **asdict(self.config),
            "architectures": self.architectures,
            "frozen": self.frozen,
            "vocabulary": _source(self.tokenizer),
        }
        # cloned, since a file cannot hold two names for the same memory
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in self.trained_state().items()}
        with replacing_files(Path(directory)) as complete:
            self.tokenizer.save(complete)
            if card is not None:
                (complete / CARD_FILE).write_text(card, encoding="utf-8")
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            (complete / CONFIG_FILE).write_text(text, encoding="utf-8")
            (complete / WEIGHTS_FILE).write_bytes(save(weights))

    def trained_state(self) -> dict[str, Tensor]:
        """The state dict without frozen backbones."""
        frozen = tuple(f"{side}_tower.backbone." for side in self.towers if getattr(self.config, side).frozen)
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(frozen)}

    def load_trained_state(self, state: dict[str, Tensor], origin: str) -> None:
        """Inverse of :meth:`trained_state`. Raises :class:`InputError` if ``state`` is another model's."""
        self.check_state(state, origin)
        self.load_state_dict(state, strict=False)

    def check_state(self, state: dict[str, Tensor], origin: str) -> None:
        """Compare names and shapes to those of :meth:`trained_state`.

        Raises:
            InputError: If they differ; names ``origin``, where the state comes from.
        """
        expected = self.trained_state()
        if strange := expected.keys() ^ state.keys():
            name = min(strange)
            raise InputError(f"{origin}: weights of another configuration (at {name}); restore the run's own files")
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape:
                raise InputError(
                    f"{origin}: {name} is {tuple(tensor.shape)}, the configuration says "
                    f"{tuple(expected[name].shape)}; restore the run's own files"
                )

    def take_weights(self, other: DualEncoder, origin: str) -> None:
        """Copy all weights of a model with the same towers, frozen or not.

        Raises:
            InputError: If the towers differ, or a backbone that is frozen here has been trained there; names
                ``origin``, where the other model comes from.
        """
        state, own = other.state_dict(), self.state_dict()
        if strange := state.keys() ^ own.keys() | {
            n for n in own.keys() & state.keys() if own[n].shape != state[n].shape
        }:
            raise InputError(
                f"{origin}: has other towers than this configuration (at {min(strange)}); take its model settings"
            )
        self.load_state_dict(state)
        for side, tower in self.towers.items():
            if tower.checksum not in (None, checksum(tower.backbone)):
                raise InputError(
                    f"{origin}: its {side} backbone has been trained, and a frozen one is stored by name alone; "
                    f"add --model.{side}.frozen False"
                )

    @classmethod
    def from_pretrained(cls, name: str | Path, device: torch.device | str | None = None) -> DualEncoder:
        """Load from a directory written by :meth:`save_pretrained`, or from the hub.

        Args:
            name: The directory, or the hub name.
            device: Where to run; by default CUDA where there is one.

        Raises:
            InputError: If the directory is not a model, a frozen backbone has other weights than those the
                model was trained with, or weights and configuration disagree.
        """
        directory = _download(str(name))
        path, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
        saved = read_config(path)
        tokenizer = load_tokenizer(directory, saved.model.text.encoder, saved.model.text.max_tokens)
        if saved.vocabulary not in (None, _source(tokenizer)):
            raise InputError(f"{directory / VOCABULARY_FILE}: another model's vocabulary; restore the run's own file")
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{weights}: cannot be read ({error}); restore the file") from None
        cls._bear_out(saved, tokenizer, state, directory)
        model = cls(saved.model, tokenizer, pretrained=False, architectures=saved.architectures)
        model.check_frozen(saved.frozen, str(path))
        model.load_trained_state(state, str(weights))
        return model.to(device or default_device()).eval()

    @classmethod
    def _bear_out(cls, saved: SavedConfig, tokenizer: Tokenizer, state: dict[str, Tensor], directory: Path) -> None:
        """Compare what a configuration would build to the weights that are there, before memory is taken for it."""
        config = saved.model
        thawed = replace(config, image=replace(config.image, frozen=False), text=replace(config.text, frozen=False))
        try:
            with without_memory():
                skeleton = cls(thawed, tokenizer, pretrained=False, architectures=saved.architectures)
        except Exception as error:  # libraries' networks raise whatever their code stumbles on
            reason = first_line(error)
            raise InputError(f"{directory / CONFIG_FILE}: no such model can be built ({reason}); restore it") from None
        skeleton.config = config
        skeleton.check_state(state, str(directory / WEIGHTS_FILE))

    def fingerprint(self) -> str:
        """SHA-256 over all weights: equal models embed equally."""
        return checksum(self)


def _without_memory(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


def _source(tokenizer: Tokenizer) -> str | None:
    """What a word vocabulary was fitted on."""
    return tokenizer.source if isinstance(tokenizer, WordTokenizer) else None


class _Ready:
    """A picture that is already in memory."""

    name, fingerprint = "picture", ""

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    def load(self) -> Image.Image:
        return self._image.convert("RGB")


def _download(name: str) -> Path:
    if Path(name).exists():
        return current_files(Path(name))
    where = locate(name)
    if where != name:
        return Path(where)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such directory; give the directory that vse train wrote, or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.md"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise unavailable(name, error) from None
