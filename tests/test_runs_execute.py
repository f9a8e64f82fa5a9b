"""Executing studies: what is moved in, what is refused, what survives a kill. Kernels are started here."""

from __future__ import annotations

import errno
import json
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from editkit.base.errors import ConfigError, DataError
from editkit.cli import main
from editkit.press import execute
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
    assert "editkit/press/report.py" in sidecar["inputs"]["files"] and "pandas" in sidecar["inputs"]["packages"]


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


def test_a_kernel_that_does_not_start_is_tried_once_more(tmp_path, monkeypatch):
    layout = make_project(tmp_path, good=GOOD)
    calls = []

    def no_kernel(stage, log, env, processes):
        calls.append(env["EDITKIT_RUN_DIR"])
        return {"status": NO_START, "message": "Kernel didn't respond in 60 seconds"}, 0

    monkeypatch.setattr(execute, "call_worker", no_kernel)
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


def test_one_run_at_a_time_has_the_gpus_and_the_others_do_not_wait(tmp_path, monkeypatch):
    layout = make_project(tmp_path, one=GOOD)
    (tmp_path / "studies" / "default.yaml").write_text(
        "runs:\n  - {notebook: notebooks/one.ipynb, gpus: 1, minutes: 9, grid: {n: [1, 2, 3, 4]}}\n"
        "  - {notebook: notebooks/one.ipynb, gpus: 3, alias: big}\n  - {notebook: notebooks/one.ipynb, alias: cpu}\n"
    )
    monkeypatch.setattr(execute, "_gpu_count", lambda: 2)
    busy, order, cpu_done = threading.Lock(), [], threading.Event()

    def record(run, layout, **options):
        if run.spec.gpus:
            assert busy.acquire(blocking=False), "two runs have the GPUs"
            assert cpu_done.wait(20), "the run without GPU waits for those with"
            busy.release()
        order.append(run.spec.alias)
        if not run.spec.gpus:
            cpu_done.set()
        return execute.Outcome(run.spec, OK)

    monkeypatch.setattr(execute, "run_one", record)
    outcomes = run_all(load(layout), layout, jobs=2)
    assert [o.status for o in outcomes] == [OK] * 4 + [UNAVAILABLE, OK]
    assert order[0] == "cpu" and len(order) == 5


def test_places_that_cannot_be_written_are_named_before_anything_runs(tmp_path, monkeypatch):
    layout = make_project(tmp_path, good=GOOD)
    monkeypatch.setattr(execute, "run_one", lambda *args, **options: pytest.fail("executed"))
    (tmp_path / "book" / "runs").write_text("a file where a folder belongs")
    with pytest.raises(ConfigError, match=r"cannot write to .*runs .*make room"):
        run_all(load(layout), layout)
    (tmp_path / "book" / "runs").unlink()

    def full(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(execute.tempfile, "TemporaryFile", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        run_all(load(layout), layout)


def test_a_full_disk_in_the_middle_leaves_nothing_half_written(done, monkeypatch, tmp_path):
    """In a sidecar, in a reference, in a file of the cache."""
    layout, runs, _ = done
    before = read_sidecar(layout.run_dir(runs["good"].run_id))
    real = Path.write_text

    def full(path, text, **options):
        if "run.json" in path.name:
            real(path, text[:20], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **options)

    collect([runs["good"].spec], layout, allow_dirty=True)
    monkeypatch.setattr(Path, "write_text", full)
    [outcome] = run_all([runs["good"]], layout, force=True)
    assert outcome.status == FAILED and "No space left" in outcome.message
    with pytest.raises(OSError, match="No space left"):
        collect([runs["good"].spec], layout, allow_dirty=True)
    monkeypatch.undo()
    assert read_sidecar(layout.run_dir(runs["good"].run_id)) == before
    assert references(layout)["good"][0]["values"] == before["values"]
    assert sorted(p.name for p in layout.results.iterdir()) == ["good"]
    assert not any((layout.scratch / "staging").iterdir())


def test_what_the_machine_cannot_get_is_not_available_and_no_failure(tmp_path):
    body = "from editkit.base.errors import UnavailableError\nraise UnavailableError('no network')"
    layout = make_project(tmp_path, far=body)
    [run] = load(layout)
    assert [(o.status, o.message) for o in run_all([run], layout)] == [(UNAVAILABLE, "no network")]
    assert main(["run", "studies/default.yaml", "--root", str(tmp_path)]) == 0
    assert json.loads(layout.outcome(run.run_id).read_text())["message"] == "no network"


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
    assert "unknown parameter" in capsys.readouterr().err
    assert main([*study, "-p", "n=3", "--only", "good", "--keep-reference"]) == 2
    assert "without -p" in capsys.readouterr().err
