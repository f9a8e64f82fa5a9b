"""The rule of the reproduction ledger: from recorded values to verdicts, as one tidy table. No verdict is ever typed.

A paper's file (`book/ledger/<paper>.yaml`, checked against `schema.yaml` beside it) lists tables and figures; each has
checks, one per comparison that it supports, or the reason why it cannot be tested. `table` makes one line per check and
testbed of all of them; pages, summary and ledger.csv are views of it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import yaml
from scipy import stats

from editkit.base.config import check_known
from editkit.base.errors import DataError
from editkit.press.format import KINDS
from editkit.press.quote import Runs
from editkit.studies import published

HOLDS, FAILS, OPEN, ABSENT = "holds", "fails", "open", "not run"
FORM, DIRECTION, NOT, UNDECIDED, COUNT, NOT_RUN, UNTESTABLE = VERDICTS = (
    "reproduced in form", "reproduced in direction", "not reproduced", "open", "same data", "not run yet",
    "not testable here",
)  # fmt: skip
TESTBEDS = {"companion": "companion", "smollm2": "SmolLM2-135M"}
PAPERS = ("labyrinth", "clare", "memoir", "horse")
FOLDER = "ledger"


# -------------------------------------------------------------------- one comparison


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number with its ends: recorded under `key` of a run, or (key "") typed in the ledger, then without error."""

    key: str
    record: Mapping[str, Any]
    exact: bool = False

    @property
    def kind(self) -> str:
        """What the ends are, a key of `format.KINDS`; records from before there were kinds say it in their note."""
        said = "seeds" if "range" in self.record.get("note", "") else ""
        return self.record.get("kind") or said

    @property
    def spread(self) -> str:
        if not self.key or self.exact:
            return "free of sampling error"
        return "no interval" if self.record["lo"] is None else KINDS[self.kind]

    def bounds(self) -> tuple[float, float] | None:
        """Between what the number lies with 95 % confidence; None if that is not known.

        Least and greatest of n seeds are no such interval (of 3 seeds, one in four misses the median). They bound the
        standard deviation by (hi - lo) / 2 * sqrt(n / (n - 1)), and so Student's interval of the mean.
        """
        value, lo, hi = (self.record[k] for k in ("value", "lo", "hi"))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        if self.exact or not self.key:
            return value, value
        if lo is None:
            return None
        if self.kind not in ("seeds", "range"):
            return lo, hi
        n = self.record["n"] or 0
        half = float("inf") if n < 2 else stats.t.ppf(0.975, n - 1) * (hi - lo) / (2 * (n - 1) ** 0.5)
        return value - half, value + half


def number(x: float) -> Cell:
    return Cell("", {"value": x, "lo": None, "hi": None, "n": None, "unit": "", "note": "", "fmt": None})


def meets(check: Mapping, ours: Cell | None, goal: Cell | None) -> bool | None:
    """Whether `ours` lies above, below or near `goal`: certainly, certainly not, or (None) not decided."""
    a, b = ours and ours.bounds(), goal and goal.bounds()
    if a is None or b is None:
        return None
    low, high = (0.0, 0.0) if ours == goal else (a[0] - b[1], a[1] - b[0])
    if check["expect"] == "near":
        within = -check["margin"] <= low and high <= check["margin"]
        return True if within else False if low > check["margin"] or high < -check["margin"] else None
    if check["expect"] == "below":
        low, high = -high, -low
    return True if low > 0 else False if high <= 0 else None


def decide(check: Mapping, ours: Cell | None, control: Cell | None, goal: Cell | None) -> str:
    """HOLDS if `ours` certainly meets the expectation and its control certainly does not; FAILS if one of the two is
    certainly otherwise; ABSENT without the values; else OPEN. Without `than` the control itself is the goal.
    """
    mine = meets(check, ours, goal)
    both = [mine]
    if "than" in check or check["expect"] == "near":
        theirs = meets(check, control, goal)
        both.append(None if theirs is None else not theirs)
    if False in both and ours is not None:
        return FAILS
    if ours is None or control is None or goal is None:
        return ABSENT
    return HOLDS if all(both) else OPEN


