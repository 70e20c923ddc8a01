from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image, ImageChops

from training.data.formats.scene_drawing import (
    BACKGROUNDS,
    COLOURS,
    PICTURE_SIZE,
    SHAPES,
    SIZES,
    TEXTURES,
    SceneObject,
    draw,
)
from training.data.formats.scenes import SPLITS, Scene, describe, read_scenes, relation, twins, write_scenes
from training.errors import InputError

COUNT = 1000

# Read back independently of the tables that wrote the captions.
MEANING = {
    **{word: word for word in ("square", "triangle", "star", "cross", "heart")},
    **{
        "disc": "disc",
        "circle": "disc",
        "ring": "ring",
        "hoop": "ring",
        "crescent": "crescent",
        "moon": "crescent",
    },
    **{
        "small": "small",
        "tiny": "small",
        "little": "small",
        "large": "large",
        "big": "large",
        "huge": "large",
    },
    **{"plain": "plain", "striped": "striped", "stripes": "striped"},
    **{"dotted": "dotted", "spotted": "dotted", "dots": "dotted"},
    **{"left": "left", "right": "right", "above": "above", "over": "above"},
    **{"below": "below", "under": "below", "beneath": "below"},
}
NOUN = re.compile(
    r"an? (?:(?P<size>small|tiny|little|large|big|huge) )?(?:(?P<before>plain|striped|dotted|spotted) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) "
    r"(?P<shape>disc|circle|ring|hoop|crescent|moon|square|triangle|star|cross|heart)"
    r"(?: with (?P<after>stripes|dots))?"
)
RELATION = re.compile(r"(?:to the )?(left|right) of|(above|over|below|under|beneath)")
SKELETONS = (
    "N REL N",
    "there is N REL N",
    "on BACKDROP, N is REL N",
    "a picture showing N REL N, on BACKDROP",
    "REL N sits N",
)


@cache
def all_scenes(count: int = COUNT) -> dict[str, list[Scene]]:
    return {split: [cast(Scene, image) for image in read_scenes(count, split).images] for split in SPLITS}


def attributes(item: SceneObject) -> tuple[str, ...]:
    return item.shape, item.colour, item.size, item.texture


def content(scene: Scene) -> Hashable:
    """What the picture shows, whatever the jitter of positions and the order of ``objects``."""
    pair = sorted(scene.objects[:2], key=attributes)
    return *map(attributes, pair), relation(*pair), *map(attributes, scene.objects[2:])


def is_true(word: str, subject: SceneObject, reference: SceneObject) -> bool:
    return {
        "left": subject.x < reference.x,
        "right": subject.x > reference.x,
        "above": subject.y < reference.y,
        "below": subject.y > reference.y,
    }[word]


def parse(caption: str, scene: Scene) -> tuple[str, list[SceneObject], list[str]]:
    """The sentence's skeleton, the objects of the scene that it names, and its relation words' meanings."""
    named = []
    for noun in NOUN.finditer(caption):
        (item,) = (o for o in scene.objects if (o.colour, o.shape) == (noun["colour"], MEANING[noun["shape"]]))
        assert MEANING[noun["before"] or noun["after"] or "plain"] == item.texture
        assert noun["size"] is None or MEANING[noun["size"]] == item.size
        named.append(item)
    relations = [MEANING[a or b] for a, b in RELATION.findall(caption)]
    skeleton = RELATION.sub("REL", NOUN.sub("N", caption))
    article = "an" if scene.background[0] in "aeiou" else "a"
    return skeleton.replace(f"{article} {scene.background} background", "BACKDROP"), named, relations


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_is_true_of_its_scene(split: str) -> None:
    for scene in all_scenes()[split]:
        for caption, expected in zip(describe(scene), SKELETONS, strict=True):
            skeleton, named, relations = parse(caption, scene)
            assert skeleton.replace(", and N REL them", "") == expected
            assert sorted(named, key=attributes) == sorted(scene.objects, key=attributes)
            first, second = named[:2] if expected != SKELETONS[-1] else named[1::-1]
            assert is_true(relations[0], first, second), caption
            for third, word in zip(named[2:], relations[1:], strict=True):
                assert is_true(word, third, first), caption
                assert is_true(word, third, second), caption


