"""The rule of the reproduction ledger: from recorded values to a verdict. No verdict is ever typed.

A paper's file (`book/ledger/<paper>.yaml`) lists its tables and figures as items; an item has checks, one per
comparison that the table or figure supports, or the reason why it cannot be tested here. The keys of the file
are described at `load`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from editkit.base.config import check_known
from editkit.base.errors import DataError
from editkit.press.quote import Lookup, Runs
from editkit.studies import published

HOLDS, FAILS, OPEN, ABSENT = "holds", "fails", "open", "not run"
FORM, DIRECTION, NOT, UNDECIDED, NOT_RUN, UNTESTABLE = (
    "reproduced in form",
    "reproduced in direction",
    "not reproduced",
    "open",
    "not run in this profile",
    "not testable here",
)
VERDICTS = (FORM, DIRECTION, NOT, UNDECIDED, NOT_RUN, UNTESTABLE)
EXPECTATIONS = ("above", "below", "near")

_ITEM = {"id", "item", "shows", "page", "notebook", "runs", "parameters", "checks", "not_testable"}
_CHECK = {"claim", "published", "ours", "versus", "expect", "than", "margin", "exact", "full_only"}
_PUBLISHED = {"value", "unit", "text", "of", "source"}
_DATA = {"file", "table", "where", "minus", "column", "label"}


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A recorded value with its interval; lo and hi are None where none was recorded."""

    value: float
    lo: float | None
    hi: float | None

    def ends(self, exact: bool) -> tuple[float, float] | None:
        """The interval; the value itself if it is free of sampling error (`exact`); None if unknown."""
        if self.lo is not None and self.hi is not None:
            return self.lo, self.hi
        return (self.value, self.value) if exact else None


def judge(check: dict, ours: Quantity, versus: Quantity | None = None) -> str:
    """HOLDS, FAILS or OPEN by the stated rule.

    expect "above" / "below": the interval lies wholly on that side of `than` (default 0), or of the interval of
    `versus`. expect "near": the distance from `than`, or from `versus`, is certainly within `margin`. FAILS means
    that the opposite is certain in the same sense; everything else is OPEN.
    """
    exact = bool(check.get("exact"))
    mine = ours.ends(exact)
    than = float(check.get("than", 0.0))
    other = (than, than) if versus is None else versus.ends(exact)
    if mine is None or other is None:
        return OPEN
    low, high = mine[0] - other[1], mine[1] - other[0]  # range of ours minus the other
    if check["expect"] == "near":
        margin = float(check["margin"])
        if -margin <= low and high <= margin:
            return HOLDS
        return FAILS if low > margin or high < -margin else OPEN
    if check["expect"] == "below":
        low, high = -high, -low
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else OPEN


def verdict(results: Sequence[str]) -> str:
    """Of an item from the results of its checks."""
    if not results or all(r == ABSENT for r in results):
        return NOT_RUN
    if FAILS in results:
        return NOT
    if len(results) > 1 and all(r == HOLDS for r in results):
        return FORM
    return DIRECTION if HOLDS in results else UNDECIDED


# -------------------------------------------------------------------- looking up


@dataclasses.dataclass(frozen=True)
class Quoted:
    """A value as found: the record, where it is from, and the target that quotes it."""

    record: dict
    sidecar: dict
    alias: str
    which: str
    target: str

    @property
    def quantity(self) -> Quantity | None:
        if not isinstance(self.record["value"], (int, float)) or isinstance(self.record["value"], bool):
            return None
        return Quantity(self.record["value"], self.record["lo"], self.record["hi"])


def chosen_run(runs: Runs, aliases: Iterable[str]) -> str | None:
    """The first alias the book has a result or a committed reference of."""
    return next((alias for alias in aliases if alias in runs.manifest), None)


def quote(runs: Runs, alias: str, key: str) -> Quoted | None:
    """The value of `key` in a run, or of "alias:key" in another one; None if it is not there."""
    if ":" in key:
        alias, key = key.split(":", 1)
    try:
        record, sidecar, alias, which = runs.item(f"{alias}:{key}", "values")
    except Lookup:
        return None
    return Quoted(record, sidecar, alias, which, f"{alias}:{key}")


@dataclasses.dataclass(frozen=True)
class Checked:
    """A check with what was found for it."""

    check: dict
    result: str
    ours: Quoted | None
    versus: Quoted | None


