from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import pytest
from httpx import Response
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from served import COMMENT, COUNT, Place, encoded, is_bare, jpeg, pixels, serving
from starlette.testclient import TestClient

from index.gallery import Gallery
from training.errors import InputError
from vse_app import limits
from vse_app.answers import Added, Answer, Found, Health, ItemRecord, Items, Problem, Removed
from vse_app.queries import Query
from vse_app.search_engine import SearchEngine
from vse_app.server import Serving

M = TypeVar("M", bound=BaseModel)


@pytest.fixture
def client(place: Place) -> Iterator[TestClient]:
    with serving(place) as (client, _):
        yield client


@pytest.fixture
def public(place: Place) -> Iterator[TestClient]:
    with serving(place, host="0.0.0.0", read_only=True) as (client, _):
        yield client


def read(response: Response, model: type[M]) -> M:
    """The answer, which has every field of its description and none besides."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    record = response.json()
    assert record.keys() == model.model_fields.keys()
    return model.model_validate(record, strict=True)


def refused(response: Response, status: int) -> str:
    """The one line that says why."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"detail"}
    detail = Problem.model_validate(response.json(), strict=True).detail
    assert "\n" not in detail
    assert 5 < len(detail) < 500
    return detail


def sent(data: bytes, name: str = "picture.png", field: str = "image") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, (name, data))]


def ids(found: list[Found]) -> list[int]:
    return [of.id for of in found]


def test_search_by_text(client: TestClient, place: Place) -> None:
    answer = read(client.get("/search", params={"text": "red disc", "k": 5}), Answer)
    with SearchEngine.open(place.gallery) as engine:
        expected = engine.search_text("red disc", 5)
    assert [(of.id, of.score) for of in answer.results] == [(of.id, of.score) for of in expected]
    first, best = answer.results[0], expected[0].item
    assert (first.caption, first.metadata, first.name) == (best.caption, best.metadata, Path(best.path).name)
    assert (first.probability, first.likely, first.duplicates, answer.cut) == (None, None, [], None)
    assert first.image == f"items/{first.id}/image"
    assert 0 < answer.milliseconds < 30_000
    assert len(read(client.get("/search", params={"text": "red"}), Answer).results) == 10


def test_search_for_the_like_of_an_item(client: TestClient) -> None:
    found = read(client.get("/search", params={"like": 3, "k": COUNT}), Answer).results
    assert sorted(ids(found)) == [key for key in range(1, COUNT + 1) if key != 3]
    assert "no item 999" in refused(client.get("/search", params={"like": 999}), 400)


def test_search_by_picture_and_text(client: TestClient, place: Place) -> None:
    data = place.pictures[4].read_bytes()
    found = read(client.post("/search", files=sent(data), data={"k": "3"}), Answer).results
    assert found[0].id == 5
    assert found[0].score == pytest.approx(1, abs=1e-5)
    both = read(client.post("/search", files=sent(data), data={"text": "red", "weight": "0.7"}), Answer).results
    with SearchEngine.open(place.gallery) as engine:
        query = Query(text="red", image=Image.open(BytesIO(data)), weight=0.7)
        expected = engine.search([query])[0]
    assert ids(both) == [result.id for result in expected]
    assert Gallery.exists(place.gallery)
    assert not (place.gallery / "uploads").exists()


def test_conditions_and_collapse(client: TestClient) -> None:
    where = ["year>=2006", "colour=green", "tags=ring", "at.row=1"]
    found = read(client.get("/search", params={"text": "x", "where": where}), Answer).results
    assert [of.caption for of in found] == ["green ring"]
    body = {"where": ["colour=blue"], "collapse": "0.5", "k": "2"}
    found = read(client.post("/search", files=sent(encoded(pixels(1))), data=body), Answer).results
    assert len(found) + sum(of.alike for of in found) <= 6
    assert all(of.alike == len(of.duplicates) for of in found)
    assert "no condition" in refused(client.get("/search", params={"text": "x", "where": "year"}), 400)
    assert "query bank" in refused(client.get("/search", params={"text": "x", "querybank": True}), 400)


