"""The plan of the house, held by reading the source: nothing here is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "simpletuner"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: path.relative_to(PACKAGE).as_posix() for path in FILES}

LAYERS = [
    {"errors", "events"},
    {"config"},
    {"diffusion", "networks", "data", "reporting"},
    {"families"},
    {"training"},
    {"evaluation"},
    {"preflight"},
    {"disk", "estimates", "text_cache"},
    {"lending", "stocks"},
    {"publishing", "checkup", "cache_tools"},
    {"app", "cache_sweep", "checkup_text", "checkup_page"},
    {"cli", "wizard", "examples", "hub_cli", "__main__", "train", "configure"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate"}


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            # `from simpletuner.data import cache` imports a module, `from simpletuner.data.cache import get` does not
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_module_level(tree: ast.Module) -> Iterator[str]:
    """What is imported when the file is: not in functions, and not for the type checker alone."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(ast.Module([node], []))
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_imports_point_down(path: Path) -> None:
    here = top(path)
    if here == "__init__":
        assert not list(imported(tree_of(path)))
        return
    theirs = {name.split(".")[1] for name in imported(tree_of(path)) if name.startswith("simpletuner.")}
    uphill = {there for there in theirs if there in RANK and there != here and RANK[there] >= RANK[here]}
    if here in LAYERS[-1]:
        uphill -= LAYERS[-1]  # the command line shows the examples and opens the wizard
    assert not uphill, f"{here} must not import {uphill}"


def test_every_part_has_its_layer() -> None:
    assert {top(path) for path in FILES} - {"__init__"} <= RANK.keys()


def test_the_top_level_bears_no_name_of_the_standard_library() -> None:
    """`accelerate launch simpletuner/train.py` puts this folder first on the import path."""
    assert not {path.stem for path in PACKAGE.iterdir()} & sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_only_the_engine_knows_accelerate(path: Path) -> None:
    uses = any(name.split(".")[0] == "accelerate" for name in imported(tree_of(path)))
    assert not uses or NAMES[path] == "training/engine.py"


LIGHT = [
    path
    for path in FILES
    if top(path) in {"config", "families", "errors", "events", "cli", "wizard", "hub_cli", "__main__", "train", "configure"}
    or NAMES[path] in {"data/samples.py", "examples/__init__.py"}
]


@pytest.mark.parametrize("path", LIGHT, ids=NAMES.get)
def test_what_the_command_line_reads_imports_nothing_heavy(path: Path) -> None:
    """`--help` and a config error answer at once. What is imported must be light as well."""
    seen, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        seen.add(file)
        for name in at_module_level(tree_of(file)):
            assert name.split(".")[0] not in HEAVY, f"{NAMES[file]} imports {name}"
            parts = name.split(".")[1:] if name.startswith("simpletuner.") else []
            found = [PACKAGE.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
            ours = {file for stem in found for file in (stem.with_suffix(".py"), stem / "__init__.py") if file in NAMES}
            waiting += ours - seen


PICKLING = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_no_pickle_is_written_or_read(path: Path) -> None:
    tree = tree_of(path)
    assert not {name.split(".")[0] for name in imported(tree)} & PICKLING
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.save"}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))
