"""Executing studies: what is moved in, what is refused, what survives a kill. Kernels are started here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from editkit.base.errors import DataError
from editkit.cli import main
from editkit.press import execute
from editkit.press import notebook as nb
from editkit.press.execute import CURRENT, FAILED, OK, UNAVAILABLE, run_all
from editkit.press.inputs import changes, prepare
from editkit.press.layout import Layout, finished, read_sidecar
from editkit.press.reference import collect, references
from editkit.press.study import load_study
from editkit.press.worker import NO_START

pytestmark = pytest.mark.xdist_group("kernels")

GOOD = """\
import sys, warnings
warnings.warn("IProgress not found. Please update jupyter and ipywidgets.")  # as tqdm.auto, from any module
run.value("interpreter", sys.executable)
run.value("double", 2 * n, lo=n, hi=3 * n, n=n, note="twice n")
import pandas as pd
run.table("t", pd.DataFrame({"x": [n]}), caption="A table.")"""
RAISES = "1 / 0"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
UNFINISHED = "class Late:\n    def finish(self):\n        pass\nrun = Late()"
AUTHOR = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
SLOW = """\
mark = run.work_dir / "checkpoint"
import time
if mark.exists():
    run.value("resumed", True)
else:
    mark.write_text("half way")
    time.sleep(120)"""


def write_notebook(path, body, parameters="n: int = 2  # how many"):
    cells = [new_markdown_cell("# Title"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell("from editkit.press import start\nrun = start(globals(), style=False)")]
    cells += [new_code_cell(body), new_code_cell("run.finish()")]
    nbformat.write(new_notebook(cells=cells), path)


def make_project(root, **notebooks):
    for folder in ("studies", "book", "notebooks"):
        (root / folder).mkdir()
    for name, body in notebooks.items():
        write_notebook(root / "notebooks" / f"{name}.ipynb", body)
    lines = [f"  - {{notebook: notebooks/{name}.ipynb, alias: {name}}}\n" for name in notebooks]
    (root / "studies" / "default.yaml").write_text("runs:\n" + "".join(lines))
    return Layout(root)


def load(layout):
    return prepare(load_study(layout.root / "studies" / "default.yaml").runs, layout.root)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study of five runs, executed once: one good, three that fail in three ways, one lacks data."""
    layout = make_project(
        tmp_path_factory.mktemp("project"), good=GOOD, raises=RAISES, killed=KILLED, unfinished=UNFINISHED
    )
    with (layout.root / "studies" / "default.yaml").open("a") as handle:
        handle.write("  - {notebook: notebooks/good.ipynb, alias: needy, requires: [data/none.json]}\n")
    runs = {run.spec.alias: run for run in load(layout)}
    outcomes = {o.spec.alias: o for o in run_all(list(runs.values()), layout, jobs=2)}
    return layout, runs, outcomes


def test_one_failing_run_does_not_lose_the_others(done):
    _, _, outcomes = done
    assert {alias: o.status for alias, o in outcomes.items()} == {
        "good": OK, "raises": FAILED, "killed": FAILED, "unfinished": FAILED, "needy": UNAVAILABLE,
    }  # fmt: skip


def test_failures_are_explained_and_logged(done):
    layout, runs, outcomes = done
    assert outcomes["raises"].message == "ZeroDivisionError: division by zero (cell 4)"
    assert "out of memory" in outcomes["killed"].message
    assert "without run.finish()" in outcomes["unfinished"].message
    assert "data/none.json" in outcomes["needy"].message
    assert "ZeroDivisionError" in layout.log(runs["raises"].run_id).read_text()


def test_nothing_of_a_failed_run_reaches_the_book(done):
    layout, runs, _ = done
    assert [p.name for p in layout.runs.iterdir()] == [runs["good"].run_id]
    assert not any((layout.scratch / "staging").iterdir())


def test_the_sidecar_tells_everything(done):
    layout, runs, _ = done
    sidecar = read_sidecar(layout.run_dir(runs["good"].run_id))
    assert sidecar["values"]["double"]["value"] == 4 and sidecar["tables"]["t"]["rows"] == 1
    assert sidecar["parameters"] == [
        {"name": "n", "type": "int", "value": 2, "default": 2, "help": "how many"}
    ]
    assert sidecar["notebook"] == "notebooks/good.ipynb" and sidecar["alias"] == "good"
    assert sidecar["packages"]["papermill"] and sidecar["hardware"]["cores"] >= 1
    assert sidecar["peak_memory_mib"]["host"] > 1 and 0 < sidecar["wall_seconds"] < 3600
    assert set(sidecar["git"]) == {"commit", "dirty"} and sidecar["started"].endswith("+00:00")
    assert "runs/report.py" in sidecar["inputs"]["modules"]