@pytest.mark.parametrize(
    ("parameters", "status", "message"),
    [
        ({}, 400, "give a text"),
        ({"text": ""}, 400, "empty"),
        ({"text": " \t"}, 400, "empty"),
        ({"text": "a", "like": 1}, 400, "give a text"),
        ({"text": "a", "k": 0}, 422, "k: "),
        ({"text": "a", "k": 201}, 422, "k: "),
        ({"text": "a", "k": "many"}, 422, "k: "),
        ({"text": "a" * (limits.TEXT + 1)}, 422, "text: "),
        ({"text": "a", "collapse": 1.5}, 422, "collapse: "),
        ({"text": "a", "collapse": 0.4}, 422, "collapse: "),
        ({"text": "a", "collapse": -1}, 422, "collapse: "),
        ({"text": "a", "collapse": "nan"}, 422, "collapse: "),
        ({"text": "a", "where": ["a=1"] * 17}, 422, "where: "),
        ({"text": "a", "where": "a=" + "1" * 2000}, 422, "where"),
        ({"like": 0}, 422, "like: "),
        ({"like": 1 << 53}, 422, "like: "),
    ],
)
def test_bad_searches_are_refused_in_one_line(
    parameters: dict[str, Any], status: int, message: str, client: TestClient
) -> None:
    assert message in refused(client.get("/search", params=parameters), status)


def test_items(client: TestClient, place: Place) -> None:
    listed = read(client.get("/items"), Items)
    assert listed.total == COUNT
    assert [of.id for of in listed.items] == list(range(1, COUNT + 1))
    assert [of.caption for of in listed.items] == place.captions
    page = read(client.get("/items", params={"offset": 20, "limit": 10}), Items)
    assert ([of.id for of in page.items], page.total) == ([21, 22, 23, 24], COUNT)
    assert read(client.get("/items", params={"offset": 1 << 52}), Items).items == []
    some = read(client.get("/items", params={"where": ["colour=red", "year<2003"], "limit": 2}), Items)
    assert ([of.id for of in some.items], some.total) == ([1, 2], 3)
    record = read(client.get("/items/7"), ItemRecord)
    assert record == listed.items[6]
    assert record.size == place.pictures[6].stat().st_size
    for path in ("/items/25", "/items/25/image", "/items/9007199254740991"):
        assert "not in the gallery" in refused(client.get(path), 404)
    for path in ("/items/0", "/items/-1", "/items/x", f"/items/{1 << 53}", "/items/1.5"):
        refused(client.get(path), 422)
    refused(client.get("/nothing"), 404)
    refused(client.put("/items/1"), 405)


def test_pictures_are_drawn_anew(client: TestClient, place: Place) -> None:
    assert COMMENT in place.pictures[0].read_bytes()
    for key in (1, 2):
        response = client.get(f"/items/{key}/image")
        assert response.headers["content-type"] == "image/jpeg"
        assert is_bare(response.content)
        with Image.open(BytesIO(response.content)) as image, Image.open(place.pictures[key - 1]) as original:
            assert image.size == original.size
    large = client.post("/items", files=sent(jpeg(1, (2400, 600)), field="images")).json()["ids"][0]
    for side, size in ((16, (16, 4)), (320, (320, 80)), (321, (321, 80)), (1600, (1600, 400))):
        response = client.get(f"/items/{large}/image", params={"side": side})
        assert is_bare(response.content)
        with Image.open(BytesIO(response.content)) as image:
            assert image.size == size
    for side in (15, 1601, -1, "x"):
        refused(client.get(f"/items/{large}/image", params={"side": side}), 422)


def test_a_picture_whose_file_is_gone_or_another_thing(client: TestClient, place: Place) -> None:
    place.pictures[1].unlink()
    place.pictures[2].write_bytes(place.secret.read_bytes())
    for key in (2, 3):
        detail = refused(client.get(f"/items/{key}/image"), 404)
        assert str(place.pictures[0].parent) not in detail


