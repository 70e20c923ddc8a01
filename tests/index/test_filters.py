from __future__ import annotations

import json
import operator
import re
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gallery_tools import create, item, outcome, refused, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from index import snapshot
from index.filters import MOST_CONDITIONS, Condition, written
from index.items import Item, ItemFile, write_items

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq}
COLUMNS = ("path", "caption", "size", "modified")

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
text = st.text(characters, max_size=4) | st.sampled_from(
    [
        "a",
        "ab",
        "abc",
        "A",
        "é",
        "日本",
        "😀",
        "'",
        '"',
        "'; DROP TABLE items; --",
        "%",
        "_",
        "[a]",
        "a\\b",
        "\n",
        "10",
        "true",
    ]
)
numbers = st.integers(-4, 4) | st.sampled_from([0.5, -1.25, 1e300, 2**53, 2**62, 2**70, -(2**70)])
scalars = st.none() | st.booleans() | numbers | text
plain = st.sampled_from(
    ["a", "b c", "é", "'", "size", "path", "a' OR 1=1 --", "日本", "[0]", "$", "a]", "#", "?", "*"]
)
names = plain | st.sampled_from(
    ["a.a", "", " a", 'a"', "\\", "a<b", "a=", "\n", "metadata", "metadata.a", "a.", "é.日本"]
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
items = st.builds(
    lambda caption, size, modified, metadata: item(
        "", caption=caption, size=size, mtime_ns=modified, metadata=metadata
    ),
    st.none() | text,
    st.integers(0, 5),
    st.integers(-4, 4).map(lambda quarters: quarters * 250_000_000),
    st.dictionaries(names, values, max_size=4),
)


class Field(NamedTuple):
    """As a condition writes it, and the places in the metadata where it may be."""

    written: str
    places: list[list[str]]


def dotted(steps: list[str]) -> Field:
    return Field(".".join(steps), [steps, [".".join(steps)]] if len(steps) > 1 else [steps])


def quoted(steps: list[str]) -> Field:
    return Field(".".join(json.dumps(step, ensure_ascii=len(step) % 2 == 0) for step in steps), [steps])


own = st.lists(plain, min_size=1, max_size=3).filter(lambda steps: steps not in (["size"], ["path"])).map(dotted)
fields = (
    st.sampled_from(COLUMNS).map(lambda name: Field(name, []))
    | own
    | st.lists(names, min_size=1, max_size=3).map(quoted)
    | st.lists(plain, min_size=1, max_size=2).map(
        lambda steps: Field(f"metadata.{'.'.join(steps)}", dotted(steps).places)
    )
)


def elements(one: Item, field: Field) -> list[Any]:
    """What a condition may hold for."""
    if not field.places:
        return [one.mtime_ns / 1e9 if field.written == "modified" else getattr(one, field.written)]
    found = []
    for steps in field.places:
        value: Any = one.metadata
        for step in steps:
            value = value[step] if isinstance(value, dict) and step in value else {}
        found += value if isinstance(value, list) else [value]
    return found


def possible(field: Field, value: Any) -> bool:
    """Whether a field that every item has is of this type."""
    if field.written == "caption" and value is None:
        return True
    kinds = str if field.written in ("path", "caption") else (int, float)
    return bool(field.places) or (isinstance(value, kinds) and not isinstance(value, bool))


def holds(condition: Condition, field: Field, one: Item) -> bool:
    wanted = condition.value
    if condition.operator == "!=":
        return not holds(Condition(condition.field, "=", wanted), field, one)
    for value in elements(one, field):
        kinds = [(str,), (bool,), (type(None),), (int, float)]
        kind = next(
            kind for kind in kinds if isinstance(wanted, kind) and not (kind == (int, float) and wanted is True)
        )
        if not isinstance(value, kind) or isinstance(value, bool) != isinstance(wanted, bool):
            continue
        if condition.operator == "~":
            pattern = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in wanted)
            if re.fullmatch(pattern, value, re.DOTALL):
                return True
        elif OPERATORS[condition.operator](value, wanted):  # text by code points, as SQLite does
            return True
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("filters")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_conditions_hold_for_what_python_says(folder: Path, data: st.DataObject) -> None:
    held = data.draw(st.lists(items, min_size=1, max_size=5))
    held = [item(f"{n}{data.draw(text)}x", **facts_of(one)) for n, one in enumerate(held)]
    known = [value for one in held for name in COLUMNS for value in elements(one, Field(name, []))]
    known += [value for one in held for name in one.metadata for value in elements(one, quoted([name]))]
    wanted = scalars | st.sampled_from([value for value in known if not isinstance(value, list | dict)])
    conditions, asked = [], []
    for _ in range(data.draw(st.integers(1, 2))):
        field, value = data.draw(fields), data.draw(wanted)
        allowed = ["=", "!="] if value is None or isinstance(value, bool) else ["=", "!=", "<", "<=", ">", ">="]
        if isinstance(value, str):
            allowed.append("~")
        conditions.append(Condition(field.written, data.draw(st.sampled_from(allowed)), value))
        asked.append(field)
    path = folder / "items.sqlite"
    path.unlink(missing_ok=True)
    write_items(path, held, np.arange(1, len(held) + 1))
    with closing(ItemFile(path)) as table:
        if not all(possible(field, condition.value) for condition, field in zip(conditions, asked, strict=True)):
            with refused("can never hold"):
                table.ids_where(conditions)
            return
        found = set(table.ids_where(conditions).tolist())
    assert found == {
        n
        for n, one in enumerate(held, 1)
        if all(holds(condition, field, one) for condition, field in zip(conditions, asked, strict=True))
    }


