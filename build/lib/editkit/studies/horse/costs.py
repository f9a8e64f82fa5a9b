"""What hypernetwork editing costs: a training step by kind of cache, an edit by number of facts; time, memory.

All kinds of a comparison run in one process, in turn, on the same facts, so whatever else the machine does hits
each of them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ...base.errors import ConfigError
from ...methods.hypernet.data import EditRecord
from ...methods.hypernet.horse import HORSE, RELEASED
from ...methods.hypernet.network import Rows
from ...methods.hypernet.training import Trainer
from ...models.facts import Fact
from ...models.lm import LM

KINDS = {
    "published": "rows in files, read twice; the d x d normal matrix built and solved twice; nothing remembered",
    "files": "rows in files; one factorised system, the smaller of d x d and N x N; nothing remembered",
    "memory, new facts": "rows in memory, every fact of the step met for the first time",
    "memory, known facts": "rows, states below the edits and unedited answers of every fact in memory",
}


class PublishedHORSE(HORSE):
    """The order of work of the published code; the numbers are those of `HORSE` with `RELEASED`."""

    def plan(self, rows: Rows) -> PublishedPlan:
        return PublishedPlan(self, rows)


class PublishedPlan:
    """Reads the rows of every site for the shifts and again for the update, and solves d x d systems in float32."""

    def __init__(self, net: PublishedHORSE, rows: Rows) -> None:
        self.net, self.rows = net, rows
        self.shifts: list[Tensor] = []
        before: tuple[Tensor, Tensor] | None = None
        with torch.no_grad():
            for i in range(len(net.sites)):
                A, keys, grads = self._system(i)
                part, k = net.net(i)
                R = torch.cat([part.value_differences(u, g, k) for _, u, g in net.chunks(rows, i)])
                written = R if before is None else _project(R, *before)
                before = R, grads
                self.shifts.append(torch.linalg.solve(A, keys.T @ written).T)

    def _system(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, grads = self.rows.site(i)
        A = keys.T @ keys
        A.diagonal().add_(1.0)
        return A, keys, grads

    def backward(self, grads: Sequence[Tensor]) -> None:
        before: tuple[Tensor, Tensor] | None = None
        loss = torch.zeros(())
        for i, G in enumerate(grads):
            A, keys, raw = self._system(i)
            upstream = keys @ torch.linalg.solve(A, G.T)
            part, k = self.net.net(i)
            with torch.enable_grad():
                R = torch.cat([part.value_differences(u, g, k) for _, u, g in self.net.chunks(self.rows, i)])
                written = R if before is None else _project(R, *before)
                loss = loss + (upstream * written).sum()
            before = R.detach(), raw
        with torch.enable_grad():
            loss.backward()


def _project(R: Tensor, P: Tensor, g: Tensor) -> Tensor:
    return R - (R * P).sum() / (P * P).sum() * g


def _give_back() -> None:
    """Return freed memory to the system (glibc), so that using it again is seen."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def peak_memory(found: dict[str, float], key: str = "peak", interval: float = 0.002) -> Iterator[None]:
    """Put into found[key] how many bytes the process grew beyond its size at the start (sampled; NaN off Linux)."""
    status = Path("/proc/self/statm")
    if not status.exists():
        found[key] = float("nan")
        yield
        return
    page = os.sysconf("SC_PAGE_SIZE")
    _give_back()

    def resident() -> int:
        return int(status.read_text().split()[1]) * page

    start = most = resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(interval):
            most = max(most, resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found[key] = float(max(most, resident()) - start)


def step_times(
    lm: LM,
    records: Sequence[EditRecord],
    layers: Sequence[int],
    n_edits: int,
    *,
    rounds: int = 3,
    kinds: Sequence[str] = tuple(KINDS),
    network: Mapping[str, Any] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Time of a training step of HORSE (options `RELEASED`) for each kind of cache.

    Columns: kind, round, n_edits, seconds (wall), processor (seconds), held (bytes that the caches hold). A first
    step that nobody times warms the machine up. Raises ConfigError for an unknown kind.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown:
        raise ConfigError(f"unknown kind {unknown[0]!r}; choose from {', '.join(KINDS)}")
    options = {"rank": 32, "lr": 1e-3, **(network or {}), **RELEASED}
    config = {"n_edits": n_edits, "meta_lr": 1e-5, "batch_size": batch_size}
    folder = Path(tempfile.mkdtemp(prefix="editkit-rows-"))
    trainers = {}
    try:
        for kind in kinds:
            cls = PublishedHORSE if kind == "published" else HORSE
            on_disk = kind in ("published", "files")
            net = cls(lm, options, layers=layers)
            trainers[kind] = Trainer(lm, net, records, config, folder=folder / kind if on_disk else None)
            trainers[kind].step()
        out = []
        for number in range(rounds):
            for kind, trainer in trainers.items():
                if kind == "memory, new facts":
                    trainer.forget()
                elif kind == "memory, known facts":
                    trainer.remember(len(trainer.log))
                wall, busy = time.perf_counter(), time.process_time()
                trainer.step()
                out.append({
                    "kind": kind, "round": number, "n_edits": n_edits, "seconds": time.perf_counter() - wall,
                    "processor": time.process_time() - busy, "held": trainer.held(),
                })  # fmt: skip
        return pd.DataFrame(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class EditCost:
    """Seconds (wall and processor) and peak bytes of one edit."""

    seconds: float
    processor: float
    peak: float


def edit_cost(make: Callable[[], Any], facts: Sequence[Fact]) -> EditCost:
    """Cost of editing all facts at once with a fresh editor; the model is restored."""
    editor, found = make(), {}
    try:
        wall, busy = time.perf_counter(), time.process_time()
        with peak_memory(found):
            editor.edit(facts)
        return EditCost(time.perf_counter() - wall, time.process_time() - busy, found["peak"])
    finally:
        editor.restore()


def speed_up(times: pd.DataFrame, slow: str, fast: str, column: str = "processor") -> float:
    """Ratio of the medians of two kinds of `step_times`."""
    median = {kind: statistics.median(part[column]) for kind, part in times.groupby("kind")}
    return median[slow] / median[fast]
