"""The examples on the pages about errors and gotchas, executed: each message and output is what the code gives."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import editkit.base.errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "book" / "troubleshooting"


@pytest.mark.parametrize("page", ["errors", "gotchas"])
def test_the_examples_give_what_the_page_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```pycon\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) > 8
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, f"{page}.md", 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_every_class_of_error_has_its_section_and_an_example():
    text = (PAGES / "errors.md").read_text(encoding="utf-8")
    names = [n for n, c in vars(editkit.base.errors).items() if isinstance(c, type) and n != "EditkitError"]
    for name in names:
        assert f"\n## {name}:" in text and f"\neditkit.base.errors.{name}: " in text, (
            f"errors.md says nothing of {name}"
        )
    for part in re.split(r"^#{2,3} ", text.split("(sec-error-request)=")[1], flags=re.M)[1:]:
        assert part.count("\n") < 4 or "```pycon" in part, f"an error without an example: {part[:40]}"
