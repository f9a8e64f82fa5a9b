"""The optional Snakemake workflow: same study, same results (needs the extra `cluster`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_runs_execute import load, make_project

from editkit.press.execute import OK, run_all
from editkit.press.layout import finished

pytest.importorskip("snakemake", reason="Snakemake is optional: pip install -e '.[cluster]'")
pytestmark = pytest.mark.xdist_group("kernels")

SNAKEFILE = Path(__file__).resolve().parents[1] / "workflow" / "Snakefile"


def command(root, *options):
    start = [sys.executable, "-m", "snakemake", "-s", str(SNAKEFILE), "--cores", "1"]
    return [*start, "--config", f"root={root}", *options]


def snakemake(root, *options):
    return subprocess.run(command(root, *options), capture_output=True, text=True, cwd=root)


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


MANY = """\
import os, time
from pathlib import Path
import numpy as np
folder = Path(os.environ["EDITKIT_TEST_FOLDER"])
with (folder / "executed").open("a") as handle:
    handle.write(f"{n}\\n")
third = len((folder / "executed").read_text().split()) > 2
while third and (folder / "hold").exists():
    time.sleep(0.05)
run.value("sum", float(np.random.default_rng(n).normal(size=100).sum()))"""


def make_many(root):
    """A study of five runs of one notebook."""
    root.mkdir()
    layout = make_project(root, many=MANY)
    (root / "studies" / "default.yaml").write_text(
        "runs:\n  - notebook: notebooks/many.ipynb\n    alias: many-{n}\n    grid: {n: [1, 2, 3, 4, 5]}\n"
    )
    return layout


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_study_killed_half_way_resumes_with_what_is_unfinished(tmp_path, monkeypatch):
    """SIGKILL to Snakemake and its jobs while the third run is executing; results equal those without Snakemake."""
    monkeypatch.setenv("EDITKIT_TEST_FOLDER", str(tmp_path))
    layout = make_many(tmp_path / "project")
    executed, hold = tmp_path / "executed", tmp_path / "hold"
    hold.touch()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(layout.root), cwd=layout.root, stdout=log, stderr=log, start_new_session=True
        )
        runs = load(layout)
        wait_for(lambda: sum(finished(layout, run.run_id) is not None for run in runs) == 2
                 and len(executed.read_text().split()) == 3)  # fmt: skip
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # The kernel lives in a session of its own and goes when it finds its parent gone.
    wait_for(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    )
    done = [layout.run_dir(run.run_id) / "run.json" for run in runs if finished(layout, run.run_id)]
    before = [file.read_bytes() for file in done]
    killed = executed.read_text().split()[-1]
    hold.unlink()
    assert snakemake(layout.root).returncode != 0  # the lock of the killed process is still there
    assert snakemake(layout.root, "--unlock").returncode == 0
    resumed = snakemake(layout.root)
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(executed.read_text().split()) == sorted(
        [*"12345", killed]
    )  # finished runs were not run again
    assert len(before) == 2 and before == [file.read_bytes() for file in done]
    plain = make_many(tmp_path / "plain")
    assert {o.status for o in run_all(load(plain), plain, jobs=2)} == {OK}
    for run, other in zip(runs, load(plain), strict=True):
        assert finished(layout, run.run_id)[0]["values"] == finished(plain, other.run_id)[0]["values"]
