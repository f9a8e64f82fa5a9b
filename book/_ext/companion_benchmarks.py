"""Sphinx part of the benchmark results: numbers and the table come from benchmarks/results/*.json only.

{bench}`targets:speed_up_processor_time ; .1f`      a number by file and path (see editkit.press.benchmarks)

```{bench-table}                                    one table of them all
"""

from __future__ import annotations

import shutil
from pathlib import Path

import companion
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from editkit.press import benchmarks
from editkit.press.quote import Lookup

logger = logging.getLogger(__name__)


def url(docname: str, name: str) -> str:
    """Link from a page to a result file."""
    return "../" * docname.count("/") + f"{benchmarks.STAGED}/{name}.json"


class Bench(SphinxRole):
    """{bench}`file:path ; format`: a recorded number, linked to its file."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        reports = self.env.app.companion_benchmarks
        try:
            text = benchmarks.formatted(reports, self.text)
        except Lookup as error:
            logger.warning(str(error), location=self.get_location())
            return [nodes.inline("", f"[missing: {self.text}]", classes=["ek-missing"])], []
        name = self.text.partition(":")[0].strip()
        return [
            nodes.reference(
                "", text, refuri=url(self.env.docname, name), internal=True, classes=["ek-val", "ek-bench"],
                reftitle=f"benchmark {name}.json; {benchmarks.origin(reports[name])}",
            )
        ], []  # fmt: skip


class BenchTable(companion.Base):
    """All benchmarks."""

    required_arguments = 0
    option_spec = {"name": directives.unchanged}  # noqa: RUF012

    def build(self) -> list[nodes.Node]:
        head, body = benchmarks.table(self.env.app.companion_benchmarks)
        rows = [
            [*row[:4], [self.link(row[4], url(self.env.docname, row[4].removesuffix(".json")))], row[5]]
            for row in body
        ]
        table = companion.make_table(head, rows, ["ek-benchmarks"])
        table.insert(0, nodes.title("", "Every benchmark of the repository, read from its result file."))
        return [self.named(table)]


def load(app: Sphinx) -> None:
    app.companion_benchmarks = benchmarks.load(Path(app.srcdir) / benchmarks.STAGED)


def copy(app: Sphinx, error: Exception | None) -> None:
    """Put the files beside the pages."""
    source = Path(app.srcdir) / benchmarks.STAGED
    if error is None and app.builder.format == "html" and source.is_dir():
        shutil.copytree(source, Path(app.outdir) / benchmarks.STAGED, dirs_exist_ok=True)


def setup(app: Sphinx) -> dict:
    app.add_role("bench", Bench())
    app.add_directive("bench-table", BenchTable)
    app.connect("builder-inited", load)
    app.connect("build-finished", copy)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
