"""Sphinx part of the reproduction ledger: tables of what the papers show, what we measured, and the verdict.

    ```{ledger} labyrinth        rows of book/ledger/labyrinth.yaml
    ```{ledger-summary}          number of verdicts of each kind by paper

All values come from the sidecars through the same look-up as {val}; `verdicts` holds the rule. A run that is not
in this copy of the book is said to be missing, never an error. The whole ledger is written to ledger.csv.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import companion
import verdicts
from docutils import nodes
from sphinx.application import Sphinx

from editkit.press.format import format_number, format_value
from editkit.press.quote import agreement, origin, other_execution

FOLDER, CSV = "ledger", "ledger.csv"
MARK = {verdicts.HOLDS: "✓", verdicts.FAILS: "✗", verdicts.OPEN: "?", verdicts.ABSENT: "–"}
SIGN = {"above": ">", "below": "<"}


def papers(source: Path) -> dict[str, dict]:
    """{paper: ledger} of all files, in the order of the book."""
    order = ("labyrinth", "clare", "memoir", "horse")
    files = {p.stem: p for p in (source / FOLDER).glob("*.yaml")}
    names = [*[n for n in order if n in files], *sorted(set(files) - set(order))]
    return {name: verdicts.load(files[name]) for name in names}


class Ledger(companion.Base):
    """All tables and figures of one paper."""

    def build(self) -> list[nodes.Node]:
        paper = self.arguments[0]
        path = Path(self.env.srcdir) / FOLDER / f"{paper}.yaml"
        if not path.is_file():
            raise companion.Lookup(f"there is no ledger {path.name}")
        self.env.note_dependency(str(path))
        data = verdicts.load(path)
        made: list[nodes.Node] = []
        for item in data["items"]:
            made.append(self.entry(paper, item))
        return made

    def inline(self, text: str) -> list[nodes.Node]:
        return self.parse_inline(text, lineno=self.lineno)[0]

    def entry(self, paper: str, item: dict) -> nodes.Element:
        """One table or figure of the paper: head, what it shows, checks, run."""
        result, alias, checks = verdicts.examine(item, self.runs)
        box = nodes.container("", classes=["ek-entry", f"ek-is-{result.split()[-1]}"])
        box["ids"].append(f"ledger-{paper}-{item['id']}")
        head = nodes.paragraph("", "", classes=["ek-entry-head"])
        head += nodes.strong("", "", *self.inline(item["item"]))
        head += [nodes.Text(" "), nodes.inline("", result, classes=["ek-verdict", f"ek-{tone(result)}"])]
        box += head
        shows = nodes.paragraph("", "", *self.inline(item["shows"]))
        if "not_testable" in item:
            shows += [
                nodes.Text(" "),
                nodes.emphasis("", "Why not here: "),
                *self.inline(item["not_testable"]),
            ]
        box += shows
        if checks:
            head_row = ["", "what is compared", "published", "ours"]
            box += companion.make_table(head_row, [self.row(c) for c in checks], ["ek-checks"])
        box += self.origin_line(item, alias)
        return box

    def row(self, checked: verdicts.Checked) -> list:
        check = checked.check
        mark = nodes.inline("", MARK[checked.result], classes=[f"ek-mark-{checked.result.split()[0]}"])
        mark["reftitle"] = checked.result
        rule = nodes.inline("", f" ({rule_text(check)})", classes=["ek-rule"])
        return [[mark], [*self.inline(check["claim"]), rule], self.published(check.get("published")),
                self.ours(checked)]  # fmt: skip

    def published(self, published: dict | None) -> list[nodes.Node]:
        if not published:
            return [nodes.Text("no figure known")]
        text, of, source = published_text(published)
        made: list[nodes.Node] = [nodes.inline("", text, classes=["ek-published"])]
        made += [nodes.Text(" "), nodes.inline("", f"({of})", classes=["ek-rule"])] if of else []
        made[0]["reftitle"] = source
        return [*made, nodes.Text(" "), nodes.inline("", f"[{short(source)}]", classes=["ek-rule"])]

    def ours(self, checked: verdicts.Checked) -> list[nodes.Node]:
        if checked.ours is None or ("versus" in checked.check and checked.versus is None):
            return [nodes.Text(absent_text(checked))]
        made = self.value(checked.ours)
        if checked.versus is not None:
            made += [nodes.Text(" against "), *self.value(checked.versus)]
        reference = self.reference(checked.ours)
        if reference is not None and agreement(checked.ours.record, reference.record) == "equal":
            made += [nodes.Text(" "), nodes.inline("", "(reference run: equal)", classes=["ek-rule"])]
        elif reference is not None:
            made += [nodes.Text("; reference run "), *self.value(reference)]
        return made

    def value(self, quoted: verdicts.Quoted) -> list[nodes.Node]:
        uri = self.env.app.builder.get_relative_uri(self.env.docname, f"{companion.PAGES}/{quoted.alias}")
        node = nodes.reference("", format_value(quoted.record), refuri=uri, internal=True, classes=["ek-val"])
        node["reftitle"] = f"{quoted.target}; {origin(quoted.sidecar, quoted.which)}"
        mark = [nodes.superscript("", "ref")] if quoted.which == "reference" else []
        return [node, *mark]

    def reference(self, ours: verdicts.Quoted) -> verdicts.Quoted | None:
        """The committed reference beside this run's value, where it is another execution."""
        entry = self.runs.manifest[ours.alias]
        other = entry.get("reference")
        key = ours.target.split(":", 1)[1]
        if ours.which != "run" or not other_execution(entry):
            return None
        if key not in other["values"]:
            return None
        return verdicts.Quoted(other["values"][key], other, ours.alias, "reference", ours.target)

    def origin_line(self, item: dict, alias: str | None) -> nodes.paragraph:
        line = nodes.paragraph("", "", classes=["ek-entry-origin"])
        if item.get("page") in self.env.found_docs:  # pages that are not in the contents are not built
            uri = self.env.app.builder.get_relative_uri(self.env.docname, item["page"])
            line += [self.link("page", uri), nodes.Text(" · ")]
        if "not_testable" in item:
            line += nodes.Text("no run")
            return line
        if alias is None:
            line += nodes.Text(f"not run in this profile: {item.get('notebook') or ', '.join(item['runs'])}")
            return line
        sidecar, which = self.runs.find(alias)
        line += self.run_link(alias, "reference run" if which == "reference" else "run")
        line += [nodes.Text(" · "), nodes.literal("", sidecar["notebook"])]
        shown = parameters(sidecar, item.get("parameters"))
        if shown:
            line += [nodes.Text(": "), nodes.Text(shown)]
        return line


