"""Where the time of one edit goes, one method of each family, on a real model.

    python benchmarks/edit_families.py --out benchmarks/results/edit_families.json

Every method writes the same known fact at the model's preset, with second moments and contexts at hand. Prints JSON:
per method the processor seconds of one edit without the profiler, and the shares of the profiled time that products of
matrices, attention, factorisations and solves, and copies between dtypes and places take.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from editkit.locate.contexts import sample_contexts
from editkit.press.provenance import git_state, hardware, package_versions
from editkit.studies import arms
from editkit.studies.real_edits import draw, open_real

FAMILIES = ("ft-m", "rome", "memit", "alphaedit", "grace", "memoir", "in-context")
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::mkldnn_linear"),
    "attention": ("aten::_scaled_dot_product", "aten::_softmax"),
    "solves": ("aten::linalg", "aten::cholesky", "aten::_linalg", "aten::triangular_solve"),
    "copies": ("aten::copy_", "aten::cat", "aten::index"),
}


def shares(profiled: profile) -> dict[str, float]:
    """Shares of the time spent in operators themselves, by kind."""
    spent = {e.key: e.self_cpu_time_total for e in profiled.key_averages() if e.key.startswith("aten::")}
    total = sum(spent.values())
    found = {
        kind: sum(t for k, t in spent.items() if k.startswith(names)) / total for kind, names in KINDS.items()
    }
    return {**found, "other": 1 - sum(found.values())}


def run(args: argparse.Namespace) -> dict:
    """One edit of each method, timed and then profiled."""
    torch.set_num_threads(args.threads)
    bed = open_real(args.model, args.asked)
    moments = bed.moments(arms.needed_layers(bed.lm, args.methods), max_texts=None)
    contexts = sample_contexts(bed.lm, arms.options_of(bed.lm, "memit").get("n_contexts", 5), 10, 0)
    facts = draw(bed.table, 1, args.seed, n_others=1).facts
    needs = {"statistics": moments, "contexts": contexts, "background": bed.background(facts, 50, args.seed)}
    found = {}
    for name in args.methods:
        for profiled in (False, True):
            editor = arms.make_arm(bed.lm, name, **needs)
            try:
                start = time.process_time()
                if profiled:
                    with profile(activities=[ProfilerActivity.CPU]) as seen:
                        editor.edit(facts)
                    found[name]["shares"] = shares(seen)
                else:
                    editor.edit(facts)
                    found[name] = {"processor_seconds": time.process_time() - start}
            finally:
                editor.restore()
    return {
        "benchmark": "edit_families",
        "parameters": vars(args) | {"out": None},
        "methods": found,
        "provenance": {"packages": package_versions(), "hardware": hardware(),
                       "git": git_state(Path(__file__).resolve().parents[1])},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="*", default=list(FAMILIES))
    parser.add_argument("--asked", type=int, default=10, help="facts asked per relation, to find known ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here")
    args = parser.parse_args()
    report = json.dumps(run(args), indent=1, default=str)
    if args.out:
        args.out.write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
