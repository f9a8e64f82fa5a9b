"""The reproduction ledger: its rule, its files, and its page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from editkit.base.errors import ConfigError, DataError
from editkit.press.layout import Layout
from editkit.press.notebook import read_notebook
from editkit.press.quote import Runs
from editkit.press.reference import references
from editkit.press.study import load_study
from editkit.studies import published

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import verdicts  # noqa: E402
from verdicts import ABSENT, DIRECTION, FAILS, FORM, HOLDS, NOT, NOT_RUN, OPEN, UNDECIDED, Quantity  # noqa: E402

FILES = sorted((ROOT / "book" / "ledger").glob("*.yaml"))


def q(value, lo=None, hi=None):
    return Quantity(value, lo, hi)


@pytest.mark.parametrize(
    ("check", "ours", "versus", "result"),
    [
        ({"expect": "above"}, q(2, 1, 3), None, HOLDS),
        ({"expect": "above"}, q(2, -1, 3), None, OPEN),
        ({"expect": "above"}, q(2, 0, 3), None, OPEN),
        ({"expect": "above"}, q(-2, -3, -1), None, FAILS),
        ({"expect": "below"}, q(-2, -3, -1), None, HOLDS),
        ({"expect": "below"}, q(2, 1, 3), None, FAILS),
        ({"expect": "above", "than": 5}, q(2, 1, 3), None, FAILS),
        ({"expect": "above"}, q(2), None, OPEN),
        ({"expect": "above", "exact": True}, q(2), None, HOLDS),
        ({"expect": "above"}, q(2, 1.5, 3), q(1, 0, 1.4), HOLDS),
        ({"expect": "above"}, q(2, 1.5, 3), q(1, 0, 1.6), OPEN),
        ({"expect": "below"}, q(2, 1.5, 3), q(1, 0, 1.4), FAILS),
        ({"expect": "above"}, q(2, 1.5, 3), q(1), OPEN),
        ({"expect": "below", "exact": True}, q(1), q(2), HOLDS),
        ({"expect": "near", "margin": 1}, q(0.5, 0, 1), None, HOLDS),
        ({"expect": "near", "margin": 1}, q(0.5, 0, 1.1), None, OPEN),
        ({"expect": "near", "margin": 1}, q(3, 2, 4), None, FAILS),
        ({"expect": "near", "margin": 1, "than": 3}, q(3, 2.5, 3.5), None, HOLDS),
        ({"expect": "near", "margin": 1}, q(3, 3, 3), q(2.5, 2.2, 2.9), HOLDS),
        ({"expect": "near", "margin": 1}, q(3, 3, 3), q(1, 0.9, 1.1), FAILS),
    ],
)
def test_a_comparison_is_decided_by_its_interval(check, ours, versus, result):
    assert verdicts.judge(check, ours, versus) == result


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        ([], NOT_RUN),
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


def record(value, lo=None, hi=None):
    return {"value": value, "lo": lo, "hi": hi, "n": 1, "unit": "", "note": "", "fmt": None}


ITEM = {"id": "i", "item": "Table", "shows": "x", "runs": ["a-full", "a"],
        "checks": [{"claim": "c", "ours": "k", "expect": "above"}]}  # fmt: skip


def test_the_first_run_that_exists_is_used_and_missing_ones_are_no_error():
    small = {"a": {"reference": {"values": {"k": record(1, 0.5, 2)}}}}
    full = {"a-full": {"run": {"values": {"k": record(-1, -2, -0.5)}}}}
    assert verdicts.examine(ITEM, Runs({}))[:2] == (NOT_RUN, None)
    assert verdicts.examine(ITEM, Runs(small))[:2] == (DIRECTION, "a")
    assert verdicts.examine(ITEM, Runs(small | full))[:2] == (NOT, "a-full")
    partly = {"a-full": {"run": {"values": {"other": record(1)}}}}
    assert verdicts.examine(ITEM, Runs(small | partly))[0] == DIRECTION, "the run that has the value"
    nothing = {"a": {"run": {"values": {}}}}
    assert verdicts.examine(ITEM, Runs(nothing))[0] == NOT_RUN
    unmeasured = {"a": {"run": {"values": {"k": record(None)}}}}
    assert verdicts.examine(ITEM, Runs(unmeasured))[0] == UNDECIDED


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("not_testable: because", "either checks or not_testable"),
        ("chekcs: []", "did you mean 'checks'"),
        ("checks: [{claim: c, ours: k, expect: higher}]", "use one of above, below, near"),
        ("checks: [{claim: c, ours: k, expect: near}]", "margin"),
        ("checks: [{claim: c, ours: k, expect: above, published: {value: 1}}]", "needs its source"),
        ("checks: [{claim: c, ours: k, expect: above, than: 1, versus: l}]", "exclude each other"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, change, error):
    path = tmp_path / "p.yaml"
    key = change.split(":")[0]
    base = {
        "id": "i",
        "item": "T",
        "shows": "x",
        "runs": "[a]",
        "checks": "[{claim: c, ours: k, expect: above}]",
    }
    lines = [f"{k}: {v}" for k, v in base.items() if k != key] + [change]
    path.write_text("title: P\nitems:\n  - " + "\n    ".join(lines) + "\n")
    with pytest.raises((DataError, ConfigError), match=error):
        verdicts.load(path)


def test_published_cells_are_read_from_the_data_of_the_chapter():
    cells, source = verdicts.published_cells(
        {
            "file": "labyrinth",
            "table": "main",
            "column": "Spe",
            "minus": {"method": "MEMIT_seq"},
            "where": {"dataset": "MultiCounterFact", "edits": "20 x 100", "method": "AlphaEdit"},
        }
    )
    table = published.table("labyrinth", "main").query(
        "dataset == 'MultiCounterFact' and edits == '20 x 100'"
    )
    table = table.pivot(index="model", columns="method", values="Spe")
    wanted = (table["AlphaEdit"] - table["MEMIT_seq"]).round(6)
    assert dict(cells) == wanted.to_dict() and len(cells) == 4 and "arXiv" in source


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_name_runs_notebooks_and_pages_that_exist(path):
    known = {run.alias for study in (ROOT / "studies").glob("*.yaml") for run in load_study(study).runs}
    known |= set(references(Layout(ROOT)))
    for item in verdicts.load(path)["items"]:
        if "page" in item:
            assert (ROOT / "book" / f"{item['page']}.md").is_file(), f"{item['id']}: no page {item['page']}"
        if "checks" in item:
            notebook = read_notebook(ROOT / item["notebook"])
            assert set(item["runs"]) & known, f"{item['id']}: none of {item['runs']} is in a study"
            text = "\n".join(cell.source for cell in notebook.cells)
            for name in item.get("parameters", ()):
                assert name in text, f"{item['id']}: {item['notebook']} has no parameter {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_expectations_point_where_the_published_figures_do(path):
    """A direction may only be expected if the majority of the paper's own figures show it."""
    for item in verdicts.load(path)["items"]:
        for check in item.get("checks", ()):
            data = (check.get("published") or {}).get("data")
            if data is None or "minus" not in data or check["expect"] == "near":
                continue
            signs = [value > 0 for _, value in verdicts.published_cells(data)[0]]
            share = sum(signs) / len(signs)
            assert share > 0.5 if check["expect"] == "above" else share < 0.5, (
                f"{item['id']}: {check['claim']}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_committed_references_record_what_the_ledger_quotes(path):
    """A key that nobody records would read "not run" for ever."""
    sidecars = {alias: sidecar for alias, (sidecar, _) in references(Layout(ROOT)).items()}
    for item in verdicts.load(path)["items"]:
        for check in item.get("checks", ()):
            for key in filter(None, (check["ours"], check.get("versus"))):
                alias, _, name = key.rpartition(":")
                there = [run for run in ([alias] if alias else item["runs"]) if run in sidecars]
                full = [run for run in item["runs"] if not run.endswith(("-full", "-long"))]
                if set(full) <= set(there) and not check.get("full_only"):
                    found = any(name in sidecars[run]["values"] for run in there)
                    assert found, f"{item['id']}: none of {there} records {name}"
