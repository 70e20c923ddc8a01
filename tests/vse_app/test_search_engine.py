from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from index.calibration import Calibration
from index.errors import GalleryError
from index.filters import Condition
from index.gallery import Gallery
from index.querybank import QueryBank
from index.relevance import Relevance
from training.data.batches import Inputs
from training.data.text import WordTokenizer
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from vse_app import indexing
from vse_app.queries import Query
from vse_app.search_engine import Facts, SearchEngine

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
    monkeypatch.setattr(indexing, "BATCH", batch)
    monkeypatch.setattr(indexing, "TOGETHER", 2)
    with SearchEngine.open_or_create(tmp_path / "g", model) as engine:
        assert engine.add(photos, {photos[2]: Facts("a red disc")}).to_json() == {
            "added": 7,
            "updated": 0,
            "moved": 0,
            "reworded": 0,
            "unchanged": 0,
            "left_out": [],
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
        encode = engine.model.encode

        def counted(side: str, inputs: Inputs) -> torch.Tensor:
            embedded.append(len(inputs))
            return encode(side, inputs)

        monkeypatch.setattr(engine.model, "encode", counted)
        Image.new("RGB", (20, 24), "red").save(photos[1])
        report = engine.add([photos[0].parent])
        assert (report.added, report.updated, report.unchanged, embedded) == (2, 1, 4, [3])
        monkeypatch.undo()
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


@pytest.fixture
def engine(model: Path, photos: list[Path], tmp_path: Path) -> Iterator[SearchEngine]:
    facts = {path: Facts(None, {"number": n}) for n, path in enumerate(photos)}
    with SearchEngine.open_or_create(tmp_path / "g", model) as engine:
        engine.add(photos, facts)
        yield engine


def test_new_facts_are_kept_without_embedding_again(
    engine: SearchEngine, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.search_image(photos[0], 1)[0]
    monkeypatch.setattr(engine.model, "encode", None)
    report = engine.add(photos, {photos[0]: Facts("new", {"number": 10}), photos[1]: Facts(None, {"number": 1})})
    assert (report.added, report.reworded, report.unchanged) == (0, 1, 6)
    monkeypatch.undo()
    after = engine.search_image(photos[0], 1)[0]
    assert (after.item.caption, after.item.metadata) == ("new", {"number": 10})
    assert after.score == pytest.approx(before.score)


def test_a_dry_run_changes_nothing(engine: SearchEngine, photos: list[Path]) -> None:
    state = engine.gallery.snapshot.manifest
    Image.new("RGB", (20, 24), "red").save(photos[1])
    report = engine.add(photos, {photos[0]: Facts("new")}, dry_run=True)
    assert (report.updated, report.reworded, report.unchanged) == (1, 1, 5)
    assert engine.gallery.snapshot.manifest == state


def test_conditions_leave_exactly_what_they_say(engine: SearchEngine, photos: list[Path]) -> None:
    (found,) = engine.search([Query(text="red")], 5, where=[Condition.parse("number>=3"), Condition.parse("number<6")])
    assert {result.item.path for result in found} == {str(path) for path in photos[3:6]}
    assert engine.search([Query(text="red")], 5, where=[Condition.parse("number>9")]) == [[]]


def test_more_like_this_leaves_itself_out(engine: SearchEngine, photos: list[Path]) -> None:
    by_image = [result.item.path for result in engine.search_image(photos[2], 7)]
    assert by_image[0] == str(photos[2])
    key = int(engine.gallery.ids_of([str(photos[2])])[0])
    for like in (str(photos[2]), key):
        (found,) = engine.search([Query(like=like)], 7)
        assert [result.item.path for result in found] == by_image[1:]
    with pytest.raises(InputError, match=r"none\.png: is not in"):
        engine.search([Query(like="none.png")])
    with pytest.raises(InputError, match=r"shape \(3,\); give \(8,\)"):
        engine.search([Query(vector=np.ones(3, np.float32))])


def test_many_queries_at_once_are_each_as_alone(engine: SearchEngine, photos: list[Path]) -> None:
    vector = engine.gallery.vectors(engine.gallery.ids_of([str(photos[5])]))[0]
    queries = [Query(text="red"), Query(image=photos[1]), Query(like=str(photos[3])), Query(vector=vector)]
    queries.append(Query(text="disc", image=photos[1], weight=0.3))
    together = engine.search(queries, 3)
    for query, results in zip(queries, together, strict=True):
        (alone,) = engine.search([query], 3)
        assert [result.id for result in alone] == [result.id for result in results]


def test_text_and_picture_meet_in_proportion_to_their_spread(engine: SearchEngine, photos: list[Path]) -> None:
    ends = [engine.search_image(photos[1], 7), engine.search_text("disc", 7)]
    for weight, expected in zip((0, 1), ends, strict=True):
        (found,) = engine.search([Query(text="disc", image=photos[1], weight=weight)], 7)
        assert [result.id for result in found] == [result.id for result in expected]
    (found,) = engine.search([Query(text="disc", image=photos[1], weight=0.4)], 7)
    by_id = [{result.id: result.score for result in of} for of in ends]
    picture, text = (np.array([of[result.id] for result in found]) for of in by_id)
    # All seven pictures are the background, so the combination is linear in both standardised scores.
    combined = 0.6 * picture / picture.std() + 0.4 * text / text.std()
    assert (np.diff(combined) <= 1e-5).all()


def test_copies_are_shown_once_and_counted(engine: SearchEngine, photos: list[Path]) -> None:
    copies = [photos[0].with_name(f"copy{n}.png") for n in range(3)]
    for path in copies:
        path.write_bytes(photos[4].read_bytes())
    engine.add(copies)
    (found,) = engine.search([Query(image=photos[4])], 7, collapse_at=0.99999)
    assert len(found) == 7  # though ten pictures are there, seven look different
    assert {found[0].item.path, *(hit.item.path for hit in found[0].duplicates)} == {str(photos[4]), *map(str, copies)}
    assert not any(result.duplicates for result in found[1:])


def test_probabilities_and_hubs_need_calibration(engine: SearchEngine) -> None:
    assert engine.search_text("red")[0].probability is None
    with pytest.raises(GalleryError, match="no query bank"):
        engine.search([Query(text="red")], correct_hubs=True)


def test_a_calibrated_gallery_marks_what_is_likely(engine: SearchEngine, photos: list[Path]) -> None:
    random = np.random.default_rng(0)
    images = random.standard_normal((200, 8)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    captions = np.repeat(images, 2, axis=0) + 0.3 * random.standard_normal((400, 8)).astype(np.float32)
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    background = engine.gallery.vectors(engine.gallery.snapshot.ids())
    relevance = Relevance.fit(captions, images, np.arange(400) // 2, background)
    engine.gallery.install_calibration(relevance.save)
    results = engine.search_text("red disc", 7)
    assert all(0 <= result.probability <= 1 for result in results if result.probability is not None)
    probabilities = [result.probability for result in results]
    assert probabilities == sorted(probabilities, reverse=True)  # type: ignore[type-var]
    assert [result.likely for result in results] == [p >= relevance.cut for p in probabilities]  # type: ignore[operator]
    assert engine.search_image(photos[0], 1)[0].probability is None
    assert Relevance.load(engine.gallery.calibration_folder() or Path(), 8).calibration == relevance.calibration


def test_hubs_are_pushed_back(engine: SearchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine.search_text("red disc", 7)
    best = engine.gallery.vectors(np.array([plain[0].id]))
    # A bank of nothing but the first result's own vector: it is the one that comes up for everything.
    bank = QueryBank(np.repeat(best, 10, axis=0), beta=10.0)
    relevance = Relevance(Calibration(1.0, 0.0, 0.5), engine.background, bank)
    monkeypatch.setattr(SearchEngine, "relevance", relevance)
    (corrected,) = engine.search([Query(text="red disc")], 7, correct_hubs=True)
    hubness = bank.hubness(engine.gallery.vectors(np.array([result.id for result in plain])))
    order = np.argsort(hubness - [result.score for result in plain])
    assert [result.id for result in corrected] == [plain[n].id for n in order]
    # The similarity is shown; only the order changes.
    assert [result.score for result in corrected] == pytest.approx([plain[n].score for n in order])
    assert corrected != plain
