from __future__ import annotations

import datetime
import json
import math
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_tools import DIM, clip_retrieval, create, unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index import exchange, segment, vector_files
from index.errors import GalleryError
from index.exchange import ImportReport, export_gallery, import_vectors, source_shape
from index.gallery import Gallery
from index.items import Item

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
h5py = pytest.importorskip("h5py")


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    with create(tmp_path / "g") as created:
        yield created


def contents(gallery: Gallery) -> dict[str, tuple[Item, bytes]]:
    items = list(gallery.items())
    rows = gallery.vectors(np.array([key for key, _ in items]))
    return {item.path: (item, row.tobytes()) for (_, item), row in zip(items, rows, strict=True)}


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    known=st.lists(
        st.tuples(
            st.none() | words,
            st.integers(0, 2**63 - 1),
            st.integers(-(2**62), 2**62),
            words,
            st.dictionaries(words, json_values, max_size=3),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_an_exported_gallery_comes_back_as_it_was(
    known: list[tuple[str | None, int, int, str, dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
    small_batches: None,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    items = [Item(f"a b/é{n}.jpg", *facts) for n, facts in enumerate(known)]
    with create(folder / "g") as gallery, create(folder / "h") as other:
        gallery.add(items, unit(0, len(items)))
        assert export_gallery(gallery, folder / "out") == len(items)
        assert source_shape(folder / "out") == (len(items), DIM)
        report = import_vectors(other, folder / "out")
        assert report == ImportReport(added=len(items))
        assert contents(other) == contents(gallery)


def test_export_has_the_layout_of_clip_retrieval(gallery: Gallery, tmp_path: Path, small_batches: None) -> None:
    items = [Item(f"{n:02}.jpg", f"caption {n}", n, n, "ab", {"n": n}) for n in range(40)]
    rows = unit(0, 40)
    gallery.add(items, rows)
    gallery.remove(["00.jpg"])
    seen: list[tuple[str, int, int]] = []
    (tmp_path / "out").mkdir()
    export_gallery(gallery, tmp_path / "out", lambda *step: seen.append(step))
    assert seen[-1] == ("exporting", 39, 39)
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert names == [
        *(f"img_emb/img_emb_000{n}.npy" for n in range(3)),
        *(f"metadata/metadata_000{n}.parquet" for n in range(3)),
    ]
    arrays = [np.load(tmp_path / "out" / name, allow_pickle=False) for name in names[:3]]
    assert [len(array) for array in arrays] == [16, 16, 7]
    np.testing.assert_array_equal(np.concatenate(arrays), rows[1:])
    table = pa.concat_tables([pq.read_table(tmp_path / "out" / name) for name in names[3:]]).to_pydict()
    assert table["image_path"] == [item.path for item in items[1:]]
    assert table["caption"] == [item.caption for item in items[1:]]
    assert table["id"] == list(range(2, 41))
    assert json.loads(table["metadata"][3]) == {"n": 4}


@pytest.mark.parametrize("parts", [1, 12])
def test_clip_retrievals_own_files_come_in(gallery: Gallery, tmp_path: Path, parts: int, small_batches: None) -> None:
    rows = unit(1, 24)
    tables = {
        "image_path": [f"{n:05}" for n in range(24)],
        "caption": [None if n == 3 else f"caption {n}" for n in range(24)],
        "width": [None if n == 3 else n for n in range(24)],
        "similarity": [math.nan if n == 4 else n / 2 for n in range(24)],
        "taken": [datetime.date(2020, 1, 1)] * 24,
        "tags": [["a", "b"]] * 24,
        "id": [f"x{n}" for n in range(24)],
    }
    source = clip_retrieval(tmp_path / "clip", rows.astype(np.float16), tables, parts)
    (source / "text_emb").mkdir()
    (source / "text_emb" / "text_emb_0.npy").write_bytes(b"not looked at")
    assert source_shape(source) == (24, DIM)
    seen: list[tuple[str, int, int]] = []
    report = import_vectors(gallery, source, lambda *step: seen.append(step))
    assert (report.added, report.normalised, report.skipped_rows) == (24, 0, 0)
    assert seen[-1] == ("importing", 24, 24)
    items = [item for _, item in gallery.items()]
    common = {"taken": "2020-01-01", "tags": ["a", "b"]}
    by_path = {item.path: item for item in items}
    assert by_path["00002"] == Item(
        "00002", "caption 2", 0, 0, "", {"width": 2, "similarity": 1.0, "id": "x2"} | common
    )
    assert by_path["00003"] == Item("00003", None, 0, 0, "", {"similarity": 1.5, "id": "x3"} | common)
    assert by_path["00004"].metadata == {"width": 4, "id": "x4"} | common
    stored = gallery.vectors(gallery.snapshot.ids())
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1.1e-5)
    expected = rows[[int(item.path) for item in items]]
    np.testing.assert_allclose(stored, expected, atol=1e-3)


def test_without_paths_items_are_called_after_file_and_row(gallery: Gallery, tmp_path: Path) -> None:
    import_vectors(gallery, clip_retrieval(tmp_path / "bare", unit(0, 4), None, 2))
    import_vectors(gallery, clip_retrieval(tmp_path / "captions", unit(0, 2), {"caption": ["a", "b"]}))
    np.save(tmp_path / "photos.npy", unit(0, 2).astype(np.float64))
    import_vectors(gallery, tmp_path / "photos.npy")
    assert {item.path: item.caption for _, item in gallery.items()} == {
        "img_emb_0/0": "a",
        "img_emb_0/1": "b",
        "img_emb_1/0": None,
        "img_emb_1/1": None,
        "photos/0": None,
        "photos/1": None,
    }


def test_rows_without_use_are_skipped_and_told(gallery: Gallery, tmp_path: Path, small_batches: None) -> None:
    rows = unit(0, 9).astype(np.float64)
    rows[1], rows[3, 2], rows[4, 0], rows[6], rows[7] = 0, np.nan, 1e300, 3 * rows[6], 1e-30 * rows[7]
    paths = [None if n == 8 else f"{n}.jpg" for n in range(9)]
    source = clip_retrieval(tmp_path / "clip", rows, {"image_path": paths})
    dry = import_vectors(gallery, source, dry_run=True)
    assert not len(gallery)
    report = import_vectors(gallery, source)
    assert dry == report
    array = source / "img_emb" / "img_emb_0.npy"
    assert report.skipped == [
        f"{array}: 1: its vector is zero",
        f"{array}: 3: it is not finite",
        f"{array}: 4: it is not finite",
        f"{array}: 8: has no image_path",
    ]
    assert (report.added, report.skipped_rows, report.normalised, report.replaced) == (5, 4, 2, 0)
    expected = unit(0, 9)[[0, 2, 5, 6, 7]]
    np.testing.assert_allclose(gallery.vectors(gallery.snapshot.ids()), expected, atol=1e-6)


def test_order_galleries_take_vectors_as_they_are(tmp_path: Path) -> None:
    rows = np.array([[0, 0, 0], [3, 4, 0], [0, np.inf, 0]], np.float32)
    np.save(tmp_path / "order.npy", rows)
    with create(tmp_path / "g", 3, "order") as gallery:
        report = import_vectors(gallery, tmp_path / "order.npy")
        assert (report.added, report.normalised, report.skipped_rows) == (2, 0, 1)
        np.testing.assert_array_equal(gallery.vectors(gallery.snapshot.ids()), rows[:2])


def test_many_skipped_rows_are_only_counted(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "SHOWN", 3)
    np.save(tmp_path / "zero.npy", np.zeros((10, DIM), np.float32))
    report = import_vectors(gallery, tmp_path / "zero.npy")
    assert (report.added, report.skipped_rows, len(report.skipped)) == (0, 10, 3)


def test_a_path_that_occurs_again_replaces(gallery: Gallery, tmp_path: Path, small_batches: None) -> None:
    gallery.add([Item("7.jpg", None, 1, 2, "00")], unit(5, 1))
    paths = [f"{n}.jpg" for n in (0, 1, 0, 2, 3, 4, 5, 6, 7, 1)]
    source = clip_retrieval(tmp_path / "clip", unit(0, 10), {"image_path": paths})
    assert import_vectors(gallery, source, dry_run=True).replaced == 2
    report = import_vectors(gallery, source)
    assert (report.added, report.replaced, len(gallery)) == (10, 3, 8)
    stored = {path: row for path, (_, row) in contents(gallery).items()}
    assert stored["0.jpg"] == unit(0, 10)[2].tobytes()
    assert stored["1.jpg"] == unit(0, 10)[9].tobytes()
    assert stored["7.jpg"] == unit(0, 10)[8].tobytes()


def test_an_interrupted_import_can_be_run_again(gallery: Gallery, tmp_path: Path, small_batches: None) -> None:
    np.save(tmp_path / "v.npy", unit(0, 18))

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_vectors(gallery, tmp_path / "v.npy", interrupt)
    assert len(gallery) == 10
    report = import_vectors(gallery, tmp_path / "v.npy")
    assert (report.added, report.replaced, len(gallery)) == (18, 10, 18)
    assert {path: row for path, (_, row) in contents(gallery).items()} == {
        f"v/{n}": row.tobytes() for n, row in enumerate(unit(0, 18))
    }


def test_an_interrupted_export_leaves_nothing(gallery: Gallery, tmp_path: Path, small_batches: None) -> None:
    gallery.add([Item(f"{n}.jpg", None, 1, 2, "00") for n in range(40)], unit(0, 40))

    def interrupt(stage: str, done: int, total: int) -> None:
        assert not (tmp_path / "out").exists()
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gallery(gallery, tmp_path / "out", interrupt)
    assert os.listdir(tmp_path) == ["g"]
    # A killed process cannot clean up; the next export does.
    (tmp_path / ".out.unfinished" / "img_emb").mkdir(parents=True)
    (tmp_path / ".out.unfinished" / "img_emb" / "img_emb_9999.npy").write_bytes(b"half")
    export_gallery(gallery, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["g", "out"]
    assert len(os.listdir(tmp_path / "out" / "img_emb")) == 3


def test_refusals_of_export(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GalleryError, match="has no items"):
        export_gallery(gallery, tmp_path / "out")
    gallery.add([Item("a.jpg", None, 1, 2, "00")], unit(0, 1))
    with pytest.raises(GalleryError, match="nothing is written"):
        export_gallery(gallery, tmp_path / "missing" / "deep" / "out")
    for taken in ("full", "file"):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "a").touch()
        (tmp_path / "file").touch()
        with pytest.raises(GalleryError, match="not empty; choose another directory"):
            export_gallery(gallery, tmp_path / taken)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(GalleryError, match=r"pip install 'vse-app\[exchange\]'"):
        export_gallery(gallery, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "g"]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def save_objects(path: Path) -> None:
    np.save(path, np.array([[Trap()]], object))


def save_pickle(path: Path) -> None:
    np.array([[Trap()]], object).dump(path)


def save_promise(path: Path) -> None:
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, DIM)}
        np.lib.format.write_array_header_1_0(file, header)


def save_negative(path: Path) -> None:
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (-1, DIM)}
        np.lib.format.write_array_header_1_0(file, header)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (save_objects, "holds object"),
        (save_pickle, "magic string"),
        (save_promise, "ends before the 1,000,000,000,000 rows"),
        (save_negative, "holds float32"),
        (lambda path: np.save(path, np.zeros((2, DIM), np.int64)), "holds int64"),
        (lambda path: np.save(path, np.zeros(DIM, np.float32)), "holds float32"),
        (lambda path: np.save(path, np.asfortranarray(unit(0, 3))), "by columns"),
        (lambda path: np.save(path, np.zeros((2, 0), np.float32)), "holds float32"),
        (lambda path: np.save(path, unit(0, 2, DIM + 1)), f"have {DIM + 1} dimensions"),
        (lambda path: np.savez(path.with_suffix(""), a=unit(0, 2)), "No such file"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{"), "EOF"),
        (lambda path: path.write_bytes(b""), "EOF"),
    ],
)
def test_numpy_files_that_are_refused(
    gallery: Gallery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], object],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "v.npy")
    with pytest.raises(GalleryError, match=reason) as caught:
        import_vectors(gallery, tmp_path / "v.npy")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "v.npy"))
    assert not len(gallery)
    assert not (tmp_path / "trapped").exists()


