"""Words beside numbers: before a run what to expect and why, after it by quotation what came out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from editkit.press.layout import Layout
from editkit.press.notebook import read_notebook
from editkit.press.reference import references

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
AWAITED = {"chance.hub"}  # recorded by the notebook since the reference was made; leaves when it is made anew
QUOTE = re.compile(r"\{([^{}]+)\}")


def calls(path: Path, method: str) -> list[ast.Call]:
    """All `run.<method>(...)` of a notebook."""
    found = []
    for cell in read_notebook(path).cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == f"run.{method}":
                    found.append(node)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_says_what_to_expect_and_what_came_out(path):
    first = read_notebook(path).cells[0].source
    question, _, expected = first.partition("**To expect.**")
    assert len(question.split()) > 20 and len(expected.split()) > 10, (
        "the first cell asks, and says what to expect and why"
    )
    assert not re.search(r"\d\.\d|\d ?%", expected), "an expectation that quotes a result"
    for call in calls(path, "says"):
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z{])", ast.literal_eval(call.args[0])):
            assert QUOTE.search(sentence), f"{sentence!r} quotes nothing"
    recorded = calls(path, "value") or calls(path, "values")
    assert calls(path, "says") or not recorded, "numbers are recorded and none is put into words"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_quotes_is_recorded(path):
    """In every sentence, by some committed reference: a key that nobody records would drop its sentence in silence."""
    notebook = f"notebooks/{path.name}"
    values = [s["values"] for s, _ in references(Layout(ROOT)).values() if s["notebook"] == notebook]
    known = set().union(*values) | AWAITED
    for call in calls(path, "says") if values else ():
        for part in QUOTE.findall(ast.literal_eval(call.args[0])):
            for key in part.removesuffix(" bare").split("<>"):
                assert key.strip() in known


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_alt_text_is_typed(path):
    """They are made from what is drawn (editkit/press/describe.py); a schematic without data says what it is."""
    for call in calls(path, "figure"):
        typed = [
            k for k in call.keywords if k.arg == "alt" and isinstance(k.value, (ast.Constant, ast.JoinedStr))
        ]
        assert not typed or ast.literal_eval(call.args[0]) == "map"
