"""A gallery that somebody else builds again, or takes items from, under whoever has it open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served import COUNT, Place, jpeg, pixels, serving

from index import snapshot
from index.errors import GalleryError, ModelError
from index.gallery import Gallery
from training.errors import InputError
from training.models.dual_encoder import DualEncoder
from vse_app import search_engine
from vse_app.queries import Query, find_item
from vse_app.search_engine import Facts, SearchEngine
from vse_app.search_service import SearchService


def rebuild(place: Place, model: Path) -> None:
    shutil.rmtree(place.gallery)
    with SearchEngine.open_or_create(place.gallery, model) as engine:
        engine.add(place.pictures, place.facts)


@pytest.fixture
def other(place: Place) -> Path:
    """A model of the same shape with other weights."""
    torch.manual_seed(1)
    first = DualEncoder.from_pretrained(place.model)
    DualEncoder(first.config, first.tokenizer).save_pretrained(place.model.with_name("other"))
    return place.model.with_name("other")


ASKED: dict[str, Callable[[SearchService], Any]] = {
    "a remembered text": lambda service: service.search(Query(text="red disc")),
    "a new text": lambda service: service.search(Query(text="blue ring")),
    "a picture": lambda service: service.search(Query(image=pixels(3))),
    "the like of an item": lambda service: service.search(Query(like=3)),
    "both": lambda service: service.search(Query(text="red disc", image=pixels(3))),
    "the model": lambda service: service.call(lambda engine: engine.model).result(),
    "the model elsewhere": lambda service: service.search(Query(text="x")) and service.model,
    "to add": lambda service: service.add([pixels(3)], Facts()),
    "to remove": lambda service: service.remove([3]),
}


def test_another_model_is_refused_until_the_right_gallery_is_back(
    place: Place, service: SearchService, other: Path
) -> None:
    before = service.search(Query(text="red disc"))
    rebuild(place, other)
    for name, ask in ASKED.items():
        with pytest.raises(ModelError) as error:
            ask(service)
        assert "\n" not in str(error.value), name
    assert not service.uploads.exists()
    with Gallery.open(place.gallery) as gallery:
        assert len(gallery) == COUNT
    rebuild(place, place.model)
    after = service.search(Query(text="red disc"))
    assert [hit.item.path for hit in after] == [hit.item.path for hit in before]
    assert ASKED["to remove"](service) == 1


def test_a_server_says_so_with_a_status_of_its_own_fault(place: Place, other: Path) -> None:
    with serving(place) as (client, service):
        checksum = client.get("/health").json()["model"]
        rebuild(place, other)
        answers = [client.get("/search", params={"text": "red"}), client.get("/health"), client.delete("/items/1")]
        answers.append(client.post("/items", files=[("images", ("a.jpg", jpeg(60)))]))
        for answer in answers:
            assert answer.status_code == 503, answer.text
            assert "model" in answer.json()["detail"]
        rebuild(place, place.model)
        assert client.get("/health").json()["model"] == checksum == service.checksum


@pytest.mark.parametrize("given", [False, True])
def test_an_engine_in_python_notices_too(given: bool, place: Place, other: Path) -> None:
    model = DualEncoder.from_pretrained(place.model) if given else None
    with SearchEngine(Gallery.open(place.gallery), model) as engine:
        assert engine.search_text("red disc")
        rebuild(place, other)
        engine.gallery.refresh()
        for ask in (
            lambda: engine.search_text("red disc"),
            lambda: engine.model,
            lambda: engine.embed([Query(like=1)]),
        ):
            with pytest.raises(ModelError, match="open it again"):
                ask()
    with SearchEngine.open(place.gallery) as engine:
        assert engine.search_text("red disc")


@pytest.mark.parametrize("tidied", [False, True])
@pytest.mark.parametrize("removed", [5, COUNT])
def test_ids_that_clients_keep_are_looked_up(tidied: bool, removed: int, place: Place, service: SearchService) -> None:
    pytest.importorskip("gradio")
    from vse_app.api import Api
    from vse_app.web import why
    from vse_app.web.robustness_tab import RobustnessTab

    api = Api(service)
    record = {"id": removed, "name": "a.png", "caption": "red disc"}
    with Gallery.open(place.gallery, writable=True) as gallery:
        gallery.remove([removed])
        if tidied:
            gallery.compact()
    tab = RobustnessTab.__new__(RobustnessTab)
    tab._api, tab._target = api, None
    for ask in (
        lambda: why._html(api, record, "red disc"),
        lambda: tab._prepare(removed, None),
        lambda: service.call(lambda engine: find_item(engine.gallery, removed)).result(),
    ):
        with pytest.raises(InputError, match=f"item {removed}: is no longer in the gallery"):
            ask()
    with pytest.raises(GalleryError, match=f"no item {removed}"):
        service.search(Query(like=removed))
    with pytest.raises(InputError, match="no id"):
        service.call(lambda engine: find_item(engine.gallery, 1e300)).result()


def test_the_sample_for_texts_with_pictures_is_drawn_once_for_each_state(
    place: Place, service: SearchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    sample = search_engine.sample

    def counted(state: snapshot.Snapshot) -> Any:
        drawn.append(state.manifest.items)
        return sample(state)

    monkeypatch.setattr(search_engine, "sample", counted)
    for _ in range(3):
        service.search(Query(text="red disc", image=pixels(3)))
    assert drawn == [COUNT]
    service.remove([1])
    service.search(Query(text="red disc", image=pixels(3)))
    assert drawn == [COUNT, COUNT - 1]
