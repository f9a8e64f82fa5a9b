"""The rooms of the package: which there are, and that imports only point down."""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from pathlib import Path

import networkx as nx
import pytest

from editkit.moved import MOVED

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from house import FLOOR, PACKAGE, arrows, imported, upward  # noqa: E402


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, also by a detour (strongly connected components)."""
    graph = nx.DiGraph((a, b) for a, targets in edges.items() for b in targets if a != b)
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def test_at_most_ten_rooms_and_each_says_what_it_is():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == set(FLOOR) and len(rooms) <= 10
    for room in rooms:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert text and ("mport" in text), room


def test_imports_point_down():
    assert upward(arrows()) == []


def test_an_upward_import_is_found():
    name = "editkit.linear.normal"
    edges = {name: imported(name, "from ..models import lm", False, {"editkit.models.lm"})}
    assert upward(edges) == ["editkit.linear.normal imports editkit.models.lm"]


def test_no_two_modules_import_each_other():
    edges = {name: targets - {".".join(name.split(".")[:-1])} for name, targets in arrows().items()}
    assert circles(edges) == []


def test_no_two_extensions_of_the_book_import_each_other():
    files = {path.stem: path for path in (ROOT / "book" / "_ext").glob("*.py")}
    edges = {}
    for name, path in files.items():
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        found = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
        edges[name] = found & set(files)
    assert circles(edges) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_places_forward_and_name_the_new_one(old):
    for name in [n for n in sys.modules if n == f"editkit.{old}" or n.startswith(f"editkit.{old}.")]:
        del sys.modules[name]
    with pytest.warns(FutureWarning, match=f"editkit.{old} has moved: import editkit"):
        importlib.import_module(f"editkit.{old}")


def test_old_imports_give_the_same_objects():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from editkit.corpora.world import load_world as old_world
        from editkit.methods.weights.rome import ROME as old

    from editkit.corpora.world import load_world
    from editkit.methods.weights.rome import ROME

    assert old is ROME and old_world is load_world


def test_a_name_that_never_was_is_still_missing():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("editkit.nothing")
