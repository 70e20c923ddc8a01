from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.errors import InputError
from vse_app.facts import read_facts
from vse_app.indexing import Facts


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
    ("text", "message"),
    [
        ("caption\na dog\n", "line 1: names no column image"),
        ("image;caption\na.jpg;a dog\n", "line 1: names no column image.*commas"),
        ("", None),
    ],
)
def test_tables_of_another_kind_are_refused(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "f.csv").write_text(text)
    if message is None:
        assert read_facts(tmp_path / "f.csv") == {}
    else:
        with pytest.raises(InputError, match=message):
            read_facts(tmp_path / "f.csv")
    with pytest.raises(InputError, match="check the path"):
        read_facts(tmp_path / "none.csv")


RECORDS = {
    "no image": ("{}", "names no image"),
    "a number for an image": ('{"image": 3}', "names no image"),
    "no record": ("[1]", "names no image"),
    "no JSON": ("{", "not valid JSON"),
    "too deep": ('{"image": "a.jpg", "x": ' + "[" * 20_000 + "]" * 20_000 + "}", "deep"),
    "not a number": ('{"image": "a.jpg", "x": NaN}', "not JSON"),
    "an infinite number": ('{"image": "a.jpg", "x": 1e999}', "not JSON"),
    "half a character in a caption": ('{"image": "a.jpg", "caption": "\\ud83d"}', "half a character"),
    "half a character in a field": ('{"image": "a.jpg", "x": ["\\ud83d"]}', "half a character"),
    "half a character in a name": ('{"image": "a.jpg", "\\ud83d": 1}', "half a character"),
    "half a character in the image": ('{"image": "\\ud83d.jpg"}', "the image '"),
    "NUL in the image": ('{"image": "a\\u0000.jpg"}', "the image '"),
    "NUL in a caption": ('{"image": "a.jpg", "caption": "a\\u0000b"}', "NUL"),
    "NUL in a field": ('{"image": "a.jpg", "x": "a\\u0000b"}', "NUL"),
    "a caption that is no text": ('{"image": "a.jpg", "caption": 1.10}', "no text"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_bad_record_is_named_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    record, reason = RECORDS[kind]
    (tmp_path / "f.jsonl").write_text(f'{{"image": "first.jpg"}}\n{record}\n{{"image": "last.jpg"}}\n')
    table = read_facts(tmp_path / "f.jsonl")
    assert [path.name for path in table] == ["first.jpg", "last.jpg"]
    [problem] = table.problems
    assert problem.startswith(f"{tmp_path / 'f.jsonl'}: line 2")
    assert reason in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x" * 200_000 + ",a", "field limit"),
        ("a.jpg,two,many,fields,here", "5 fields for 3 columns"),
        (",a cat,1", "no image"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "f.csv").write_text(f"image,caption,n\nfirst.jpg,a dog,1\n{row}\nlast.jpg,a cat,2\n")
    table = read_facts(tmp_path / "f.csv")
    assert {path.name: facts.metadata for path, facts in table.items()} == {
        "first.jpg": {"n": 1},
        "last.jpg": {"n": 2},
    }
    [problem] = table.problems
    assert problem.startswith(f"{tmp_path / 'f.csv'}: line 3: ")
    assert reason in problem


def test_headers_are_read_as_they_are_meant(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(
        '\ufeff Image, CAPTION ,Year,,Year, Place\r\na.jpg, "dogs, two", 2019,x,7, "Oslo, north" \r\n'
    )
    table = read_facts(tmp_path / "f.csv")
    assert table == {tmp_path / "a.jpg": Facts("dogs, two", {"year": 2019, "place": "Oslo, north"})}
    assert [problem.partition(": line 1: ")[2] for problem in table.problems] == [
        "column 4 has no name; it is left out",
        "column 5 is called 'year' again; it is left out",
    ]


@pytest.mark.parametrize("text", ["true", "1e5", "007", "1.10", "12345678901234567890123", "NaN", "null", "[1]"])
def test_captions_are_text_and_cells_what_they_mean(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.csv").write_text(f"image,caption\na.jpg,{text}\n")
    assert read_facts(tmp_path / "f.csv") == {tmp_path / "a.jpg": Facts(text, {})}


@pytest.mark.parametrize("text", ["1e999", "-1e999", "Infinity", "NaN", "9" * 5000, "[" * 5000])
def test_cells_that_are_no_values_are_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.csv").write_text(f"image,size\na.jpg,{text}\n")
    assert read_facts(tmp_path / "f.csv") == {tmp_path / "a.jpg": Facts(None, {"size": text})}


def test_a_picture_named_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("image,caption\na.jpg,first\nb.jpg,other\n./b/../a.jpg,second\n")
    (tmp_path / "b").mkdir()
    table = read_facts(tmp_path / "f.csv")
    assert [facts.caption for facts in table.values()] == ["first", "other", "second"]
    [problem] = table.problems
    assert "line 4: ./b/../a.jpg was there before, in line 2;" in problem


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_json_lines_end_at_newlines_alone(tmp_path: Path, separator: str) -> None:
    caption = f"a{separator}b"
    line = json.dumps({"image": "a.jpg", "caption": caption}, ensure_ascii=False)
    (tmp_path / "f.jsonl").write_bytes(f"{line}\r\n{line}".encode())
    assert [facts.caption for facts in read_facts(tmp_path / "f.jsonl").values()] == [caption]
