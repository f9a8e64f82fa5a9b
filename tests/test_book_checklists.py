"""The checklists for a new method and a new data set, followed to the letter: their Python blocks are executed."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from conftest import make_lm

from editkit.methods import EDITORS

BOOK = Path(__file__).resolve().parents[1] / "book"


def blocks(page: str) -> list[str]:
    text = (BOOK / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def follow(page: str, monkeypatch, **names) -> dict:
    """Execute the blocks as one module and return its names."""
    module = types.ModuleType("checklist")
    monkeypatch.setitem(sys.modules, "checklist", module)
    module.__dict__.update(names)
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), module.__dict__)
    return module.__dict__


def test_the_checklist_of_a_method_makes_an_editor_that_keeps_the_contract(facts, monkeypatch):
    page = "contributing/method.md"
    try:
        names = follow(page, monkeypatch, lm=make_lm(), facts=facts[:3])
        cls = EDITORS["least_update"]
        assert cls is names["LeastUpdate"] and len(blocks(page)) == 3
        [ridge] = [row for row in cls.Config.describe() if row["name"] == "ridge"]
        assert ridge["default"] == 1e-3 and ridge["source"] == "this page"
    finally:
        EDITORS.pop("least_update", None)


def test_the_checklist_of_a_data_set_makes_a_loader(tmp_path, monkeypatch):
    page = "contributing/dataset.md"
    names = follow(page, monkeypatch, folder=tmp_path)
    assert names["corpus"].provenance.corpus == "capitals" and len(blocks(page)) == 3


@pytest.mark.parametrize(
    "page", ["contributing/method.md", "contributing/dataset.md", "contributing/notebooks.md"]
)
def test_checklists_name_files_that_exist(page):
    root = BOOK.parent
    for name in re.findall(
        r"`((?:editkit|tests|notebooks|studies|book)/[\w./-]+)`", (BOOK / page).read_text()
    ):
        assert (root / name).exists(), f"{page} names {name}"
