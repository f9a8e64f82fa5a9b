"""Executing runs: each in a process and a temporary folder of its own, moved in only when whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import psutil
from filelock import FileLock

from ..base.errors import ConfigError
from . import notebook as nb
from .inputs import Prepared, changes, input_record
from .layout import RESULTS, SCHEMA, SIDECAR, Layout
from .provenance import PACKAGE, digest, git_state, tree_hash
from .report import CACHE_DIR, PARAMETERS, RUN_DIR, WORK_DIR
from .study import RunSpec, data_root, how_to_get, missing_files
from .worker import DIED, FAILED, NO_START, OK, OOM_CODES

CURRENT, UNAVAILABLE = "current", "unavailable"
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
    """What became of a run: status is "ok", "current", "unavailable" or "failed"."""

    spec: RunSpec
    status: str
    message: str = ""
    seconds: float = 0.0
    stderr_cells: tuple[int, ...] = ()


class Processes:
    """The worker processes alive now, so that an interrupt can end them all."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._closed = False

    def wait(self, command: list[str], **options) -> int:
        """Start a process that takes no part in our Ctrl-C and wait for its end; returns its exit code."""
        with self._lock:
            if self._closed:
                return -signal.SIGTERM
            process = subprocess.Popen(command, start_new_session=True, **options)
            self._alive.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._alive.discard(process)

    def end_all(self) -> None:
        """Kill every process with its children (the kernels), and start no new ones."""
        with self._lock:
            self._closed = True
            for process in self._alive:
                with contextlib.suppress(psutil.Error):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()


