"""Reading models and text: what the library does against the straightforward way, in one run, with equal results.

    python benchmarks/reading.py --out benchmarks/results/reading.json

Four parts of a run that took most of the time of the default book, each with the code that they had before (written
here once more) and with the library's: greedy continuations of probes, sampled free texts, second moments of keys, and
reading the unedited model for several methods. Processor times, because the machine may do other things; the two ways
alternate. Prints JSON with the ratios and whether the results are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from editkit.corpora.world import load_companion, load_world, records
from editkit.locate.moments import second_moment
from editkit.models.hooks import trace
from editkit.press.provenance import git_state, hardware, package_versions
from editkit.scoring import Baseline, generate, score_text
from editkit.scoring.engine import prompt_tokens
from editkit.studies import testbed


@torch.no_grad()
def greedy_by_length(lm, prompts: list[str], limits: list[int]) -> list[tuple[int, ...]]:
    """One batch per prompt length, the head at every position of the prompt, every row to the end of the longest."""
    rows, found = prompt_tokens(lm, prompts), {}
    stop = lm.tokenizer.eos_token_id
    for length in sorted({len(row) for row in rows}):
        same = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[i] for i in same])
        most, cache, start = max(limits[i] for i in same), None, 0
        for _ in range(most):
            out = lm.model(
                input_ids=ids[:, start:],
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = out.past_key_values, ids.shape[1]
            ids = torch.cat([ids, out.logits[:, -1].argmax(-1)[:, None]], dim=1)
        for i, row in zip(same, ids.tolist(), strict=True):
            end = next((k for k in range(length, len(row)) if row[k] == stop), len(row) - 1) + 1
            found[i] = tuple(row[: min(end, length + limits[i])])
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def whole_products(lm, layer: int, texts: list[str]) -> torch.Tensor:
    """Second moment of one layer's keys with the whole product X^T X of every batch."""
    total, n = torch.zeros(lm.d_key, lm.d_key, dtype=torch.float64), 0
    encoding = lm.encode(texts)
    order = np.argsort(encoding.lengths.numpy(), kind="stable")
    for rows in np.array_split(order, max(1, int(encoding.lengths.sum()) // 3500)):
        batch, _ = encoding.take(rows.tolist())
        with trace(lm.model, [lm.down_name(layer)], inputs=True, outputs=False, stop_early=True) as seen:
            lm.forward(batch)
        X = seen.input[lm.down_name(layer)][batch.attention_mask.bool()].double()
        total.addmm_(X.T, X)
        n += len(X)
    return total / n


def compare(ways: dict, same, repeats: int) -> dict:
    """Processor seconds of the two ways (the least of alternating repeats), their ratio, and equality of results."""
    seconds, results = {name: [] for name in ways}, {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            seconds[name].append(time.process_time() - start)
    best = {name: min(times) for name, times in seconds.items()}
    return {**best, "ratio": best["before"] / best["now"], "same": same(results["before"], results["now"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=400, help="probes to continue")
    parser.add_argument("--facts", type=int, default=20, help="facts with free texts")
    parser.add_argument("--texts", type=int, default=1500, help="texts of the second moments")
    parser.add_argument("--methods", type=int, default=4, help="methods that read the unedited model")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm, world = load_companion(), load_world()
    layer = testbed.preset(lm)["layers"][0]
    pick = np.random.default_rng(0)
    statements = list(world.statements())
    chosen = [statements[i] for i in pick.choice(len(statements), args.prompts, replace=False)]
    prompts = [s.prompt for s in chosen]
    room = [len(lm.tokenizer(s.answer)["input_ids"]) + 4 for s in chosen]
    facts = records.edit_facts(world, args.facts, seed=5)
    corpus = world.corpus_texts()
    texts = [corpus[i] for i in pick.choice(len(corpus), args.texts, replace=False)]
    free = {"seed": 0, "max_total_tokens": 50}
    found = {
        "greedy continuations": compare(
            {"before": lambda: greedy_by_length(lm, prompts, room),
             "now": lambda: [g.ids for g in generate(lm, prompts, max_new_tokens=room)]},
            lambda a, b: a == b, args.repeats,
        ),
        "free texts": compare(
            {"before": lambda: score_text(lm, facts, batch_size=1000, **free),  # one fact after the other
             "now": lambda: score_text(lm, facts, **free)},
            lambda a, b: a.equals(b), args.repeats,
        ),
        "second moments, one layer": compare(
            {"before": lambda: whole_products(lm, layer, texts),
             "now": lambda: second_moment(lm, [layer], texts)[layer].C},
            lambda a, b: bool(torch.allclose(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))), args.repeats,
        ),
        f"unedited model, {args.methods} methods": compare(
            {"before": lambda: [Baseline.of(lm, facts, protocols=["generate"]) for _ in range(args.methods)][-1].texts,
             "now": lambda: Baseline.of(lm, facts, protocols=["generate"]).texts},
            lambda a, b: a == b, args.repeats,
        ),
    }  # fmt: skip
    result = {
        "benchmark": "reading",
        "parameters": {k: v for k, v in vars(args).items() if k != "out"},
        "processor_seconds": found,
        "provenance": {
            "packages": package_versions(),
            "hardware": hardware(),
            "git": git_state(Path(__file__).parents[1]),
        },
    }
    text = json.dumps(result, indent=1, default=str) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