def test_the_note_about_missing_widgets_is_on_no_page(done):
    """tqdm.auto says it in the cell that imports transformers first, whether or not `start` ran before."""
    layout = done[0]
    sidecar = finished(layout, load(layout)[0].run_id)[0]
    assert sidecar["stderr_cells"] == []


def test_the_kernel_is_the_running_interpreter(done):
    layout, runs, _ = done
    sidecar = read_sidecar(layout.run_dir(runs["good"].run_id))
    assert sidecar["values"]["interpreter"]["value"] == sys.executable


def test_the_published_notebook_names_no_path_of_this_machine(done):
    layout, runs, _ = done
    text = layout.notebook(runs["good"].run_id).read_text().replace(json.dumps(sys.executable)[1:-1], "")
    assert str(layout.root) not in text


def test_unchanged_runs_are_not_executed(done):
    layout, runs, _ = done
    place = layout.notebook(runs["good"].run_id)
    before = place.stat().st_mtime_ns
    [again] = run_all([runs["good"]], layout)
    assert again.status == CURRENT and place.stat().st_mtime_ns == before
    assert changes(runs["good"], layout) == []


def test_a_changed_source_of_editkit_is_noticed(done, monkeypatch):
    layout, runs, _ = done
    path = layout.run_dir(runs["good"].run_id) / "run.json"
    text = path.read_text()
    sidecar = json.loads(text)
    sidecar["inputs"]["modules"]["facts.py"] = "another hash"
    sidecar["inputs"]["packages"]["torch"] = "0.1"
    sidecar["inputs"]["shipped"]["corpora/world/companion"] = "another model"
    path.write_text(json.dumps(sidecar))
    try:
        reasons = changes(runs["good"], layout)
    finally:
        path.write_text(text)
    assert reasons == ["world/companion changed", "torch changed", "editkit/models/facts.py changed"]


