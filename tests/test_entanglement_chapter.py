"""The Python blocks of CLaRE's derivation run in the order of the page; labels are unique and used."""

import re
from collections import Counter
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "book" / "clare" / "derivation.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
pytestmark = pytest.mark.skipif(not TEXT, reason="the book is not part of this installation")


def test_blocks_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S)
    assert len(blocks) >= 7
    page: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), page)


def test_labels_are_unique_and_every_reference_has_one():
    labels = Counter(re.findall(r"^:label: (\S+)$", TEXT, flags=re.M))
    assert max(labels.values()) == 1
    used = re.findall(r"\{(?:eq|prf:ref|ref)\}`([^`]+)`", TEXT)
    assert {name for name in used if "clare-" in name} <= set(labels)
    blocks = " ".join(re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S))
    assert set(re.findall(r"eq-clare-[a-z-]+", blocks)) <= set(labels)
