"""All pairs of a corpus as a graph, against the bare matrix product of that size, in one run.

    python benchmarks/all_pairs.py                           # 11,427 facts, widths 256 and 4096, lists of 32
    python benchmarks/all_pairs.py --n 2000 --widths 64      # a quick look

Both work in float32 on the same random vectors with a common mean (hidden states have one). The bare product
is torch's H H^T of all n x n scores, kept in memory; the graph is `editkit.entanglement.graph.build_graph`,
with everything it does: normalised factors, blocks, selection, journal, files, hashes. The two alternate, so
whatever else the machine does hits both; on a busy machine compare processor times with --threads 1. Prints
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from editkit.entanglement.graph import ROWS, EntanglementGraph, build_graph
from editkit.entanglement.graph_statistics import threshold_for
from editkit.entanglement.similarity import cosine
from editkit.press.provenance import git_state, hardware, package_versions


class Clock:
    """Wall and processor seconds of calls, by name."""

    def __init__(self):
        self.wall: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}

    def time(self, name: str, call, *args, **options):
        start, busy = time.perf_counter(), time.process_time()
        result = call(*args, **options)
        self.wall.setdefault(name, []).append(time.perf_counter() - start)
        self.processor.setdefault(name, []).append(time.process_time() - busy)
        return result


def bare_product(H: torch.Tensor) -> float:
    """H H^T, all of it; returns one entry, so that the device has finished."""
    return float((H @ H.T)[-1, -1])


def graph_of(folder: Path, H: torch.Tensor, **options) -> EntanglementGraph:
    """The graph of the cosines of H."""
    return build_graph(folder, cosine(H), **options)


def run(args: argparse.Namespace) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device) if args.device else torch.get_default_device()
    generator = torch.Generator().manual_seed(args.seed)
    report = {}
    for width in args.widths:
        H = (torch.randn(args.n, width, generator=generator) + args.mean).to(device)
        threshold = threshold_for(cosine(H), args.density)
        arms = {"top_k": {"top_k": args.top_k}, "threshold": {"threshold": threshold}}
        clock, edges, load = Clock(), {}, []
        bare_product(H[:1000])  # warm-up
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(args.repeats):
                load.append(os.getloadavg()[0])
                clock.time("product", bare_product, H)
                for name, options in arms.items():
                    target = Path(folder) / f"{name}{repeat}"
                    graph = clock.time(name, graph_of, target, H, rows=args.rows, **options)
                    edges[name] = graph.n_edges
        seconds = {
            name: {"wall": times, "processor": clock.processor[name]} for name, times in clock.wall.items()
        }
        best = {kind: {name: min(s[kind]) for name, s in seconds.items()} for kind in ("wall", "processor")}
        report[str(width)] = {
            "pairs": args.n * (args.n - 1) // 2, "flop": 2 * args.n**2 * width, "edges": edges,
            "threshold": threshold, "seconds": seconds,
            "ratio": {
                kind: {
                    name: {"of_fastest": best[kind][name] / best[kind]["product"],
                           "of_medians": statistics.median(seconds[name][kind])
                           / statistics.median(seconds["product"][kind])}
                    for name in arms
                }
                for kind in ("wall", "processor")
            },
            "load_average_while_timing": load,
        }  # fmt: skip
    return {
        "benchmark": "all_pairs", "parameters": vars(args) | {"out": None}, "widths": report,
        "provenance": {"packages": package_versions(), "hardware": hardware(),
                       "git": git_state(Path(__file__).resolve().parents[1])},
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--n", type=int, default=11427, help="facts")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 4096], help="widths of the vectors")
    parser.add_argument("--mean", type=float, default=0.5, help="common mean, in standard deviations")
    parser.add_argument("--top-k", type=int, default=32, help="length of the lists")
    parser.add_argument("--density", type=float, default=0.005, help="share of pairs above the threshold")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of a block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=None, help="torch device (default: torch's default device)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    report = json.dumps(run(args), indent=1)
    if args.out:
        args.out.write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
