"""Sphinx extension of the book: quote numbers, tables and figures of runs, and say where they come from.

Roles and directives read the sidecars that `editkit book` stages beside the pages (`_runs.json`):

    {val}`alias:key`                 a number with its interval, linked to its run
    {val}`alias:key bare`            without the interval
    {val}`alias:key .2f`             in another format
    {val}`alias@reference:key`       from the committed reference run, not from this one
    {val}`:key`                      on the page of a run: a number of that run

    ```{run-figure} alias:name       a numbered figure (options: name, reference; content: another caption)
    ```{run-table} alias:name        a numbered table
    ```{run-parameters} alias        the parameters of a run     ```{provenance} alias   where it comes from
    ```{run-results} alias           everything a run recorded   ```{run-list}           all runs of the book
    ```{run-explorer} alias:name     a figure's graph data, to be searched (companion_explorer.py)

Whatever is missing is a warning, and the book is built with warnings as errors.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.errors import NoUri
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from editkit.press.book import MANIFEST, PAGES
from editkit.press.format import KINDS, format_number, format_value
from editkit.press.quote import Lookup, Runs, agreement, marks, origin, other_execution

logger = logging.getLogger(__name__)
_CODE = re.compile(r"(``[^`\n]+``|`[^`\n]+`)")
MATHJAX = "tex-svg-full.js"  # one self-contained file: no fonts, no further requests


def place(alias: str, which: str) -> str:
    """Folder of a run's files, in the staged sources and in the book alike."""
    return f"{PAGES}/{alias}/reference" if which == "reference" else f"{PAGES}/{alias}"


def page_alias(docname: str) -> str | None:
    """The alias whose page this is, if it is the page of a run."""
    head, _, tail = docname.partition("/")
    return tail if head == PAGES and tail != "index" else None


def run_uri(env, alias: str) -> str:
    """Address of a run's page from the page at hand; in the PDF, which has no such pages, nothing."""
    try:
        return env.app.builder.get_relative_uri(env.docname, f"{PAGES}/{alias}")
    except NoUri:
        return ""


def stale_mark() -> nodes.superscript:
    """Stands wherever something is quoted from a result whose inputs have changed since."""
    return nodes.superscript("", "stale", classes=["ek-stale"])


class Base(SphinxDirective):
    """What the directives share: access to the runs, links into a run's folder, reporting what is missing."""

    required_arguments = 1

    @property
    def runs(self) -> Runs:
        return self.env.app.companion_runs

    @property
    def page(self) -> str | None:
        return page_alias(self.env.docname)

    def run(self) -> list[nodes.Node]:
        try:
            return self.build()
        except Lookup as error:
            logger.warning(str(error), location=self.get_location())
            return [nodes.paragraph("", f"[missing: {error}]")]

    def file(self, alias: str, which: str, name: str) -> Path:
        return Path(self.env.srcdir) / place(alias, which) / name

    def url(self, alias: str, which: str, name: str) -> str:
        return "../" * self.env.docname.count("/") + f"{place(alias, which)}/{name}"

    def link(self, text: str, url: str, **attributes) -> nodes.reference:
        return nodes.reference("", text, refuri=url, internal=True, **attributes)

    def run_link(self, alias: str, text: str) -> nodes.reference:
        return self.link(text, run_uri(self.env, alias))

    def named(self, node: nodes.Element) -> nodes.Element:
        self.add_name(node)
        return node

    def source_line(self, alias: str, which: str, sidecar: dict, data: str | None) -> list[nodes.Node]:
        """ "Run · data" under a figure or table."""
        parts = [self.run_link(alias, "reference run" if which == "reference" else "run")]
        parts[0]["reftitle"] = origin(sidecar, which)
        parts += [stale_mark()] if "stale" in marks(sidecar, which) else []
        if data:
            parts += [nodes.Text(" · "), self.link("data", self.url(alias, which, data))]
        return [nodes.inline("", " ("), *parts, nodes.Text(")")]


