"""Requests made from the server's own description."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DataObject, data
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import furnish

from vse_app.search_service import SearchService
from vse_app.server import Serving, create_app

ROUTES = ["GET /search", "POST /search", "GET /items", "POST /items", "GET /items/{id}", "DELETE /items/{id}",
          "GET /items/{id}/image", "GET /audit", "GET /health", "GET /metrics"]  # fmt: skip


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.schemas.BaseSchema]:
    place = furnish(tmp_path_factory.mktemp("schema"))
    with SearchService(place.gallery) as service:
        app = create_app(service, Serving(place.gallery), page=False)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(service, "close", lambda: None)  # each call starts and ends the application
            yield schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("route", ROUTES)
def test_whatever_the_schema_allows(route: str, schema: schemathesis.schemas.BaseSchema) -> None:
    method, path = route.split()
    strategy = schema[path][method].as_strategy()

    @given(data())
    @settings(
        max_examples=40 if "search" in route or "items" in route else 3,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def probe(drawn: DataObject) -> None:
        case = drawn.draw(strategy)
        case.call_and_validate(
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ]
        )

    probe()
