"""Galleries that somebody made up, checksums and all: what the files say."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from gallery_tools import DIM, assert_refused, cook, item, outcome, read_manifest, refused, vectors, write_manifest

from index.gallery import Gallery
from index.verification import verify

INDEX = "index/000000005"
SEGMENT = "segments/000000001"
ARRAYS = [f"{SEGMENT}/{name}.npy" for name in ("ids", "vectors", "removed-000000003")] + [f"{INDEX}/ids.npy"]


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    encoded = header.encode("latin1")
    return b"\x93NUMPY" + version + struct.pack("<H", len(encoded)) + encoded + data


def saved(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("arr_0.npy", saved(np.arange(3)))
    return buffer.getvalue()


HEADER = "{'descr': '%s', 'fortran_order': %s, 'shape': %s, }\n"
CONTENTS = {
    "10^15 rows": npy(HEADER % ("<f4", False, (10**15, DIM))),
    "10^15 ids": npy(HEADER % ("<i8", False, (10**15,))),
    "10^400 rows": npy(HEADER % ("<f4", False, (10**400, DIM))),
    "negative rows": npy(HEADER % ("<f4", False, (-14, DIM)), bytes(1000)),
    "objects": saved(np.array([None, {}]), allow_pickle=True),
    "columns": saved(np.asfortranarray(np.ones((14, DIM), np.float32))),
    "other type": saved(np.ones((14, DIM))),
    "other ids": saved(np.ones(14, np.int32)),
    "big endian": saved(np.ones((14, DIM), ">f4")),
    "scalar": saved(np.float32(1)),
    "zip": zipped(),
    "broken zip": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x04K\x01.",
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "version 9": npy(HEADER % ("<f4", False, (14, DIM)), version=b"\x09\x00"),
    "a call": npy("__import__('os').system('true')\n"),
    "parentheses": npy("(" * 300 + "\n"),
    "unclosed": npy("{'descr': '''\n"),
    "mixed keys": npy("{1: 2, 'shape': 3, None: 4}\n"),
    "no type": npy(HEADER % ("nonsense", False, (14, DIM))),
    "structure": npy("{'descr': [('a', '<f4'), ('b', '<f4')], 'fortran_order': False, 'shape': (14,)}\n", bytes(200)),
    "a list as type": npy("{'descr': [[[]]], 'fortran_order': False, 'shape': (14,), }\n"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_none(name: str, content: str, made: Path) -> None:
    (made / name).write_bytes(CONTENTS[content])
    cook(made)
    assert_refused(made, f"^{made / name}: ", opens=name.startswith(INDEX), sparing="10^" in content)


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 2, *range(4, 15)],
        [2, 1, *range(3, 15)],
        [0, *range(2, 15)],
        [*range(1, 14), 999],
        [-5, *range(2, 15)],
        [1, -(1 << 63), *range(3, 15)],
        [*range(1, 14), -(1 << 63)],
        [*range(1, 14), (1 << 63) - 1],
    ],
    ids=repr,
)
def test_ids_ascend(ids: list[int], made: Path) -> None:
    np.save(made / SEGMENT / "ids.npy", np.array(ids, np.int64))
    cook(made)
    assert_refused(made, "ids")


@pytest.mark.parametrize("bits", [[255, 252], [0, 0], [3, 0], [0, 3]])
def test_as_many_rows_are_removed_as_the_manifest_says(bits: list[int], made: Path) -> None:
    np.save(made / SEGMENT / "removed-000000003.npy", np.array(bits, np.uint8))
    cook(made)
    assert_refused(made, "is not what the manifest says")


SQL = {
    "view": "CREATE VIEW other AS SELECT * FROM items",
    "trigger": "CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM items; END",
    "table": "CREATE TABLE other (a)",
    "virtual table": "CREATE VIRTUAL TABLE other USING fts5(a)",
    "index": "CREATE INDEX other ON items (caption)",
    "column": "ALTER TABLE items ADD COLUMN more TEXT",
    "view in place": "ALTER TABLE items RENAME TO held; CREATE VIEW items AS SELECT * FROM held",
    "generated column": "DROP TABLE items; CREATE TABLE items (id INTEGER PRIMARY KEY, path TEXT AS ('x'))",
    "nothing": "DROP TABLE items",
    "statistics": "ANALYZE",
}


@pytest.mark.parametrize("name", SQL)
def test_item_files_hold_one_table(name: str, made: Path) -> None:
    path = made / SEGMENT / "items.sqlite"
    with sqlite3.connect(path) as table:
        table.executescript(SQL[name])
    table.close()
    cook(made)
    assert_refused(made, f"^{path}: is no table of items; ")


@pytest.mark.parametrize(
    "assignment",
    [
        "path = ''",
        "path = '../../etc/passwd'",
        "path = 'a/../b'",
        "path = 'a\\..\\b'",
        "path = CAST(x'610062' AS TEXT)",
        "path = x'6162'",
        "path = CAST(x'ff0a' AS TEXT)",
        "caption = x'6162'",
        "caption = CAST(x'0aff' AS TEXT)",
        "size = 'many'",
        "mtime_ns = 1.5",
        "sha256 = x'00'",
        "metadata = '[]'",
        "metadata = 'null'",
        "metadata = '{'",
        "metadata = x'ff'",
        "metadata = '" + "[" * 3000 + "'",
        'metadata = \'{"x": ' + "9" * 5000 + "}'",
        "id = 77",
    ],
    ids=lambda assignment: assignment[:32],
)
def test_items_are_items(assignment: str, made: Path) -> None:
    path = made / SEGMENT / "items.sqlite"
    with sqlite3.connect(path) as table:
        table.execute(f"UPDATE items SET {assignment} WHERE id = 5")
    table.close()
    cook(made)
    problems = verify(made).problems
    assert len(problems) == 1
    assert len(problems[0].splitlines()) == 1
    with Gallery.open(made) as reader:
        message = outcome(lambda: list(reader.items()))
        assert message
        assert outcome(lambda: reader.search(vectors(0, 1), 30)) == message


def test_an_item_that_is_missing_is_no_crash(made: Path) -> None:
    path = made / SEGMENT / "items.sqlite"
    with sqlite3.connect(path) as table:
        table.execute("DELETE FROM items WHERE id = 5")
    table.close()
    cook(made)
    assert_refused(made, f"^{path}: ", opens=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"nprobe": 0}',
        b'{"nprobe": true}',
        b'{"nprobe": 1.5}',
        b'{"nprobe": 99999999999999999999}',
        b'{"other": 1}',
        b"{}",
        b'{"efSearch": 3}',
        b'{"nprobe": 1, "k_factor": 2}',
        b"[" * 100_000,
        b"\xff",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_search_parameters_fit_their_index(content: bytes, made: Path) -> None:
    (made / INDEX / "parameters.json").write_bytes(content)
    cook(made)
    assert_refused(made, f"^{made / INDEX}", opens=True)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"], ids=lambda content: repr(content[:9]))
def test_curves_are_json(content: bytes, made: Path) -> None:
    (made / INDEX / "curve.json").write_bytes(content)
    cook(made)
    assert_refused(made, r"curve\.json: ", opens=True)


@pytest.mark.parametrize("name", ["curve.json", "ids.npy", "parameters.json"])
def test_an_index_has_all_its_files(name: str, made: Path) -> None:
    cook(made, lambda content: content["index"]["files"].pop(name))
    assert_refused(made, f"^{made / INDEX / name}: is not in the manifest", opens=True)


@pytest.mark.parametrize("name", ["ids.npy", "vectors.npy", "items.sqlite"])
def test_a_segment_has_all_its_files(name: str, made: Path) -> None:
    cook(made, lambda content: content["segments"][0]["files"].pop(name))
    assert_refused(made, f"^{made / SEGMENT / name}: is not in the manifest")


def other_metric() -> Any:
    return faiss.index_factory(DIM, "IVF2,Flat", faiss.METRIC_L2)


def wrapped() -> Any:
    return faiss.index_factory(DIM, "PCA8,IVF2,Flat", faiss.METRIC_INNER_PRODUCT)


@pytest.mark.parametrize(
    "build",
    [
        other_metric,
        wrapped,
        lambda: faiss.IndexFlatIP(DIM),
        lambda: faiss.index_factory(DIM + 1, "IVF2,Flat", faiss.METRIC_INNER_PRODUCT),
        lambda: faiss.index_factory(DIM, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT),
        lambda: faiss.index_factory(DIM, "Flat,RFlat", faiss.METRIC_INNER_PRODUCT),
        lambda: faiss.index_factory(DIM, "HNSW8", faiss.METRIC_INNER_PRODUCT),
    ],
)
def test_other_kinds_of_index_are_refused(build: Callable[[], Any], made: Path) -> None:
    index = build()
    index.train(vectors(0, 120, index.d))
    index.add(vectors(1, 22, index.d)) if "IDMap" not in type(index).__name__ else None
    faiss.write_index(index, str(made / INDEX / "index.faiss"))
    cook(made)
    assert_refused(made, f"^{made / INDEX}/index.faiss: ", opens=True)


@pytest.mark.parametrize("ids", [[*range(1, 22), 999], [*range(101, 123)], [*range(3, 25)]], ids=repr)
def test_an_index_of_other_items_is_refused(ids: list[int], made: Path) -> None:
    np.save(made / INDEX / "ids.npy", np.array(ids, np.int64))
    cook(made)
    assert_refused(made, r"ids\.npy: ", opens=True)


PROMISES = """
import resource, sys
from pathlib import Path
import numpy as np
from gallery_tools import cook, outcome, vectors
from index.gallery import Gallery
directory = Path(sys.argv[1])
path = directory / "index/000000005/index.faiss"
content = path.read_bytes()
Gallery.open(directory).search(vectors(0, 1), 3)
resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, 2_000_000_000))
refused = 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for width, number in ((8, 1 << 40), (8, (1 << 63) - 1), (4, 1 << 28)):
    for place in range(4, min(300, len(content) - 8), 4):
        changed = bytearray(content)
        changed[place : place + width] = number.to_bytes(width, "little")
        path.write_bytes(changed)
        cook(directory)
        with Gallery.open(directory) as gallery:
            message = outcome(lambda: gallery._searching())
        refused += message is not None
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
print(refused)
"""


def test_counts_that_promise_terabytes_allocate_nothing(made: Path) -> None:
    paths = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}"
    command = [sys.executable, "-c", PROMISES, str(made)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


def test_numbers_at_their_end_refuse_to_grow(made: Path) -> None:
    cook(made, lambda content: content.update(next_id=(1 << 62) - 1))
    with Gallery.open(made, writable=True) as writer:
        before = verify(made)
        with refused("unchanged"):
            writer.add([item("new")], vectors(7, 1))
        assert verify(made) == before
    cook(made, lambda content: content.update(next_id=99, next_part=10**9 - 1))
    with Gallery.open(made, writable=True) as writer, refused("unchanged"):
        writer.add([item("new")], vectors(7, 1))
    assert not verify(made).leftovers


def test_models_and_unknown_calibrations_are_plain_data(made: Path) -> None:
    content = read_manifest(made)
    write_manifest(made, content | {"model": {"name": "line\nbreak", "checksum": "x" * 100}})
    with Gallery.open(made) as reader, refused("line.nbreak"):
        reader.check_model("abc")
    assert json.dumps(content)