def tone(result: str) -> str:
    """Class of a verdict's badge."""
    return {
        verdicts.FORM: "form", verdicts.DIRECTION: "direction", verdicts.NOT: "not",
        verdicts.UNDECIDED: "open", verdicts.NOT_RUN: "absent", verdicts.UNTESTABLE: "untestable",
    }[result]  # fmt: skip


def absent_text(checked: verdicts.Checked) -> str:
    """Why there is no value of ours."""
    return "full profile only" if checked.check.get("full_only") else "not run in this profile"


def rule_text(check: dict) -> str:
    """The expectation in words."""
    if check["expect"] == "near":
        around = "of each other" if "versus" in check else f"of {format_number(check.get('than', 0))}"
        return f"expected within {format_number(check['margin'])} {around}"
    if "versus" in check:
        return "expected: first " + ("larger" if check["expect"] == "above" else "smaller")
    return f"expected {SIGN[check['expect']]} {format_number(check.get('than', 0))}"


def published_text(published: dict) -> tuple[str, str, str]:
    """(figure as printed, what it is of, source)."""
    if "data" in published:
        cells, source = verdicts.published_cells(published["data"])
        unit = published.get("unit", "points" if "minus" in published["data"] else "%")
        text = ", ".join(f"{format_number(value, 'g')}" for _, value in cells) + f"\u202f{unit}"
        return text, published.get("of") or ", ".join(name for name, _ in cells if name), source
    value, unit = published.get("value"), published.get("unit", "")
    text = published.get("text") or format_number(value, "g")
    return text + (f"\u202f{unit}" if unit else ""), published.get("of", ""), published["source"]


def short(source: str) -> str:
    """The part of a source that fits a cell: what follows the last semicolon or the year in brackets."""
    return re.split(r"\(\d{4}\)[;,]?\s*", source)[-1].split(". ")[0].split(";")[0] or source


def parameters(sidecar: dict, names: list[str] | None) -> str:
    """The named parameters of a run, and those that differ from the notebook's defaults."""
    rows = [p for p in sidecar["parameters"] if p["name"] in (names or []) or p["value"] != p["default"]]
    return ", ".join(f"{p['name']} = {json.dumps(p['value'])}" for p in rows)


class LedgerSummary(companion.Base):
    """How many tables and figures got which verdict."""

    required_arguments = 0

    def build(self) -> list[nodes.Node]:
        body = []
        for data in papers(Path(self.env.srcdir)).values():
            count = Counter(verdicts.examine(item, self.runs)[0] for item in data["items"])
            body.append([data["title"], *(str(count[v]) if count[v] else "" for v in verdicts.VERDICTS)])
        return [companion.make_table(["paper", *verdicts.VERDICTS], body, ["ek-ledger-summary"])]


# -------------------------------------------------------------------- download


def write_csv(app: Sphinx, error: Exception | None) -> None:
    """The whole ledger as a file beside the pages."""
    if error is not None or app.builder.format != "html" or not (Path(app.srcdir) / FOLDER).is_dir():
        return
    rows = list(csv_rows(Path(app.srcdir), app.companion_runs))
    with (Path(app.outdir) / CSV).open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0] if rows else ["paper"])
        writer.writeheader()
        writer.writerows(rows)


def csv_rows(source: Path, runs):
    """One row per check (or per item without checks)."""
    for paper, data in papers(source).items():
        for item in data["items"]:
            result, alias, checks = verdicts.examine(item, runs)
            head = {"paper": paper, "item": item["item"], "verdict": result, "run": alias or ""}
            for c in checks or [None]:
                more = {"claim": "", "result": "", "published": "", "source": "", "ours": "", "lo": "", "hi": "",
                        "n": "", "versus": ""}  # fmt: skip
                if c is None:
                    more["claim"] = item["not_testable"]
                else:
                    published = c.check.get("published") or {}
                    more |= {"claim": c.check["claim"], "result": c.result}
                    if published:
                        more["published"], _, more["source"] = published_text(published)
                    if c.ours is not None:
                        more |= {
                            "ours": c.ours.record["value"],
                            **{k: c.ours.record[k] for k in ("lo", "hi", "n")},
                        }
                    if c.versus is not None:
                        more["versus"] = c.versus.record["value"]
                yield head | more


def setup(app: Sphinx) -> dict:
    app.add_directive("ledger", Ledger)
    app.add_directive("ledger-summary", LedgerSummary)
    app.connect("build-finished", write_csv)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