def test_paths_are_told_on_this_machine_only(client: TestClient, place: Place) -> None:
    assert read(client.get("/items/1"), ItemRecord).path == str(place.pictures[0])
    assert read(client.get("/search", params={"like": 2}), Answer).results[0].path


def test_a_public_server_tells_no_paths_and_changes_nothing(public: TestClient, place: Place) -> None:
    place.pictures[1].unlink()
    read(public.get("/items"), Items)
    answers = [public.get("/items/1"), public.get("/items"), public.get("/search", params={"text": "red"})]
    answers += [public.get("/items/2/image"), public.get("/search", params={"like": 99})]
    answers += [public.get("/search", params={"text": "red", "querybank": True}), public.get("/health")]
    answers += [public.post("/items", files=sent(jpeg(1), field="images")), public.delete("/items/1")]
    for response in answers:
        assert str(place.gallery.parent) not in response.text, response.text
    for response in answers[-2:]:
        assert "changed" in refused(response, 403)
    assert read(public.get("/items/1"), ItemRecord).path is None
    assert read(public.get("/health"), Health).pictures == COUNT


def test_added_pictures_are_found_until_they_are_removed(client: TestClient, place: Place) -> None:
    files = [*sent(jpeg(50, (300, 200)), "a.jpg", "images"), *sent(encoded(pixels(51)), "b.png", "images")]
    facts = {"caption": "two of them", "metadata": '{"year": 1999, "deep": {"er": [1, "ü"]}}'}
    added = read(client.post("/items", files=files, data=facts), Added)
    assert added.ids == [COUNT + 1, COUNT + 2]
    found = read(client.post("/search", files=sent(jpeg(50, (300, 200))), data={"k": "1"}), Answer).results[0]
    assert (found.id, found.caption, found.metadata) == (COUNT + 1, "two of them", json.loads(facts["metadata"]))
    where = {"where": ["year=1999", "deep.er=ü"]}
    assert [of.id for of in read(client.get("/items", params=where), Items).items] == added.ids
    assert is_bare(client.get(f"/items/{COUNT + 1}/image").content)
    assert len(list((place.gallery / "uploads").iterdir())) == 2
    assert read(client.delete(f"/items/{COUNT + 1}"), Removed).removed == 1
    for response in (client.delete(f"/items/{COUNT + 1}"), client.get(f"/items/{COUNT + 1}")):
        assert "not in the gallery" in refused(response, 404)
    assert len(list((place.gallery / "uploads").iterdir())) == 1
    # Ids are never given twice, and the others keep theirs.
    assert read(client.post("/items", files=files[:1]), Added).ids == [COUNT + 3]
    assert read(client.get(f"/items/{COUNT + 2}"), ItemRecord).caption == "two of them"
    read(client.delete("/items/1"), Removed)
    assert place.pictures[0].exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[1]", "object"),
        ("3", "object"),
        ("{", "JSON"),
        ("", None),
        ('{"a": NaN}', "JSON"),
        ('{"a": -Infinity}', "JSON"),
        ('{"a": 1e999}', "JSON"),
        (r'{"a": "\ud800"}', "JSON"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", "nested"),
        ('{"a": ' + "[" * 9900 + "]" * 9900 + "}", "JSON"),
        ('{"a": ' + "9" * 5000 + "}", "JSON"),
    ],
)
def test_metadata_that_cannot_be_kept(metadata: str, message: str | None, client: TestClient, place: Place) -> None:
    response = client.post("/items", files=sent(jpeg(60), field="images"), data={"metadata": metadata})
    if message is None:
        assert read(response, Added).ids
    else:
        assert message in refused(response, 400)
        assert not (place.gallery / "uploads").exists()
    assert read(client.get("/items", params={"where": "a=1"}), Items).items == []