class Val(SphinxRole):
    """{val}`alias:key`: a recorded number, its interval, a link to its run."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        target, _, option = self.text.strip().partition(" ")
        option = option.strip()
        runs: Runs = self.env.app.companion_runs
        try:
            record, sidecar, alias, which = runs.item(target, "values", page_alias(self.env.docname))
        except Lookup as error:
            logger.warning(str(error), location=self.get_location())
            return [nodes.inline("", f"[missing: {self.text}]", classes=["ek-missing"])], []
        bare = option == "bare"
        text = format_value(record, spec=None if bare else option or None, interval=not bare)
        notes = [origin(sidecar, which)]
        if record["lo"] is not None:
            notes.append(f"[ ] = {KINDS[record.get('kind', '')]}")
        if record["n"] is not None:
            notes.append(f"n = {record['n']:,}")
        notes += [record["note"]] if record["note"] else []
        apart = False
        if which == "run" and (other := self.reference(alias, target)) is not None:
            notes.append(f"reference run: {format_value(other)}")
            apart = agreement(record, other) == "apart"
        node = nodes.reference(
            "", text, refuri=run_uri(self.env, alias), internal=True, classes=["ek-val"], reftitle="; ".join(notes)
        )
        node["companion"] = {"alias": alias, "which": which, "key": target.split(":", 1)[1].strip()}
        mark = [stale_mark() if word == "stale" else nodes.superscript("", word) for word in marks(sidecar, which)]
        if apart:  # the table under the page has both values (beside.py)
            mark.append(nodes.superscript("", "≠ref", classes=["ek-apart"]))
        return [node, *mark], []

    def reference(self, alias: str, target: str) -> dict | None:
        """The committed reference's record of the same number, where it is another execution."""
        entry = self.env.app.companion_runs.manifest[alias]
        key = target.split(":", 1)[1].strip()
        return entry["reference"]["values"].get(key) if other_execution(entry) else None


class RunFigure(Base):
    """A figure of a run, inlined so that it follows the theme, numbered like any figure."""

    option_spec: ClassVar = {"name": directives.unchanged, "class": directives.class_option}
    has_content = True

    def build(self) -> list[nodes.Node]:
        record, sidecar, alias, which = self.runs.item(self.arguments[0], "figures", self.page)
        svg = self.file(alias, which, record["file"]).read_text(encoding="utf-8")
        figure = nodes.figure("", classes=["ek-figure", *self.options.get("class", [])])
        figure["companion"] = {"alias": alias, "which": which, "key": None}
        figure += nodes.raw("", svg, format="html")
        caption = nodes.caption("", "")
        if self.content:
            caption += self.parse_inline(" ".join(self.content), lineno=self.content_offset)[0]
        else:
            caption += coded(record["caption"])
        caption += self.source_line(alias, which, sidecar, record["data"])
        figure += caption
        return [self.named(figure)]


class RunTable(Base):
    """A table of a run, formatted as in the notebook; options: columns (comma separated), name."""

    option_spec: ClassVar = {"name": directives.unchanged, "columns": directives.unchanged}
    has_content = True

    def build(self) -> list[nodes.Node]:
        record, sidecar, alias, which = self.runs.item(self.arguments[0], "tables", self.page)
        with self.file(alias, which, record["file"]).open(encoding="utf-8", newline="") as handle:
            rows = list(csv.reader(handle))
        wanted = [c.strip() for c in self.options.get("columns", "").split(",") if c.strip()] or record[
            "columns"
        ]
        if unknown := [c for c in wanted if c not in record["columns"]]:
            raise Lookup(f"table {self.arguments[0]} has no columns {unknown}; it has {record['columns']}")
        places = [record["columns"].index(c) for c in wanted]
        body = [[cell(row[i], record["fmt"].get(record["columns"][i])) for i in places] for row in rows[1:]]
        table = make_table(wanted, body)
        table["companion"] = {"alias": alias, "which": which, "key": None}
        title = nodes.title("", "")
        if self.content:
            title += self.parse_inline(" ".join(self.content), lineno=self.content_offset)[0]
        else:
            title += coded(record["caption"])
        title += self.source_line(alias, which, sidecar, record["file"])
        table.insert(0, title)
        return [self.named(table)]


def cell(text: str, spec: str | None) -> str:
    """One CSV cell as printed."""
    for kind in (int, float):
        try:
            return format_number(kind(text), spec)
        except ValueError:
            continue
    return {"": "n/a", "True": "yes", "False": "no"}.get(text, text)


def coded(text: str) -> list[nodes.Node]:
    """Text with `code` set as code."""
    return [
        nodes.literal("", part.strip("`")) if part.startswith("`") and len(part) > 2 else nodes.Text(part)
        for part in _CODE.split(text)
        if part
    ]


