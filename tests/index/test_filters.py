from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_tools import create, item, outcome, refused, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from index.filters import Condition
from index.items import Item, ItemFile, write_items

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq}
COLUMNS = ("path", "caption", "size", "modified")

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
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
names = st.sampled_from(
    ["a", "b c", "é", "'", "size", "path", "a' OR 1=1 --", "日本", "[0]", "$", "a]", "#", "?", "*"]
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
fields = (
    st.sampled_from(COLUMNS)
    | names
    | st.lists(names, min_size=1, max_size=3).map(".".join)
    | names.map("metadata.{}".format)
)


def elements(one: Item, field: str) -> list[Any]:
    """What a condition may hold for."""
    if field == "modified":
        return [one.mtime_ns / 1e9]
    if field in COLUMNS:
        return [getattr(one, field)]
    value: Any = one.metadata
    for step in field.removeprefix("metadata.").split("."):
        if not isinstance(value, dict) or step not in value:
            return []
        value = value[step]
    return value if isinstance(value, list) else [value]


def holds(condition: Condition, one: Item) -> bool:
    wanted = condition.value
    if condition.operator == "!=":
        return not holds(Condition(condition.field, "=", wanted), one)
    for value in elements(one, condition.field):
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
    held = [item(f"{n}{data.draw(text)}".replace("\0", "") + "x", **facts_of(one)) for n, one in enumerate(held)]
    known = [value for one in held for field in COLUMNS for value in elements(one, field)]
    known += [value for one in held for field in one.metadata for value in elements(one, field)]
    wanted = scalars | st.sampled_from([value for value in known if not isinstance(value, list | dict)])
    conditions = []
    for _ in range(data.draw(st.integers(1, 2))):
        value = data.draw(wanted)
        allowed = ["=", "!="] if value is None or isinstance(value, bool) else ["=", "!=", "<", "<=", ">", ">="]
        if isinstance(value, str):
            allowed.append("~")
        conditions.append(Condition(data.draw(fields), data.draw(st.sampled_from(allowed)), value))
    path = folder / "items.sqlite"
    path.unlink(missing_ok=True)
    write_items(path, held, np.arange(1, len(held) + 1))
    table = ItemFile(path)
    found = set(table.ids_where(conditions).tolist())
    table.close()
    assert found == {n for n, one in enumerate(held, 1) if all(holds(condition, one) for condition in conditions)}


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
    assert message is None or "no field" in message or "not Unicode" in message
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


@pytest.mark.parametrize("written", ["", "year", "=3", "  =3", "'a'=3", '"a"=3', "!", "a b", "\n", "a\nb"])
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
    ("written", "found"),
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
    ],
)
def test_special_cases(written: str, found: list[int], tmp_path: Path) -> None:
    first = {"n": 1, "é": 1, "日本": {"é": 2}, "obj": {"x": 1}, "tags": ["a", "b"]}
    with create(tmp_path / "g") as gallery:
        gallery.add([item("a.jpg", caption="c", metadata=first, mtime_ns=1_500_000_000)], vectors(0, 1))
        second = {"n": 2, "none": None, "path": "x"}
        gallery.add([item("b[1].jpg", size=10, mtime_ns=1_500_000_001, metadata=second)], vectors(1, 1))
        assert gallery.ids_where([Condition.parse(written)]).tolist() == found


def test_conditions_are_joined_by_and_over_all_segments(tmp_path: Path) -> None:
    with create(tmp_path / "g") as gallery:
        for n in range(4):
            gallery.add([item(f"{n}-{m}", size=m, metadata={"n": n}) for m in range(3)], vectors(n, 3))
        gallery.remove(["2-1"])
        conditions = [Condition.parse("n>=1"), Condition.parse("size>0"), Condition.parse("path!=3-2")]
        found = gallery.ids_where(conditions)
        assert [one.path for _, one in gallery.items(found)] == ["1-1", "1-2", "2-2", "3-1"]
        assert gallery.ids_where([]).tolist() == gallery.snapshot.ids().tolist()
        many = [Condition.parse("n>=1")] * 300
        assert len(gallery.ids_where(many)) == 8
