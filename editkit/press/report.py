"""What a notebook calls to record its results.

    from editkit.press import start
    run = start(globals())                     # right after the parameters cell
    with run.timed("edit"):
        ...
    run.value("memit.efficacy", 0.987, lo=0.979, hi=0.993, n=100, fmt=".1%")
    run.table("scores", frame, caption="Scores after 100 edits.")
    run.figure("tradeoff", fig, caption="...", alt="...", data=frame)
    run.finish()                               # last cell

Under `editkit run` everything lands in the directory named by EDITKIT_RUN_DIR and becomes the run's sidecar;
in a plain Jupyter session the same calls only display.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import numbers
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import ConfigError
from .format import MISSING, check_spec, format_number, format_value

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RUN_DIR, WORK_DIR, CACHE_DIR, PARAMETERS = (
    "EDITKIT_RUN_DIR", "EDITKIT_WORK_DIR", "EDITKIT_CACHE", "EDITKIT_RUN_PARAMETERS",
)  # fmt: skip
RESULTS = "results.json"
_IMPORTED_AT = time.time()  # before this, in practice, no module of editkit was imported
_KEY = re.compile(r"[A-Za-z0-9][\w.+@=-]*")


def start(namespace: Mapping[str, Any], *, style: bool = True) -> Run:
    """Begin recording; call it as `run = start(globals())` right after the parameters cell.

    The declared parameters are the annotated names of that cell (`n_edits: int = 100  # number of edits`).
    style: also apply `editkit.press.plotting.use_style()`.
    Raises ConfigError when a declared parameter is not plain data, or when the notebook has overwritten a
    value that `editkit run` passed in.
    """
    given = json.loads(os.environ.get(PARAMETERS, "null"))
    names = list(given) if given is not None else _declared(namespace)
    parameters = {}
    for name in names:
        value = namespace.get(name)
        try:
            parameters[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"parameter {name!r} is a {type(value).__name__}; use plain data: numbers, text, lists, dicts"
            ) from error
        if given is not None and parameters[name] != given[name]:
            raise ConfigError(
                f"parameter {name!r} was passed as {given[name]!r} but the notebook set it to "
                f"{parameters[name]!r}; assign parameters only in the cell tagged 'parameters'"
            )
    # Said on import by tqdm.auto (through transformers) where ipywidgets is missing; no page needs the widget.
    warnings.filterwarnings("ignore", message="IProgress not found")
    if style:
        from . import plotting

        plotting.use_style()
    directory = os.environ.get(RUN_DIR)
    return Run(parameters, Path(directory) if directory else None)


def _declared(namespace: Mapping[str, Any]) -> list[str]:
    """Names annotated in the notebook, else (no annotations kept) every plain global."""
    annotated = [name for name in namespace.get("__annotations__", {}) if name in namespace]
    if annotated:
        return annotated
    plain = (bool, int, float, str, list, dict, type(None))
    hidden = {"In", "Out", "exit", "quit"}
    return [k for k, v in namespace.items() if not k.startswith("_") and k not in hidden and type(v) in plain]


@dataclasses.dataclass(frozen=True)
class Value:
    """A recorded value; shows itself as text, `float(value)` gives the number."""

    key: str
    record: dict

    def __float__(self) -> float:
        return float(self.record["value"])

    def __repr__(self) -> str:
        n = self.record.get("n")
        return f"{self.key} = {format_value(self.record)}" + (f" (n = {n:,})" if n is not None else "")


class Run:
    """Collects values, tables, figures and timings of one run. Made by `start`."""

    def __init__(self, parameters: dict[str, Any], directory: Path | None = None):
        self.parameters = parameters
        self.directory = directory
        self.values: dict[str, dict] = {}
        self.tables: dict[str, dict] = {}
        self.figures: dict[str, dict] = {}
        self.timings: dict[str, float] = {}
        self._started = time.perf_counter()
        self._scratch: Path | None = None

    # ---------------------------------------------------------------- where things go

    @property
    def recorded(self) -> bool:
        """Whether results are being written (under `editkit run`) or only shown (interactive)."""
        return self.directory is not None

    @property
    def work_dir(self) -> Path:
        """A directory for checkpoints that survives a kill: a restarted run with equal inputs finds it."""
        if WORK_DIR in os.environ:
            path = Path(os.environ[WORK_DIR])
        else:
            self._scratch = self._scratch or Path(tempfile.mkdtemp(prefix="editkit-work-"))
            path = self._scratch
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def cache_dir(self) -> Path:
        """A directory shared by all runs, for content-addressed caches such as covariances."""
        path = Path(os.environ[CACHE_DIR]) if CACHE_DIR in os.environ else self.work_dir / "cache"
        path.mkdir(parents=True, exist_ok=True)
        return path

    # ---------------------------------------------------------------- recording

    def value(
        self,
        key: str,
        x: float | int | str | bool | None,
        *,
        lo: float | None = None,
        hi: float | None = None,
        n: int | None = None,
        unit: str = "",
        note: str = "",
        fmt: str | None = None,
    ) -> Value:
        """Record one number under a key the book can quote.

        x:      the number; scores are fractions 0..1 (print them with fmt=".1%"). None: "not measured".
        lo, hi: ends of its 95 % interval, on the scale of x.   n: number of items (facts, prompts) averaged.
        unit:   text after the number, e.g. "s".   note: what exactly was measured (protocol).
        fmt:    Python format spec; default ".3g" for floats, ",d" for integers.
        Raises ConfigError for a bad or (in a recorded run) repeated key, NaN, or a reversed or half interval.
        """
        self._claim(key, self.values)
        record = {"value": _number(key, x), "lo": _number(key, lo), "hi": _number(key, hi)}
        if (lo is None) != (hi is None) or (lo is not None and lo > hi):
            raise ConfigError(f"value {key!r}: give both ends of the interval, lo <= hi; got {lo}, {hi}")
        record |= {"n": None if n is None else int(n), "unit": unit, "note": note}
        record["fmt"] = check_spec(fmt) if fmt else None
        self.values[key] = record
        return Value(key, record)

    def table(
        self, name: str, df: pd.DataFrame, *, caption: str = "", fmt: Mapping[str, str] | str | None = None
    ) -> Table:
        """Record a table (as CSV with full precision) and return its display; the index is not written.

        fmt: format spec for all float columns, or {column: spec}.
        """
        self._claim(name, self.tables)
        if isinstance(fmt, str):
            fmt = {str(c): fmt for c in df.columns if df[c].dtype.kind == "f"}
        formats = {str(column): check_spec(spec) for column, spec in (fmt or {}).items()}
        columns = [str(c) for c in df.columns]
        unknown = sorted(set(formats) - set(columns))
        if unknown:
            raise ConfigError(f"table {name!r}: fmt names columns {unknown}; the table has {columns}")
        file = self._write(f"{name}.csv", df.to_csv(index=False))
        self.tables[name] = {
            "file": file, "caption": caption, "fmt": formats, "columns": columns, "rows": len(df)
        }  # fmt: skip
        return Table(df, caption, formats)

    def figure(
        self, name: str, fig: Figure, *, caption: str, alt: str, data: pd.DataFrame | None = None
    ) -> FigureDisplay:
        """Record a figure as themed SVG, with the data behind it as CSV, and return its display.

        caption: states model, n, seeds and protocol.   alt: one sentence for a reader who cannot see it.
        The matplotlib figure is closed, so that Jupyter does not show it a second time.
        """
        self._claim(name, self.figures)
        if not caption.strip() or not alt.strip():
            raise ConfigError(f"figure {name!r} needs a caption and an alt text")
        import matplotlib.pyplot as plt

        from .plotting import themed_svg

        run_name = self.directory.name if self.directory else "figure"
        svg = themed_svg(fig, prefix=f"{run_name}-{name}", title=alt)
        plt.close(fig)
        file = self._write(f"{name}.svg", svg)
        data_file = None if data is None else self._write(f"{name}.data.csv", data.to_csv(index=False))
        self.figures[name] = {"file": file, "data": data_file, "caption": caption, "alt": alt}
        return FigureDisplay(svg, caption)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to the timer `name` (seconds; repeated blocks add up)."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - begin

    def finish(self) -> None:
        """Write the results. A recorded run without this call counts as unfinished."""
        seconds = time.perf_counter() - self._started
        if self.directory is None:
            print(f"Finished after {seconds:.1f} s. Interactive session: nothing was written.")
            return
        from .provenance import kernel_facts

        results = {
            "parameters": self.parameters,
            "values": self.values,
            "tables": self.tables,
            "figures": self.figures,
            "timings": {name: round(t, 4) for name, t in self.timings.items()},
            "notebook_seconds": round(seconds, 3),
            **kernel_facts(_IMPORTED_AT),
        }
        self._write(RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")

    # ---------------------------------------------------------------- helpers

    def _claim(self, name: str, taken: dict) -> None:
        if not _KEY.fullmatch(name):
            raise ConfigError(f"{name!r} is no key; use letters, digits and . _ - + = @, e.g. 'a.b'")
        if self.recorded and name in taken:
            raise ConfigError(f"{name!r} is recorded twice; give each result its own key")

    def _write(self, file: str, text: str) -> str:
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = self.directory / f".{file}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.directory / file)
        return file


def _number(key: str, x: Any) -> float | int | str | bool | None:
    """Plain data from numpy / torch scalars; infinities become the texts "inf" and "-inf" (JSON has none)."""
    if hasattr(x, "item"):
        x = x.item()
    if x is None or isinstance(x, (bool, str)):
        return x
    if not isinstance(x, numbers.Real):
        raise ConfigError(f"value {key!r}: expected a number, text or None, got {type(x).__name__}")
    if math.isnan(x):
        raise ConfigError(f"value {key!r} is NaN; record None if it could not be measured")
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    return int(x) if isinstance(x, numbers.Integral) else float(x)


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
class FigureDisplay:
    """Display of a recorded figure: inline SVG with its caption."""

    svg: str
    caption: str

    def _repr_html_(self) -> str:
        return f'<figure class="ek-figure">{self.svg}<figcaption>{escape(self.caption)}</figcaption></figure>'

    def __repr__(self) -> str:
        return f"[figure] {self.caption}"
