"""Sphinx part of the reproduction ledger: tables of what the papers show, what we measured, and the verdict.

    ```{ledger} labyrinth        rows of book/ledger/labyrinth.yaml
    ```{ledger-summary}          number of verdicts of each kind by paper and testbed

Both are views of the one table that `verdicts` makes of the sidecars, which is also written to ledger.csv. A run that
is not in this copy of the book is said to be missing, never an error.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import companion
import verdicts
from docutils import nodes
from sphinx.application import Sphinx
from verdicts import FOLDER, TESTBEDS, Cell, Line

from editkit.press.format import format_number, format_value
from editkit.press.quote import agreement, marks, origin, other_execution

CSV = "ledger.csv"
MARK = {verdicts.HOLDS: "✓", verdicts.FAILS: "✗", verdicts.OPEN: "?", verdicts.ABSENT: "–"}
TONE = dict(
    zip(verdicts.VERDICTS, ("form", "direction", "not", "open", "data", "absent", "untestable"), strict=True)
)


def grey(text: str, **attributes) -> nodes.inline:
    return nodes.inline("", text, classes=["ek-rule"], **attributes)


class Ledger(companion.Base):
    """All tables and figures of one paper."""

    def build(self) -> list[nodes.Node]:
        paper, source = self.arguments[0], Path(self.env.srcdir)
        path = source / FOLDER / f"{paper}.yaml"
        if not path.is_file():
            raise companion.Lookup(f"there is no ledger {path.name}")
        self.env.note_dependency(str(path))
        found = [line for line in verdicts.lines(source, self.runs) if line.paper == paper]
        return [self.entry(list(group)) for _, group in itertools.groupby(found, lambda line: line.row["id"])]

    def inline(self, text: str) -> list[nodes.Node]:
        return self.parse_inline(text, lineno=self.lineno)[0]

    def entry(self, lines: list[Line]) -> nodes.Element:
        """One table or figure of the paper: head with a verdict for each testbed, what it shows, checks, runs."""
        first, row = lines[0], lines[0].row
        box = nodes.container("", classes=["ek-entry", f"ek-is-{TONE[first.verdict]}"])
        box["ids"].append(f"ledger-{first.paper}-{row['id']}")
        head = nodes.paragraph(
            "", "", nodes.strong("", "", *self.inline(row["item"])), classes=["ek-entry-head"]
        )
        beds = [list(group) for _, group in itertools.groupby(lines, lambda line: line.testbed)]
        for bed in beds:
            badge = nodes.inline("", bed[0].verdict, classes=["ek-verdict", f"ek-{TONE[bed[0].verdict]}"])
            head += [nodes.Text(" "), grey(f"{TESTBEDS[bed[0].testbed]}: "), badge]
        box += [head, nodes.paragraph("", "", *self.inline(row["shows"]))]
        reasons = {
            bed[0].result: TESTBEDS[bed[0].testbed] for bed in beds if bed[0].verdict == verdicts.UNTESTABLE
        }
        for reason, where in reasons.items():
            why = f"Why not here{f' ({where})' if len(reasons) > 1 else ''}: "
            box += nodes.paragraph("", "", nodes.emphasis("", why), *self.inline(reason))
        for bed in beds:
            if bed[0].check is not None:
                head_row = ["", "what is compared", "published", "ours", "control"]
                box += companion.make_table(head_row, [self.cells(line) for line in bed], ["ek-checks"])
                box += self.origin_line(bed[0])
        if row["page"] in self.env.found_docs:  # pages that are not in the contents are not built
            uri = self.env.app.builder.get_relative_uri(self.env.docname, row["page"])
            box[-1] += [nodes.Text(" · "), self.link("page", uri)]
        return box

    def cells(self, line: Line) -> list:
        check = line.check
        mark = nodes.inline("", MARK[line.result], classes=[f"ek-mark-{line.result.split()[0]}"])
        mark["reftitle"] = line.result
        published = [nodes.Text("no figure known")]
        if check.get("published"):
            text, of, source = verdicts.published_text(check["published"])
            published = [nodes.inline("", text, classes=["ek-published"]), grey(f" {of}" if of else "")]
            published[0]["reftitle"] = source
            published.append(grey(f" [{source.split('; ')[-1].split('. ')[0]}]"))
        control = [grey(check["control_is"] + ": "), *self.value(line, line.control)]
        return [[mark], [*self.inline(check["claim"]), grey(f" ({rule_text(check)})")], published,
                self.value(line, line.ours, beside=True), control]  # fmt: skip

    def value(self, line: Line, cell: Cell | None, beside: bool = False) -> list[nodes.Node]:
        """A value linked to its run, with edits and n; the reference run's beside it where it differs."""
        if cell is None:
            return [nodes.Text("not run")]
        if not cell.key:
            return [nodes.Text(format_number(cell.record["value"]))]
        uri = companion.run_uri(self.env, line.alias)
        node = nodes.reference("", format_value(cell.record), refuri=uri, internal=True, classes=["ek-val"])
        node["reftitle"] = f"{line.alias}:{cell.key}; {cell.spread}; {origin(line.sidecar, line.which)}"
        size = [f"{line.edits:,} edits"] if line.edits else []
        size += [f"n = {cell.record['n']:,}"] if cell.record["n"] is not None else []
        made = [node, grey(" " + ", ".join([*size, cell.spread, line.alias]))]
        entry = self.runs.manifest[line.alias]
        if beside and line.which == "run" and other_execution(entry):
            other = entry["reference"]["values"].get(cell.key)
            if other is not None and agreement(cell.record, other) == "equal":
                made.append(grey(" (reference run: equal)"))
            elif other is not None:
                made.append(grey(f"; reference run {format_value(other)}"))
        return made

    def origin_line(self, line: Line) -> nodes.paragraph:
        made = nodes.paragraph("", f"{TESTBEDS[line.testbed]}: ", classes=["ek-entry-origin"])
        made += self.run_link(line.alias, "reference run" if line.which == "reference" else "run")
        made += [companion.stale_mark()] if "stale" in marks(line.sidecar, line.which) else []
        made += [nodes.Text(" · "), nodes.literal("", line.sidecar["notebook"])]
        return made


