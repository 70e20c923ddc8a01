"""A gallery for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Place, furnish

from vse_app.search_service import SearchService


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return furnish(tmp_path)


@pytest.fixture
def service(place: Place) -> Iterator[SearchService]:
    with SearchService(place.gallery) as service:
        yield service
