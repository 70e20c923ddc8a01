"""The configuration of a run: one frozen dataclass tree ↔ TOML ↔ command-line flags."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from training.errors import InputError
from training.models.config import ModelConfig


@dataclass(frozen=True)
class LossConfig:
    """What the embeddings are asked for."""

    name: Literal["curriculum", "max", "sum", "infonce", "sigmoid"] = "curriculum"
    """curriculum goes from the sum of hinges to the hardest one (VSE++); max and sum are its two ends."""
    margin: float = 0.2
    """Hinge margin in units of the score: 0.2 suits cosine, 0.05 order similarity."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the batch. VSE++ sums; with a gradient clip that is not the same as the mean."""
    warmup_epochs: float = 1.0
    """Length of the curriculum, also of the one that starts when a collapse is noticed."""
    on_collapse: Literal["fall_back", "warn"] = "fall_back"
    """What to do when all similarities have become equal: restart the curriculum, or only say so."""
    temperature: float = 0.07
    """infonce, sigmoid: initial temperature, learned."""


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """adam is the VSE++ recipe; adamw decouples weight decay."""
    lr: float = 2e-4
    """Peak learning rate of heads and of encoders trained from scratch."""
    backbone_lr: float = 2e-5
    """Peak learning rate of pretrained backbones that are fine-tuned."""
    weight_decay: float = 0.0
    """Applied to matrices only, not to biases and norms."""
    epochs: int = 30
    """Every caption is visited once per epoch."""
    batch_size: int = 128
    """Pairs per step; hard negatives come from the batch, so larger is harder."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step divides the rate by ten every decay_epochs; cosine ends at zero."""
    decay_epochs: int = 15
    """Epochs between two decays of the step schedule."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from zero."""
    clip: float = 2.0
    """Largest gradient norm; 0 switches clipping off."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 runs the towers under autocast; losses stay in float32."""


@dataclass(frozen=True)
class ClusterConfig:
    """Draws by gradient, for sampler = clustered and importance."""

    count: int = 64
    """Clusters; at most half the batch are made, so that each batch sees all of them, most of them twice."""
    allocation: Literal["equal", "proportional", "neyman"] = "proportional"
    """How a batch is shared among clusters. proportional never loses; neyman gains most on redundant data."""
    mix: float = 0.2
    """Fraction of each batch that goes by size whatever the allocation; no pair weighs more than 1 / mix."""
    sketch: int = 32
    """Numbers that stand for a pair's gradient."""
    pool: int = 0
    """Pairs that are drawn as negatives beside each batch; 0 means as many as the batch."""


