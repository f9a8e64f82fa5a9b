"""What a notebook calls to record its results.

    from editkit.press import start
    run = start(globals())                     # right after the parameters cell
    with run.timed("edit"):
        ...
    run.value("memit.efficacy", 0.987, lo=0.979, hi=0.993, n=100, fmt=".1%", kind="bootstrap")
    run.values(frame, "{method}.{axis}", x="mean", n="n_facts", fmt=".1%", kind="bootstrap")  # one a row
    run.table("scores", frame, caption="Scores after 100 edits.")
    run.figure("tradeoff", fig, caption="...", data=frame)
    run.says("MEMIT states {memit.efficacy} of the edits, {memit.efficacy <> ft.efficacy} fine-tuning's {ft.efficacy}.")
    run.finish()                               # last cell

Under `editkit run` everything lands in the directory named by EDITKIT_RUN_DIR and becomes the run's sidecar;
in a plain Jupyter session the same calls only display.
"""

from __future__ import annotations

import ast
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.config import check_known
from ..base.errors import ConfigError
from .display import FigureDisplay, Says, Table
from .format import KINDS, check_spec, format_value

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RUN_DIR, WORK_DIR, CACHE_DIR, PARAMETERS = (
    "EDITKIT_RUN_DIR", "EDITKIT_WORK_DIR", "EDITKIT_CACHE", "EDITKIT_RUN_PARAMETERS",
)  # fmt: skip
RESULTS = "results.json"
_INJECTED = "# Parameters"  # first line of papermill's cell
_QUOTE = re.compile(r"\{([^{}]+)\}")
_KEY = re.compile(r"[A-Za-z0-9][\w.+@=-]*")


def start(namespace: Mapping[str, Any], *, style: bool = True) -> Run:
    """Begin recording; call it as `run = start(globals())` right after the parameters cell.

    The declared parameters are the annotated names of that cell (`n_edits: int = 100  # number of edits`).
    style: also apply `editkit.press.plotting.use_style()`.
    Raises ConfigError when a declared parameter is not plain data, when the notebook has overwritten a value that
    `editkit run` passed in, and when papermill has injected what is not declared so: name, type or range.
    """
    given = json.loads(os.environ.get(PARAMETERS, "null"))
    if given is None:
        _check_injected(namespace)
    names = given or [name for name in namespace.get("__annotations__", {}) if name in namespace]
    parameters = {name: _plain(name, namespace.get(name)) for name in names}
    _refuse_changed(given or {}, namespace)
    # Said on import by tqdm.auto (through transformers) where ipywidgets is missing; no page needs the widget.
    warnings.filterwarnings("ignore", message="IProgress not found")
    if style:
        from . import plotting

        plotting.use_style()
    directory = os.environ.get(RUN_DIR)
    return Run(parameters, Path(directory) if directory else None, namespace)


def _plain(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"parameter {name!r} is a {type(value).__name__}; use plain data: numbers, text, lists, dicts"
        ) from error


def _refuse_changed(parameters: Mapping[str, Any], namespace: Mapping[str, Any]) -> None:
    for name, was in parameters.items():
        if (now := _plain(name, namespace.get(name))) != was:
            raise ConfigError(
                f"parameter {name!r} was passed as {was!r} but the notebook set it to {now!r}; assign parameters "
                "only in the cell tagged 'parameters'"
            )