def test_a_changed_notebook_is_executed_and_a_reworded_one_refreshed(tmp_path):
    layout = make_project(tmp_path, good="run.value('a', n)")
    [run] = load(layout)
    assert run_all([run], layout)[0].status == OK
    place = layout.notebook(run.run_id)
    path = layout.root / "notebooks" / "good.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Other words"
    nbformat.write(notebook, path)
    for command in (["init", "-q"], ["add", "notebooks", "studies"], [*AUTHOR, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    [run] = load(layout)
    assert run_all([run], layout)[0].status == CURRENT
    git = read_sidecar(place.parent)["git"]
    assert git["later"] and not git["dirty"] and len(git["commit"]) == 40
    assert "# Other words" in place.read_text() and nb.failure(nbformat.read(place, as_version=4)) is None
    write_notebook(path, "run.value('a', n + 1)")
    [run] = load(layout)
    assert changes(run, layout) == ["notebook changed"]
    assert run_all([run], layout)[0].status == OK
    assert read_sidecar(place.parent)["values"]["a"]["value"] == 3
    assert sorted(p.name for p in layout.runs.iterdir()) == [run.run_id]


def test_a_damaged_result_is_not_current(done, tmp_path):
    layout, runs, _ = done
    table = layout.run_dir(runs["good"].run_id) / "t.csv"
    text = table.read_text()
    table.unlink()
    try:
        assert "lacks ['t.csv']" in changes(runs["good"], layout)[0]
    finally:
        table.write_text(text)


def test_a_failed_notebook_put_among_the_finished_is_refused(done):
    layout, runs, _ = done
    place = layout.notebook(runs["good"].run_id)
    text = place.read_text()
    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata["papermill"]["exception"] = True
    nbformat.write(notebook, place)
    try:
        with pytest.raises(DataError, match="must not be published"):
            finished(layout, runs["good"].run_id)
    finally:
        place.write_text(text)


def test_references_are_kept_by_alias_and_traceable(done):
    layout, runs, _ = done
    with pytest.raises(DataError, match="uncommitted"):
        collect([runs["good"].spec], layout)
    with pytest.raises(DataError, match="not finished"):
        collect([runs["raises"].spec], layout, allow_dirty=True)
    [folder] = collect([runs["good"].spec], layout, allow_dirty=True)
    assert sorted(p.name for p in folder.iterdir()) == ["run.json", "t.csv"]
    assert references(layout)["good"][0]["values"]["double"]["value"] == 4


def test_a_killed_study_keeps_what_is_finished_and_resumes(tmp_path):
    layout = make_project(tmp_path, quick="run.value('a', 1)", slow=SLOW)
    command = [sys.executable, "-m", "editkit.cli", "run", "studies/default.yaml", "--root", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    marks: list = []
    while not marks and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        marks = list((layout.scratch / "work").glob("slow-*/checkpoint"))
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert marks, output
    quick, slow = load(layout)
    assert finished(layout, quick.run_id) and finished(layout, slow.run_id) is None
    assert [o.status for o in run_all([quick, slow], layout)] == [CURRENT, OK]
    assert finished(layout, slow.run_id)[0]["values"]["resumed"]["value"] is True
    assert not list((layout.scratch / "work").iterdir()), "checkpoints of a finished run are dropped"


def test_no_process_outlives_a_killed_runner(tmp_path):
    layout = make_project(tmp_path, slow=SLOW)
    command = [sys.executable, "-m", "editkit.cli", "run", "studies/default.yaml", "--root", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list((layout.scratch / "work").glob("slow-*/checkpoint")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2, "a worker and a kernel should be running"
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=240)
    assert not alive


def test_an_interrupt_ends_running_runs_and_keeps_finished_ones(tmp_path):
    layout = make_project(tmp_path, quick="run.value('a', 1)", slow=SLOW)
    command = [sys.executable, "-m", "editkit.cli", "run", "studies/default.yaml", "--root", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list((layout.scratch / "work").glob("slow-*/checkpoint")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "finished runs are kept" in errors and "Traceback" not in errors
    assert not psutil.wait_procs(family, timeout=240)[1]
    quick, slow = load(layout)
    assert finished(layout, quick.run_id) and finished(layout, slow.run_id) is None


def test_a_kernel_that_does_not_start_is_tried_once_more(tmp_path, monkeypatch):
    layout = make_project(tmp_path, good=GOOD)
    calls = []

    def no_kernel(stage, log, env, processes):
        calls.append(env["EDITKIT_RUN_DIR"])
        return {"status": NO_START, "message": "Kernel didn't respond in 60 seconds"}, 0

    monkeypatch.setattr(execute, "_call_worker", no_kernel)
    [outcome] = run_all(load(layout), layout)
    assert len(calls) == 2 and outcome.status == FAILED and "did not start, twice" in outcome.message


def test_a_defect_of_the_runner_loses_one_run_only(tmp_path, monkeypatch):
    layout = make_project(tmp_path, one=GOOD, two=GOOD)

    def explode(run, layout, **options):
        if run.spec.alias == "one":
            raise OSError("disk full")
        return execute.Outcome(run.spec, OK)

    monkeypatch.setattr(execute, "run_one", explode)
    outcomes = run_all(load(layout), layout)
    assert [(o.status, o.message) for o in outcomes] == [(FAILED, "OSError: disk full"), (OK, "")]


def test_gpus_are_given_to_one_run_at_a_time(tmp_path, monkeypatch):
    layout = make_project(tmp_path, one=GOOD)
    (tmp_path / "studies" / "default.yaml").write_text(
        "runs:\n  - {notebook: notebooks/one.ipynb, gpus: 1, grid: {n: [1, 2, 3, 4]}}\n"
        "  - {notebook: notebooks/one.ipynb, gpus: 3, alias: big}\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    busy: set[str] = set()
    seen = []

    def record(run, layout, *, environment, **options):
        device = environment["CUDA_VISIBLE_DEVICES"]
        assert device not in busy
        busy.add(device)
        time.sleep(0.05)
        busy.discard(device)
        seen.append(device)
        return execute.Outcome(run.spec, OK)

    monkeypatch.setattr(execute, "run_one", record)
    outcomes = run_all(load(layout), layout, jobs=4)
    assert [o.status for o in outcomes] == [OK] * 4 + [UNAVAILABLE]
    assert len(seen) == 4 and set(seen) == {"4", "7"}


def test_the_command_line_summarizes_and_fails(done, capsys):
    layout, runs, _ = done
    study = ["run", "studies/default.yaml", "--root", str(layout.root)]
    assert main([*study, "--list"]) == 0
    listed = capsys.readouterr().out
    assert f"{runs['good'].run_id} " in listed and "current" in listed and "no result yet" in listed
    assert main([*study, "--only", "good", "--only", "needy"]) == 0
    assert "0 executed, 1 unchanged, 1 not available here, 0 failed" in capsys.readouterr().out
    assert main([*study, "--one", "raises"]) == 1
    errors = capsys.readouterr().err
    assert "ZeroDivisionError" in errors and f"logs/{runs['raises'].run_id}.log" in errors
    assert main([*study, "-p", "m=3", "--only", "good"]) == 2
    assert "does not declare ['m']" in capsys.readouterr().err
