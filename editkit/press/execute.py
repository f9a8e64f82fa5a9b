"""Executing runs: each in a process and a temporary folder of its own, moved in only when whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import nbformat
from filelock import FileLock, Timeout

from ..base.errors import ConfigError
from . import notebook as nb
from .inputs import Prepared, below, changes, early_key, edited, key, package_files
from .layout import RESULTS, SCHEMA, SIDECAR, Layout
from .provenance import git_state
from .report import CACHE_DIR, PARAMETERS, RUN_DIR, WORK_DIR
from .study import RunSpec, data_root, how_to_get, missing_files
from .worker import DIED, FAILED, NO_START, OK, UNAVAILABLE, Processes, call_worker

CURRENT, WAITING = "current", "waiting"
PATHS = ("EDITKIT_CACHE", "EDITKIT_DATA", "EDITKIT_DOWNLOADS")  # what a relative path means is decided here
# glibc gives large blocks back to the system at once and asks for them again, page by page, at every layer of every
# forward pass; kept, a run takes a tenth less time. Other C libraries do not read these variables.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
OUT_OF_MEMORY = "out of memory (the system killed the process)"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run: "ok", "current", "unavailable" or "failed"; "waiting" is said on the way."""

    spec: RunSpec
    status: str
    message: str = ""
    seconds: float = 0.0
    stderr_cells: tuple[int, ...] = ()


