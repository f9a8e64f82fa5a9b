"""The book of this repository, built once per process for the tests that read its pages.

Pages quote runs that only `editkit run` makes. Where neither a run nor a committed reference is there, a stand-in
with the quoted names takes its place: these tests are about pages, links and anchors, not about numbers.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

import yaml

from editkit.press import book
from editkit.press.layout import Layout
from editkit.press.reference import references
from editkit.press.study import Study

ROOT = Path(__file__).resolve().parents[1]
SVG = (
    '<svg width="100%" viewBox="0 0 40 20" role="img" aria-label="stand-in"><title>stand-in</title>'
    '<path d="M0 20L40 0" style="stroke: var(--ek-ink, #232426)"/></svg>\n'
)
_TARGET = r"(?P<alias>[a-z0-9][\w.-]*)(?:@\w+)?(?::(?P<key>[\w.+@=-]+))?"
_ROLE = re.compile(rf"\{{val\}}`\s*{_TARGET}")
_DIRECTIVE = re.compile(
    rf"^[ \t]*[`:]{{3,}}\{{(?P<kind>run-figure|run-table|run-parameters|run-results|provenance)\}} {_TARGET}"
    r"(?P<options>(?:\n[ \t]*:[^\n]*)*)",
    re.M,
)
_PAGE = re.compile(r"\bruns/(?P<alias>[a-z0-9][\w.-]*)(?=[`>)\s])")


def pages(folder: Path) -> list[Path]:
    """The pages of the table of contents, with those that only the API or a part of it has."""
    toc = yaml.safe_load((folder / "_toc.yml").read_text(encoding="utf-8"))
    return [path for file in book._files(toc) if (path := folder / f"{file}.md").is_file()]


def quoted(folder: Path) -> dict[str, dict]:
    """{alias: {"values": names, "figures": names, "tables": {name: columns}}} of all quotations on the pages."""
    found: dict[str, dict] = {}

    def entry(alias: str) -> dict:
        return found.setdefault(alias, {"values": set(), "figures": set(), "tables": {}})

    for path in pages(folder):
        text = path.read_text(encoding="utf-8")
        if path.parent.name == "contributing":
            text = re.sub(r"^(`{3,})(?!\{).*?^\1", "", text, flags=re.M | re.S)  # examples of how to quote
        for match in _ROLE.finditer(text):
            entry(match["alias"])["values"].add(match["key"])
        for match in _DIRECTIVE.finditer(text):
            mine = entry(match["alias"])
            if match["kind"] == "run-figure":
                mine["figures"].add(match["key"])
            elif match["kind"] == "run-table":
                columns = re.search(r":columns:\s*(.*)", match["options"])
                mine["tables"].setdefault(match["key"], []).extend(
                    c.strip() for c in (columns[1].split(",") if columns else [])
                )
        for match in _PAGE.finditer(text):
            if match["alias"] != "index":
                entry(match["alias"])
    return found


def stand_ins(root: Path, folder: Path) -> list[str]:
    """Complete the references below `root` by everything the pages quote; returns the aliases touched."""
    known = {alias: (sidecar, path) for alias, (sidecar, path) in references(Layout(root)).items()}
    pattern = known["linear-memory"][0]
    touched = []
    for alias, names in quoted(folder).items():
        sidecar, target = known.get(alias, (None, root / "results" / alias))
        if sidecar is None:
            empty = {"values": {}, "tables": {}, "figures": {}, "timings": {}}
            sidecar = {
                **copy.deepcopy(pattern),
                **empty,
                "alias": alias,
                "run_id": f"{alias}-0",
                "title": alias,
            }
        value = {"value": 0.5, "lo": None, "hi": None, "n": None, "unit": "", "note": "stand-in", "fmt": None}
        values = {k: value for k in sorted(names["values"]) if k not in sidecar["values"]}
        figures = {
            k: {"file": f"{k}.svg", "data": None, "caption": "Stand-in.", "alt": "stand-in"}
            for k in sorted(names["figures"])
            if k not in sidecar["figures"]
        }
        tables = {}
        for k, columns in names["tables"].items():
            had = sidecar["tables"].get(k, {"columns": []})["columns"]
            if k not in sidecar["tables"] or set(columns) - set(had):
                head = list(dict.fromkeys([*had, *columns])) or ["method", "score"]
                tables[k] = {
                    "file": f"{k}.csv",
                    "caption": "Stand-in.",
                    "fmt": {},
                    "columns": head,
                    "rows": 1,
                }
        if not (values or figures or tables) and alias in known:
            continue
        touched.append(alias)
        target.mkdir(parents=True, exist_ok=True)
        for figure in figures.values():
            (target / figure["file"]).write_text(SVG, encoding="utf-8")
        for table in tables.values():
            row = ",".join("0.5" for _ in table["columns"])
            (target / table["file"]).write_text(",".join(table["columns"]) + f"\n{row}\n", encoding="utf-8")
        for kind, more in (("values", values), ("figures", figures), ("tables", tables)):
            sidecar[kind] |= more
        (target / "run.json").write_text(json.dumps(sidecar), encoding="utf-8")
    return touched


@functools.cache
def whole_book() -> Path:
    """The folder of the built HTML; it lives as long as the process."""
    keep = tempfile.TemporaryDirectory(prefix="editkit-book-")
    whole_book.keep = keep  # removed with the process
    root = Path(keep.name)
    skip = shutil.ignore_patterns("_build", "runs", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "book", root / "book", ignore=skip)
    for folder in ("results", "notebooks", "benchmarks/results"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy2(ROOT / "_config.yml", root / "_config.yml")
    stand_ins(root, root / "book")
    whole_book.layout = Layout(root)
    index, _, _ = book.build(Study("pages", "Pages", ()), Layout(root))
    return index.parent
