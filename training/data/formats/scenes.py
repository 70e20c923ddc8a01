"""The built-in data set: rendered scenes of a few objects whose captions need word order to be understood.

Two or three objects differ in shape and colour, and often in size and texture. Half of the scenes come with a
twin in which one thing is exchanged between two objects (their positions, colours, textures or sizes). Twins
are described by the same words in another order, so a bag of words cannot tell them apart.
Everything follows from the seed; no file is read.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.corpus import Corpus
from training.data.formats.scene_drawing import (
    BACKGROUNDS,
    COLOURS,
    DRAWING_VERSION,
    SHAPES,
    SIZES,
    TEXTURES,
    SceneObject,
    draw,
)
from training.errors import InputError
from training.files import replacing, write_text

DEFAULT_COUNT = 6000
MINIMUM_COUNT = 20
"""Fewer scenes would leave a split with no room for a pair of twins."""

SPLITS = ("train", "val", "test")

_TWIN_SHARE = 1 / 3  # of the draws; each makes two scenes, hence half of the scenes
_TRIPLE_SHARE = 0.15
_SWAPS = {"positions": ("x", "y"), "colours": ("colour",), "textures": ("texture",), "sizes": ("size",)}

_WORDS = {
    "disc": ("disc", "circle"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
    "plain": ("", "plain"),
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "spotted", "with dots"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
"""How captions word an attribute or a relation; attributes that are missing here have one word."""

_SENTENCES = (
    "{first} {forward} {second}{rest}",
    "there is {second} {backward} {first}{rest}",
    "on {backdrop}, {first} is {forward} {second}{rest}",
    "a picture showing {second} {backward} {first}{rest}, on {backdrop}",
    "{forward} {second} sits {first}{rest}",
)


@dataclass(frozen=True)
class Scene:
    """A picture described by its contents; an image source that is drawn when it is loaded.

    Attributes:
        objects: Two objects side by side or one above the other, and perhaps a third off their common axis.
        background: A key of ``BACKGROUNDS``.
        id: Unique within the data set.
    """

    objects: tuple[SceneObject, ...]
    background: str
    id: str

    @property
    def name(self) -> str:
        """What to call the scene in messages and results."""
        return self.id

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the pixels."""
        return hashlib.sha256(f"{DRAWING_VERSION} {self.objects} {self.background}".encode()).hexdigest()

    def load(self) -> Image.Image:
        """Draw the scene: RGB, 128 x 128 pixels."""
        return draw(self.objects, self.background)


def relation(subject: SceneObject, reference: SceneObject) -> str:
    """Where ``subject`` lies as seen from ``reference``: ``left``, ``right``, ``above`` or ``below``."""
    dx, dy = subject.x - reference.x, subject.y - reference.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def twins(scene: Scene) -> dict[str, Scene]:
    """Exchange one property between the first two objects.

    Returns:
        The twin for each of ``positions``, ``colours``, ``textures`` and ``sizes`` in which the two objects
        differ. Each has the id of ``scene``.
    """
    first, second, *rest = scene.objects
    swapped: dict[str, Scene] = {}
    for swap, fields in _SWAPS.items():
        to_first: dict[str, Any] = {field: getattr(second, field) for field in fields}
        to_second: dict[str, Any] = {field: getattr(first, field) for field in fields}
        if to_first != to_second:
            objects = (replace(first, **to_first), replace(second, **to_second), *rest)
            swapped[swap] = replace(scene, objects=objects)
    return swapped


def describe(scene: Scene) -> tuple[str, ...]:
    """Word a scene in five ways.

    Every caption gives each object's colour, shape and texture (none for plain, at times) and how the objects
    lie to each other. All but the last give every size, the last only if sizes differ. The third and the
    fourth also name the background. Captions alternate between the two orders of mention.

    Returns:
        Five different captions, always the same for a scene. Apart from a/an, its twins have the same words.
    """
    values = sorted(str(value) for item in scene.objects for value in vars(item).values())
    rng = random.Random(f"{values} {scene.background}")  # the same for twins
    first, second = scene.objects[:2]
    # Which object comes first hangs on its place alone, or twins would need other relation words.
    if (relation(first, second) in ("left", "above")) != (rng.random() < 0.5):
        first, second = second, first
    sizes_agree = len({item.size for item in scene.objects}) == 1

    captions = []
    for sentence in _SENTENCES:
        words = {key: rng.choice(options) for key, options in _WORDS.items()}
        if sizes_agree and sentence is _SENTENCES[-1]:
            words["small"] = words["large"] = ""
        rest = [f", and {_noun(item, words)} {words[relation(item, first)]} them" for item in scene.objects[2:]]
        captions.append(
            sentence.format(
                first=_noun(first, words),
                second=_noun(second, words),
                forward=words[relation(first, second)],
                backward=words[relation(second, first)],
                rest="".join(rest),
                backdrop=_with_article(f"{scene.background} background"),
            )
        )
    return tuple(captions)


def read_scenes(count: int, split: str, seed: int = 0) -> Corpus:
    """Generate one split of the data set.

    A tenth of the scenes is for validation and a tenth for testing. No two scenes share a caption, and twins
    share a split.

    Args:
        count: Number of scenes over all splits.
        split: ``train``, ``val`` or ``test``.
        seed: Which data set; different seeds give unrelated ones.

    Returns:
        The split, with five captions per scene.

    Raises:
        InputError: If the split does not exist or there are too few scenes.
    """
    if split not in SPLITS:
        raise InputError(f"scenes:{count}: no split {split!r}; choose one of {', '.join(SPLITS)}")
    scenes = _generate(count, seed)[split]
    return Corpus(
        name=f"scenes:{count}",
        split=split,
        image_ids=[scene.id for scene in scenes],
        captions=[caption for scene in scenes for caption in describe(scene)],
        caption_ids=[f"{scene.id}#{i}" for scene in scenes for i in range(len(_SENTENCES))],
        owner=np.repeat(np.arange(len(scenes)), len(_SENTENCES)),
        images=scenes,
    )


