"""Target optimisation: all facts at once against one fact at a time, in one run.

    python benchmarks/targets.py                 # 100 facts of the companion
    python benchmarks/targets.py --facts 10      # a quick look
    python benchmarks/targets.py --model smollm2 --slices 10 --out benchmarks/results/targets_smollm2.json

`one_by_one` has the structure of the released MEMIT code, written for this benchmark: for every fact a loop of
torch.optim.Adam over a full forward pass, the model's logits at all positions for the KL term, norm and head once more
at all positions of the loss layer for the target term, and a backward pass down to delta. `editkit` is
`locate.targets.optimize_targets` with the same options. Both optimise the same facts in the same contexts, in slices
that alternate, so whatever else the machine does hits both; processor times tell it apart. `bfloat16` is the library
with its products in bfloat16. Prints JSON with the ratios and the largest distance between the targets; for a real
model also what its preset's MEMIT writes with each set of targets, and the memory taken above the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.locate.contexts import ContextTemplates, sample_contexts
from editkit.locate.targets import TargetConfig, encode_targets, optimize_targets
from editkit.methods import make_editor
from editkit.models.batching import Encoding
from editkit.models.hooks import frozen, hidden, submodule
from editkit.models.lm import LM
from editkit.press.provenance import git_state, hardware, package_versions
from editkit.studies import real_edits
from editkit.studies.arms import options_of
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


class Peak:
    """Largest resident memory of this process while it is entered, above what it was then (bytes)."""

    def __enter__(self):
        self.start = self.most = self._now()
        self.done = threading.Event()
        self.watch = threading.Thread(target=self._look, daemon=True)
        self.watch.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.watch.join()

    @property
    def bytes(self) -> int:
        return self.most - self.start

    @staticmethod
    def _now() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _look(self) -> None:
        while not self.done.wait(0.02):
            self.most = max(self.most, self._now())


def load(args: argparse.Namespace) -> SimpleNamespace:
    """lm, facts, layer, contexts, token and options of the targets; `drawn` for a real model, else None."""
    if args.model == "companion":
        bench = open_bench(args.model, "world", args.facts, args.seed, n_bystanders=0, max_texts=50)
        found, layer, facts, token = bench.options, bench.layers[-1], bench.facts, bench.token
        return SimpleNamespace(lm=bench.lm, facts=facts, layer=layer, contexts=bench.contexts, token=token,
                               options=found, drawn=None)  # fmt: skip
    bed = real_edits.open_real(args.model, args.asked)
    found = options_of(bed.lm, "memit")
    drawn = real_edits.draw(bed.table, args.facts, args.seed)
    contexts = sample_contexts(bed.lm, found.get("n_contexts", 5), found.get("context_length", 10), 0)
    return SimpleNamespace(lm=bed.lm, facts=drawn.facts, layer=found["layers"][-1], contexts=contexts,
                           token=found.get("token", "subject_last"), options=found, drawn=drawn, bed=bed)  # fmt: skip


def written(case: SimpleNamespace, Z: Tensor, moments) -> dict[str, float]:
    """Shares of right answers after MEMIT has written the targets Z (m, n)."""
    editor = make_editor("memit", case.lm, statistics=moments, contexts=case.contexts, **case.options)
    editor.targets = lambda facts: Z
    try:
        editor.edit(case.facts)
        return real_edits.ask(case.lm, case.drawn).groupby("axis")["success"].mean().to_dict()
    finally:
        editor.restore()


def run(args: argparse.Namespace) -> dict:
    """Time all, compare the targets."""
    if args.threads:
        torch.set_num_threads(args.threads)
    case = load(args)
    lm, layer, contexts, token = case.lm, case.layer, case.contexts, case.token
    options = {k[2:]: v for k, v in case.options.items() if k.startswith("z_")}
    cfg = TargetConfig.make({**options, "loss_threshold": args.loss_threshold, "products": "model"})
    clock, memory = Clock(), Peak()
    found: dict[str, list[Tensor]] = {"editkit": [], "bfloat16": [], "one_by_one": []}
    most = dict.fromkeys(("editkit", "bfloat16"), 0)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    slices = [case.facts[i :: args.slices] for i in range(args.slices)]
    for facts in slices:
        for name, how in (("editkit", cfg), ("bfloat16", cfg.replace(products="bfloat16"))):
            with memory:
                z = clock.time(
                    name,
                    lambda f=facts, c=how: (
                        optimize_targets(lm, f, layer, c, contexts=contexts, token=token).z
                    ),
                )
            most[name] = max(most[name], memory.bytes)
            found[name] += list(z.T)
        with frozen(lm.model):
            found["one_by_one"] += [
                clock.time("one_by_one", lambda f=f: one_fact(lm, f, layer, cfg, contexts, token))
                for f in facts
            ]
    order = [i for k in range(args.slices) for i in range(k, len(case.facts), args.slices)]
    back = torch.tensor(order).argsort()
    z = {name: torch.stack(parts)[back] for name, parts in found.items()}
    scores = {}
    if case.drawn is not None:
        moments = case.bed.moments(case.options["layers"], max_texts=None)
        scores = {k: written(case, v.T, moments) for k, v in z.items()}

    def against(name: str) -> dict:
        gap = (z[name] - z["one_by_one"]).norm(dim=1) / z["one_by_one"].norm(dim=1)
        return {
            "speed_up": clock.wall["one_by_one"] / clock.wall[name],
            "speed_up_processor_time": clock.processor["one_by_one"] / clock.processor[name],
            "largest_relative_distance": float(gap.max()),
            "memory_above_weights_gb": most[name] / 1e9,
        }

    return {
        "benchmark": "targets",
        "parameters": vars(args) | {"out": None},
        "options": cfg.to_dict(),
        "contexts": len(contexts.flat),
        "seconds": {"wall": clock.wall, "processor": clock.processor},
        "seconds_per_fact": {k: v / args.facts for k, v in clock.processor.items()},
        **against("editkit"),
        "bfloat16": against("bfloat16"),
        "scores": scores,
        "load_average": load_average,
        "provenance": {"packages": package_versions(), "hardware": hardware(),
                       "git": git_state(Path(__file__).resolve().parents[1])},
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="companion", help="companion, or a real model with a preset (smollm2)"
    )
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--asked", type=int, default=60, help="facts asked per relation, to find known ones")
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
