"""Under every page that quotes runs: this run, the committed reference run and the paper, side by side.

The block is made from what the page quotes ({val}, run-figure, run-table) and, on the page of a run, from all that
the run recorded; nobody writes it. Its table has one row per number: the value of this run, of the reference run,
whether their intervals overlap, and the paper's figure where the ledger has one. Above it stand the notebooks
behind the page, to download and to run again.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import companion
import verdicts
from docutils import nodes
from sphinx.application import Sphinx

from editkit.press.format import format_value
from editkit.press.quote import Runs, agreement, other_execution

PAGES_WITHOUT = ("ledger", "runs/index")  # the ledger compares by itself, the list of runs quotes nothing
SIGN = {"equal": "=", "overlap": "≈", "apart": "≠", "differs": "·"}
WORDS = {
    "equal": "equal as printed",
    "overlap": "with overlapping intervals",
    "apart": "with intervals apart",
    "differs": "different, without intervals to compare",
}


def quoted_on(app: Sphinx, docname: str, doctree: nodes.document) -> dict[str, list[str]]:
    """{alias: keys of the values quoted} of a page, in the order of the page; all keys on the page of a run."""
    found: dict[str, list[str]] = {}
    runs: Runs = app.companion_runs
    own = companion.page_alias(docname)
    if own in runs.manifest:
        found[own] = list(runs.find(own)[0]["values"])
    for node in doctree.findall(lambda n: isinstance(n, nodes.Element) and "companion" in n):
        keys = found.setdefault(node["companion"]["alias"], [])
        key = node["companion"]["key"]
        if key is not None and key not in keys:
            keys.append(key)
    return found


def published_figures(source: Path) -> list[tuple[str, str, tuple[str, str]]]:
    """[(notebook, pattern of keys, (printed figure with what it is of, source))] of checks that have one."""
    if not (source / verdicts.FOLDER).is_dir():
        return []
    found = []
    for row in (
        r for p in verdicts.PAPERS for r in verdicts.load(source / verdicts.FOLDER / f"{p}.yaml")["rows"]
    ):
        for check in row.get("checks", ()):
            if "published" in check:
                text, of, where = verdicts.published_text(check["published"])
                found.append((row["notebook"], check["ours"], (f"{text} ({of})" if of else text, where)))
    return found


class Block:
    """Builds the block of one page."""

    def __init__(self, app: Sphinx, docname: str):
        self.app, self.docname = app, docname
        self.runs: Runs = app.companion_runs
        self.up = "../" * docname.count("/")

    def link(self, text: str, url: str, **attributes) -> nodes.reference:
        return nodes.reference("", text, refuri=url, internal=True, **attributes)

    def file(self, alias: str, which: str, name: str) -> str:
        return f"{self.up}{companion.place(alias, which)}/{name}"

    def page(self, alias: str) -> str:
        return self.app.builder.get_relative_uri(self.docname, f"{companion.PAGES}/{alias}")

    def build(self, quoted: dict[str, list[str]]) -> nodes.container:
        box = nodes.container("", classes=["ek-beside"])
        box += nodes.rubric("", "Behind this page")
        box += nodes.bullet_list("", *(nodes.list_item("", self.notebook(alias)) for alias in quoted))
        figures = published_figures(Path(self.app.srcdir))
        groups = {alias: self.rows(alias, keys, figures) for alias, keys in quoted.items()}
        groups = {alias: rows for alias, rows in groups.items() if rows}
        if groups:
            box += nodes.raw("", f"<details><summary>{self.summary(groups)}</summary>", format="html")
            for alias, rows in groups.items():
                box += self.heading(alias)
                box += self.table(rows)
            box += nodes.raw("", "</details>", format="html")
        return box

    def notebook(self, alias: str) -> nodes.paragraph:
        """Run, runnable notebook to download, and the command that executes it again."""
        sidecar, which = self.runs.find(alias)
        line = nodes.paragraph("", "")
        if companion.page_alias(self.docname) != alias:
            line += [
                self.link("reference run" if which == "reference" else "run", self.page(alias)),
                nodes.Text(" "),
            ]
        name = PurePosixPath(sidecar["notebook"]).name
        inner = nodes.literal("", sidecar["notebook"])
        if (Path(self.app.srcdir) / companion.PAGES / alias / name).is_file():
            line += nodes.reference("", "", inner, refuri=self.file(alias, "run", name), internal=True,
                                    classes=["ek-download", "ek-runnable"])  # fmt: skip
        else:
            line += inner
        if which == "run":
            executed = self.file(alias, which, f"{sidecar['run_id']}.ipynb")
            line += [nodes.Text(" · "), self.link("executed", executed, classes=["ek-download"])]
        line += [nodes.Text(" · again: "), nodes.literal("", command(sidecar), classes=["ek-command"])]
        return line

    def rows(self, alias: str, keys: Iterable[str], figures: list) -> list[dict]:
        """One row per number that has something to stand beside it."""
        entry = self.runs.manifest[alias]
        both, notebook = other_execution(entry), self.runs.find(alias)[0]["notebook"]
        rows = []
        for key in keys:
            mine, reference = (entry.get(w, {}).get("values", {}).get(key) for w in ("run", "reference"))
            paper = next(
                (f for n, pattern, f in figures if n == notebook and fnmatch.fnmatch(key, pattern)), None
            )
            if (both and mine and reference) or paper:
                state = agreement(mine, reference) if both and mine and reference else None
                rows.append({"key": key, "run": mine, "reference": reference, "state": state, "paper": paper})
        return rows

    def summary(self, groups: dict[str, list[dict]]) -> str:
        rows = [row for group in groups.values() for row in group]
        states = [row["state"] for row in rows if row["state"]]
        parts = []
        if states:
            counts = [f"{states.count(s)} {WORDS[s]}" for s in WORDS if states.count(s)]
            parts.append(f"{len(states)} beside the reference run ({'; '.join(counts)})")
        if papers := sum(bool(row["paper"]) for row in rows):
            parts.append(f"{papers} beside the paper")
        return f"This run, the reference run, the paper: {', '.join(parts)}"

    def heading(self, alias: str) -> nodes.paragraph:
        """Which executions are compared: commit, date, seeds, parameters that differ."""
        entry = self.runs.manifest[alias]
        line = nodes.paragraph("", "", nodes.literal("", alias), classes=["ek-beside-head"])
        for which, word in (("run", "this run"), ("reference", "reference run")):
            if which not in entry:
                line += nodes.Text(f"; {word}: not executed for this copy")
                continue
            sidecar = entry[which]
            commit = (sidecar["git"]["commit"] or "none")[:8] + (
                "+changes" if sidecar["git"]["dirty"] else ""
            )
            text = f"; {word}: commit {commit}, {sidecar['started'][:10]}{seeds(sidecar)} ("
            line += [
                nodes.Text(text),
                self.link("sidecar", self.file(alias, which, "run.json")),
                nodes.Text(")"),
            ]
        if different := differing(entry):
            line += nodes.Text(f". Parameters that differ: {different}")
        return line

    def table(self, rows: list[dict]) -> nodes.table:
        body = []
        for row in rows:
            mark = nodes.inline("", SIGN.get(row["state"], ""), classes=[f"ek-agree-{row['state']}"])
            mark["reftitle"] = WORDS.get(row["state"], "")
            printed, source = row["paper"] or ("", "")
            paper = nodes.inline("", printed, classes=["ek-paper"] if printed else [])
            paper["reftitle"] = source
            note = (row["run"] or row["reference"] or {}).get("note", "")
            name = [nodes.literal("", row["key"])]
            name += [nodes.inline("", " ", *companion.coded(note), classes=["ek-rule"])] if note else []
            body.append([name, shown(row["run"]), [mark], shown(row["reference"]), [paper]])
        head = ["number", "this run", "", "reference run", "paper"]
        return companion.make_table(head, body, ["ek-beside-table"])


def shown(record: dict | None) -> str:
    """A value with its interval and sample size."""
    if record is None:
        return "–"
    return format_value(record) + (f"; n = {record['n']:,}" if record.get("n") is not None else "")


def seeds(sidecar: dict) -> str:
    """ ", seeds = [1, 2, 3]" if the run declares seeds."""
    found = [p for p in sidecar["parameters"] if p["name"] in ("seed", "seeds")]
    return "".join(f", {p['name']} = {json.dumps(p['value'])}" for p in found)


def differing(entry: dict) -> str:
    """Parameters with another value in the reference run than in this one."""
    if "run" not in entry or "reference" not in entry:
        return ""
    mine, other = ({p["name"]: p["value"] for p in entry[w]["parameters"]} for w in ("run", "reference"))
    names = [n for n in mine if n in other and mine[n] != other[n]]
    return ", ".join(f"{n} = {json.dumps(mine[n])} (reference: {json.dumps(other[n])})" for n in names)


def command(sidecar: dict) -> str:
    """The line that executes the run again."""
    return f"editkit run studies/{sidecar['study']}.yaml --only {sidecar['alias']} --force"


def append(app: Sphinx, doctree: nodes.document) -> None:
    """Put the block at the end of the page, on the page of a run before its provenance."""
    docname = app.env.docname
    if docname in PAGES_WITHOUT or app.builder.format != "html":
        return
    quoted = quoted_on(app, docname, doctree)
    if not quoted:
        return
    block = Block(app, docname).build(quoted)
    for box in doctree.findall(nodes.container):
        if "ek-provenance" in box["classes"] and companion.page_alias(docname):
            box.parent.insert(box.parent.index(box), block)
            return
    sections = [n for n in doctree.children if isinstance(n, nodes.section)]
    (sections[-1] if sections else doctree).append(block)


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", append)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
