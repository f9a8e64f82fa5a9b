"""Peak memory and seconds, of a call or phase by phase, on an accelerator and on the host.

On an accelerator its own allocator is asked. On the host it is the resident set of the process: the kernel's own mark
on Linux; elsewhere samples (`peak`), or what is resident at the end of a phase (`Phases`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...base.device import is_accelerator, synchronize

OTHER = "other"


def peak(call: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """Rise of the peak memory in bytes, wall seconds, processor seconds of a call."""
    settle(device)
    if is_accelerator(device):
        torch.accelerator.reset_peak_memory_stats(device)
        base = torch.accelerator.memory_allocated(device)
        start, busy = time.perf_counter(), time.process_time()
        call()
        synchronize(device)
        seconds = time.perf_counter() - start, time.process_time() - busy
        return float(torch.accelerator.max_memory_allocated(device) - base), *seconds
    with _Resident() as memory:
        start, busy = time.perf_counter(), time.process_time()
        call()
        seconds = time.perf_counter() - start, time.process_time() - busy
    return memory.rise, *seconds


def settle(device: torch.device) -> None:
    """Collect garbage and give freed memory back, or the next peak would hide in it."""
    gc.collect()
    if is_accelerator(device):
        synchronize(device)
        torch.accelerator.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> bool:
    """From now on let the C library return every array of a megabyte or more to the system when it is freed, so that a
    peak is that of the arrays in use. Slower (pages are cleared anew): for measuring memory, not time. For the whole
    process; True where it worked (glibc).
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(-3, 2**20))  # M_MMAP_THRESHOLD
    except (AttributeError, OSError, TypeError):
        return False


class Phases:
    """Seconds and peak memory by phase. A phase inside another interrupts it; what is in none is "other".

    seconds: phase -> processor seconds on the CPU, where a machine may be shared, wall seconds on an accelerator.
    peak:    phase -> bytes above what was held when `measured` began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self._clock = time.perf_counter if is_accelerator(device) else time.process_time
        self._now: str | None = None

    @contextmanager
    def measured(self) -> Iterator[Phases]:
        """Phases count only inside."""
        settle(self.device)
        self._base = self._held()
        self._open(OTHER)
        try:
            yield self
        finally:
            self._close()
            self._now = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is inside to this phase."""
        if self._now is None:
            yield
            return
        before = self._now
        self._close()
        self._open(name)
        try:
            yield
        finally:
            self._close()
            self._open(before)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count every call of a method of this one object to a phase."""
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def outer(*args, **kwargs):
            with self.phase(name):
                return inner(*args, **kwargs)

        object.__setattr__(owner, method, outer)

    def _open(self, name: str) -> None:
        self._now = name
        if is_accelerator(self.device):
            torch.accelerator.reset_peak_memory_stats(self.device)
        else:
            _reset_mark()
        self._since = self._clock()

    def _close(self) -> None:
        synchronize(self.device)
        name = self._now
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - self._since
        if is_accelerator(self.device):
            most = torch.accelerator.max_memory_allocated(self.device)
        else:
            most = _status("VmHWM") or _fallback()
        self.peak[name] = max(self.peak.get(name, 0.0), float(most - self._base))

    def _held(self) -> int:
        if is_accelerator(self.device):
            return torch.accelerator.memory_allocated(self.device)
        return _status("VmRSS") or _fallback()


class _Resident:
    """Peak rise of the resident set inside a `with`: the kernel's own mark on Linux, samples elsewhere."""

    def __enter__(self) -> _Resident:
        self.rise, self._stop = 0.0, threading.Event()
        self._exact = _reset_mark()
        self._base = self._peak = _status("VmRSS") or _fallback()
        if not self._exact:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._exact:
            self._peak = _status("VmHWM") or self._base
        else:
            self._stop.set()
            self._thread.join()
            self._peak = max(self._peak, _fallback())
        self.rise = float(max(self._peak - self._base, 0))

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _status("VmRSS") or _fallback())


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return 1024 * int(found[0]) if found else None


def _fallback() -> int:
    """Largest resident set so far, in bytes (POSIX); 0 where nothing is known."""
    try:
        import resource
    except ImportError:
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