def examine(item: dict, runs: Runs) -> tuple[str, str | None, list[Checked]]:
    """(verdict, alias of the run used, the checks) of one item."""
    if "not_testable" in item:
        return UNTESTABLE, None, []
    found = []
    for check in item["checks"]:
        ours = versus = None
        for alias in item["runs"]:  # the best run that recorded what this comparison needs
            ours = quote(runs, alias, check["ours"])
            versus = quote(runs, alias, check["versus"]) if "versus" in check else None
            if ours is not None and ("versus" not in check or versus is not None):
                break
        found.append(Checked(check, _result(check, ours, versus), ours, versus))
    return verdict([c.result for c in found]), chosen_run(runs, item["runs"]), found


def _result(check: dict, ours: Quoted | None, versus: Quoted | None) -> str:
    if ours is None or ("versus" in check and versus is None):
        return ABSENT
    if ours.quantity is None or (versus is not None and versus.quantity is None):
        return OPEN  # recorded as "not measured"
    return judge(check, ours.quantity, versus.quantity if versus else None)


# -------------------------------------------------------------------- the files


def load(path: Path) -> dict[str, Any]:
    """A paper's ledger: {title, source, items}, checked.

    item:  id, item (name in the paper), shows, page (docname), notebook, and either
           runs (aliases, the best first), parameters (names to show), checks; or not_testable (the reason).
    check: claim; ours (key, or alias:key) with expect above | below | near, than (default 0) or versus (key),
           margin (near); exact: true for values without sampling error; full_only: true for a comparison that
           only the full profile records; published: {value, unit, text, of, source} as printed in the paper, or
           {data: {file, table, where, minus, column, label}}, see `published_cells`.
    Raises DataError naming file and item.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path.name}: {error}") from error
    seen: set[str] = set()
    for item in data["items"]:
        where = f"{path.name}, item {item.get('id')!r}"
        check_known(item, sorted(_ITEM), f"key of {where}:")
        if item["id"] in seen:
            raise DataError(f"{where} is there twice")
        seen.add(item["id"])
        if ("not_testable" in item) == ("checks" in item):
            raise DataError(f"{where} needs either checks or not_testable")
        if "checks" in item and not (item.get("runs") and item["checks"]):
            raise DataError(f"{where}: checks need runs, and at least one")
        for check in item.get("checks", ()):
            _check_check(check, where)
    return data


def _check_check(check: dict, where: str) -> None:
    check_known(check, sorted(_CHECK), f"key of a check of {where}:")
    published = check.get("published", {})
    data = published.get("data")
    check_known(published, sorted(_PUBLISHED | {"data"}), f"key of published in {where}:")
    check_known(data or {}, sorted(_DATA), f"key of published data in {where}:")
    if not check.get("claim") or not check.get("ours"):
        raise DataError(f"{where}: a check needs a claim and ours")
    if check.get("expect") not in EXPECTATIONS:
        raise DataError(f"{where}: expect {check.get('expect')!r}; use one of {', '.join(EXPECTATIONS)}")
    if ("margin" in check) != (check["expect"] == "near"):
        raise DataError(f"{where}: margin belongs to expect near, and only there")
    if "versus" in check and "than" in check:
        raise DataError(f"{where}: versus and than exclude each other")
    if data is not None:
        published_cells(data)
    elif published and not published.get("source"):
        raise DataError(f"{where}: a published figure needs its source")


def published_cells(data: dict) -> tuple[list[tuple[str, float]], str]:
    """([(label, figure)], source) out of a table of printed figures in `editkit.studies.published`.

    where selects rows by column; `column` is what is read and `label` (default "model") tells the rows apart. With
    `minus`, the same cells are subtracted whose selection differs by these columns. Raises DataError.
    """
    table = published.table(data["file"], data["table"])
    label = data.get("label", "model")
    cells = _select(table, data["where"], data["column"], label)
    if "minus" in data:
        other = _select(table, {**data["where"], **data["minus"]}, data["column"], label)
        cells = {name: round(value - other[name], 6) for name, value in cells.items() if name in other}
    if not cells:
        raise DataError(f"no row of {data['file']}.{data['table']} has {data['where']}")
    return list(cells.items()), published.source(data["file"], data["table"])


def _select(table: pd.DataFrame, where: dict, column: str, label: str) -> dict[str, float]:
    check_known([*where, column], table.columns, "column of the published table:")
    rows = table[(table[list(where)] == pd.Series(where)).all(axis=1)].dropna(subset=column)
    labels = rows[label].astype(str) if label in rows else [""] * len(rows)
    return dict(zip(labels, rows[column], strict=True))
