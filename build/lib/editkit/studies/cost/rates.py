"""What a machine can do at best: floating point operations and bytes per second, measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from ...base.device import is_accelerator, synchronize


@dataclasses.dataclass(frozen=True)
class Rates:
    """Best of a few products of square matrices and of a few copies.

    flops: dtype name -> operations per second (a multiplication and an addition are two).   bytes: read and written
    per second.   size: width of the matrices.
    """

    flops: dict[str, float]
    bytes: float
    size: int


def measure_rates(device: torch.device, *, size: int = 0, repeats: int = 5) -> Rates:
    """Rates of a device. size: width of the square matrices; 0: 8,192 on an accelerator, 1,024 on the CPU.

    On the CPU with the threads torch has now. Takes seconds.
    """
    size = size or (8192 if is_accelerator(device) else 1024)
    flops = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _fastest(lambda a=a, out=out: torch.mm(a, a, out=out), device, repeats)
        flops[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    n = 2**30 if is_accelerator(device) else 2**27  # bytes, far more than any cache holds
    source = torch.zeros(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(flops, 2 * n / _fastest(lambda: target.copy_(source), device, repeats), size)


def _fastest(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that nobody times; clocks as in `meter.Phases`."""
    clock = time.perf_counter if is_accelerator(device) else time.process_time
    call()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = clock()
        call()
        synchronize(device)
        best = min(best, clock() - start)
    return best