def test_too_many_uploads_and_none(client: TestClient) -> None:
    refused(client.post("/items", data={"caption": "x"}), 422)
    refused(client.post("/items", files=sent(jpeg(1), field="images") * 17), 422)
    refused(client.post("/search", data={"text": "x"}), 422)
    assert "broken.jpg" in refused(client.post("/search", files=sent(jpeg(1)[:300], "broken.jpg")), 400)
    assert "20 MB" in refused(client.post("/search", files=sent(b"\xff\xd8" + bytes(20_000_001))), 400)


def test_somebody_else_is_writing(client: TestClient, place: Place) -> None:
    with Gallery.open(place.gallery, writable=True):
        assert "another writer" in refused(client.delete("/items/1"), 409)
        assert "another writer" in refused(client.post("/items", files=sent(jpeg(1), field="images")), 409)
    assert read(client.delete("/items/1"), Removed).removed == 1


def test_too_busy_says_when_to_try_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(place) as (client, service):
        monkeypatch.setattr(service, "_asked", type(service._asked)(1))
        service._asked.put(None)
        response = client.get("/search", params={"text": "red"})
        monkeypatch.undo()
    assert "try again" in refused(response, 503)
    assert response.headers["retry-after"] == "1"


def test_audit_is_served_once_there_is_one(place: Place, tmp_path: Path) -> None:
    with serving(place) as (client, _):
        assert "vse audit" in refused(client.get("/audit"), 404)
    folder = place.model / "audit"
    folder.mkdir()
    (folder / "audit.json").write_text('{"checksum": "ü", "bounds": {}}', encoding="utf-8")
    with serving(place) as (client, _):
        assert client.get("/audit").json() == {"checksum": "ü", "bounds": {}}
        (folder / "audit.json").write_text("{")
        assert "again" in refused(client.get("/audit"), 500)
    other = tmp_path / "elsewhere"
    with pytest.raises(InputError, match=r"holds no audit\.json"):
        Serving(place.gallery, audit=other)
    other.mkdir()
    (other / "audit.json").write_text('{"a": 1}')
    with serving(place, audit=other) as (client, _):
        assert client.get("/audit").json() == {"a": 1}


def test_health(client: TestClient, place: Place) -> None:
    health = read(client.get("/health"), Health)
    with Gallery.open(place.gallery) as gallery:
        assert (health.status, health.pictures, health.model) == ("ok", COUNT, gallery.model["checksum"])


def test_metrics_count(client: TestClient) -> None:
    for text in ("red", "green", "blue"):
        client.get("/search", params={"text": text})
    client.get("/items/1/image")
    client.get("/items/99")
    client.get("/../../etc/passwd")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert values["vse_answers_total", (("route", "/search"), ("status", "200"))] == 3
    assert values["vse_answers_total", (("route", "/items/{id}"), ("status", "404"))] == 1
    assert values["vse_answers_total", (("route", "other"), ("status", "404"))] == 1
    assert values["vse_request_seconds_count", (("route", "/search"),)] == 3
    for stage in ("embed", "search"):
        assert values["vse_stage_seconds_count", (("stage", stage),)] == 3
    assert values["vse_stage_seconds_count", (("stage", "picture"),)] == 1
    assert values["vse_batch_queries_sum", ()] == 3
    assert values["vse_pictures", ()] == COUNT


def test_the_schema_describes_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {path: set(of) for path, of in paths.items()} == {
        "/search": {"get", "post"},
        "/items": {"get", "post"},
        "/items/{id}": {"get", "delete"},
        "/items/{id}/image": {"get"},
        "/audit": {"get"},
        "/health": {"get"},
        "/metrics": {"get"},
    }
    assert all(route["summary"] for of in paths.values() for route in of.values())
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_the_end_of_the_server_ends_the_service(place: Place) -> None:
    with serving(place) as (client, service):
        client.get("/health")
    assert service.closed.is_set()
    with pytest.raises(RuntimeError, match="shutting down"):
        service.submit(Query(text="red"))