def rule_text(check: dict) -> str:
    """The expectation in words."""
    goal = check.get("than", 0 if check["expect"] == "near" else None)
    of = check["control_is"] if goal is None else goal if isinstance(goal, str) else format_number(goal)
    if check["expect"] == "near":
        return f"expected within {format_number(check['margin'])} of {of}, its control not"
    return f"expected {check['expect']} {of}" + ("" if goal is None else ", its control not")


class LedgerSummary(companion.Base):
    """How many tables and figures got which verdict."""

    required_arguments = 0

    def build(self) -> list[nodes.Node]:
        source = Path(self.env.srcdir)
        frame = verdicts.table(source, self.runs).drop_duplicates(["paper", "row", "testbed"])
        count = frame.groupby(["paper", "testbed"]).verdict.value_counts()
        titles = {p: verdicts.load(source / FOLDER / f"{p}.yaml")["title"] for p in verdicts.PAPERS}
        body = [
            [titles[p], TESTBEDS[bed], *(str(count.get((p, bed, v), "")) for v in verdicts.VERDICTS)]
            for bed in TESTBEDS
            for p in verdicts.PAPERS
        ]
        return [companion.make_table(["paper", "testbed", *verdicts.VERDICTS], body, ["ek-ledger-summary"])]


def write_csv(app: Sphinx, error: Exception | None) -> None:
    """The whole ledger as a file beside the pages."""
    if error is None and app.builder.format == "html" and (Path(app.srcdir) / FOLDER).is_dir():
        verdicts.table(Path(app.srcdir), app.companion_runs).to_csv(Path(app.outdir) / CSV, index=False)


def setup(app: Sphinx) -> dict:
    app.add_directive("ledger", Ledger)
    app.add_directive("ledger-summary", LedgerSummary)
    app.connect("build-finished", write_csv)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
