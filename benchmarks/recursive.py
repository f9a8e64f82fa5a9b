"""Recursive least squares against re-solving at every batch: time a batch and accuracy, in one run.

    python benchmarks/recursive.py                          # d = 4096, 100 batches of 100 facts
    python benchmarks/recursive.py --d 512 --batches 20     # a quick look

The engines of `editkit.linear.engines` run the same stream of batches. At evenly spaced batches of that
stream the re-solves are timed too, on the same accumulated Gram matrix, so whatever else the machine does
hits both; on a busy machine compare processor times with --threads 1. All float64:

    released_memit_seq   statement of the released MEMIT-seq: lam C0 + S + K K^T, LU, n right-hand sides
    released_alphaedit   statement of the released AlphaEdit: P (S + K K^T) + L2 I, LU, m right-hand sides
    one_time             all facts again, A C = B, by Cholesky with m right-hand sides
    lean_cholesky        C kept, K K^T added in place, Cholesky, n right-hand sides: the least one can do

Every engine's sum of updates is compared with the one-time solution of all facts. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from editkit.linear.engines import ENGINES, make_engine
from editkit.linear.normal import one_time_solution
from editkit.press.provenance import git_state, hardware, package_versions

BASELINES = ("released_memit_seq", "released_alphaedit", "one_time", "lean_cholesky")


def second_moment(d: int, condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """C0 (d, d) with a power-law spectrum from 1 to 1/condition in a random basis, and F with C0 = F F^T."""
    power = torch.log(torch.tensor(condition)) / torch.log(torch.tensor(float(d)))
    F = torch.diag(torch.arange(1, d + 1, dtype=torch.float64) ** (-float(power) / 2))
    for _ in range(4):  # reflections: a random basis at O(d^2)
        v = torch.randn(d, dtype=torch.float64, generator=generator)
        v /= torch.linalg.vector_norm(v)
        F -= 2.0 * torch.outer(v, v @ F)
    return F @ F.T, F


class Clock:
    """Wall and processor time of calls, synchronised by reading one entry of the result."""

    def __init__(self):
        self.wall: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}

    def time(self, name: str, call):
        start, busy = time.perf_counter(), time.process_time()
        result = call()
        if isinstance(result, Tensor):
            float(result.flatten()[0])
        self.wall.setdefault(name, []).append(time.perf_counter() - start)
        self.processor.setdefault(name, []).append(time.process_time() - busy)
        return result


def resolves(K: Tensor, R: Tensor, B: Tensor, C0: Tensor, lam: float, S: Tensor, P: Tensor, kept: Tensor):
    """The baselines by name; S = Gram matrix before the batch, `kept` = lam C0 + S; both get consumed."""
    d = K.shape[0]

    def released_memit_seq():
        adjusted = torch.linalg.solve(lam * C0 + S + K @ K.T, K)
        delta = R @ adjusted.T
        S.add_(K @ K.T)
        return delta

    def released_alphaedit():
        eye = torch.eye(d, dtype=K.dtype, device=K.device)
        delta = torch.linalg.solve(P @ (K @ K.T + S) + 10.0 * eye, P @ K @ R.T).T
        S.add_(K @ K.T)
        return delta

    def lean_cholesky():
        kept.addmm_(K, K.T)
        return R @ torch.cholesky_solve(K, torch.linalg.cholesky(kept)).T

    def one_time():
        kept.addmm_(K, K.T)
        return torch.cholesky_solve(B.T, torch.linalg.cholesky(kept)).T

    return {"released_memit_seq": released_memit_seq, "released_alphaedit": released_alphaedit,
            "one_time": one_time, "lean_cholesky": lean_cholesky}  # fmt: skip


def run(args: argparse.Namespace) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device) if args.device else torch.get_default_device()
    generator = torch.Generator().manual_seed(args.seed)
    d, m, n = args.d, args.m, args.n
    C0, F = second_moment(d, args.condition, generator)
    C0, F = C0.to(device), F.to(device)
    # Keys of different subjects share a direction.
    shared = F @ torch.randn(d, 1, dtype=torch.float64, generator=generator).to(device)
    W0 = torch.randn(m, d, dtype=torch.float64, generator=generator).to(device)
    P = (torch.eye(d, dtype=torch.float64) - C0.cpu() / 2).to(device)  # only its size matters for the time

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, n, dtype=torch.float64, generator=generator).to(device)

    clock = Clock()
    engines = {name: clock.time(f"{name}/start", lambda name=name: make_engine(name, args.lam * C0))
               for name in args.engines}
    totals = {name: torch.zeros_like(W0) for name in engines}
    S, B = torch.zeros_like(C0), torch.zeros_like(W0)
    keys, values, load = [], [], []
    timed = {round((i + 1) * args.batches / (args.repeats + 1)) for i in range(args.repeats)}
    for t in range(1, args.batches + 1):
        K, V = F @ draw(d) + shared, draw(m)
        keys.append(K)
        values.append(V)
        for name, engine in engines.items():
            R = V - (W0 + totals[name]) @ K
            totals[name] += clock.time(name, lambda engine=engine, K=K, R=R: engine.add(K, R))
        B += (V - W0 @ K) @ K.T
        if t in timed:
            load.append(os.getloadavg()[0])
            for name in BASELINES:
                state = S.clone(), args.lam * C0 + S
                clock.time(name, resolves(K, R, B, C0, args.lam, state[0], P, state[1])[name])
        S += K @ K.T
        if args.verbose:
            seconds = ", ".join(f"{name} {clock.wall[name][-1]:.3f} s" for name in engines)
            print(f"batch {t}: {seconds}", flush=True)
    target = one_time_solution(torch.cat(keys, dim=1), torch.cat(values, dim=1), W0, args.lam * C0)
    norm = float(torch.linalg.vector_norm(target))
    baselines = {name: summary(clock, name) for name in BASELINES}
    report = {}
    for name, engine in engines.items():
        times = summary(clock, name)
        report[name] = {
            "start_seconds": clock.wall[f"{name}/start"][0], "batch_seconds": times,
            "speed_up": {b: baselines[b]["wall"]["median"] / times["wall"]["mean"] for b in baselines},
            "speed_up_processor_time": {
                b: baselines[b]["processor"]["median"] / times["processor"]["mean"] for b in baselines},
            "relative_error": float(torch.linalg.vector_norm(totals[name] - target)) / norm,
            "error_estimate": engine.error(), "refactored": getattr(engine, "refactored", None),
        }  # fmt: skip
    return {
        "benchmark": "recursive", "parameters": vars(args) | {"out": None}, "resolve_seconds": baselines,
        "engines": report, "load_average_while_timing": load,
        "provenance": {"packages": package_versions(), "hardware": hardware(),
                       "git": git_state(Path(__file__).resolve().parents[1])},
    }  # fmt: skip


def summary(clock: Clock, name: str) -> dict:
    """Mean (what a stream costs, checks included), median, fastest and slowest batch, in seconds."""
    return {kind: {"mean": statistics.mean(times[name]), "median": statistics.median(times[name]),
                   "min": min(times[name]), "max": max(times[name]), "timed": len(times[name])}
            for kind, times in (("wall", clock.wall), ("processor", clock.processor))}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--d", type=int, default=4096, help="key width")
    parser.add_argument("--m", type=int, default=1024, help="value width")
    parser.add_argument("--n", type=int, default=100, help="facts a batch")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--lam", type=float, default=15000.0, help="weight of the second moment, in tokens")
    parser.add_argument("--condition", type=float, default=1e4, help="condition number of the second moment")
    parser.add_argument("--repeats", type=int, default=3, help="batches at which the re-solves are timed")
    parser.add_argument("--engines", nargs="+", default=["inverse"],
                        choices=[name for name in ENGINES if name != "direct"])
    parser.add_argument("--device", default=None, help="torch device (default: torch's default device)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    report = json.dumps(run(args), indent=1)
    if args.out:
        args.out.write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
