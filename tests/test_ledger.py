"""The reproduction ledger: its rule, its files, and what came out on the committed references."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from editkit.base.errors import ConfigError, DataError
from editkit.press.layout import Layout
from editkit.press.notebook import read_notebook
from editkit.press.quote import Runs
from editkit.press.reference import references
from editkit.studies import published

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import verdicts  # noqa: E402
from verdicts import (  # noqa: E402
    ABSENT,
    COUNT,
    DIRECTION,
    FAILS,
    FORM,
    HOLDS,
    NOT,
    NOT_RUN,
    OPEN,
    UNDECIDED,
    Cell,
    number,
)

BOOK = ROOT / "book"
ROWS = [
    pytest.param(paper, row, id=f"{paper}-{row['id']}")
    for paper in verdicts.PAPERS
    for row in verdicts.load(BOOK / "ledger" / f"{paper}.yaml")["rows"]
]
CHECKS = [
    pytest.param(*row.values, check, id=f"{row.id}-{i}")
    for row in ROWS
    for i, check in enumerate(row.values[1].get("checks", ()))
]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs({alias: {"reference": sidecar} for alias, (sidecar, _) in references(Layout(ROOT)).items()})


def record(value, lo=None, hi=None, **more):
    return {"value": value, "lo": lo, "hi": hi, "n": 1, "unit": "", "note": "", "fmt": None} | more


def q(value, lo=None, hi=None, key="k", **more):
    return Cell(key, record(value, lo, hi, **more))


ABOVE, BELOW = {"expect": "above"}, {"expect": "below"}
NEAR = {"expect": "near", "margin": 1}


@pytest.mark.parametrize(
    ("check", "ours", "control", "goal", "result"),
    [
        (ABOVE, q(2, 1, 3), number(0), None, HOLDS),
        (ABOVE, q(2, -1, 3), number(0), None, OPEN),
        (ABOVE, q(-2, -3, 0), number(0), None, FAILS),
        (BELOW, q(-2, -3, -1), number(0), None, HOLDS),
        (BELOW, q(2, 1, 3), number(0), None, FAILS),
        (ABOVE, q(2), number(0), None, OPEN),
        (ABOVE, q(2, 1.5, 3), q(1, 0, 1.4, "c"), None, HOLDS),
        (ABOVE, q(2, 1.5, 3), q(1, 0, 1.6, "c"), None, OPEN),
        (ABOVE, q(2, 1.5, 3), q(2, 1.5, 3), None, FAILS),  # the control itself
        (ABOVE, None, number(0), None, ABSENT),
        (ABOVE | {"than": 1}, q(2, 1.5, 3), number(0), number(1), HOLDS),
        (ABOVE | {"than": 1}, q(2, 1.5, 3), number(2), number(1), FAILS),  # the control meets it as well
        (ABOVE | {"than": 1}, q(2, 1.5, 3), q(1, 0, 2, "c"), number(1), OPEN),
        (ABOVE | {"than": 1}, q(0, -1, 0.5), None, number(1), FAILS),  # certain without the control
        (ABOVE | {"than": 1}, q(2, 1.5, 3), None, number(1), ABSENT),
        (NEAR, q(0.5, 0, 1), q(5, 4, 6, "c"), number(0), HOLDS),
        (NEAR, q(0.5, 0, 1), q(0.5, 0, 1, "c"), number(0), FAILS),
        (NEAR, q(0.5, 0, 1.1), q(5, 4, 6, "c"), number(0), OPEN),
        (NEAR, q(3, 2, 4), q(5, 4, 6, "c"), number(0), FAILS),
        (NEAR, q(3, 3, 3), q(5, 4, 6, "c"), q(2.5, 2.2, 2.9, "g"), HOLDS),
    ],
)
def test_a_comparison_is_decided_against_its_control(check, ours, control, goal, result):
    assert verdicts.decide(check, ours, control, goal or control) == result


def test_least_and_greatest_of_few_seeds_are_widened_to_an_interval():
    few, many = q(1.0, 0.9, 1.1, n=3, kind="seeds").bounds(), q(1.0, 0.9, 1.1, n=20, kind="seeds").bounds()
    assert few == pytest.approx((1 - 4.3027 * 0.2 / (2 * 2**0.5), 1 + 4.3027 * 0.2 / (2 * 2**0.5)), rel=1e-4)
    assert few[0] < many[0] < 1
    assert q(1.0, 0.9, 1.1, n=1, kind="seeds").bounds() == (-float("inf"), float("inf"))
    assert q(1.0, 0.9, 1.1, n=3, kind="bootstrap").bounds() == (0.9, 1.1)
    assert q(1.0, 0.9, 1.1, n=3, note="mean; interval: range over seeds").bounds() == few, "older records"


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        ([ABSENT, ABSENT], NOT_RUN),
        ([HOLDS], DIRECTION),
        ([HOLDS, HOLDS], FORM),
        ([HOLDS, OPEN], DIRECTION),
        ([HOLDS, HOLDS, ABSENT], DIRECTION),
        ([OPEN, ABSENT], UNDECIDED),
        ([HOLDS, HOLDS, FAILS], NOT),
    ],
)
def test_a_verdict_follows_from_the_comparisons(results, verdict):
    assert verdicts.verdict(results) == verdict


def test_equal_counts_are_no_reproduction():
    assert verdicts.verdict([HOLDS, HOLDS], counts=True) == COUNT
    assert verdicts.verdict([HOLDS, FAILS], counts=True) == NOT


ROW = {"id": "i", "item": "T", "shows": "x", "page": "p", "notebook": "n.ipynb", "not_testable": {},
       "checks": [{"claim": "c", "ours": "k", "expect": "above", "control": "c", "control_is": "x"},
                  {"claim": "d", "ours": "l", "expect": "above", "control": 0, "control_is": "x"}]}  # fmt: skip


def sidecar(values, n_edits=1, notebook="n.ipynb", model="companion", seeds=(1,)):
    given = {"n_edits": n_edits, "model": model, "seeds": list(seeds)}
    parameters = [{"name": name, "value": value} for name, value in given.items()]
    return {"reference": {"notebook": notebook, "parameters": parameters, "values": values}}


def test_one_run_answers_a_row_the_fullest_and_then_the_longest():
    whole = {"k": record(2, 1, 3), "c": record(0, 0, 0.5), "l": record(2, 1, 3)}
    part = {"k": whole["k"], "c": whole["c"]}
    manifest = {
        "short": sidecar(whole), "long": sidecar(whole, 100), "longest": sidecar(part, 1000),
        "seeds": sidecar(whole, 100, seeds=(1, 2)), "other": sidecar(whole, 5000, "m.ipynb"),
        "real": sidecar(part, 9, model="smollm2"),
    }  # fmt: skip
    lines = verdicts.examine("p", ROW, "companion", Runs(manifest))
    assert {line.alias for line in lines} == {"seeds"} and lines[0].verdict == FORM and lines[0].edits == 100
    [first, second] = verdicts.examine("p", ROW, "smollm2", Runs(manifest))
    assert (first.alias, first.verdict, second.result) == ("real", DIRECTION, ABSENT)
    [none] = verdicts.examine("p", ROW, "smollm2", Runs({"short": manifest["short"]}))
    assert none.verdict == NOT_RUN and none.check is None
    unmeasured = {**whole, "k": record(None), "l": record(None)}
    assert verdicts.examine("p", ROW, "companion", Runs({"a": sidecar(unmeasured)}))[0].verdict == UNDECIDED


def test_the_best_and_the_median_competitor_are_picked_by_their_values():
    values = {
        f"gain.{m}.x": record(v, v - 1, v + 1) for m, v in {"a": 3, "b": -2, "d": 5, "others": -9}.items()
    }
    check = {"ours": "gain.*.x", "without": ["others"], "expect": "above"}
    assert verdicts.look_up(check | {"pick": "least"}, values, "ours").key == "gain.b.x"
    assert verdicts.look_up(check | {"pick": "median"}, values, "ours").key == "gain.a.x"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"not_testable": 3}, "not_testable"),
        ({"chekcs": []}, "'chekcs' was unexpected"),
        ({"checks": []}, "non-empty|too short"),
        ({"checks": [ROW["checks"][0] | {"expect": "higher"}]}, "'higher' is not one of"),
        ({"checks": [ROW["checks"][0] | {"expect": "near"}]}, "'margin' is a required property"),
        ({"checks": [ROW["checks"][0] | {"published": {"value": 1}}]}, "published"),
        (
            {"checks": [{k: v for k, v in ROW["checks"][0].items() if k != "control"}]},
            "'control' is a required",
        ),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, change, error):
    path = tmp_path / "p.yaml"
    base = {k: v for k, v in ROW.items() if k != "not_testable"}
    path.write_text(yaml.safe_dump({"title": "P", "rows": [base | change]}))
    with pytest.raises((DataError, ConfigError), match=error):
        verdicts.load(path)


def test_published_cells_are_read_from_the_data_of_the_chapter():
    where = {"dataset": "MultiCounterFact", "edits": "20 x 100", "method": "AlphaEdit"}
    cells, source = verdicts.published_cells(
        {
            "file": "labyrinth",
            "table": "main",
            "column": "Spe",
            "minus": {"method": "MEMIT_seq"},
            "where": where,
        }
    )
    table = published.table("labyrinth", "main").query(
        "dataset == 'MultiCounterFact' and edits == '20 x 100'"
    )
    table = table.pivot(index="model", columns="method", values="Spe")
    wanted = (table["AlphaEdit"] - table["MEMIT_seq"]).round(6)
    assert dict(cells) == wanted.to_dict() and len(cells) == 4 and "arXiv" in source


@pytest.mark.parametrize(("paper", "row"), ROWS)
def test_a_row_names_a_notebook_and_a_page_that_exist(paper, row):
    assert (BOOK / f"{row['page']}.md").is_file()
    if "checks" in row:
        read_notebook(ROOT / row["notebook"])


# Recorded by the notebooks since the references were last made; each leaves this list when they are made anew.
AWAITED = {"chance.hub", "chance.own_rephrase", "wise.reliability"}


@pytest.mark.parametrize(("paper", "row", "check"), CHECKS)
def test_every_key_is_recorded_by_a_committed_reference(runs, paper, row, check):
    """A key that nobody records would read "not run" for ever."""
    values = [
        e["reference"]["values"]
        for e in runs.manifest.values()
        if e["reference"]["notebook"] == row["notebook"]
    ]
    for name in ("ours", "control", "than"):
        key = check.get(name)
        if isinstance(key, str):
            found = any(verdicts.look_up(check, v, name) for v in values)
            assert found != (key in AWAITED), f"{key}: {'is recorded now' if found else 'nobody records it'}"


@pytest.mark.parametrize(("paper", "row", "check"), CHECKS)
def test_no_check_holds_on_its_control(runs, paper, row, check):
    """With the control in the place of ours, a row with this check alone would not be reproduced."""
    changed = {k: v for k, v in check.items() if k not in ("pick", "without")} | {"ours": check["control"]}
    for line in verdicts.examine(paper, row | {"checks": [changed]}, "companion", runs):
        if line.check is None:
            assert check["control"] in AWAITED
        elif line.result != OPEN:
            assert line.result == FAILS and line.verdict == NOT
        else:  # not even the control is measured well enough to be told from the goal
            assert "than" in check or check["expect"] == "near" or line.control.bounds() is None


@pytest.mark.parametrize(("paper", "row", "check"), CHECKS)
def test_expectations_point_where_the_published_figures_do(paper, row, check):
    """A direction may only be expected if the majority of the paper's own figures show it."""
    data = check.get("published", {}).get("data")
    if data is not None and "minus" in data and check["expect"] != "near":
        signs = [value > 0 for _, value in verdicts.published_cells(data)[0]]
        share = sum(signs) / len(signs)
        assert share > 0.5 if check["expect"] == "above" else share < 0.5


def test_the_table_has_a_line_for_every_row_and_testbed(runs):
    frame = verdicts.table(BOOK, runs)
    rows = {(paper, row["id"]) for paper, row in (p.values for p in ROWS)}
    assert set(frame.groupby(["paper", "row"]).testbed.nunique()) == {len(verdicts.TESTBEDS)}
    assert set(zip(frame.paper, frame.row, strict=True)) == rows
    assert set(frame.verdict) <= set(verdicts.VERDICTS)
    assert frame[frame.result.isin([HOLDS, FAILS])].run.ne("").all()
    assert frame.groupby(["paper", "row", "testbed"]).run.nunique().max() == 1, "one run per row"