def make_table(head: list[str], body: list[list[str | list[nodes.Node]]], classes=()) -> nodes.table:
    """A docutils table; numbers are set flush right."""
    group = nodes.tgroup("", cols=len(head))
    group += [nodes.colspec("", colwidth=1) for _ in head]

    def row(cells, numeric: bool) -> nodes.row:
        made = nodes.row()
        for content in cells:
            right = numeric and isinstance(content, str) and re.match(r"[−∞\d.]", content)
            paragraph = nodes.paragraph(
                "", "", *([nodes.Text(content)] if isinstance(content, str) else content)
            )
            made += nodes.entry("", paragraph, classes=["ek-num"] if right else [])
        return made

    group += nodes.thead("", row(head, False))
    group += nodes.tbody("", *(row(cells, True) for cells in body))
    return nodes.table("", group, classes=["ek-run-table", *classes])


class RunParameters(Base):
    """The parameters of a run: value, default, meaning."""

    def build(self) -> list[nodes.Node]:
        sidecar, _ = self.runs.find(self.arguments[0], page=self.page)
        head = ["parameter", "type", "value", "default", "meaning"]
        body = []
        for p in sidecar["parameters"]:
            value, default = (nodes.literal("", json.dumps(p[key])) for key in ("value", "default"))
            shown = nodes.strong("", "", value) if p["value"] != p["default"] else value
            body.append([[nodes.literal("", p["name"])], p["type"], [shown], [default], coded(p["help"])])
        return [make_table(head, body, ["ek-parameters"])] if body else []


class Provenance(Base):
    """Parameters, commit, versions, hardware, time and downloads of a run, folded."""

    def build(self) -> list[nodes.Node]:
        alias = self.arguments[0]
        sidecar, which = self.runs.find(alias, page=self.page)
        title = nodes.inline("", f"Provenance: {origin(sidecar, which)}")
        box = nodes.container("", classes=["ek-provenance"])
        box += nodes.raw("", "<details><summary>", format="html")
        box += nodes.raw("", title.astext().replace("<", "&lt;"), format="html")
        box += nodes.raw("", "</summary>", format="html")
        if sidecar.get("stale"):
            box += nodes.paragraph("", "Inputs have changed since: " + "; ".join(sidecar["stale"]) + ".")
        box += make_table(["", ""], [[k, v] for k, v in self.facts(sidecar)], ["ek-facts"])
        box += self.downloads(alias, which, sidecar)
        box += nodes.raw("", "</details>", format="html")
        return [box]

    def facts(self, sidecar: dict) -> list[tuple[str, str]]:
        machine, memory = sidecar["hardware"], sidecar["peak_memory_mib"]
        git = sidecar["git"]
        device = ", ".join(machine["accelerators"]) or "no GPU"
        gib = f", {machine['memory_gib']:g} GiB" if machine["memory_gib"] else ""
        peak = f"{memory['host']:,.0f} MiB" if memory["host"] else "n/a"
        if memory["accelerator"]:
            peak += f", GPU {memory['accelerator']:,.0f} MiB"
        parameters = ", ".join(f"{p['name']} = {json.dumps(p['value'])}" for p in sidecar["parameters"])
        cpu = f", {sidecar['processor_seconds']:,.1f} processor seconds" if "processor_seconds" in sidecar else ""
        timings = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in sidecar["timings"].items())
        rows = [
            ("notebook", f"{sidecar['notebook']} (study {sidecar['study']})"),
            ("parameters", parameters or "none"),
            ("commit", self.commit(git)),
            ("started, took", f"{sidecar['started']}, {sidecar['wall_seconds']:,.1f} s{cpu}"),
            ("timers", timings),
            ("machine", f"{machine['processor']}, {machine['cores']} cores{gib}, {device}"),
            ("peak memory", peak),
            ("versions", ", ".join(f"{name} {version}" for name, version in sidecar["packages"].items())),
            ("inputs", f"sha256 {sidecar['inputs']['hash']}"),
        ]
        return [(name, text) for name, text in rows if text]

    @staticmethod
    def commit(git: dict) -> str:
        if git["commit"] is None:
            return "none"
        if git["dirty"]:
            return f"{git['commit']} with uncommitted changes"
        return git["commit"] + (" (executed before it, with equal inputs)" if git.get("later") else "")

    def downloads(self, alias: str, which: str, sidecar: dict) -> nodes.paragraph:
        files = [("executed notebook", f"{sidecar['run_id']}.ipynb")] if which == "run" else []
        files.append(("sidecar (JSON)", "run.json"))
        files += [(f"table {name}", t["file"]) for name, t in sidecar["tables"].items()]
        files += [(f"data of {name}", f["data"]) for name, f in sidecar["figures"].items() if f["data"]]
        line = nodes.paragraph("", "Download: ")
        for i, (text, file) in enumerate(files):
            line += [nodes.Text(" · ")] if i else []
            line += self.link(text, self.url(alias, which, file), classes=["ek-download"])
        runnable = Path(sidecar["notebook"]).name  # of both kinds of run in the run's own folder
        if self.file(alias, "run", runnable).is_file():
            link = self.link("runnable notebook", self.url(alias, "run", runnable), classes=["ek-download"])
            line += [nodes.Text(" · "), link]
        return line


