"""The optional Snakemake workflow: same study, same results (needs the extra `cluster`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_runs_execute import load, make_project

from editkit.runs.layout import finished

pytest.importorskip("snakemake", reason="Snakemake is optional: pip install -e '.[cluster]'")
pytestmark = pytest.mark.xdist_group("kernels")

SNAKEFILE = Path(__file__).resolve().parents[1] / "workflow" / "Snakefile"


def snakemake(root, *options):
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        str(SNAKEFILE),
        "--cores",
        "1",
        "--config",
        f"root={root}",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, cwd=root)


def test_one_rule_per_run_and_nothing_twice(tmp_path):
    layout = make_project(tmp_path, good="run.value('a', 1)", raises="1 / 0")
    first = snakemake(tmp_path, "--keep-going")
    assert first.returncode != 0 and "ZeroDivisionError" in first.stderr
    good, raises = load(layout)
    assert finished(layout, good.run_id) and finished(layout, raises.run_id) is None
    dry = snakemake(tmp_path, "--dry-run")
    assert raises.run_id.replace("-", "_") in dry.stdout and good.run_id.replace("-", "_") not in dry.stdout


def test_a_changed_notebook_is_executed_again(tmp_path):
    layout = make_project(tmp_path, good="run.value('a', 1)")
    assert snakemake(tmp_path).returncode == 0
    path = tmp_path / "notebooks" / "good.ipynb"
    path.write_text(path.read_text().replace("run.value('a', 1)", "run.value('a', 2)"))
    assert snakemake(tmp_path).returncode == 0
    [good] = load(layout)
    assert finished(layout, good.run_id)[0]["values"]["a"]["value"] == 2
