"""What is left when a study is killed, interrupted or run twice: real processes and real kernels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from test_runs_execute import load, make_project

from editkit.press import execute
from editkit.press.execute import CURRENT, OK, WAITING, run_all
from editkit.press.layout import finished

pytestmark = pytest.mark.xdist_group("kernels")

SLOW = """\
mark = run.work_dir / "checkpoint"
import time
if mark.exists():
    run.value("resumed", True)
else:
    mark.write_text("half way")
    time.sleep(120)"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A study of a quick and a slow run, what starts it and waits for the slow one, and the temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "t").mkdir()
    (tmp_path / "p").mkdir()
    layout = make_project(tmp_path / "p", quick="run.value('a', 1)", slow=SLOW)
    command = [sys.executable, "-m", "editkit.cli", "run", "studies/default.yaml", "--root", str(layout.root)]

    def begin(**options):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        deadline = time.monotonic() + 240
        while not list((layout.scratch / "work").glob("slow-*/checkpoint")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        return process, psutil.Process(process.pid).children(recursive=True)

    yield layout, begin, tmp_path / "t"
    tempfile.tempdir = None


def test_a_killed_study_leaves_no_process_keeps_what_is_finished_and_resumes(slow):
    layout, begin, temporary = slow
    process, family = begin()
    assert len(family) >= 2, "a worker and a kernel should be running"
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=2.5)
    assert not alive
    assert not list(temporary.glob("*ek-*"))
    quick, late = load(layout)
    assert finished(layout, quick.run_id) and finished(layout, late.run_id) is None
    assert [o.status for o in run_all([quick, late], layout)] == [CURRENT, OK]
    assert finished(layout, late.run_id)[0]["values"]["resumed"]["value"] is True
    assert not list((layout.scratch / "work").iterdir()), "checkpoints of a finished run are dropped"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels end with their parent on Linux only")
def test_the_kernel_of_a_killed_worker_ends_and_its_folder_is_removed_by_the_next_run(slow):
    layout, begin, temporary = slow
    process, family = begin()
    for each in (psutil.Process(process.pid), *family[:1]):  # the runner, and the worker that would clear up
        each.suspend()
    for each in (psutil.Process(process.pid), *family[:1]):
        each.kill()
    process.communicate()
    assert not psutil.wait_procs(family, timeout=2.5)[1]
    assert list(temporary.glob("ek-*"))
    in_use = temporary / "ek-in-use"
    in_use.mkdir()
    with FileLock(in_use / "lock"):
        assert run_all(load(layout)[1:], layout)[0].status == OK
    assert [path.name for path in temporary.glob("*ek-*")] == ["ek-in-use"]


@pytest.mark.parametrize("ignored", [False, True], ids=["foreground", "started with SIGINT ignored"])
def test_an_interrupt_ends_running_runs_and_keeps_finished_ones(slow, ignored):
    """Shells start what runs in the background with SIGINT ignored, and programs inherit that."""
    layout, begin, _ = slow
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    process, family = begin(preexec_fn=lambda: signal.signal(signal.SIGINT, handler))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "finished runs are kept" in errors and "Traceback" not in errors
    assert not psutil.wait_procs(family, timeout=240)[1]
    quick, late = load(layout)
    assert finished(layout, quick.run_id) and finished(layout, late.run_id) is None


def test_a_second_study_says_who_is_running_and_waits(tmp_path, monkeypatch):
    layout = make_project(tmp_path, good="run.value('a', 1)")
    [run] = load(layout)
    entered, go = threading.Event(), threading.Event()

    def work(run, *args):
        entered.set()
        assert go.wait(60)
        return execute.Outcome(run.spec, OK)

    monkeypatch.setattr(execute, "_execute", work)
    first = threading.Thread(target=run_all, args=([run], layout))
    first.start()
    assert entered.wait(60)
    said = []

    def hear(outcome):
        said.append((outcome.status, outcome.message))
        go.set()

    run_all([run], layout, report=hear)
    first.join()
    assert said[0] == (WAITING, f"process {os.getpid()} is executing it") and said[1][0] == OK


def test_relative_folders_mean_what_they_mean_where_the_command_is_given(tmp_path, monkeypatch):
    layout = make_project(tmp_path, good="import os\nrun.value('cache', os.environ['EDITKIT_CACHE'])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDITKIT_CACHE", "my-cache")
    [run] = load(layout)
    assert run_all([run], layout)[0].status == OK
    value = finished(layout, run.run_id)[0]["values"]["cache"]["value"]
    assert Path(value) == tmp_path / "my-cache"


@pytest.mark.parametrize(
    ("run", "book", "status", "built"),
    [(0, 0, 0, True), (1, 0, 2, True), (0, 1, 2, True), (2, 0, 2, False), (130, 0, 2, False)],
)
def test_make_book_builds_the_book_also_after_a_failed_run(tmp_path, run, book, status, built):
    """Not after a study that cannot be read, nor after Ctrl-C; make itself turns every failure into 2."""
    program = tmp_path / "bin" / "editkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/calls"\ntest "$1" = run && exit {run}\nexit {book}\n')
    program.chmod(0o755)
    root = Path(__file__).resolve().parents[1]
    call = ["make", "-s", "-C", str(root), "book", f"VENV={tmp_path}", "INSTALLED=/dev/null"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "calls").read_text().split() == (["run", "book"] if built else ["run"])
