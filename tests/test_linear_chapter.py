"""The Python blocks of the derivation chapter run in the order of the page; labels are unique and used."""

import re
from collections import Counter
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "book" / "labyrinth" / "derivation.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
pytestmark = pytest.mark.skipif(not TEXT, reason="the book is not part of this installation")


def test_blocks_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S)
    assert len(blocks) >= 8
    page: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), page)
    assert page["engine"].n_facts > 0


def test_blocks_of_the_linear_memory_run_in_order():
    text = (PAGE.parents[1] / "foundations" / "linear_memory.md").read_text(encoding="utf-8")
    page: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S):
        exec(compile(block, "linear_memory.md", "exec"), page)
    assert page["error"](page["Delta"] + page["later"]) < page["error"](page["Delta"] + page["forgetful"])


def test_labels_are_unique_and_every_reference_has_one():
    labels = Counter(re.findall(r"^:label: (\S+)$", TEXT, flags=re.M))
    assert max(labels.values()) == 1
    used = re.findall(r"\{(?:eq|prf:ref|ref)\}`([^`]+)`", TEXT)
    assert {name for name in used if "lab-" in name} <= set(labels)
    blocks = " ".join(re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S))
    assert set(re.findall(r"eq-lab-[a-z-]+", blocks)) <= set(labels)
