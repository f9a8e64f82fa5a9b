"""The PDF of the derivations: what is asked for without LaTeX, and sources that need nothing outside the PDF."""

from __future__ import annotations

import re
import shutil

import pytest
from whole_book import whole_book

from editkit.base.errors import EditkitError
from editkit.press import pdf
from editkit.press.study import Study

pytestmark = pytest.mark.xdist_group("book")


def test_without_latex_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        EditkitError, match=r"needs LaTeX, and latexmk and xelatex are not on the PATH.*apt install"
    ):
        pdf.build_pdf(None, None)


def test_the_latex_of_the_derivations_is_written_without_a_warning():
    whole_book()
    latex = pdf.write_latex(Study("pages", "Pages", ()), whole_book.layout)
    text = (latex / "derivations.tex").read_text(encoding="utf-8")
    assert text.count(r"\begin{equation") > 40 and r"\newcommand" not in text.split(r"\begin{document}")[1]
    assert text.count(r"\section{") == 1 + len(pdf.PAGES), "the symbols and one section per page"
    raw = re.search(r"\{(?:doc|chapter|eq|ref|numref|term|val)\}", text)
    assert not raw, f"a role is left as text: {raw}"


def test_macros_of_mathjax_become_macros_of_latex():
    assert pdf.latex_macro("R", r"\mathbb{R}") == r"\providecommand{\R}{}\renewcommand{\R}{\mathbb{R}}"
    assert pdf.latex_macro("norm", [r"|#1|", 1]).endswith(r"\renewcommand{\norm}[1]{|#1|}")


def test_references_that_leave_the_pdf_become_titles(tmp_path):
    (tmp_path / "labyrinth").mkdir()
    (tmp_path / "labyrinth" / "derivation.md").write_text(
        "# D\n\n{doc}`exactness`, {doc}`the test <exactness>`, {eq}`eq-far`, {eq}`eq-near`, {doc}`/clare/derivation`\n"
    )
    (tmp_path / "labyrinth" / "exactness.md").write_text(
        "# Is it exact?\n\n```{math}\n:label: eq-far\nx\n```\n"
    )
    (tmp_path / "clare").mkdir()
    (tmp_path / "clare" / "derivation.md").write_text("# C\n")
    text = pdf.resolve_outside(
        tmp_path / "labyrinth" / "derivation.md", tmp_path, pdf.labels_elsewhere(tmp_path)
    )
    assert "*Is it exact?*, *the test*, *Is it exact?*, {eq}`eq-near`, {doc}`/clare/derivation`" in text