def run_one(
    run: Prepared,
    layout: Layout,
    *,
    force: bool = False,
    environment: dict[str, str] | None = None,
    processes: Processes | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Execute one run unless its result is current. Does not raise for a failing notebook.

    What became of a run that has no result is kept for the book (`Layout.outcome`).
    """
    if missing := missing_files(run.spec, layout.root):
        outcome = Outcome(run.spec, UNAVAILABLE, f"needs {', '.join(map(how_to_get, missing))}")
        return _kept(outcome, layout)
    with _alone(run, layout, report):
        if not force and not changes(run, layout):
            return Outcome(run.spec, CURRENT)
        staging = layout.scratch / "staging"
        staging.mkdir(parents=True, exist_ok=True)
        for left_over in staging.glob(f"{run.run_id}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=f"{run.run_id}.", dir=staging))
        try:
            return _kept(_execute(run, layout, stage, environment or {}, processes or Processes()), layout)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _alone(run: Prepared, layout: Layout, report: Callable[[Outcome], None]) -> Iterator[None]:
    """Hold a run; if another process executes it, say which, and wait for its end."""
    place = layout.scratch / "locks"
    place.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(place / f"{run.run_id}.lock"), place / f"{run.run_id}.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text() if owner.exists() else "?"
        report(Outcome(run.spec, WAITING, f"process {who} is executing it"))
        lock.acquire()
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def _kept(outcome: Outcome, layout: Layout) -> Outcome:
    path = layout.outcome(outcome.spec.run_id)
    path.unlink(missing_ok=True)
    if outcome.status != OK:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"status": outcome.status, "message": outcome.message}), encoding="utf-8")
    return outcome


def _execute(
    run: Prepared, layout: Layout, stage: Path, environment: dict[str, str], processes: Processes
) -> Outcome:
    commit, package, begin = git_state(layout.root)["commit"], package_files(), time.time()
    work = _work_dir(run, layout)
    target = stage / run.run_id  # the folder that will be moved in; its name is the run id from the start
    target.mkdir()
    log = layout.log(run.run_id)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    template = stage / "template.ipynb"
    nbformat.write(run.template, template)
    request = {
        "notebook": str(template),
        "output": str(target / f"{run.run_id}.ipynb"),
        "parameters": run.parameters,
        "cwd": str(work),
        "log": str(log),
    }
    (stage / "request.json").write_text(json.dumps(request), encoding="utf-8")
    env = _environment(run, layout, target, work) | environment
    outcome, code = call_worker(stage, log, env, processes)
    if outcome["status"] == NO_START:  # a kernel that did not come up says nothing about the notebook
        outcome, code = call_worker(stage, log, env, processes)
    seconds = outcome.get("seconds", 0.0)
    if outcome["status"] != OK:
        status = UNAVAILABLE if outcome["status"] == UNAVAILABLE else FAILED
        return Outcome(run.spec, status, _explain(outcome, code), seconds)
    executed = nbformat.read(target / f"{run.run_id}.ipynb", as_version=4)
    problem = nb.failure(executed)
    if not problem and not (target / RESULTS).is_file():
        problem = "the notebook ended without run.finish()"
    if problem:
        return Outcome(run.spec, FAILED, problem, seconds)
    results = json.loads((target / RESULTS).read_text(encoding="utf-8"))
    record = key(run, layout.root, results.pop("read"))
    if touched := edited(record["files"], package, begin, run, layout.root):
        return Outcome(run.spec, FAILED, f"{', '.join(touched)} edited during the run; run again", seconds)
    _clean_metadata(executed, run.spec.notebook)
    nbformat.write(executed, target / f"{run.run_id}.ipynb")
    noisy = tuple(nb.stderr_cells(executed))
    git = git_state(layout.root, commit, [run.spec.notebook, *below(record["files"], layout.root)])
    _write_sidecar(run, target, results, record, git, outcome, noisy)
    _move_in(target, layout.run_dir(run.run_id), stage / "old")
    shutil.rmtree(work, ignore_errors=True)
    return Outcome(run.spec, OK, seconds=seconds, stderr_cells=noisy)


def _work_dir(run: Prepared, layout: Layout) -> Path:
    """The checkpoint folder: found again by a restarted run, dropped when anything that it might read has changed."""
    name = f"{run.run_id}.{early_key(run, layout.root)[:12]}"
    root = layout.scratch / "work"
    for other in root.glob(f"{run.run_id}.*"):
        if other.name != name:
            shutil.rmtree(other, ignore_errors=True)
    (root / name).mkdir(parents=True, exist_ok=True)
    return root / name


def _environment(run: Prepared, layout: Layout, target: Path, work: Path) -> dict[str, str]:
    env = dict(os.environ)
    env |= {
        RUN_DIR: str(target),
        WORK_DIR: str(work),
        PARAMETERS: json.dumps(run.parameters),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # keeps ipykernel's debugger note out of the pages
        # Said by tqdm.auto (through transformers) where ipywidgets is missing, in whichever cell imports it first.
        "PYTHONWARNINGS": ",".join(
            filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"))
        ),
    }
    for name, value in MALLOC.items():
        env.setdefault(name, value)
    env.setdefault(CACHE_DIR, str(layout.scratch / "cache"))
    if data_root(layout.root).is_dir():
        env.setdefault("EDITKIT_DATA", str(data_root(layout.root)))
    env |= {name: os.path.abspath(env[name]) for name in PATHS if env.get(name)}
    if run.spec.threads:
        env |= {name: str(run.spec.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return env


def _explain(outcome: dict, code: int) -> str:
    if outcome["status"] == DIED:
        return f"{OUT_OF_MEMORY}; lower the batch size or n, or raise memory_gib"
    if outcome["status"] == NO_START:
        return f"the kernel did not start, twice: {outcome['message']}"
    if outcome["message"]:
        cell = outcome.get("cell")
        return outcome["message"] + (f" (cell {cell})" if cell is not None else "")
    return f"the worker ended with exit code {code}"


def _clean_metadata(executed: nbformat.NotebookNode, source: str) -> None:
    """Leave no paths of this machine in the published notebook."""
    record = executed.metadata["papermill"]
    for name in ("input_path", "output_path", "environment_variables"):
        record.pop(name, None)
    record["template"] = source


def _write_sidecar(
    run: Prepared, target: Path, results: dict, record: dict, git: dict, outcome: dict, noisy: tuple
) -> None:
    spec = run.spec
    sidecar = {
        "schema": SCHEMA,
        "run_id": run.run_id,
        **{name: getattr(spec, name) for name in ("alias", "title", "study", "tags", "notebook")},
        "started": datetime.fromtimestamp(outcome["started"], UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(outcome["seconds"], 2),
        "git": git,
        **results,
        "parameters": [
            {
                "name": p.name,
                "type": p.type,
                "value": run.parameters[p.name],
                "default": p.default,
                "help": p.help,
            }
            for p in run.declared.values()
        ],
        "stderr_cells": noisy,
        "inputs": record,
    }
    (target / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    (target / RESULTS).unlink()


def _move_in(target: Path, place: Path, old: Path) -> None:
    """Replace a finished run by a new one. A kill between the two renames leaves nothing, never a half."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(old)
    target.rename(place)


def run_all(
    runs: Sequence[Prepared],
    layout: Layout,
    *,
    jobs: int = 1,
    force: bool = False,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Execute runs, `jobs` at a time; a failing one does not stop the others.

    Runs that want a GPU are executed one after the other, beside the others, and see all GPUs; giving several GPUs to
    several runs, here or on other machines, is Snakemake's work (workflow/Snakefile).
    report: called with each outcome as it comes.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    _check_room(layout)
    processes = Processes()
    gpus = _gpu_count() if any(run.spec.gpus for run in runs) else 0

    def work(run: Prepared) -> Outcome:
        if run.spec.gpus > gpus:
            outcome = Outcome(run.spec, UNAVAILABLE, f"needs {run.spec.gpus} GPU(s), this machine has {gpus}")
            report(_kept(outcome, layout))
            return outcome
        environment = {}
        if jobs > 1 and not run.spec.threads and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        begin = time.perf_counter()
        try:
            outcome = run_one(
                run, layout, force=force, environment=environment, processes=processes, report=report
            )
        except Exception as error:  # a defect of the runner in one run must not lose the others either
            message = f"{type(error).__name__}: {error}"
            outcome = Outcome(run.spec, FAILED, message, time.perf_counter() - begin)
        report(outcome)
        return outcome

    # Long runs first, so that none of them is left to run alone at the end.
    order = (
        sorted(range(len(runs)), key=lambda i: -(runs[i].spec.minutes or 0)) if jobs > 1 else range(len(runs))
    )
    with ThreadPoolExecutor(jobs) as pool, ThreadPoolExecutor(1) as gpu_pool:
        futures = {i: (gpu_pool if runs[i].spec.gpus else pool).submit(work, runs[i]) for i in order}
        try:
            return [futures[i].result() for i in range(len(runs))]
        except (
            BaseException
        ):  # an interrupt: pending runs are dropped, running ones ended, finished ones kept
            for each in (pool, gpu_pool):
                each.shutdown(wait=False, cancel_futures=True)
            processes.end_all()
            raise


def _check_room(layout: Layout) -> None:
    """Raise ConfigError unless results and scratch can be written, before anything is executed."""
    for folder in (layout.scratch, layout.runs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(2**16))
        except OSError as error:
            raise ConfigError(
                f"cannot write to {folder} ({error.strerror}); make room, or copy the project to a folder of your own"
            ) from error


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