@dataclass(frozen=True)
class AdversarialConfig:
    """Training on pictures that PGD perturbs within an ℓ∞ ball, against the model as it is at each step."""

    method: Literal["none", "fare", "supervised"] = "none"
    """fare keeps perturbed pictures where the model in init embeds clean ones; supervised: the run's loss on them."""
    epsilon: str = "1/255"
    """Radius as a fraction of the pixel range."""
    steps: int = 2
    """Gradient steps of the attack."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: str = ""
    """KIND:PATH, e.g. karpathy:flickr8k, coco:DIR, precomputed:DIR, folder:DIR, scenes:6000."""
    out: str = ""
    """Run directory."""
    train_split: str = "train"
    """Splits may be joined, e.g. train+restval."""
    val_split: str = "val"
    """Its rSum selects the weights that are kept."""
    init: str = ""
    """Begin with the weights of this run, of the same towers; its word vocabulary is taken over."""
    augment: Literal["none", "crop", "crop+flip"] = "none"
    """Random views of training pictures. A flip turns left into right: not for captions that say which."""
    sampler: Literal["uniform", "clustered", "importance"] = "uniform"
    """By gradient clusters or gradient norms, in epochs for which that is measured to pay; uniform in others."""
    clusters: ClusterConfig = field(default_factory=ClusterConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    """Decides initial weights, order of the pairs, augmentation and dropout."""
    workers: int = 0
    """Processes that decode pictures."""
    validate_every: int = 0
    """Steps between validations; 0 validates after each epoch."""
    patience: int = 0
    """Stop after this many validations without a better rSum; 0 never does."""
    checkpoint_every: int = 500
    """Steps between saved states; one is also saved after each validation."""
    tensorboard: bool = False
    """Also write TensorBoard events (pip install 'vse-app[tensorboard]')."""


def from_dict(record: dict[str, Any], origin: str) -> Config:
    """Build a configuration from nested tables.

    Raises:
        InputError: For an unknown key or a value of the wrong type, naming ``origin`` and the key.
    """
    built: Config = _build(Config, record, origin, "")
    return built


def _build(kind: type[Any], record: dict[str, Any], origin: str, prefix: str) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise InputError(f"{origin}: unknown setting {name!r}; known here: {', '.join(hints)}")
        wanted = hints[key]
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise InputError(f"{origin}: {name} must be a table")
            values[key] = _build(wanted, value, origin, f"{name}.")
            continue
        if wanted == tuple[int, ...]:
            if not isinstance(value, list | tuple) or any(type(item) is not int for item in value):
                raise InputError(f"{origin}: {name} = {value!r} must be a list of whole numbers")
            values[key] = tuple(value)
            continue
        choices = get_args(wanted)
        if choices and value not in choices:
            raise InputError(f"{origin}: {name} = {value!r}; choose from {', '.join(map(repr, choices))}")
        if wanted is float and type(value) is int:
            value = float(value)
        if not choices and type(value) is not wanted:
            raise InputError(f"{origin}: {name} = {value!r} must be of type {wanted.__name__}")
        values[key] = value
    return kind(**values)


def read_toml(path: Path) -> Config:
    """Read a recipe or a run's ``config.toml``. Raises :class:`InputError` as :func:`from_dict` does."""
    try:
        return from_dict(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe; see training/recipes") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"{path}: not TOML ({error})") from None


def to_toml(config: Config) -> str:
    """The whole configuration, defaults included, so that it reruns the run under any later defaults."""
    lines: list[str] = []

    def table(value: Any, name: str) -> None:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if name:
            lines.append(f"\n[{name}]")
        lines.extend(f"{k} = {_scalar(v)}" for k, v in fields.items() if not dataclasses.is_dataclass(v))
        for key, inner in fields.items():
            if dataclasses.is_dataclass(inner):
                table(inner, f"{name}.{key}" if name else key)

    table(config, "")
    return "\n".join(lines) + "\n"


def _scalar(value: str | int | float | bool | tuple[int, ...]) -> str:
    if isinstance(value, tuple):
        return repr(list(value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)


def parse_epsilon(text: str) -> float:
    """``8/255`` or ``0.03``, a fraction of the pixel range, as a number.

    Raises:
        InputError: Unless it is one from 0 to 1.
    """
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"ε = {text!r}: not a number; write 2/255 or 0.008") from None
    if not 0 <= value <= 1:
        raise InputError(f"ε = {text}: pixels go from 0 to 1, so must ε; write {text.split('/')[0]}/255")
    return value


_LEAST = {
    "adversarial.steps": 1,
    "checkpoint_every": 1,
    "clusters.count": 1,
    "clusters.mix": 0,
    "clusters.pool": 0,
    "clusters.sketch": 1,
    "loss.warmup_epochs": 0,
    "model.dim": 1,
    "model.image.dropout": 0,
    "model.image.feature_dim": 0,
    "model.image.hidden": 1,
    "model.image.resize": 0,
    "model.image.size": 0,
    "model.text.dropout": 0,
    "model.text.hidden": 1,
    "model.text.max_tokens": 3,
    "model.text.word_dim": 1,
    "optim.backbone_lr": 0,
    "optim.batch_size": 2,
    "optim.clip": 0,
    "optim.decay_epochs": 1,
    "optim.epochs": 1,
    "optim.lr": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "patience": 0,
    "seed": 0,
    "validate_every": 0,
    "workers": 0,
}


_MOST = {
    "model.dim": 1 << 17,
    "model.image.feature_dim": 1 << 20,
    "model.image.hidden": 1 << 17,
    "model.image.resize": 1 << 12,
    "model.image.size": 1 << 12,
    "model.text.hidden": 1 << 17,
    "model.text.max_tokens": 1 << 13,
    "model.text.word_dim": 1 << 17,
}

_FREE = ("data", "out", "workers", "checkpoint_every", "patience", "tensorboard")  # for a resumed run to change


def check_ranges(config: Config) -> None:
    """Refuse numbers that no run can have; losses and transforms check their own.

    Raises:
        InputError: Naming the first such setting.
    """
    for name, least in _LEAST.items():
        value = attrgetter(name)(config)
        if not value >= least:
            raise InputError(f"{name} = {value!r} must be at least {least}")
        if value > _MOST.get(name, math.inf):
            raise InputError(f"{name} = {value!r} must be at most {_MOST[name]}")
        if name.endswith("dropout") and value >= 1:
            raise InputError(f"{name} = {value!r} must be below 1")
    parse_epsilon(config.adversarial.epsilon)
    mix = config.clusters.mix
    if not mix <= 1:
        raise InputError(f"clusters.mix = {mix!r} must be at most 1")
    if config.sampler == "importance" and mix == 0:
        raise InputError("clusters.mix = 0: pairs without a gradient would never be drawn again; take 0.2")


def changed_course(saved: Config, wanted: Config) -> str | None:
    """The first setting that a run cannot change when it is resumed, as :func:`difference` says it; None if none.

    It may change where its files lie, what only speeds it up or watches it, and when it ends, unless the learning
    rate depends on that. ``fare`` needs the model in ``init`` to the end, wherever it lies.
    """
    free = {name: getattr(wanted, name) for name in _FREE}
    if wanted.adversarial.method == "fare":
        free["init"] = wanted.init
    saved = replace(saved, **free)
    if wanted.optim.schedule != "cosine":
        saved = replace(saved, optim=replace(saved.optim, epochs=wanted.optim.epochs))
    changed = difference(saved, wanted)
    if changed and changed.startswith("optim.epochs"):
        changed += ", by which the cosine schedule goes"
    return changed


def difference(a: Config, b: Config) -> str | None:
    """The first setting in which two configurations differ, as ``name: a ≠ b``; None if there is none."""

    def walk(x: Any, y: Any, prefix: str) -> str | None:
        for f in dataclasses.fields(x):
            left, right = getattr(x, f.name), getattr(y, f.name)
            if dataclasses.is_dataclass(left):
                found = walk(left, right, f"{prefix}{f.name}.")
                if found:
                    return found
            elif left != right:
                return f"{prefix}{f.name}: {left!r} ≠ {right!r}"
        return None

    return walk(a, b, "")