def write_scenes(directory: str | Path, count: int = DEFAULT_COUNT, seed: int = 0) -> None:
    """Write the data set to a folder in Karpathy's layout: ``images/*.png`` and ``dataset_scenes.json``.

    The JSON file is written last, when every picture that it names is there.

    Args:
        directory: Made if it does not exist.
        count: Number of scenes over all splits.
        seed: Which data set.

    Raises:
        InputError: If there are too few scenes or the folder cannot be made.
    """
    splits = _generate(count, seed)
    pictures = Path(directory) / "images"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{pictures}: cannot make this folder ({error.strerror}); name another") from error

    records: list[dict[str, object]] = []
    with tqdm(total=count, desc="drawing scenes", unit="scene", disable=None) as progress:
        for split, scenes in splits.items():
            for scene in scenes:
                with replacing(pictures / f"{scene.name}.png") as temporary:
                    scene.load().save(temporary, "PNG")
                records.append(_record(scene, split, len(records)))
                progress.update()
    document = json.dumps({"dataset": "scenes", "images": records})
    write_text(Path(directory) / "dataset_scenes.json", document)


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _noun(item: SceneObject, words: dict[str, str]) -> str:
    size, texture, shape = (words.get(key, key) for key in (item.size, item.texture, item.shape))
    before, after = ("", texture) if texture.startswith("with") else (texture, "")
    return _with_article(" ".join(filter(None, (size, before, item.colour, shape, after))))


def _stated(scene: Scene) -> Hashable:
    """What every caption of a scene states; scenes that differ in it share no caption."""
    first, second, *rest = scene.objects
    sizes_differ = len({item.size for item in scene.objects}) > 1
    return frozenset(
        (item.colour, item.shape, item.texture, sizes_differ and item.size, relation(item, other))
        for item, other in [(first, second), (second, first), *((item, first) for item in rest)]
    )


@lru_cache(maxsize=2)
def _generate(count: int, seed: int) -> dict[str, tuple[Scene, ...]]:
    """Make the scenes of all splits."""
    if count < MINIMUM_COUNT:
        raise InputError(
            f"scenes:{count}: too few scenes; ask for at least {MINIMUM_COUNT}, e.g. scenes:{DEFAULT_COUNT}"
        )
    rng = random.Random(seed)
    held_out = count // 10
    taken: set[Hashable] = set()
    splits: dict[str, tuple[Scene, ...]] = {}
    made = 0
    for split, size in zip(SPLITS, (count - 2 * held_out, held_out, held_out), strict=True):
        scenes: list[Scene] = []
        while len(scenes) < size:
            group = _sample_pair(rng) if rng.random() < _TWIN_SHARE else [_sample(rng)]
            if len(scenes) + len(group) > size or not taken.isdisjoint(map(_stated, group)):
                continue
            # The twins that were not chosen are barred as well: one could turn up in another split.
            taken.update(_stated(one) for scene in group for one in (scene, *twins(scene).values()))
            scenes += (replace(scene, id=f"scene{made + i:05d}") for i, scene in enumerate(group))
            made += len(group)
        splits[split] = tuple(scenes)
    return splits


def _sample_pair(rng: random.Random) -> list[Scene]:
    """A random scene and a twin of it, every kind of twin equally often."""
    swap = rng.choice(list(_SWAPS))
    while swap not in (candidates := twins(scene := _sample(rng))):
        pass
    return [scene, candidates[swap]]


def _sample(rng: random.Random) -> Scene:
    """A random scene without id: attributes uniform, objects clear of each other and of the edge."""
    if rng.random() < _TRIPLE_SHARE:
        # Two in a row, the third opposite the gap between them.
        centres = [(0.26, 0.28), (0.74, 0.28), (rng.uniform(0.44, 0.56), 0.73)]
        if rng.random() < 0.5:
            centres = [(x, 1 - y) for x, y in centres]
    else:
        height = rng.uniform(0.38, 0.62)
        centres = [(x, height + rng.uniform(-0.1, 0.1)) for x in (0.26, 0.74)]
    if rng.random() < 0.5:
        centres = [(y, x) for x, y in centres]
    shapes = rng.sample(list(SHAPES), len(centres))
    colours = rng.sample(list(COLOURS), len(centres))
    objects = tuple(
        SceneObject(
            shape=shape,
            colour=colour,
            size=rng.choice(list(SIZES)),
            texture=rng.choice(TEXTURES),
            x=round(x + rng.uniform(-0.02, 0.02), 3),
            y=round(y + rng.uniform(-0.02, 0.02), 3),
        )
        for shape, colour, (x, y) in zip(shapes, colours, centres, strict=True)
    )
    return Scene(objects, rng.choice(list(BACKGROUNDS)), id="")


def _record(scene: Scene, split: str, imgid: int) -> dict[str, object]:
    """One image of Karpathy's JSON layout."""
    captions = describe(scene)
    sentids = [imgid * len(captions) + i for i in range(len(captions))]
    sentences = [
        {"raw": raw, "tokens": re.findall(r"\w+", raw), "imgid": imgid, "sentid": sentid}
        for raw, sentid in zip(captions, sentids, strict=True)
    ]
    return {
        "filename": f"{scene.name}.png",
        "split": split,
        "imgid": imgid,
        "sentids": sentids,
        "sentences": sentences,
    }