@settings(max_examples=100, deadline=None)
@given(name=st.text(characters, max_size=6) | names)
def test_every_name_in_the_metadata_can_be_asked_for(folder: Path, name: str) -> None:
    path = folder / "names.sqlite"
    path.unlink(missing_ok=True)
    write_items(path, [item("a", metadata={name: 1, "other": {name: 2}}), item("b")], np.array([1, 2]))
    with closing(ItemFile(path)) as table:
        for field in (json.dumps(name), written(name)):
            condition = Condition.parse(f"{field} = 1")
            assert table.ids_where([condition]).tolist() == [1]
            assert table.has(condition)
        assert table.ids_where([Condition.parse(f"other.{json.dumps(name)}=2")]).tolist() == [1]
        assert not table.has(Condition.parse(f"{json.dumps(name + '?')}!=1"))


def facts_of(one: Item) -> dict[str, Any]:
    return {"caption": one.caption, "size": one.size, "mtime_ns": one.mtime_ns, "metadata": one.metadata}


@settings(max_examples=60, deadline=None)
@given(field=st.text(max_size=8), value=st.text(max_size=8) | st.floats() | st.integers())
@pytest.mark.parametrize("operation", ["=", "!=", ">", "~"])
def test_no_field_or_value_upsets_sqlite(folder: Path, operation: str, field: str, value: Any) -> None:
    path = folder / f"strange{ord(operation[0])}.sqlite"
    if not path.exists():
        write_items(path, [item("a", metadata={"a": 1, "b": [1, "x"]})], np.array([1]))
    table = ItemFile(path)
    message = outcome(lambda: table.ids_where([Condition(field, operation, value)]))
    table.close()
    expected = ("no field", "not Unicode", "a NUL", "can never hold")
    assert message is None or any(words in message for words in expected)
    parsed = outcome(lambda: Condition.parse(f"{field}{operation}{value}").sql())
    assert parsed is None or len(parsed) < 300