def verdict(results: list[str], counts: bool = False) -> str:
    """Of a table or figure from the results of its checks. counts: they only count what a file holds."""
    if FAILS in results:
        return NOT
    if all(r == ABSENT for r in results):
        return NOT_RUN
    if all(r == HOLDS for r in results) and (counts or len(results) > 1):
        return COUNT if counts else FORM
    return DIRECTION if HOLDS in results and not counts else UNDECIDED


# -------------------------------------------------------------------- a row on a testbed


def setting(sidecar: Mapping) -> tuple[str, int, int]:
    """(testbed, edits, seeds) of a run, by its parameters."""
    given = {p["name"]: p["value"] for p in sidecar.get("parameters", ())}
    edits = next((given[name] for name in ("n_edits", "counts", "n_revised", "n_ripple") if given.get(name)), 0)
    edits = max(edits) if isinstance(edits, list) else edits
    return given.get("testbed") or given.get("model") or "companion", edits, len(given.get("seeds", [0]))


@dataclasses.dataclass(frozen=True)
class Line:
    """One check of a row on one testbed, with all that was found for it; `check` is None where nothing is tested."""

    paper: str
    row: Mapping
    testbed: str
    verdict: str
    alias: str = ""
    sidecar: Mapping | None = None
    which: str = ""
    check: Mapping | None = None
    result: str = ""
    ours: Cell | None = None
    control: Cell | None = None

    @property
    def edits(self) -> int:
        return setting(self.sidecar)[1] if self.sidecar else 0

    def flat(self) -> dict[str, Any]:
        """The line as it stands in ledger.csv."""
        check, mine = self.check or {}, self.ours.record if self.ours else {}
        text, of, source = published_text(check["published"]) if check.get("published") else ("", "", "")
        return {
            "paper": self.paper, "row": self.row["id"], "item": self.row["item"], "testbed": self.testbed,
            "verdict": self.verdict, "run": self.alias, "edits": self.edits or None, "claim": check.get("claim"),
            "result": self.result, "expect": check.get("expect"), "margin": check.get("margin"),
            "key": self.ours.key if self.ours else None, "ours": mine.get("value"), "lo": mine.get("lo"),
            "hi": mine.get("hi"), "n": mine.get("n"), "spread": self.ours.spread if self.ours else None,
            "control_is": check.get("control_is"), "control": self.control.record["value"] if self.control else None,
            "published": text, "of": of, "source": source,
        }  # fmt: skip


def look_up(check: Mapping, values: Mapping[str, dict], name: str) -> Cell | None:
    """The cell of a check's `ours`, `control` or `than`; None if the run has not recorded it."""
    wanted = check.get(name, check["control"] if name == "than" and check["expect"] != "near" else 0)
    if not isinstance(wanted, str):
        return number(wanted)
    exact = check.get("exact", False)
    if name == "ours" and "pick" in check:  # among several competitors: the best of them is our least gain
        found = [k for k in fnmatch.filter(values, wanted) if k.split(".")[1] not in check.get("without", ())]
        if not found:
            return None
        choose = {"least": min, "median": statistics.median_low}[check["pick"]]
        chosen = choose([values[k]["value"] for k in found])
        wanted = next(k for k in found if values[k]["value"] == chosen)
    return Cell(wanted, values[wanted], exact) if wanted in values else None


def examine(paper: str, row: Mapping, testbed: str, runs: Runs) -> list[Line]:
    """The lines of one table or figure on one testbed, all from one run.

    Of the runs of the row's notebook on the testbed: the one that decides most checks, then the one with most edits,
    then with most seeds.
    """
    if reason := row.get("not_testable", {}).get(testbed):
        return [Line(paper, row, testbed, UNTESTABLE, check=None, result=reason)]

    def cells(check: Mapping, sidecar: Mapping) -> list[Cell | None]:
        return [look_up(check, sidecar["values"], name) for name in ("ours", "control", "than")]

    found = [(alias, *runs.find(alias)) for alias in runs.manifest]
    found = [f for f in found if f[1]["notebook"] == row.get("notebook") and setting(f[1])[0] == testbed]
    if not found:
        return [Line(paper, row, testbed, NOT_RUN)]

    def worth(candidate: tuple) -> tuple:
        sidecar = candidate[1]
        return (sum(None not in cells(c, sidecar) for c in row["checks"]), *setting(sidecar)[1:])

    alias, sidecar, which = max(found, key=worth)
    made = [(c, *cells(c, sidecar)) for c in row["checks"]]
    results = [decide(*m) for m in made]
    if all(r == ABSENT for r in results):
        return [Line(paper, row, testbed, NOT_RUN)]
    mine = verdict(results, row.get("counts", False))
    return [
        Line(paper, row, testbed, mine, alias, sidecar, which, check, result, ours, control)
        for (check, ours, control, _), result in zip(made, results, strict=True)
    ]