def test_sizes_are_left_unsaid_only_where_they_agree() -> None:
    for scene in all_scenes()["test"]:
        said = [len(re.findall("small|tiny|little|large|big|huge", caption)) for caption in describe(scene)]
        agree = len({item.size for item in scene.objects}) == 1
        assert said == [len(scene.objects)] * 4 + [0 if agree else len(scene.objects)]


def test_articles_fit_the_next_word() -> None:
    for corpus in (read_scenes(COUNT, split) for split in SPLITS):
        for caption in corpus.captions:
            for article, initial in re.findall(r"\b(an?) (\w)", caption):
                assert (article == "an") == (initial in "aeiou"), caption
            assert "  " not in caption
            assert caption == caption.strip().lower()


def test_vocabulary_is_small() -> None:
    words, unseen = (
        {word for caption in read_scenes(COUNT, split).captions for word in re.findall(r"\w+", caption)}
        for split in ("train", "test")
    )
    assert 40 < len(words) < 120
    assert unseen <= words


def test_splits_are_eight_one_one_with_five_captions_each() -> None:
    for split, size in zip(SPLITS, (800, 100, 100), strict=True):
        corpus = read_scenes(COUNT, split)
        assert (corpus.name, corpus.split, len(corpus.images)) == ("scenes:1000", split, size)
        assert np.bincount(corpus.owner).tolist() == [5] * size
        assert [corpus.captions[c] for c in np.flatnonzero(corpus.owner == 7).tolist()] == list(
            describe(cast(Scene, corpus.images[7]))
        )


def test_no_two_scenes_of_the_data_set_are_equal_or_share_a_caption() -> None:
    scenes = [scene for split in all_scenes(6000).values() for scene in split]
    assert len({content(scene) for scene in scenes}) == 6000
    assert len({scene.id for scene in scenes}) == 6000
    captions = Counter(caption for scene in scenes for caption in describe(scene))
    assert captions.total() == len(captions) == 5 * 6000


def test_twins_share_a_split_and_make_up_half_of_the_scenes() -> None:
    splits = all_scenes(6000)
    home = {content(scene): split for split, scenes in splits.items() for scene in scenes}
    for split, scenes in splits.items():
        twins_homes = [[home.get(content(twin)) for twin in twins(scene).values()] for scene in scenes]
        assert {place for places in twins_homes for place in places} == {split, None}
        assert 0.4 < np.mean([split in places for places in twins_homes]) < 0.6


def test_attributes_are_balanced() -> None:
    items = [item for scene in all_scenes()["train"] for item in scene.objects]
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("texture", TEXTURES)):
        shares = Counter(getattr(item, name) for item in items)
        assert set(shares) == set(values)
        assert max(shares.values()) < 1.5 * min(shares.values())


def test_twins_have_the_same_words_in_another_order_and_other_pixels() -> None:
    kinds = Counter[str]()
    for scene in all_scenes()["test"][:60]:
        for kind, twin in twins(scene).items():
            kinds[kind] += 1
            for caption, other in zip(describe(scene), describe(twin), strict=True):
                assert caption != other
                words, others = (Counter(re.findall(r"\w+", text)) for text in (caption, other))
                assert {word for word in words | others if words[word] != others[word]} <= {"a", "an"}
            assert twin.fingerprint != scene.fingerprint
            assert ImageChops.difference(scene.load(), twin.load()).getbbox() is not None
            assert twins(twin)[kind] == scene
    assert set(kinds) == {"positions", "colours", "textures", "sizes"}


def test_the_same_seed_gives_the_same_data_in_another_process() -> None:
    program = "from training.data.formats.scenes import *; c = read_scenes(200, 'val', seed=3)"
    program += "; print(c.fingerprint('image'), c.fingerprint('text'))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    corpus = read_scenes(200, "val", seed=3)
    assert answer.stdout.decode().split() == [corpus.fingerprint("image"), corpus.fingerprint("text")]


def test_another_seed_gives_other_scenes() -> None:
    first, second = (read_scenes(200, "train", seed) for seed in (0, 1))
    assert not set(first.captions) & set(second.captions)