def test_folders_that_are_refused(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, reason: str) -> None:
        with pytest.raises(GalleryError, match=reason) as caught:
            import_vectors(gallery, folder)
        assert "\n" not in str(caught.value)
        assert not len(gallery)

    paths = {"image_path": ["a", "b", "c"]}
    refused(tmp_path / "missing", "has no img_emb")
    folder = clip_retrieval(tmp_path / "short", unit(0, 4), None)
    pq.write_table(pa.table(paths), folder / "metadata" / "metadata_0.parquet")
    refused(folder, "has 3 rows for the 4 vectors of img_emb_0.npy")
    pq.write_table(pa.table(paths), folder / "metadata" / "metadata_1.parquet")
    refused(folder, "1 files of vectors and 2 tables")
    folder = clip_retrieval(tmp_path / "damaged", unit(0, 3), paths)
    table = folder / "metadata" / "metadata_0.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[:-20])
    refused(folder, "metadata_0.parquet: Parquet")
    table.write_bytes(whole[:4] + bytes(30) + whole[34:])
    refused(folder, "metadata_0.parquet: .*write it again")
    refused(clip_retrieval(tmp_path / "climbing", unit(0, 1), {"image_path": ["../a"]}), "without '..'")
    facts = {"size": ["large"], "mtime_ns": [1], "sha256": [""], "metadata": ["{}"]}
    refused(clip_retrieval(tmp_path / "facts", unit(0, 1), {"image_path": ["a"]} | facts), "large")
    folder = clip_retrieval(tmp_path / "wide", unit(0, 3), paths)
    np.save(folder / "img_emb" / "img_emb_0.npy", unit(0, 3, DIM + 1))
    refused(folder, "use the same encoder")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(folder, r"pip install 'vse-app\[exchange\]'")