def lines(source: Path, runs: Runs) -> Iterator[Line]:
    """All lines of the ledger, in the order of the book."""
    for paper in PAPERS:
        for row in load(source / FOLDER / f"{paper}.yaml")["rows"]:
            for testbed in TESTBEDS:
                yield from examine(paper, row, testbed, runs)


def table(source: Path, runs: Runs) -> pd.DataFrame:
    """The whole ledger, one line per check and testbed; the columns are those of `Line.flat`."""
    return pd.DataFrame([line.flat() for line in lines(source, runs)])


# -------------------------------------------------------------------- the files


def load(path: Path) -> dict[str, Any]:
    """A paper's ledger {title, rows}, checked against schema.yaml, which describes the keys. Raises DataError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        schema = yaml.safe_load(
            (Path(__file__).parents[1] / FOLDER / "schema.yaml").read_text(encoding="utf-8")
        )
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path.name}: {error}") from error
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(data))
    if error:
        place = "/".join(map(str, error.absolute_path))
        raise DataError(
            f"{path.name}, {place or 'top'}: {error.message}; ledger/schema.yaml describes the keys"
        )
    names = [row["id"] for row in data["rows"]]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path.name}: the ids {sorted(twice)} are there twice")
    for row in data["rows"]:
        why = row.get("not_testable", {})
        row["not_testable"] = dict.fromkeys(TESTBEDS, why) if isinstance(why, str) else why
        for check in row.get("checks", ()):
            if "data" in check.get("published", {}):
                published_cells(check["published"]["data"])
    return data


def published_text(given: Mapping) -> tuple[str, str, str]:
    """(figure as printed, what it is of, source)."""
    if "data" in given:
        cells, source = published_cells(given["data"])
        unit = given.get("unit", "points" if "minus" in given["data"] else "%")
        text = ", ".join(f"{value:g}".replace("-", "−") for _, value in cells)
        of = given.get("of") or ", ".join(name for name, _ in cells if name)
    else:
        text, of, source = str(given.get("text", given.get("value"))), given.get("of", ""), given["source"]
        unit = given.get("unit", "")
    return text + (f"\u202f{unit}" if unit else ""), of, source


def published_cells(data: Mapping) -> tuple[list[tuple[str, float]], str]:
    """([(label, figure)], source) out of a table of printed figures in `editkit.studies.published`.

    where selects rows by column; `column` is what is read and `label` (default "model") tells the rows apart. With
    `minus`, the same cells are subtracted whose selection differs by these columns. Raises DataError.
    """
    frame = published.table(data["file"], data["table"])

    def select(where: Mapping) -> dict[str, float]:
        check_known([*where, data["column"]], frame.columns, "column of the published table:")
        rows = frame[(frame[list(where)] == pd.Series(where)).all(axis=1)].dropna(subset=data["column"])
        label = data.get("label", "model")
        labels = rows[label].astype(str) if label in rows else [""] * len(rows)
        return dict(zip(labels, rows[data["column"]], strict=True))

    cells = select(data["where"])
    if "minus" in data:
        other = select({**data["where"], **data["minus"]})
        cells = {name: round(value - other[name], 6) for name, value in cells.items() if name in other}
    if not cells:
        raise DataError(f"no row of {data['file']}.{data['table']} has {data['where']}")
    return list(cells.items()), published.source(data["file"], data["table"])