def test_fingerprint_ignores_the_id_and_sees_everything_else() -> None:
    scene = all_scenes()["test"][0]
    moved = replace(scene.objects[0], x=scene.objects[0].x + 0.01)
    backdrop = next(name for name in BACKGROUNDS if name != scene.background)
    assert replace(scene, id="other").fingerprint == scene.fingerprint
    assert replace(scene, objects=(moved, *scene.objects[1:])).fingerprint != scene.fingerprint
    assert replace(scene, background=backdrop).fingerprint != scene.fingerprint


def test_objects_keep_clear_of_each_other_and_of_the_edge() -> None:
    for scene in itertools.chain(*all_scenes().values()):
        for item in scene.objects:
            reach = 1.13 * SIZES[item.size] / PICTURE_SIZE
            assert reach <= min(item.x, item.y) <= max(item.x, item.y) <= 1 - reach
        for a, b in itertools.combinations(scene.objects, 2):
            distance = math.hypot(a.x - b.x, a.y - b.y) * PICTURE_SIZE
            assert distance > 1.05 * (SIZES[a.size] + SIZES[b.size])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_objects_are_drawn_in_their_place_size_and_colour(shape: str, texture: str) -> None:
    empty = draw((), "cream")
    for size, colour in itertools.product(SIZES, COLOURS):
        picture = draw((SceneObject(shape, colour, size, texture, x=0.4, y=0.6),), "cream")
        assert (picture.mode, picture.size) == ("RGB", (PICTURE_SIZE, PICTURE_SIZE))
        pixels = np.asarray(picture, dtype=float)
        changed = np.abs(pixels - np.asarray(empty, dtype=float)).max(axis=2) > 60
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert abs((columns[0] + columns[-1]) / 2 - 0.4 * PICTURE_SIZE) < 5
        assert abs((rows[0] + rows[-1]) / 2 - 0.6 * PICTURE_SIZE) < 5
        assert 1.4 * SIZES[size] < max(np.ptp(rows), np.ptp(columns)) < 2.5 * SIZES[size]
        distances = [np.abs(pixels[changed] - COLOURS[name]).sum(axis=1) for name in COLOURS]
        nearest = Counter(np.argmin(distances, axis=0).tolist()).most_common(1)[0][0]
        assert list(COLOURS)[nearest] == colour


def test_textures_and_backgrounds_change_the_picture() -> None:
    pictures = [
        draw((SceneObject("star", "blue", "small", texture, 0.5, 0.5),), background).tobytes()
        for texture in TEXTURES
        for background in BACKGROUNDS
    ]
    assert len(set(pictures)) == len(TEXTURES) * len(BACKGROUNDS)


def test_write_scenes_uses_karpathys_layout(tmp_path: Path) -> None:
    write_scenes(tmp_path / "set", count=20, seed=5)
    document = json.loads((tmp_path / "set" / "dataset_scenes.json").read_text())
    records = document["images"]
    assert document["dataset"] == "scenes"
    assert Counter(record["split"] for record in records) == {"train": 16, "val": 2, "test": 2}
    assert [record["imgid"] for record in records] == list(range(20))
    assert [s["sentid"] for record in records for s in record["sentences"]] == list(range(100))
    files = {path.name for path in (tmp_path / "set" / "images").iterdir()}
    assert files == {record["filename"] for record in records}
    for split in SPLITS:
        corpus = read_scenes(20, split, seed=5)
        chosen = [record for record in records if record["split"] == split]
        assert [s["raw"] for record in chosen for s in record["sentences"]] == list(corpus.captions)
        for record, source in zip(chosen, corpus.images, strict=True):
            assert record["sentids"] == [sentence["sentid"] for sentence in record["sentences"]]
            assert {sentence["imgid"] for sentence in record["sentences"]} == {record["imgid"]}
            with Image.open(tmp_path / "set" / "images" / record["filename"]) as picture:
                assert picture.tobytes() == source.load().tobytes()
    assert records[0]["sentences"][0]["tokens"] == records[0]["sentences"][0]["raw"].replace(",", "").split()


def test_wrong_requests_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^scenes:100: no split 'dev'; choose one of train, val, test$"):
        read_scenes(100, "dev")
    with pytest.raises(InputError, match=r"^scenes:3: too few scenes; ask for at least 20"):
        read_scenes(3, "train")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file.images: cannot make this folder"):
        write_scenes(tmp_path / "file", count=20)
