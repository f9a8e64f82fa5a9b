"""The graph explorer: a figure's data becomes a page that can be searched in the browser, without network.

    ```{run-explorer} alias:name      name: a figure of the run whose data has one row per fact
    :start: happy performed           words of the fact that is shown first (optional)

Columns of the data: prompt (template with {}), subject, answer, and for every score X the columns "X to" and
"X": row numbers of the strongest neighbours and their scores, separated by blanks, strong to weak. Notebooks
make it with `editkit.entanglement.graph_statistics.explorer_frame`. Data and code are written as one script
beside the files of the run and loaded by a plain <script src>, which works from file:// where fetch does not.
"""

from __future__ import annotations

import base64
import csv
import json
import struct
from pathlib import Path
from typing import ClassVar

from companion import Base, place
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx

from editkit.press.quote import Lookup

SCRIPT = Path(__file__).with_name("explorer.js")
NONE = 0xFFFF  # "no neighbour"; the format holds up to 65,535 facts
PARTS = ("prompt", "subject", "answer")


def packed(rows: list[dict[str, str]]) -> dict:
    """The payload of explorer.js: texts once each, numbers as little-endian arrays in base64.

    facts: uint16 (n, 3), which prompt, subject, answer.   scores: name, k, low, high, to: uint16 (n, k),
    strength: uint8 (n, k) in 255 equal steps from low to high. Raises ValueError for columns that do not fit.
    """
    if not rows or not set(PARTS) <= set(rows[0]) or len(rows) >= NONE:
        raise ValueError(f"its data needs 1 to {NONE - 1} rows and the columns {', '.join(PARTS)}")
    texts: dict[str, dict[str, int]] = {part: {} for part in PARTS}
    facts = [texts[part].setdefault(row[part], len(texts[part])) for row in rows for part in PARTS]
    scores = []
    for name in (c for c in rows[0] if f"{c} to" in rows[0]):
        to = [[int(x) for x in row[f"{name} to"].split()] for row in rows]
        values = [[float(x) for x in row[name].split()] for row in rows]
        if any(len(a) != len(b) for a, b in zip(to, values)):
            raise ValueError(f"{name!r}: a row has not as many scores as neighbours")
        if any(not 0 <= x < len(rows) for ends in to for x in ends):
            raise ValueError(f"{name!r}: a neighbour is no row of the data")
        k, every = max(map(len, to)), [x for row in values for x in row]
        low, high = min(every, default=0.0), max(every, default=1.0)
        step = (high - low) / 255 or 1.0
        ends = [row[j] if j < len(row) else NONE for row in to for j in range(k)]
        strength = [round((row[j] - low) / step) if j < len(row) else 0 for row in values for j in range(k)]
        scores.append({"name": name, "k": k, "low": round(low, 5), "high": round(high, 5), "to": _base64("H", ends),
                       "strength": _base64("B", strength)})  # fmt: skip
    if not scores:
        raise ValueError('its data has no score: columns "X to" and "X"')
    return {
        **{f"{part}s": list(texts[part]) for part in PARTS},
        "facts": _base64("H", facts),
        "scores": scores,
    }


def _base64(kind: str, values: list[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}{kind}", *values)).decode()


class RunExplorer(Base):
    """The explorer of a figure's data; content: one line on where the facts come from."""

    option_spec: ClassVar = {"start": directives.unchanged}
    has_content = True

    def build(self) -> list[nodes.Node]:
        record, sidecar, alias, which = self.runs.item(self.arguments[0], "figures", self.page)
        if not record["data"]:  # too large for the committed reference results
            text = "The explorer is made from the full results of the run; execute it to see it here "
            return [nodes.note("", nodes.paragraph("", text, *self.source_line(alias, which, sidecar, None)))]
        with self.file(alias, which, record["data"]).open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        try:
            data = packed(rows)
        except (ValueError, struct.error) as error:
            raise Lookup(f"{self.arguments[0]} cannot be explored: {error}") from error
        data |= {"note": " ".join(self.content), "start": self.options.get("start", "")}
        name = f"{record['file'].removesuffix('.svg')}.explorer.js"
        self.write(Path(self.env.app.outdir) / place(alias, which) / name, data)
        box = f"ek-explorer-{self.env.new_serialno('explorer')}"
        html = (
            f'<div class="ek-explorer" id="{box}"><noscript>The explorer needs JavaScript.</noscript></div>'
            f'<script defer src="{self.url(alias, which, name)}" data-explorer="{box}"></script>'
        )
        line = nodes.paragraph(
            "", "Facts, neighbours and scores of the explorer", classes=["ek-explorer-source"]
        )
        line += self.source_line(alias, which, sidecar, record["data"])
        return [nodes.raw("", html, format="html"), line]

    @staticmethod
    def write(path: Path, data: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        payload = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        code = SCRIPT.read_text(encoding="utf-8")
        path.write_text(f"{code}\nexploreGraph({payload});\n", encoding="utf-8")


def setup(app: Sphinx) -> dict:
    app.add_directive("run-explorer", RunExplorer)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