def run_one(
    run: Prepared,
    layout: Layout,
    *,
    force: bool = False,
    environment: dict[str, str] | None = None,
    processes: Processes | None = None,
) -> Outcome:
    """Execute one run unless its result is current. Does not raise for a failing notebook."""
    if missing := missing_files(run.spec, layout.root):
        return Outcome(run.spec, UNAVAILABLE, f"needs {', '.join(map(how_to_get, missing))}")
    locks = layout.scratch / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{run.run_id}.lock"):
        if not force and not changes(run, layout):
            _refresh(run, layout)
            return Outcome(run.spec, CURRENT)
        staging = layout.scratch / "staging"
        staging.mkdir(parents=True, exist_ok=True)
        for left_over in staging.glob(f"{run.run_id}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=f"{run.run_id}.", dir=staging))
        try:
            return _execute(run, layout, stage, environment or {}, processes or Processes())
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _execute(
    run: Prepared, layout: Layout, stage: Path, environment: dict[str, str], processes: Processes
) -> Outcome:
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
    record = input_record(run, layout.root)
    env = _environment(run, layout, target, work) | environment
    outcome, code = _call_worker(stage, log, env, processes)
    if outcome["status"] == NO_START:  # a kernel that did not come up says nothing about the notebook
        outcome, code = _call_worker(stage, log, env, processes)
    seconds = outcome.get("seconds", 0.0)
    if outcome["status"] != OK:
        return Outcome(run.spec, FAILED, _explain(outcome, code), seconds)
    executed = nbformat.read(target / f"{run.run_id}.ipynb", as_version=4)
    problem = nb.failure(executed)
    if not problem and not (target / RESULTS).is_file():
        problem = "the notebook ended without run.finish()"
    if problem:
        return Outcome(run.spec, FAILED, problem, seconds)
    _clean_metadata(executed, run.spec.notebook)
    nbformat.write(executed, target / f"{run.run_id}.ipynb")
    noisy = tuple(nb.stderr_cells(executed))
    _write_sidecar(run, layout, target, record, outcome, noisy)
    _move_in(target, layout.run_dir(run.run_id), stage / "old")
    shutil.rmtree(work, ignore_errors=True)
    return Outcome(run.spec, OK, seconds=seconds, stderr_cells=noisy)


def _work_dir(run: Prepared, layout: Layout) -> Path:
    """The checkpoint folder: found again by a restarted run, dropped when any input has changed."""
    record = input_record(run, layout.root)
    record["package"] = tree_hash(PACKAGE)  # which modules will be imported is not known yet
    name = f"{run.run_id}.{digest(json.dumps(record, sort_keys=True))[:12]}"
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
        "PYTHONWARNINGS": ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"))),
    }
    for name, value in MALLOC.items():
        env.setdefault(name, value)
    env.setdefault(CACHE_DIR, str(layout.scratch / "cache"))
    if data_root(layout.root).is_dir():
        env.setdefault("EDITKIT_DATA", str(data_root(layout.root)))
    if run.spec.threads:
        env |= {name: str(run.spec.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return env


def _call_worker(stage: Path, log: Path, env: dict[str, str], processes: Processes) -> tuple[dict, int]:
    """Run the worker process to its end; returns its outcome and exit code."""
    answer = stage / "outcome.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "editkit.press.worker", str(stage / "request.json")]
    # Short path: sockets of the kernel live there, and their names may not exceed about 100 characters.
    with tempfile.TemporaryDirectory(prefix="ek-") as runtime, log.open("ab") as sink:
        env = env | {"JUPYTER_RUNTIME_DIR": runtime}
        code = processes.wait(command, env=env, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
    if answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8")), code
    return {"status": DIED if code in (-signal.SIGKILL, *OOM_CODES) else FAILED, "message": ""}, code


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
    for key in ("input_path", "output_path", "environment_variables"):
        record.pop(key, None)
    record["template"] = source


def _write_sidecar(
    run: Prepared, layout: Layout, target: Path, record: dict, outcome: dict, noisy: tuple
) -> None:
    results = json.loads((target / RESULTS).read_text(encoding="utf-8"))
    record["modules"] = results.pop("modules")
    spec = run.spec
    sidecar = {
        "schema": SCHEMA,
        "run_id": run.run_id,
        "alias": spec.alias,
        "title": spec.title,
        "study": spec.study,
        "tags": list(spec.tags),
        "notebook": spec.notebook,
        "started": datetime.fromtimestamp(outcome["started"], UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(outcome["seconds"], 2),
        "git": git_state(layout.root),
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
        "stderr_cells": list(noisy),
        "prose": nb.prose_hash(run.template),
        "inputs": record | {"hash": digest(json.dumps(record, sort_keys=True))},
    }
    (target / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    (target / RESULTS).unlink()


def _move_in(target: Path, place: Path, old: Path) -> None:
    """Replace a finished run by a new one. A kill between the two renames leaves nothing, never a half."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(old)
    target.rename(place)


def _refresh(run: Prepared, layout: Layout) -> None:
    """Bring reworded text cells, and a commit made since, into a finished run without executing it again."""
    place = layout.run_dir(run.run_id)
    sidecar = json.loads((place / SIDECAR).read_text(encoding="utf-8"))
    spec = run.spec
    new = {
        "prose": nb.prose_hash(run.template),
        "title": spec.title,
        "study": spec.study,
        "tags": list(spec.tags),
    }
    git = git_state(layout.root)
    if sidecar["git"]["dirty"] is not False and git["dirty"] is False:
        new["git"] = git | {"later": True}  # the inputs are equal, so this is what the commit gives
    if all(sidecar[key] == value for key, value in new.items()):
        return
    path = layout.notebook(run.run_id)
    fresh = nb.refresh_prose(nbformat.read(path, as_version=4), run.template)
    for file, text in (
        (path, nbformat.writes(fresh)),
        (place / SIDECAR, json.dumps(sidecar | new, indent=1)),
    ):
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(file)


def run_all(
    runs: Sequence[Prepared],
    layout: Layout,
    *,
    jobs: int = 1,
    force: bool = False,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Execute runs, `jobs` at a time, each GPU given to one of them; a failing one does not stop the others.

    report: called with each outcome as it comes.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    devices: queue.SimpleQueue[str] = queue.SimpleQueue()
    taking = threading.Lock()  # one run takes its GPUs at a time, so that two cannot wait for each other
    processes = Processes()
    available = _accelerators() if any(run.spec.gpus for run in runs) else []
    for device in available:
        devices.put(device)

    def work(run: Prepared) -> Outcome:
        if run.spec.gpus > len(available):
            return Outcome(
                run.spec, UNAVAILABLE, f"needs {run.spec.gpus} GPU(s), this machine has {len(available)}"
            )
        with taking:
            mine = [devices.get() for _ in range(run.spec.gpus)]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}
        if jobs > 1 and not run.spec.threads and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        begin = time.perf_counter()
        try:
            outcome = run_one(run, layout, force=force, environment=environment, processes=processes)
        except Exception as error:  # a defect of the runner in one run must not lose the others either
            outcome = Outcome(
                run.spec, FAILED, f"{type(error).__name__}: {error}", time.perf_counter() - begin
            )
        finally:
            for device in mine:
                devices.put(device)
        report(outcome)
        return outcome

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        # Long runs first, so that none of them is left to run alone at the end.
        order = (
            sorted(range(len(runs)), key=lambda i: -(runs[i].spec.minutes or 0))
            if jobs > 1
            else range(len(runs))
        )
        futures = {i: pool.submit(work, runs[i]) for i in order}
        try:
            return [futures[i].result() for i in range(len(runs))]
        except (
            BaseException
        ):  # an interrupt: pending runs are dropped, running ones ended, finished ones kept
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end_all()
            raise


def _accelerators() -> list[str]:
    """Ids of the GPUs this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part for part in visible.split(",") if part.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
