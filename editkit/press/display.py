"""How what a notebook has recorded shows itself: plain HTML and Markdown that take the page's theme."""

from __future__ import annotations

import dataclasses
import numbers
from html import escape
from typing import TYPE_CHECKING, Any

from .format import MISSING, format_number

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Table:
    """Display of a recorded table; plain HTML that takes the page's theme."""

    df: pd.DataFrame
    caption: str
    formats: dict[str, str]

    def _cell(self, column: str, x: Any) -> tuple[str, bool]:
        if hasattr(x, "item"):
            x = x.item()
        numeric = isinstance(x, numbers.Real) and not isinstance(x, bool)
        if not numeric and not isinstance(x, (str, bool, type(None))):
            return str(x), False
        return format_number(x, self.formats.get(column)), numeric

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(str(c))}</th>" for c in self.df.columns)
        rows = []
        for row in self.df.itertuples(index=False, name=None):
            cells = (self._cell(str(c), x) for c, x in zip(self.df.columns, row, strict=True))
            rows.append("".join(f"<td{' class=num' * num}>{escape(text)}</td>" for text, num in cells))
        body = "".join(f"<tr>{r}</tr>" for r in rows)
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="ek-table">{table}</div>'

    def __repr__(self) -> str:
        return (self.caption + "\n" if self.caption else "") + self.df.to_string(index=False, na_rep=MISSING)


@dataclasses.dataclass(frozen=True)
class Says:
    """Display of what came out."""

    text: str

    def _repr_markdown_(self) -> str:
        return f"**What came out.** {self.text}" if self.text else ""

    def __repr__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class FigureDisplay:
    """Display of a recorded figure: inline SVG with its caption."""

    svg: str
    caption: str

    def _repr_html_(self) -> str:
        return f'<figure class="ek-figure">{self.svg}<figcaption>{escape(self.caption)}</figcaption></figure>'

    def __repr__(self) -> str:
        return f"[figure] {self.caption}"
