from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from index.errors import GalleryError
from index.gallery import Gallery
from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from vse_app import search_engine
from vse_app.search_engine import SearchEngine

WORDS = ["disc", "red", "square"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = WordTokenizer(WORDS, min_count=1, source="test")
    config = ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8), dim=8)
    directory = tmp_path_factory.mktemp("model")
    DualEncoder(config, tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = [folder / f"photo{n}.png" for n in range(7)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("batch", [3, 64])
def test_results_are_those_of_a_full_sort(
    batch: int, model: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_engine, "BATCH", batch)
    with SearchEngine.open_or_create(tmp_path / "g", model) as engine:
        assert engine.add(photos, {photos[2]: "a red disc"}).to_json() == {
            "added": 7,
            "unchanged": 0,
            "refused": [],
            "notes": [],
        }
    with SearchEngine.open(tmp_path / "g") as engine:
        hits = engine.search_text("red square", 4)
        images = engine.model.encode_images([Image.open(path) for path in photos])
        scores = (engine.model.encode_texts(["red square"]) @ images.T)[0]
        order = scores.argsort(descending=True)[:4].tolist()
        assert [hit.item.path for hit in hits] == [str(photos[n]) for n in order]
        assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=1e-5)
        found = engine.search_image(photos[2], 99)
        assert len(found) == 7
        assert (found[0].item.path, found[0].item.caption) == (str(photos[2]), "a red disc")
        assert found[0].score == pytest.approx(1, abs=1e-5)


def test_only_new_and_changed_pictures_are_embedded(
    model: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SearchEngine.open_or_create(tmp_path / "g", model) as engine:
        engine.add(photos[:5])
        embedded: list[int] = []
        encode = engine.model.encode_images

        def counted(images: list[Image.Image]) -> torch.Tensor:
            embedded.append(len(images))
            return encode(images)

        monkeypatch.setattr(engine.model, "encode_images", counted)
        Image.new("RGB", (20, 24), "red").save(photos[1])
        report = engine.add([photos[0].parent])
        assert (report.added, report.unchanged, embedded) == (3, 4, [3])
        assert len(engine.gallery) == 7
        assert engine.search_image(photos[1], 1)[0].item.path == str(photos[1])


def test_a_picture_under_several_names_is_added_once(
    model: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "link.png").symlink_to(photos[0])
    with SearchEngine.open_or_create(tmp_path / "g", model) as engine:
        assert engine.add([Path("photos"), photos[3], Path("photos/../photos/photo4.png")]).added == 7
        assert engine.add([tmp_path / "photos"]).unchanged == 7


def test_broken_pictures_are_left_out_and_reported(model: Path, photos: list[Path], tmp_path: Path) -> None:
    photos[1].write_bytes(b"no picture")
    photos[2].unlink()
    photos[2].symlink_to("nowhere.png")
    with SearchEngine.open_or_create(tmp_path / "g", model) as engine:
        report = engine.add([photos[0].parent])
        assert report.added == len(engine.gallery) == 5
        assert [path for path, _ in report.quarantine.refused] == photos[1:3]


def test_a_refused_model_leaves_the_gallery_unlocked(model: Path, photos: list[Path], tmp_path: Path) -> None:
    with SearchEngine.open_or_create(tmp_path / "g", model) as engine:
        engine.add(photos[:1])
    torch.manual_seed(1)
    other = tmp_path / "other"
    DualEncoder(engine.model.config, engine.model.tokenizer).save_pretrained(other)
    with pytest.raises(GalleryError, match="build a new gallery") as refusal:
        SearchEngine.open_or_create(tmp_path / "g", other)
    with pytest.raises(InputError) as missing:
        SearchEngine.open_or_create(tmp_path / "g", tmp_path / "nowhere")
    # The exceptions still hold the frames in which the gallery was open.
    assert refusal.tb is not None
    assert missing.tb is not None
    with SearchEngine.open(tmp_path / "g", writable=True) as engine:
        assert len(engine.gallery) == 1


def test_a_gallery_remembers_its_model_from_any_directory(
    model: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SearchEngine.open_or_create(Path("g"), Path(os.path.relpath(model))) as engine:
        engine.add([Path("photos/photo0.png")])
    monkeypatch.chdir(model)
    with SearchEngine.open(tmp_path / "g") as engine:
        assert engine.search_text("disc")[0].item.path == str(photos[0])


def test_an_order_model_is_searched_by_order_similarity(photos: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8), dim=8, similarity="order", absolute=True
    )
    DualEncoder(config, WordTokenizer(WORDS, min_count=1, source="test")).save_pretrained(tmp_path / "model")
    with SearchEngine.open_or_create(tmp_path / "g", tmp_path / "model") as engine:
        engine.add(photos)
        encoder = engine.model
        images = encoder.encode_images([Image.open(path) for path in photos])
        scores = encoder.similarity.scores(images, encoder.encode_texts(["red disc"]))[:, 0]
        hits = engine.search_text("red disc", 7)
        assert [hit.item.path for hit in hits] == [str(photos[n]) for n in scores.argsort(descending=True)]
        assert [hit.score for hit in hits] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-5)
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.info()["metric"] == "order"
