"""Keys, second moments and evaluation: batches by length against one text at a time, in one run.

    python benchmarks/batching.py --threads 1                # the companion: 100 facts, 300 texts
    python benchmarks/batching.py --facts 10 --texts 40      # a quick look

`one_by_one` has the structure of the released code, written for this benchmark: every prompt in every context, every
text, every (prompt, answer) pair in a forward pass of its own through the whole model, without early stop, and nothing
is shared. Both work in the same process in turn, on the same inputs; results are compared. Prints JSON with the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from editkit.corpora.world import load_world
from editkit.locate.contexts import ContextTemplates
from editkit.locate.keys import compute_keys
from editkit.locate.moments import second_moment
from editkit.models.hooks import frozen, submodule
from editkit.models.lm import LM
from editkit.models.lookup import find_positions
from editkit.press.provenance import git_state, hardware, package_versions
from editkit.scoring import score_targets
from editkit.scoring.engine import split_tokens
from editkit.studies.bench import open_bench


def input_of(lm: LM, encoding, layer: int) -> Tensor:
    """Input of a down projection (1, tokens, d) in a forward pass through the whole model."""
    seen: dict[str, Tensor] = {}
    handle = submodule(lm.model, lm.down_name(layer)).register_forward_hook(
        lambda module, args, out: seen.update(x=args[0])
    )
    try:
        lm.forward(encoding)
    finally:
        handle.remove()
    return seen["x"]


def keys_one_by_one(lm: LM, facts, layer: int, contexts: ContextTemplates, token: str) -> Tensor:
    """K (d, n): a forward pass for every context of every fact."""
    columns = []
    weights = torch.tensor(contexts.weights("groups"), dtype=torch.float64)
    for fact in facts:
        keys = []
        for filled in contexts.fill(fact.prompt):
            encoding, where = find_positions(lm, [(filled, fact.subject)], token)
            keys.append(input_of(lm, encoding, layer)[0, int(where[0])].double())
        columns.append((weights[:, None] * torch.stack(keys)).sum(0))
    return torch.stack(columns, dim=1)


def moment_one_by_one(lm: LM, layer: int, texts: list[str]) -> Tensor:
    """C0 (d, d): a forward pass for every text."""
    total, n = torch.zeros(lm.d_key, lm.d_key, dtype=torch.float64), 0
    for text in texts:
        X = input_of(lm, lm.encode([text]), layer)[0].double()
        total += X.T @ X
        n += len(X)
    return total / n


def scores_one_by_one(lm: LM, pairs: list[tuple[str, str]]) -> list[float]:
    """Mean log-probability of each answer: a forward pass, and a softmax over all positions, for every pair."""
    found = []
    for ids, start in split_tokens(lm, pairs):
        row = torch.tensor([ids])
        logits = lm.model(input_ids=row, use_cache=False).logits
        said = torch.log_softmax(logits.float(), -1)[0, :-1].gather(-1, row[0, 1:, None])[:, 0]
        found.append(float(said[start - 1 :].mean()))
    return found


class Clock:
    """Wall and processor seconds of named calls, the best of some."""

    def __init__(self, repeats: int) -> None:
        self.repeats, self.seconds = repeats, {}

    def alternate(self, name: str, ways: dict) -> dict:
        """Call the ways in turn; their results of the last round."""
        found = {}
        for _ in range(self.repeats):
            for way, call in ways.items():
                wall, busy = time.perf_counter(), time.process_time()
                found[way] = call()
                spent = time.perf_counter() - wall, time.process_time() - busy
                old = self.seconds.setdefault(name, {}).setdefault(
                    way, {"wall": spent[0], "processor": spent[1]}
                )
                self.seconds[name][way] = {
                    "wall": min(old["wall"], spent[0]),
                    "processor": min(old["processor"], spent[1]),
                }
        return found


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    """Time both ways of all three, compare what they find."""
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = open_bench(args.model, "world", args.facts, args.seed, n_bystanders=0, max_texts=50)
    lm, layer, contexts = bench.lm, bench.layers[-1], ContextTemplates.of(bench.contexts)
    texts = load_world().corpus_texts()[: args.texts]
    pairs = [(f.text, answer) for f in bench.facts for answer in (f.target, f.target_true)]
    clock, gaps = Clock(args.repeats), {}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with frozen(lm.model):
        keys = clock.alternate("keys", {
            "editkit": lambda: compute_keys(lm, bench.facts, layer, token=bench.token, contexts=contexts),
            "one_by_one": lambda: keys_one_by_one(lm, bench.facts, layer, contexts, bench.token)})  # fmt: skip
        moment = clock.alternate("covariance", {
            "editkit": lambda: second_moment(lm, [layer], texts)[layer].C,
            "one_by_one": lambda: moment_one_by_one(lm, layer, texts)})  # fmt: skip
        score = clock.alternate("evaluation", {
            "editkit": lambda: [float(s.logprobs.mean()) for s in score_targets(lm, pairs)],
            "one_by_one": lambda: scores_one_by_one(lm, pairs)})  # fmt: skip
    for name, pair in (("keys", keys), ("covariance", moment), ("evaluation", score)):
        a, b = (torch.as_tensor(pair[way], dtype=torch.float64) for way in ("editkit", "one_by_one"))
        gaps[name] = float((a - b).norm() / b.norm())
    return {
        "benchmark": "batching", "parameters": vars(args) | {"out": None}, "contexts": len(contexts.flat),
        "pairs": len(pairs), "seconds": clock.seconds,
        "speed_up": {k: v["one_by_one"]["wall"] / v["editkit"]["wall"] for k, v in clock.seconds.items()},
        "speed_up_processor_time": {
            k: v["one_by_one"]["processor"] / v["editkit"]["processor"] for k, v in clock.seconds.items()},
        "relative_distance": gaps, "load_average": load,
        "provenance": {"packages": package_versions(), "hardware": hardware(),
                       "git": git_state(Path(__file__).resolve().parents[1])},
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="companion")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--texts", type=int, default=300, help="texts of the second moment")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest counts")
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
