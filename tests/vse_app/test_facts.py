from __future__ import annotations

from pathlib import Path

import pytest

from training.errors import InputError
from vse_app.facts import read_facts
from vse_app.search_engine import Facts


def test_a_table_and_json_lines_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("image,caption,year,place,score\na.jpg,two dogs,2019,NaN,0.5\nb/c.jpg,,,,\n")
    full = '{"image": "a.jpg", "caption": "two dogs", "year": 2019, "place": "NaN", "score": 0.5}'
    (tmp_path / "f.jsonl").write_text(full + '\n\n{"image": "b/c.jpg"}\n')
    expected = {
        tmp_path / "a.jpg": Facts("two dogs", {"year": 2019, "place": "NaN", "score": 0.5}),
        tmp_path / "b/c.jpg": Facts(None, {}),
    }
    assert read_facts(tmp_path / "f.csv") == expected
    assert read_facts(tmp_path / "f.jsonl") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.csv", "caption\na dog\n", "record 1: names no image"),
        ("f.jsonl", '{"image": 3}\n', "record 1: names no image"),
        ("f.jsonl", '{"image": "a"}\n[1]\n', "record 2: names no image"),
        ("f.jsonl", "{\n", "line 1: not valid JSON"),
    ],
)
def test_refusals_name_the_record(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_facts(tmp_path / name)
    with pytest.raises(InputError, match="check the path"):
        read_facts(tmp_path / "none.csv")