def test_metadata_that_is_no_object_is_skipped(gallery: Gallery, tmp_path: Path) -> None:
    texts = ["{", "[1]", "[" * 100_000, None, '{"a": 1}']
    facts = {"size": [1] * 5, "mtime_ns": [None] * 5, "sha256": ["ab"] * 5, "metadata": texts}
    source = clip_retrieval(tmp_path / "c", unit(0, 5), {"image_path": list("abcde"), "more": [1] * 5} | facts)
    report = import_vectors(gallery, source)
    assert [line.split(": ")[1] for line in report.skipped] == ["0", "1", "2"]
    assert [item for _, item in gallery.items()] == [
        Item("d", None, 1, 0, "ab", {"more": 1}),
        Item("e", None, 1, 0, "ab", {"more": 1, "a": 1}),
    ]


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BATCH", 250)
    monkeypatch.setattr(vector_files, "BATCH", 250)
    monkeypatch.setattr(segment, "BLOCK_BYTES", 1 << 18)
    dim = 256
    peaks: dict[int, tuple[int, int]] = {}
    for count in (1_000, 6_000):
        paths = [f"{n}.jpg" for n in range(count)]
        captions = [np.random.default_rng(n).bytes(1000).hex() for n in range(count)]
        tables = {"image_path": paths, "caption": captions}
        source = clip_retrieval(tmp_path / f"c{count}", unit(0, count, dim), tables)
        before, in_tables = pa.total_allocated_bytes(), [0]  # of pyarrow, unknown to tracemalloc
        with create(tmp_path / f"g{count}", dim) as gallery:

            def look(*step: object, seen: list[int] = in_tables) -> None:
                seen.append(pa.total_allocated_bytes())

            tracemalloc.start()
            import_vectors(gallery, source, look)
            export_gallery(gallery, tmp_path / f"out{count}", look)
            peaks[count] = tracemalloc.get_traced_memory()[1], max(in_tables) - before
            tracemalloc.stop()
        assert source_shape(tmp_path / f"out{count}") == (count, dim)
    small, large = peaks[1_000], peaks[6_000]
    assert large[0] < 1.3 * small[0] + 1e6  # ids and names of files grow a little
    assert large[0] < 6_000 * dim * 4 * 2 / 3
    assert large[1] < min(1.3 * small[1] + 1e6, 6_000 * 2_000 * 2 / 3)