def _check_injected(namespace: Mapping[str, Any]) -> None:
    """Check what papermill alone has injected: it warns of a misspelt name and runs on with the defaults."""
    cells = [cell for cell in namespace.get("In", ()) if cell.strip()]
    if not any(cell.startswith(_INJECTED) for cell in cells[1:]):
        return
    from .notebook import check_parameters, declared_in

    place = next(i for i, cell in enumerate(cells) if i and cell.startswith(_INJECTED))
    names = [line.targets[0].id for line in ast.parse(cells[place]).body if isinstance(line, ast.Assign)]
    declared = declared_in(cells[place - 1], "this notebook")
    check_parameters(declared, {name: namespace[name] for name in names}, "this notebook")


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

    def __init__(
        self,
        parameters: dict[str, Any],
        directory: Path | None = None,
        namespace: Mapping[str, Any] | None = None,
    ):
        self.parameters = parameters
        self.directory = directory
        self.numbers: dict[str, dict] = {}
        self.tables: dict[str, dict] = {}
        self.figures: dict[str, dict] = {}
        self.said: list[str] = []
        self.timings: dict[str, float] = {}
        self._started = time.perf_counter()
        self._scratch: Path | None = None
        self._namespace = parameters if namespace is None else namespace
        self._finished = False

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
        kind: str = "",
    ) -> Value:
        """Record one number under a key the book can quote.

        x:      the number; scores are fractions 0..1 (print them with fmt=".1%"). None: "not measured".
        lo, hi: ends of its interval, on the scale of x.   kind: what they are, a key of `format.KINDS`.
        n:      number of items (facts, prompts) averaged.
        unit:   text after the number, e.g. "s".   note: what exactly was measured (protocol).
        fmt:    Python format spec; default ".3g" for floats, ",d" for integers.
        Raises ConfigError for a bad or (in a recorded run) repeated key, NaN, or a reversed or half interval.
        """
        self._claim(key, self.numbers)
        check_known([kind], KINDS, "kind of interval")
        record = {"value": _number(key, x), "lo": _number(key, lo), "hi": _number(key, hi)}
        if (lo is None) != (hi is None) or (lo is not None and lo > hi):
            raise ConfigError(f"value {key!r}: give both ends of the interval, lo <= hi; got {lo}, {hi}")
        record |= {"n": None if n is None else int(n), "unit": unit, "note": note}
        record |= {"fmt": check_spec(fmt) if fmt else None, "kind": kind}
        self.numbers[key] = record
        return Value(key, record)

    def values(
        self,
        frame: pd.DataFrame,
        key: str,
        x: str = "mean",
        *,
        lo: str = "lo",
        hi: str = "hi",
        n: str | int | None = "n",
        scale: float = 1.0,
        note: str = "",
        **more: Any,
    ) -> list[Value]:
        """Record one number per row of a frame; see `value` for `unit`, `fmt` and `kind`.

        key, note: with columns in braces, "{method}.{axis}".   x, lo, hi, n: columns; ends that the frame does not have
        or that are NaN are left out, an x that is NaN is "not measured".   n: also one number for all rows.
        scale: factor of x and its ends, e.g. 100 for points.
        """
        made = []
        for row in frame.to_dict("records"):
            x_, lo_, hi_ = (
                None if row.get(c) is None or row[c] != row[c] else scale * row[c] if scale != 1.0 else row[c]
                for c in (x, lo, hi)
            )
            if x not in row:
                raise ConfigError(f"the frame has no column {x!r}; it has {', '.join(map(str, row))}")
            count = row.get(n) if isinstance(n, str) else n
            ends = {} if x_ is None or lo_ is None or hi_ is None else {"lo": lo_, "hi": hi_}
            made.append(self.value(key.format(**row), x_, **ends, n=count, note=note.format(**row), **more))
        return made

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
        self, name: str, fig: Figure, *, caption: str, alt: str = "", data: pd.DataFrame | None = None
    ) -> FigureDisplay:
        """Record a figure as themed SVG, with the data behind it as CSV, and return its display.

        caption: states model, n, seeds and protocol.   alt: what is drawn, for a drawing whose axes hold no data; all
        else that a reader who cannot see it is told is made from what is drawn (`describe`).
        The matplotlib figure is closed, so that Jupyter does not show it a second time.
        """
        self._claim(name, self.figures)
        import matplotlib.pyplot as plt

        from .describe import describe
        from .plotting import themed_svg

        alt = " ".join(filter(None, [alt.strip(), describe(fig)]))
        if not caption.strip() or not alt:
            raise ConfigError(f"figure {name!r} needs a caption, and an alt text where its axes hold no data")

        run_name = self.directory.name if self.directory else "figure"
        svg = themed_svg(fig, prefix=f"{run_name}-{name}", title=alt)
        plt.close(fig)
        file = self._write(f"{name}.svg", svg)
        data_file = None if data is None else self._write(f"{name}.data.csv", data.to_csv(index=False))
        self.figures[name] = {"file": file, "data": data_file, "caption": caption, "alt": alt}
        return FigureDisplay(svg, caption)

    def says(self, text: str) -> Says:
        """Record and display what came out, in words around recorded values; the last cell of a notebook.

        text: "{key}" stands for a value with its interval, "{key bare}" without; "{a <> b}" for "more than", "less
        than" or "not clearly different from", by whether the two intervals overlap ("equal to" for equal numbers
        without intervals). A sentence whose keys were not all recorded under these parameters is left out.
        """
        said = []
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z{])", " ".join(text.split())):
            keys = [
                k.strip() for part in _QUOTE.findall(sentence) for k in part.removesuffix(" bare").split("<>")
            ]
            if all(k in self.numbers for k in keys):
                said.append(_QUOTE.sub(lambda m: self._quoted(m[1]), sentence))
        self.said += said
        return Says(" ".join(said))

    def _quoted(self, part: str) -> str:
        first, compared, second = (p.strip() for p in part.partition("<>"))
        if not compared:
            key = first.removesuffix(" bare")
            return format_value(self.numbers[key], interval=key == first)
        (a_lo, a_hi), (b_lo, b_hi) = (
            [r["value"] if r[end] is None else r[end] for end in ("lo", "hi")]
            for r in (self.numbers[first], self.numbers[second])
        )
        if a_lo > b_hi:
            return "more than"
        if a_hi < b_lo:
            return "less than"
        return "equal to" if a_lo == a_hi and b_lo == b_hi else "not clearly different from"

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
        _refuse_changed(self.parameters, self._namespace)
        self._finished = True
        if self.directory is None:
            print(f"Finished after {seconds:.1f} s. Interactive session: nothing was written.")
            return
        from .kernel import what_was_read
        from .provenance import hardware, package_versions, peak_memory_mib

        results = {
            "parameters": self.parameters,
            "values": self.numbers,
            "tables": self.tables,
            "figures": self.figures,
            "says": self.said,
            "timings": {name: round(t, 4) for name, t in self.timings.items()},
            "notebook_seconds": round(seconds, 3),
            "processor_seconds": round(time.process_time(), 1),  # all threads, imports included: independent of load
            "packages": package_versions(),
            "hardware": hardware(),
            "peak_memory_mib": peak_memory_mib(),
            "read": what_was_read(),
        }
        self._write(RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")

    # ---------------------------------------------------------------- helpers

    def _claim(self, name: str, taken: dict) -> None:
        if self.recorded and self._finished:
            raise ConfigError(f"{name!r} is recorded after run.finish(), which must be the last call")
        if not _KEY.fullmatch(name):
            raise ConfigError(f"{name!r} is no key; use letters, digits and . _ - + = @, e.g. 'a.b'")
        if self.recorded and name in taken:
            raise ConfigError(f"{name!r} is recorded twice; give each result its own key")

    def _write(self, file: str, text: str) -> str:
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = self.directory / f".{file}.partial"
            try:
                partial.write_text(text, encoding="utf-8")
                partial.replace(self.directory / file)
            finally:
                partial.unlink(missing_ok=True)  # a full disk leaves no half file
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
