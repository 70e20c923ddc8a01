"""A gallery for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from program import Ended, Vse
from served import Place, furnish

from vse_app.cli import main
from vse_app.search_service import SearchService


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return furnish(tmp_path)


@pytest.fixture
def service(place: Place) -> Iterator[SearchService]:
    with SearchService(place.gallery) as service:
        yield service


@pytest.fixture
def vse(capsys: pytest.CaptureFixture[str]) -> Vse:
    """Runs the program in this process."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        status: object = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
        return Ended(status, *capsys.readouterr())

    return run
