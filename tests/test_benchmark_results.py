"""Benchmark results: every file has its row, pages quote files, and what they quote exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from editkit.press import benchmarks
from editkit.press.quote import Lookup

ROOT = Path(__file__).parents[1]
REPORTS = benchmarks.load(ROOT / benchmarks.FOLDER)
SCRIPT = ROOT / "benchmarks" / "batching.py"
PAGES = sorted(p for p in (ROOT / "book").rglob("*.md") if not {"_build", "runs"} & {*p.relative_to(ROOT).parts})


def test_every_result_is_in_the_table():
    head, body = benchmarks.table(REPORTS)
    assert len(body) == len(benchmarks.ROWS) and {len(row) for row in body} == {len(head)}
    assert all("thread(s)" in row[-1] and "commit" in row[-1] for row in body)
    with pytest.raises(Lookup, match="which no row"):
        benchmarks.table({**REPORTS, "new": {}})
    with pytest.raises(Lookup, match="no benchmark 'targets'"):
        benchmarks.table({})


def test_bars_are_met_or_said_to_be_missed():
    rows = {row[1]: row for row in benchmarks.table(REPORTS)[1]}
    assert rows["one fact at a time, as released"][3] == "at least 8: met"
    slow = {**REPORTS, "targets": {**REPORTS["targets"], "speed_up_processor_time": 7.9}}
    assert "at least 8: missed" in {row[3] for row in benchmarks.table(slow)[1]}
    assert REPORTS["targets"]["largest_relative_distance"] < 1e-4
    assert max(REPORTS["batching"]["relative_distance"].values()) < 1e-5


def test_numbers_are_named_by_path():
    reports = {"a": {"x": {"files / memory (s)": 0.0123, "b.c": [1]}, "dirty": True}}
    assert benchmarks.value(reports, "a:x/files / memory (s)") == 0.0123
    assert benchmarks.formatted(reports, "a:x/files / memory (s) ; .1%") == "1.2\u202f%"
    assert benchmarks.formatted(reports, "a:x/files / memory (s) ; * 1000 .1f") == "12.3"
    assert benchmarks.formatted(reports, "a:dirty") == "True"
    for bad, words in (("b:x", "no benchmark 'b'"), ("a:y", "nothing at 'y'; here is x, dirty"), ("a", "no benchmark"),
                       ("a:dirty/x", "here is the value True")):  # fmt: skip
        with pytest.raises(Lookup, match=words):
            benchmarks.value(reports, bad)


def test_pages_quote_what_is_in_the_files():
    quoted = [q for p in PAGES for q in re.findall(r"\{bench\}`([^`]+)`", p.read_text())]
    assert len(quoted) > 15
    for text in quoted:
        assert benchmarks.formatted(REPORTS, text)
    for page in PAGES:  # a page that points to a result file quotes it
        text = page.read_text()
        for name in re.findall(r"benchmarks/results/(\w+)\.json", text):
            assert f"{{bench}}`{name}:" in text, f"{page.name} names {name}.json without quoting it"


def test_batches_and_single_texts_agree():
    spec = importlib.util.spec_from_file_location("batching_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    report = script.run(script.parse(["--facts", "3", "--texts", "6", "--repeats", "1"]))
    assert max(report["relative_distance"].values()) < 1e-5
    assert set(report["speed_up"]) == {"keys", "covariance", "evaluation"}
