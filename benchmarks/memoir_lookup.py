"""What a MEMOIR memory costs at inference: a forward pass with and without it, and the look-up alone.

    python benchmarks/memoir_lookup.py --threads 1              # the shipped companion, 1,000 and 15,000 edits
    python benchmarks/memoir_lookup.py --model gpt2-xl --layer 36

The masks are random, which costs the same as those of real edits and takes no training. Forward passes with and
without the memory alternate, so that whatever else the machine does hits both; the reported overhead is the median
over repeats of the ratio of processor times, minus one. `miss`: no stored mask is near, only the look-up is paid;
`hit`: every row reads the memory. The look-up alone is also timed for masks kept as float32 rows (a matrix product)
and as bytes. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from editkit.methods import make_editor
from editkit.methods.memory.masks import MaskStore, pack
from editkit.methods.memory.tophash import TopHash, draw_permutation, random_masks
from editkit.press.provenance import git_state, hardware, package_versions
from editkit.studies.testbed import open_model

PROMPT = "The mother tongue of Ana Silva, who was born in the city of Prague and plays the piano, is"


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def filled(lm, layer: int, n: int, k: int, threshold: float, seed: int):
    """A memory of n random masks."""
    d = lm.weight_shape(layer)[1]
    editor = make_editor("memoir", lm, layer=layer, k=k, threshold=threshold, background=["a"])
    editor.hash = TopHash(torch.zeros(d), draw_permutation(d, seed), k)
    masks = random_masks([[i] for i in range(n)], d, k, seed)
    editor.masks = MaskStore.of(pack(masks), d, lm.device(layer))
    editor.weight.normal_(generator=torch.Generator().manual_seed(seed)).mul_(1e-3)
    return editor


@torch.no_grad()
def forward_overhead(lm, layer: int, n: int, k: int, rows: int, repeats: int, seed: int) -> dict:
    encoding = lm.encode([PROMPT] * rows)
    found = {"tokens": int(encoding.attention_mask.sum())}
    for name, threshold in (("miss", 1.01), ("hit", 0.0001)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a threshold below the null mean is what `hit` asks for
            editor = filled(lm, layer, n, k, threshold, seed)
        without, with_memory = [], []
        for i in range(repeats + 2):
            a = seconds(lambda: lm.model(**encoding, use_cache=False))
            with editor.attached():
                b = seconds(lambda: lm.model(**encoding, use_cache=False))
            if i >= 2:
                without.append(a)
                with_memory.append(b)
        ratio = [b / a for a, b in zip(without, with_memory, strict=True)]
        found[name] = {
            "overhead": statistics.median(ratio) - 1,
            "quartiles": [float(q) - 1 for q in np.quantile(ratio, [0.25, 0.75])],
            "forward_ms": 1e3 * statistics.median(without),
        }
    return found


def lookup_alone(n: int, d: int, k: int, repeats: int, seed: int) -> dict:
    masks = random_masks([[i] for i in range(n)], d, k, seed)
    query = masks[:1]
    store, dense, bytes_ = MaskStore.of(pack(masks), d), masks.float(), masks.to(torch.uint8)
    ways = {
        "packed bits": (lambda: store.best(query), store.packed.numel() * 8),
        "float32 product": (lambda: (query.float() @ dense.T).max(-1), dense.numel() * 4),
        "bytes": (lambda: (bytes_ & query.to(torch.uint8)).sum(-1).max(-1), bytes_.numel()),
    }
    found = {}
    for name, (call, size) in ways.items():
        times = [seconds(call) for _ in range(repeats + 2)][2:]
        found[name] = {"ms": 1e3 * statistics.median(times), "bytes": size}
    return found


def run(args: argparse.Namespace) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    lm = open_model(args.model)
    d = lm.weight_shape(args.layer)[1]
    k = round(args.share * d)
    report = {
        "model": lm.name,
        "layer": args.layer,
        "d": d,
        "k": k,
        "threads": torch.get_num_threads(),
        "edits": {},
    }
    for n in args.edits:
        report["edits"][n] = {
            "lookup": lookup_alone(n, d, k, args.repeats, args.seed),
            **{
                f"batch {rows}": forward_overhead(lm, args.layer, n, k, rows, args.repeats, args.seed)
                for rows in args.rows
            },
        }
    report["provenance"] = {
        "packages": package_versions(), "hardware": hardware(), "git": git_state(Path(__file__).resolve().parents[1]),
    }  # fmt: skip
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="companion")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.2857, help="k / d")
    parser.add_argument("--edits", type=int, nargs="+", default=[1000, 15000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="rows of a batch")
    parser.add_argument("--repeats", type=int, default=31)
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
