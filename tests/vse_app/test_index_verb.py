from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from index import tuning
from index.gallery import Gallery
from training.data.text import WordTokenizer
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from vse_app.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = WordTokenizer(["disc", "red", "square"], min_count=1, source="test")
    config = ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8), dim=8)
    directory = tmp_path_factory.mktemp("model")
    DualEncoder(config, tokenizer).save_pretrained(directory)
    return directory


class Program:
    """Runs ``vse`` in this process; the last answer's status is kept."""

    def __init__(self, capsys: pytest.CaptureFixture[str], gallery: Path) -> None:
        self.capsys, self.gallery, self.status = capsys, gallery, 0

    def text(self, *arguments: object) -> str:
        self.capsys.readouterr()
        self.status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            self.status = int(ended.code or 0)
        return self.capsys.readouterr().out

    def index(self, *arguments: object) -> Any:
        return json.loads(self.text("index", self.gallery, *arguments, "--json"))

    def search(self, *arguments: object) -> Any:
        return json.loads(self.text("search", self.gallery, *arguments, "--json"))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [tmp_path / "photos" / folder / f"{n}.png" for folder in ("a", "b") for n in range(4)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], model: Path, photos: list[Path], tmp_path: Path) -> Program:
    program = Program(capsys, tmp_path / "gallery")
    assert program.index("add", tmp_path / "photos", "--model", model)["added"] == 8
    return program


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_runs_touch_nothing(program: Program, photos: list[Path], model: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries.txt"
    queries.write_text("red disc\n" * 60)
    photos[0].unlink()
    Image.new("RGB", (9, 9)).save(photos[1])
    before = files(tmp_path)
    assert program.index("add", tmp_path / "photos", "--dry-run")["updated"] == 1
    assert program.index("remove", "--missing", "--dry-run")["removed"] == 1
    assert program.index("tune", "--queries", queries, "-k", 5, "--dry-run")["chosen"] == "exact"
    assert program.index("compact", "--dry-run")["dry_run"]
    assert program.index("export", tmp_path / "out", "--dry-run")["items"] == 8
    assert "would be made, with 7 pictures" in program.text(
        "index", tmp_path / "new", "add", tmp_path / "photos", "--model", model, "--dry-run"
    )
    assert files(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_remove_by_file_folder_condition_and_absence(program: Program, photos: list[Path], tmp_path: Path) -> None:
    report = program.index("remove", photos[0], tmp_path / "none.png")
    assert (report["removed"], report["not_there"], report["items"]) == (1, 1, 7)
    assert program.index("remove", tmp_path / "photos" / "b", "--where", "path~*/0.png")["removed"] == 1
    photos[1].unlink()
    assert program.index("remove", "--missing")["removed"] == 1
    assert program.index("remove", tmp_path / "photos")["items"] == 0
    assert program.index("info")["items"] == 0


@pytest.mark.parametrize(
    ("good", "bad", "status"), [(0, 1, 2), (1, 1, 0), (1, 0, 0)], ids=["all refused", "one refused", "none refused"]
)
def test_the_status_says_whether_all_was_in_vain(
    program: Program, photos: list[Path], tmp_path: Path, good: int, bad: int, status: int
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    report = program.index("add", *photos[:good], *[tmp_path / "broken.png"][:bad])
    assert program.status == status
    assert (report["unchanged"], len(report["refused"]), report["items"]) == (good, bad, 8)


def test_a_folder_of_films_alone_makes_no_gallery(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.MP4").touch()
    program = Program(capsys, tmp_path / "g")
    assert program.text("index", tmp_path / "g", "add", tmp_path / "films", "--model", model) == ""
    assert program.status == 2
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("action", [("add", "photos"), ("tune", "--queries", "queries.txt", "-k", "5")])
def test_dry_runs_do_not_wait_for_who_writes(program: Program, tmp_path: Path, action: tuple[str, ...]) -> None:
    (tmp_path / "queries.txt").write_text("red disc\n" * 60)
    arguments = [tmp_path / word if (tmp_path / word).exists() else word for word in action]
    with Gallery.open(program.gallery, writable=True):
        program.text("index", program.gallery, *arguments)
        assert program.status == 2  # another writer
        assert program.index(*arguments, "--dry-run")
        assert program.status == 0


def test_what_is_moved_changed_or_forced_is_told(program: Program, photos: list[Path], tmp_path: Path) -> None:
    photos[0].rename(photos[0].with_name("moved.png"))
    Image.new("RGB", (9, 9)).save(photos[1])
    said = program.text("index", program.gallery, "add", tmp_path / "photos")
    assert said == f"{program.gallery}: 0 added, 1 updated, 1 moved, 0 reworded, 6 unchanged, 0 refused; 8 pictures\n"
    assert program.index("add", tmp_path / "photos", "--force")["unchanged"] == 8


def test_what_a_table_of_facts_lacks_is_told(program: Program, photos: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "facts.jsonl"
    table.write_text(
        '{"image": "photos/a/0.png", "n": NaN}\n{"image": "typo.png"}\n{"image": "photos/a/1.png", "n": 1}\n'
    )
    report = program.index("add", tmp_path / "photos", "--facts", table)
    unused, bad = report["left_out"]
    assert unused.startswith(f"facts of 1 that are not among these pictures, as {tmp_path / 'typo.png'}")
    assert bad.startswith(f"{table}: line 1: metadata is not JSON")
    assert (report["reworded"], report["unchanged"], program.status) == (1, 7, 0)


def test_facts_can_be_searched(program: Program, photos: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "photos" / "facts.csv"
    table.write_text("image,caption,year\na/0.png,a red disc,2019\nb/1.png,,2021\n")
    report = program.index("add", tmp_path / "photos", "--facts", table)
    assert (report["reworded"], report["unchanged"]) == (2, 6)
    (found,) = program.search("red", "--where", "year>=2020")
    assert (found["path"], found["metadata"]) == (str(photos[5]), {"year": 2021})
    assert [of["caption"] for of in program.search("red", "--where", "caption=a red disc")] == ["a red disc"]


def test_many_queries_vectors_and_likenesses(program: Program, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("red disc\n\nsquare\n")
    answers = program.search("--queries", tmp_path / "queries.txt", "-k", 2)
    assert [answer["query"] for answer in answers] == ["red disc", "square"]
    assert [of["id"] for of in answers[0]["results"]] == [of["id"] for of in program.search("red disc", "-k", 2)]
    like = program.search("--like", photos[2], "-k", 8)
    assert len(like) == 7
    assert str(photos[2]) not in {of["path"] for of in like}
    assert program.search("--like", 3, "-k", 8) == like  # the third to be added
    by_image = program.search("--image", photos[2], "-k", 8)
    assert by_image[0]["path"] == str(photos[2])
    np.save(tmp_path / "vector.npy", np.ones(8, np.float32))
    assert len(program.search("--vector", tmp_path / "vector.npy", "-k", 3)) == 3
    assert len(program.search("red", "--image", photos[2], "--weight", 0.2, "-k", 3)) == 3


def test_tune_verify_compact_past_the_exact_size(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "EXACT_UP_TO", 1000)
    vectors = np.random.default_rng(0).standard_normal((1600, 8), np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "queries.txt").write_text("\n".join(["red disc", "square", "red", "disc red square"] * 20))
    program = Program(capsys, tmp_path / "gallery")
    program.index("import", tmp_path / "vectors.npy", "--model", model)
    options = ["--queries", tmp_path / "queries.txt", "-k", 3, "--target-recall", 0.9]
    report = program.index("tune", *options)
    assert report["queries_from"] == "80 texts of queries.txt"
    assert program.index("info")["search"] == report["chosen"]
    assert {point["index"].split(",")[0] for point in report["points"]} >= {"exact", "IVF64", "HNSW32", "RaBitQ"}
    assert re.search(
        r"^→ \S+ .*0\.9|1\.0", program.text("index", program.gallery, "tune", *options, "--dry-run"), re.M
    )
    out_of_reach = program.text("index", program.gallery, "tune", *options, "--memory", "1KB")
    assert (out_of_reach, program.status) == ("", 2)
    program.index("remove", "--where", "path~*0")
    assert program.index("compact")["after"]["removed"] == 0
    assert program.index("verify")["problems"] == []
    assert program.status == 0
    victim = next(program.gallery.glob("segments/*/vectors.npy"))
    os.truncate(victim, victim.stat().st_size - 1)
    (problem,) = program.index("verify")["problems"]
    assert problem.startswith(str(victim))
    assert program.status == 1


def test_captions_of_the_gallery_itself_tune_it_if_nothing_is_named(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    random = np.random.default_rng(1)
    facts = []
    for n in range(120):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        facts.append(json.dumps({"image": f"{n}.png", "caption": f"red disc {n % 7} square"}))
    (folder / "facts.jsonl").write_text("\n".join(facts))
    program.index("add", folder, "--facts", folder / "facts.jsonl")
    report = program.index("tune", "-k", 5)
    # An untrained model may tell no captions apart: then there are no probabilities, but searching is tuned.
    assert program.status == 0
    assert (report["chosen"], report["queries_from"]) == ("exact", "120 captions of the gallery")


def test_vectors_come_and_go_as_files(program: Program, tmp_path: Path) -> None:
    assert program.index("export", tmp_path / "out")["items"] == 8
    other = Program(program.capsys, tmp_path / "other")
    report = other.index("import", tmp_path / "out")
    assert (report["added"], report["items"]) == (8, 8)
    ours, theirs = ({of["path"] for of in p.search("--vector", _some(tmp_path), "-k", 8)} for p in (program, other))
    assert ours == theirs


def _some(folder: Path) -> Path:
    path = folder / "some.npy"
    np.save(path, np.eye(1, 8, dtype=np.float32))
    return path
