"""Target optimisation: all facts at once against one fact at a time, in one run.

    python benchmarks/targets.py                 # 100 facts of the companion
    python benchmarks/targets.py --facts 10      # a quick look

`one_by_one` has the structure of the released MEMIT code, written for this benchmark: for every fact a loop of
torch.optim.Adam over a full forward pass, the model's logits at all positions for the KL term, norm and head once more
at all positions of the loss layer for the target term, and a backward pass down to delta. `editkit` is
`locate.targets.optimize_targets` with the same options. Both optimise the same facts in the same contexts, in slices
that alternate, so whatever else the machine does hits both; processor times tell it apart. Prints JSON with the ratios
and the largest distance between the targets.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.locate.contexts import ContextTemplates
from editkit.locate.targets import TargetConfig, encode_targets, optimize_targets
from editkit.models.batching import Encoding
from editkit.models.hooks import frozen, hidden, submodule
from editkit.models.lm import LM
from editkit.press.provenance import git_state, hardware, package_versions
from editkit.studies.bench import open_bench


def one_fact(lm: LM, fact, layer: int, cfg: TargetConfig, contexts: ContextTemplates, token: str) -> Tensor:
    """z (m,) of one fact: the straightforward loop."""
    rows = encode_targets(lm, [fact], contexts, token, cfg.kl_prompt)
    encoding, columns, places = rows.take([0])
    n = rows.per_fact
    _, row, column, wanted = places.unbind(-1)
    last = lm.block_name(lm.n_layers - 1 if cfg.loss_layer is None else cfg.loss_layer)
    delta = torch.zeros(lm.d_model, requires_grad=True, device=lm.device(layer))
    optimizer = torch.optim.Adam([delta], lr=cfg.lr)
    seen: dict[str, Tensor] = {}

    def add(module, args, out):
        states = hidden(out).clone()
        seen.setdefault("h", states[0, columns[0]].detach().clone())
        for i in range(n):
            states[i, columns[i]] += delta
        return states if isinstance(out, Tensor) else (states, *out[1:])

    def keep(module, args, out):
        seen["last"] = hidden(out)

    handles = [
        submodule(lm.model, lm.block_name(layer)).register_forward_hook(add),
        submodule(lm.model, last).register_forward_hook(keep),
    ]
    per_row = torch.zeros(n).index_add(0, row, torch.ones(len(row)))
    try:
        for step in range(cfg.steps):
            optimizer.zero_grad()
            logits = lm.forward(Encoding(dict(encoding), encoding.texts, None, "right")).logits
            kl_log = log_softmax(logits[n - 1, columns[n - 1]], dim=-1)
            start = seen.setdefault("kl", kl_log.detach().clone())
            log_probs = log_softmax(lm.head(seen["last"]), dim=-1)
            said = log_probs[row, column].gather(-1, wanted[:, None])[:, 0]
            nll = -(said / per_row[row]).sum() / (n - 1)
            kl = cfg.kl_factor * (kl_log.exp() * (kl_log - start)).sum()
            loss = nll + kl + cfg.weight_decay * delta.norm() / seen["h"].norm() ** 2
            if loss < cfg.loss_threshold or step == cfg.steps - 1:
                break
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                limit = cfg.clamp_factor * seen["h"].norm()
                if delta.norm() > limit:
                    delta *= limit / delta.norm()
    finally:
        for handle in handles:
            handle.remove()
    return (seen["h"] + delta).detach().double()


class Clock:
    """Adds up wall and processor time by name."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    def time(self, name: str, call):
        start, busy = time.perf_counter(), time.process_time()
        out = call()
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - start
        self.processor[name] = self.processor.get(name, 0.0) + time.process_time() - busy
        return out


def run(args: argparse.Namespace) -> dict:
    """Time both, compare the targets."""
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = open_bench(args.model, "world", args.facts, args.seed, n_bystanders=0, max_texts=50)
    lm, layer = bench.lm, bench.layers[-1]
    contexts = bench.contexts
    options = {k[2:]: v for k, v in bench.options.items() if k.startswith("z_")}
    cfg = TargetConfig.make({**options, "loss_threshold": args.loss_threshold})
    clock, ours, theirs = Clock(), [], []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    slices = [bench.facts[i :: args.slices] for i in range(args.slices)]
    for facts in slices:
        found = clock.time(
            "editkit",
            lambda f=facts: optimize_targets(lm, f, layer, cfg, contexts=contexts, token=bench.token),
        )
        ours.append(found.z.T)
        with frozen(lm.model):
            theirs += [
                clock.time("one_by_one", lambda f=f: one_fact(lm, f, layer, cfg, contexts, bench.token))
                for f in facts
            ]
    a, b = torch.cat(ours), torch.stack(theirs)
    gap = (a - b).norm(dim=1) / b.norm(dim=1)
    return {
        "benchmark": "targets",
        "parameters": vars(args) | {"out": None},
        "options": cfg.to_dict(),
        "contexts": len(contexts.flat),
        "seconds": {"wall": clock.wall, "processor": clock.processor},
        "seconds_per_fact": {k: v / args.facts for k, v in clock.processor.items()},
        "speed_up": clock.wall["one_by_one"] / clock.wall["editkit"],
        "speed_up_processor_time": clock.processor["one_by_one"] / clock.processor["editkit"],
        "largest_relative_distance": float(gap.max()),
        "load_average": load,
        "provenance": {"packages": package_versions(), "hardware": hardware(),
                       "git": git_state(Path(__file__).resolve().parents[1])},
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="companion")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument(
        "--slices", type=int, default=1, help="parts that alternate between the two (1: all at once)"
    )
    parser.add_argument("--loss-threshold", type=float, default=0.05, help="0: every fact takes all steps")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    report = json.dumps(run(args), indent=1, default=str)
    if args.out:
        args.out.write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