@pytest.mark.parametrize(
    ("written", "field", "operation", "value"),
    [
        ("year>=2019", "year", ">=", 2019),
        (" year  =  2019 ", "year", "=", 2019),
        ("year=2019.5", "year", "=", 2019.5),
        ("name=a=b", "name", "=", "a=b"),
        ("name!=x", "name", "!=", "x"),
        ("name=", "name", "=", ""),
        ('name="2019"', "name", "=", "2019"),
        ("flag=true", "flag", "=", True),
        ("flag=null", "flag", "=", None),
        ("flag=True", "flag", "=", "True"),
        ("path~*/holiday/*", "path", "~", "*/holiday/*"),
        ("path~2019", "path", "~", "2019"),
        ("tags=[1]", "tags", "=", "[1]"),
        ("a.b c.é<3", "a.b c.é", "<", 3),
        ('"exif.iso"=400', '"exif.iso"', "=", 400),
        ('"a<b=".c>=1', '"a<b=".c', ">=", 1),
        (r'"say \"=\""~1', r'"say \"=\""', "~", "1"),
        ("caption=1.10", "caption", "=", "1.10"),
        ("caption=true", "caption", "=", "true"),
        ("caption=[1]", "caption", "=", "[1]"),
        ('caption="null"', "caption", "=", "null"),
        ("path=1e5", "path", "=", "1e5"),
        ("modified>1970-01-02T00:00:00+00:00", "modified", ">", 86400.0),
        ('modified<"1970-01-01T00:00:01.5Z"', "modified", "<", 1.5),
        ("modified>2024-01-31", "modified", ">", datetime(2024, 1, 31).timestamp()),
        ("modified>yesterday", "modified", ">", "yesterday"),
        ("x=NaN", "x", "=", "NaN"),
        ("x=-Infinity", "x", "=", "-Infinity"),
        ("x=line\nbreak", "x", "=", "line\nbreak"),
        ("x=" + "9" * 5000, "x", "=", "9" * 5000),
        ("x=" + "[" * 9000, "x", "=", "[" * 9000),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_conditions_are_read(written: str, field: str, operation: str, value: Any) -> None:
    condition = Condition.parse(written)
    assert (condition.field, condition.operator, condition.value) == (field, operation, value)
    assert type(condition.value) is type(value)


@pytest.mark.parametrize("written", ["", "year", "=3", "  =3", "'a'=3", '"a=3', "!", "a b", "\n", "a\nb"])
def test_what_is_no_condition_is_refused(written: str) -> None:
    with refused("is no condition"):
        Condition.parse(written)


@pytest.mark.parametrize(
    "condition",
    [
        Condition("a", "LIKE", "b"),
        Condition("a", "= 1 OR 1 =", 1),
        Condition('a"b', "=", 1),
        Condition("a\\b", "=", 1),
        Condition("a\nb", "=", 1),
        Condition("a\0b", "=", 1),
        Condition('"a\0b"', "=", 1),
        Condition(r'"a\u0000b"', "=", 1),
        Condition(r'"a\x"', "=", 1),
        Condition('"a"b', "=", 1),
        Condition("a", "=", "b\0c"),
        Condition("caption", "~", "b\0*"),
        Condition("size", ">", "1KB"),
        Condition("size", "!=", None),
        Condition("size", "~", "1*"),
        Condition("modified", ">", "yesterday"),
        Condition("modified", "=", True),
        Condition("path", "=", None),
        Condition("caption", "=", 1.1),
        Condition("caption", "<", None),
        Condition("", "=", 1),
        Condition("a..b", "=", 1),
        Condition(".a", "=", 1),
        Condition("metadata.", "=", 1),
        Condition("\udcff", "=", 1),
        Condition("a", "=", "\udcff"),
        Condition("a", "<", True),
        Condition("a", "~", None),
    ],
)
def test_what_cannot_be_asked_is_refused(condition: Condition, tmp_path: Path) -> None:
    with create(tmp_path / "g") as gallery:
        gallery.add([item("a")], vectors(0, 1))
        with refused():
            gallery.ids_where([condition])


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("n>99999999999999999999", []),
        ("n<99999999999999999999", [1, 2]),
        ("n>-" + "9" * 400, [1, 2]),
        ("n<" + "9" * 400, [1, 2]),
        ("n=1e400", []),
        ("é=1", [1]),
        ("日本.é=2", [1]),
        ("obj=1", []),
        ("obj!=1", [1, 2]),
        ("obj.x=1", [1]),
        ("tags=b", [1]),
        ("tags!=b", [2]),
        ("missing=null", []),
        ("none=null", [2]),
        ("none!=null", [1]),
        ("path~*[1].jpg", [2]),
        ("path~?.jpg", [1]),
        ("path=a.jpg", [1]),
        ("caption=null", [2]),
        ("metadata.path=x", [2]),
        ("size>=10", [2]),
        ("modified>1.5", [2]),
        ("modified<=1.5", [1]),
        ("n~*", []),
        ("modified>=1970-01-01T00:00:01.6Z", []),
        ("modified<=1970-01-01T00:00:01.5Z", [1]),
        ("caption=1.10", [3]),
        ("exif.iso=400", [1, 3]),
        ('"exif.iso"=400', [3]),
        ('exif."iso"=400', [1]),
        ("exif.iso!=400", [2]),
        ('"path"=x', [2]),
        ('" caption"=y', [3]),
    ],
)
def test_special_cases(asked: str, found: list[int], tmp_path: Path) -> None:
    first = {"n": 1, "é": 1, "日本": {"é": 2}, "obj": {"x": 1}, "tags": ["a", "b"], "exif": {"iso": 400}}
    third = {"exif.iso": [100, 400], " caption": "y"}
    with create(tmp_path / "g") as gallery:
        gallery.add([item("a.jpg", caption="c", metadata=first, mtime_ns=1_500_000_000)], vectors(0, 1))
        second = {"n": 2, "none": None, "path": "x"}
        gallery.add([item("b[1].jpg", size=10, mtime_ns=1_500_000_001, metadata=second)], vectors(1, 1))
        if 3 in found or "exif" in asked:
            gallery.add([item("c.jpg", caption="1.10", metadata=third, mtime_ns=0)], vectors(2, 1))
        assert gallery.ids_where([Condition.parse(asked)]).tolist() == found


