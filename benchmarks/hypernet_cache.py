"""A training step of HORSE with rows in files against rows in memory, in one run.

    python benchmarks/hypernet_cache.py                     # companion model, 32 and 128 facts a step
    python benchmarks/hypernet_cache.py --edits 8 --rounds 1

Kinds of cache: see `editkit.studies.horse.costs.KINDS`. They run in turn on the same facts, so whatever else the
machine does hits each of them; compare processor times on a busy machine. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from editkit.corpora.world import load_world
from editkit.methods.hypernet import records_of
from editkit.press.provenance import git_state, hardware, package_versions
from editkit.studies import testbed
from editkit.studies.horse import bench, costs


def run(args: argparse.Namespace) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    world, lm = load_world(), testbed.open_model(args.model)
    layers = args.layers or list(range(lm.n_layers // 2, lm.n_layers))
    records = records_of(bench.world_facts(world, max(args.edits), args.seed))
    steps = {}
    for n in args.edits:
        times = costs.step_times(lm, records, layers, n, rounds=args.rounds)
        median = times.groupby("kind", sort=False)[["seconds", "processor", "held"]].median()
        known = "memory, known facts"
        steps[str(n)] = {
            "median": {kind: {k: float(v) for k, v in row.items()} for kind, row in median.iterrows()},
            "speed_up": {
                f"{slow} / {known} ({column})": costs.speed_up(times, slow, known, column)
                for slow in ("published", "files")
                for column in ("processor", "seconds")
            },
        }
    return {
        "benchmark": "hypernet_cache", "parameters": {**vars(args), "layers": layers}, "kinds": costs.KINDS,
        "model": lm.name, "steps": steps,
        "provenance": {"packages": package_versions(), "hardware": hardware(),
                       "git": git_state(Path(__file__).resolve().parents[1])},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="companion", help="companion, a folder or a hub name")
    parser.add_argument("--layers", type=int, nargs="+", help="edited layers; default: the last half")
    parser.add_argument(
        "--edits", type=int, nargs="+", default=[32, 128], help="facts edited at once in a step"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--seed", type=int, default=0, help="draw of the facts")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its default")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    found = run(args)
    found["parameters"]["out"] = None
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
