"""The rules that keep the wings apart, read from the source."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from training.config import read_toml
from vse_app.train_arguments import read_arguments

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("training", "index", "vse_app")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for wing in WINGS
    for path in sorted((ROOT / wing).rglob("*.py"))
}
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.toml"))
GROUND = {"errors", "files"}
FLOORS = {
    "data": GROUND | {"data"},
    "evaluation": GROUND | {"data", "evaluation"},
    "sampling": GROUND | {"data", "evaluation", "sampling"},
    "models": GROUND | {"data", "models", "config"},
    "losses": GROUND | {"losses", "models"},
    "robustness": GROUND | {"data", "evaluation", "models", "robustness"},
}


def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports(tree: ast.AST, lazy: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; without ``lazy`` only those that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else str(node.module)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, lazy)


def imported(module: str, lazy: bool = True) -> set[str]:
    return set(imports(parse(module), lazy))


def test_reading_imports_sees_each_form() -> None:
    tree = ast.parse("import os.path\nfrom training import config\nclass A:\n  def f(self):\n    import faiss\n")
    assert set(imports(tree)) == {"os.path", "training.config", "faiss"}
    assert set(imports(tree, lazy=False)) == {"os.path", "training.config"}


@pytest.mark.parametrize(
    ("wing", "forbidden"),
    [
        ("training", {"index", "vse_app", "faiss", "gradio"}),
        ("index", {"torch", "training", "vse_app", "gradio", "transformers"}),
    ],
)
def test_ground_wings_stand_alone(wing: str, forbidden: set[str]) -> None:
    for module in FILES:
        if module.split(".")[0] == wing:
            found = {name.split(".")[0] for name in imported(module)} & forbidden
            assert not found, f"{module} imports {found}"


def test_nobody_imports_the_application() -> None:
    for module in FILES:
        if not module.startswith("vse_app"):
            assert not any(name.split(".")[0] == "vse_app" for name in imported(module)), module


@pytest.mark.parametrize("floor", [floor for floor in FLOORS if (ROOT / "training" / floor).is_dir()])
def test_floors_of_training_rest_on_lower_ones(floor: str) -> None:
    for module in FILES:
        if module.startswith(f"training.{floor}"):
            own = {name.split(".")[1] for name in imported(module) if name.startswith("training.")}
            assert own <= FLOORS[floor], f"{module} imports {own - FLOORS[floor]}"


def test_nothing_in_training_imports_the_trainer() -> None:
    for module in FILES:
        if module.startswith("training."):
            assert "training.trainer" not in imported(module), module


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: imported(module, lazy=False) & FILES.keys() for module in FILES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == FILES.keys()


@pytest.mark.parametrize("module", FILES)
def test_files_stay_short(module: str) -> None:
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 600


def test_nothing_unpickles() -> None:
    for module in FILES:
        names = {name.split(".")[0] for name in imported(module)}
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, module
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), module
                assert node.value.value is False, module
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), module


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    heavy = {"torch", "transformers", "gradio", "faiss", "numpy"}
    script = (
        "import sys, time\nfrom vse_app.cli import main\n"
        f"try:\n  main(['--help'])\nfinally:\n  print(sorted({heavy} & sys.modules.keys()), file=sys.stderr)\n"
        "  print(time.process_time(), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "VERB" in result.stdout
        imported_heavy, spent = result.stderr.splitlines()
        assert imported_heavy == "[]"
        seconds.append(float(spent))  # the processor's, so that other programs do not count
    assert min(seconds) < 0.5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_begin_with_their_command(recipe: Path, tmp_path: Path) -> None:
    config = read_toml(recipe)
    header = re.match(r"(#.*\n)+", recipe.read_text(encoding="utf-8"))
    assert header, "no header comment"
    command = re.search(rf"vse train {recipe.stem} .*", header[0].replace("\\\n#", ""))
    assert command, "the header does not name the command"
    resolved, resume = read_arguments(shlex.split(command[0])[2:])
    assert not resume
    assert (resolved.model, resolved.loss) == (config.model, config.loss)


def test_bars_are_for_terminals() -> None:
    for module in FILES:
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm":
                assert "disable" in [keyword.arg for keyword in node.keywords], f"{module} line {node.lineno}"