class RunResults(Base):
    """Everything a run recorded: values, tables, figures."""

    def build(self) -> list[nodes.Node]:
        alias = self.arguments[0]
        sidecar, which = self.runs.find(alias)
        made: list[nodes.Node] = []
        if sidecar.get("says"):
            made.append(nodes.paragraph("", "What came out: " + " ".join(sidecar["says"])))
        if sidecar["values"]:
            body = [
                [[nodes.literal("", key)], format_value(v), "" if v["n"] is None else f"{v['n']:,}", coded(v["note"])]
                for key, v in sidecar["values"].items()
            ]  # fmt: skip
            made.append(make_table(["key", "value", "n", "note"], body))
        for kind, directive in (("tables", RunTable), ("figures", RunFigure)):
            for name in sidecar[kind]:
                made += directive(
                    self.name, [f"{alias}@{which}:{name}"], {}, self.content, self.lineno,
                    self.content_offset, self.block_text, self.state, self.state_machine,
                ).run()  # fmt: skip
        return made


class RunList(Base):
    """All runs of the book with notebook, time and state."""

    required_arguments = 0

    def build(self) -> list[nodes.Node]:
        body = []
        for alias in self.runs.manifest:
            sidecar, which = self.runs.find(alias)
            state = "reference" if which == "reference" else "run"
            state += ", inputs changed since" if sidecar["stale"] else ", current"
            body.append([[self.run_link(alias, sidecar["title"] or alias)], sidecar["notebook"],
                         f"{sidecar['wall_seconds']:,.1f} s", sidecar["started"][:10], state])  # fmt: skip
        if not body:
            return [nodes.paragraph("", "There are no runs yet.")]
        return [make_table(["run", "notebook", "wall time", "date", "state"], body)]


def load_runs(app: Sphinx) -> None:
    path = Path(app.srcdir) / MANIFEST
    app.companion_runs = Runs(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})


def copy_mathjax(app: Sphinx) -> None:
    """Put MathJax into the book: it is read without network."""
    if app.builder.format != "html":
        return
    found = [f for f in metadata.files("sphinx-mathjax-offline") or () if f.name == MATHJAX]
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found[0].locate(), target / MATHJAX)


def copy_run_files(app: Sphinx, error: Exception | None) -> None:
    """Put the downloads (executed notebooks, tables, sidecars) beside the pages."""
    if error is None and app.builder.format == "html":
        for alias in app.companion_runs.manifest:
            source, target = Path(app.srcdir) / PAGES / alias, Path(app.outdir) / PAGES / alias
            shutil.copytree(source, target, dirs_exist_ok=True)


def setup(app: Sphinx) -> dict:
    app.add_role("val", Val())
    for name, directive in {
        "run-figure": RunFigure, "run-table": RunTable, "run-parameters": RunParameters,
        "provenance": Provenance, "run-results": RunResults, "run-list": RunList,
    }.items():  # fmt: skip
        app.add_directive(name, directive)
    others = ("ledger", "apidoc", "theme", "beside", "companion_benchmarks", "companion_explorer", "house", "try_it")
    for more in others:
        app.setup_extension(more)
    app.connect("builder-inited", load_runs)
    app.connect("builder-inited", copy_mathjax)
    app.connect("build-finished", copy_run_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