def test_conditions_are_joined_by_and_over_all_segments(tmp_path: Path) -> None:
    with create(tmp_path / "g") as gallery:
        for n in range(4):
            gallery.add([item(f"{n}-{m}", size=m, metadata={"n": n}) for m in range(3)], vectors(n, 3))
        gallery.remove(["2-1"])
        conditions = [Condition.parse("n>=1"), Condition.parse("size>0"), Condition.parse("path!=3-2")]
        found = gallery.ids_where(conditions)
        assert [one.path for _, one in gallery.items(found)] == ["1-1", "1-2", "2-2", "3-1"]
        assert gallery.ids_where([]).tolist() == gallery.snapshot.ids().tolist()
        many = [Condition.parse("a.b!=1")] * MOST_CONDITIONS
        assert len(gallery.ids_where(many)) == 11
        with refused("501 conditions; give at most 500"):
            gallery.ids_where([*many, many[0]])


def test_what_conditions_found_is_kept_until_the_gallery_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[Condition]] = []
    real = ItemFile.ids_where
    monkeypatch.setattr(ItemFile, "ids_where", lambda table, given: asked.append(given) or real(table, given))
    with create(tmp_path / "g") as gallery:
        gallery.add([item(f"{n}", metadata={"n": n, "flag": n > 3}) for n in range(9)], vectors(1, 9))
        few, many, flag = (Condition.parse(text) for text in ("n<2", "n>=2", "flag=true"))
        for _ in range(3):
            assert gallery.ids_where([few]).tolist() == [1, 2]
            assert len(gallery.ids_where([many])) == 7
            assert len(gallery.ids_where([flag])) == 5
            assert gallery.ids_where([Condition("flag", "=", 1)]).tolist() == []
        assert len(asked) == 4
        with pytest.raises(ValueError, match="read-only"):
            gallery.ids_where([few])[0] = 7
        gallery.add([item("new", metadata={"n": 1})], vectors(2, 1))
        assert gallery.ids_where([few]).tolist() == [1, 2, 10]
        asked.clear()
        monkeypatch.setattr(snapshot, "_FOUND_BYTES", 8 * 8)
        for given, times in ((many, 2), (few, 2), (few, 0), (many, 2)):  # which do not fit in together
            gallery.ids_where([given])
            assert len(asked) == times
            asked.clear()


def test_fields_that_no_item_has_are_named(tmp_path: Path) -> None:
    with create(tmp_path / "g") as gallery:
        unknown = [Condition.parse("yaer>=2019"), Condition.parse("size>1"), Condition.parse('"exif.is"=1')]
        assert gallery.unknown_fields(unknown) is None  # where there are no items, no field is a mistake
        gallery.add(
            [item("a", metadata={"year": 2019}), item("b", metadata={"exif.iso": 4, "size": 1})], vectors(1, 2)
        )
        gallery.add([item("c", metadata={"a": {"b": [1]}, "a<b": None})], vectors(2, 1))
        known = 'path, caption, size, modified, "a<b", "size", a, exif.iso, year'
        assert gallery.unknown_fields(unknown) == f"no item has a field 'yaer', '\"exif.is\"'; fields are {known}"
        known = ["year=1", "a.b=2", "exif.iso=4", '"size"=1', "metadata.size=1", '"a<b"=1', "modified<5", "path~x"]
        assert gallery.unknown_fields([Condition.parse(text) for text in known]) is None
