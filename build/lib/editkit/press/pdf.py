"""The derivations as one PDF, for whoever reads proofs on paper. Optional: it needs LaTeX.

The pages are those of the book, set by Sphinx's own LaTeX builder; references to what is not in the PDF become
titles of pages of the book. Warnings count as errors, as in the book.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from ..base.errors import ConfigError, EditkitError
from .book import stage
from .layout import Layout
from .study import Study

TITLE = "Model Editing Companion: the derivations"
PAGES = ("labyrinth/derivation", "clare/derivation", "memoir/derivation", "horse/derivation")
PROGRAMS = ("latexmk", "xelatex")
MISSING = (
    "the PDF of the derivations needs LaTeX, and {} not on the PATH. Install it (Debian: apt install latexmk "
    "texlive-xetex texlive-latex-extra fonts-freefont-otf), or print a page of the HTML book from the browser"
)
_ROOT = """# Derivations

The proofs of the Model Editing Companion: what the methods of four papers compute, and why it is what they claim.
Experiments, numbers and references to the runs are in the HTML book (`make book`).

```{{toctree}}
symbols
{pages}
```

```{{bibliography}}
```
"""
_CONF = """import sys
sys.path.insert(0, {extensions!r})
project, author, root_doc, language = {title!r}, "", "derivations", "en"
extensions = ["myst_nb", "sphinx_proof", "sphinx_exercise", "sphinxcontrib.bibtex", "companion"]
include_patterns = ["derivations.md", "symbols.md", *{patterns!r}]
myst_enable_extensions, bibtex_bibfiles = {myst!r}, ["references.bib"]
bibtex_reference_style, bibtex_default_style = "author_year", "unsrtalpha"
nb_execution_mode, numfig, suppress_warnings = "off", True, ["myst.domains"]
latex_engine, latex_documents = "xelatex", [("derivations", "derivations.tex", {title!r}, "", "howto")]
latex_elements = {{"preamble": {preamble!r}, "papersize": "a4paper", "figure_align": "htbp"}}
"""
_REFERENCE = re.compile(r"\{(doc|chapter|ref|numref|eq|prf:ref)\}`([^`]+)`")


def build_pdf(study: Study, layout: Layout) -> Path:
    """Typeset the derivation pages; returns the PDF.

    Raises EditkitError when LaTeX is not installed, ConfigError when a page cannot be typeset.
    """
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise EditkitError(MISSING.format(" and ".join(absent) + (" is" if len(absent) == 1 else " are")))
    latex = write_latex(study, layout)
    log = latex / "latexmk.log"
    with log.open("w", encoding="utf-8") as sink:
        command = ["latexmk", "-xelatex", "-interaction=nonstopmode", "-halt-on-error", "derivations.tex"]
        done = subprocess.run(command, cwd=latex, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = next((line for line in lines if line.startswith("!")), "see the log")
        raise ConfigError(f"LaTeX stopped: {wrong} (log: {log.relative_to(layout.root)})")
    target = layout.root / "book" / "_build" / "derivations.pdf"
    shutil.copy2(latex / "derivations.pdf", target)
    return target


def write_latex(study: Study, layout: Layout) -> Path:
    """The LaTeX sources of the PDF; returns their folder. Raises ConfigError when there are warnings."""
    folder = layout.root / "book" / "_build" / "pdf"
    shutil.rmtree(folder, ignore_errors=True)
    source, latex = folder / "source", folder / "latex"
    stage(study, layout, source)
    derivations_only(source, layout.root / "_config.yml")
    sphinx = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "latex",
        "-W",
        "--keep-going",
        "-q",
        str(source),
        str(latex),
    ]
    if subprocess.run(sphinx, stdin=subprocess.DEVNULL).returncode != 0:
        raise ConfigError("the PDF was not built: see the warnings above (every warning counts as an error)")
    return latex


def derivations_only(source: Path, config: Path) -> None:
    """Turn the staged book into the source of the PDF: its first page, its configuration, its references."""
    glossary = (source / "glossary.md").read_text(encoding="utf-8")
    symbols = glossary.split("## Symbols")[1].split("\n## ")[0].strip()
    symbols = re.sub(r"\{term\}`([^`<]+?)(?: <[^`]*)?`", r"\1", symbols)
    elsewhere = labels_elsewhere(source)
    for name in PAGES:
        path = source / f"{name}.md"
        path.write_text(resolve_outside(path, source, elsewhere), encoding="utf-8")
    (source / "symbols.md").write_text(f"# Symbols\n\n{symbols}\n", encoding="utf-8")
    (source / "derivations.md").write_text(_ROOT.format(pages="\n".join(PAGES)), encoding="utf-8")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    macros = settings["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    conf = _CONF.format(
        extensions=str(source / "_ext"),
        title=TITLE,
        patterns=[f"{name}.md" for name in PAGES],
        myst=settings["parse"]["myst_enable_extensions"],
        preamble="\n".join(latex_macro(name, body) for name, body in macros.items()),
    )
    (source / "conf.py").write_text(conf, encoding="utf-8")


def latex_macro(name: str, body: str | list) -> str:
    """A macro of MathJax ("text", or [text, number of arguments]) as LaTeX, also over a command that LaTeX has."""
    text, arguments = (body, 0) if isinstance(body, str) else body
    slots = f"[{arguments}]" if arguments else ""
    return f"\\providecommand{{\\{name}}}{{}}\\renewcommand{{\\{name}}}{slots}{{{text}}}"


def title_of(page: Path) -> str:
    """The first heading of a page."""
    return re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.M)[1]


def labels_elsewhere(source: Path) -> dict[str, str]:
    """{label: title of its page} of all labels that are not on the pages of the PDF."""
    found = {}
    for path in sorted(source.rglob("*.md")):
        if path.relative_to(source).with_suffix("").as_posix() in PAGES:
            continue
        text = path.read_text(encoding="utf-8")
        if labels := re.findall(
            r"^\(([\w:.-]+)\)=|^:(?:label|name): *(\S+)|^\$\$ *\(([\w:.-]+)\)", text, re.M
        ):
            found |= {a or b or c: title_of(path) for a, b, c in labels}
    return found


def resolve_outside(page: Path, source: Path, elsewhere: dict[str, str]) -> str:
    """A page's text in which references to pages and labels outside the PDF are titles of pages."""

    def replace(match: re.Match) -> str:
        text, name = re.fullmatch(r"(?:(.*?)\s*<)?([^<>]+?)>?", match[2]).groups()
        if match[1] not in ("doc", "chapter"):
            return f"*{text or elsewhere[name]}*" if name in elsewhere else match[0]
        places = [page.parent / f"{name}.md", source / f"{name.lstrip('/')}.md"]
        target = next((p.resolve() for p in places if p.is_file()), None)
        if target is None:
            return f"*{text or name}*"
        inside = target.relative_to(source.resolve()).with_suffix("").as_posix() in PAGES
        return match[0] if inside and match[1] == "doc" else f"*{text or title_of(target)}*"

    return _REFERENCE.sub(replace, page.read_text(encoding="utf-8"))
