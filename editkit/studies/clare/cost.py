"""What a predictor costs: seconds per fact, peak memory, bytes to keep.

Peak memory of a process is monotone and holds whatever the interpreter ever loaded, so every task runs in a process of
its own: the model is loaded, the mark is reset, the task runs, and the rise of the resident set is read. On an
accelerator its own allocator is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from ...base.config import check_known
from ...base.errors import ConfigError
from ...base.paths import user_path
from ...entanglement.gradsim import Sketch, gradients, gradsim, parameter_names
from ...entanglement.representations import represent
from ...models.facts import Fact
from ...models.lm import LM
from ..cost.meter import peak

TASKS: dict[str, str] = {
    "clare": "CLaRE, forward stopped at the layer",
    "clare-full": "CLaRE, whole forward pass",
    "key": "keys, forward stopped at the layer",
    "gradsim": "GradSim, all parameters",
    "gradsim-layer": "GradSim, edited matrix",
    "gradsim-sketch": "GradSim, all parameters, sketched",
}


def bytes_per_fact(lm: LM, task: str, layer: int, *, sketch: int = 4096) -> int:
    """float32 bytes that have to be kept of one fact to compare it with others later."""
    check_known([task], TASKS, "task")
    if task == "gradsim-sketch":
        return 4 * sketch
    if task.startswith("gradsim"):
        names = parameter_names(lm, "all" if task == "gradsim" else "down", layer)
        return 4 * sum(lm.parameter(name).numel() for name in names)
    return 4 * (lm.d_key if task == "key" else lm.d_model)


def run_task(
    lm: LM, task: str, facts: Sequence[Fact], layer: int, *, batched: bool, sketch: int = 4096
) -> None:
    """Do a task once over all facts. GradSim takes one fact at a time and keeps one gradient (compared with that of the
    first fact), as it has to on any larger model; batched: CLaRE under its token budget instead of one by one."""
    check_known([task], TASKS, "task")
    if task == "gradsim":
        gradsim(lm, facts[:1], facts[1:])
    elif task == "gradsim-layer":
        gradsim(lm, facts[:1], facts[1:], params="down", layer=layer)
    elif task == "gradsim-sketch":
        gradients(lm, facts, sketch=Sketch(sketch))
    else:
        represent(
            lm, facts, layer, token="last", module="down_input" if task == "key" else "block_output",
            early_stop=task != "clare-full", tokens_per_batch=4096 if batched else 1,
        )  # fmt: skip


def measure_task(
    lm: LM, task: str, facts: Sequence[Fact], layer: int, *, batched: bool = False
) -> dict[str, float]:
    """Wall and processor seconds per fact, peak rise and peak including the weights in bytes; after a warm-up.

    Call it in a fresh process (`measure_costs`); in a used one the peak is only that of memory not yet freed.
    """
    if len(facts) < 4:
        raise ConfigError(f"a cost needs at least 4 facts, got {len(facts)}")
    run_task(lm, task, facts[:3], layer, batched=batched)
    rest = list(facts[3:])
    rise, wall, cpu = peak(lambda: run_task(lm, task, rest, layer, batched=batched), lm.device())
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    return {
        "seconds_per_fact": wall / len(rest), "cpu_seconds_per_fact": cpu / len(rest), "rise": rise,
        "peak": weights + rise, "weights": weights, "bytes_per_fact": bytes_per_fact(lm, task, layer),
        "n": len(rest),
    }  # fmt: skip


def measure_costs(
    model: str,
    tasks: Sequence[tuple[str, bool]],
    facts: Sequence[Fact],
    layer: int,
    *,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """`measure_task` for each (task, batched), in a new Python process that loads the model once and forks for each
    task (where the system can fork), so that no task sees the memory of another.

    Returns one record per task, with its name. Raises ConfigError with the end of the output if one fails.
    """
    check_known([task for task, _ in tasks], TASKS, "task")
    request = {
        "model": model, "tasks": list(tasks), "layer": layer, "threads": threads,
        "facts": [[f.prompt, f.subject, f.target] for f in facts],
    }  # fmt: skip
    code = f"from {__name__} import _serve; _serve()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(request), capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != len(tasks):
        raise ConfigError(f"the costs could not be measured: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in lines]


def _serve() -> None:
    from .. import testbed

    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    lm = testbed.open_model(request["model"])
    facts = [Fact(*row) for row in request["facts"]]
    for task, batched in request["tasks"]:
        child = os.fork() if hasattr(os, "fork") and lm.device().type == "cpu" else 0
        if child:
            _, status = os.waitpid(child, 0)
            if status:
                sys.exit(f"{task} failed")
            continue
        found = measure_task(lm, task, facts, request["layer"], batched=batched)
        print(json.dumps({"task": task, "batched": batched, **found}), flush=True)
        if hasattr(os, "fork") and lm.device().type == "cpu":
            os._exit(0)


def all_pairs_seconds(n: int, width: int, *, top_k: int, seed: int) -> dict[str, float]:
    """Processor and wall seconds of one bare product H H^T of (n, width) float32 and of building the graph of it.

    H is random with a common mean, as hidden states have one; values do not matter for the product.
    """
    from ...entanglement.graph import build_graph
    from ...entanglement.similarity import cosine

    draw = torch.Generator().manual_seed(seed)
    H = torch.randn(n, width, generator=draw) + torch.randn(width, generator=draw)
    start, busy = time.perf_counter(), time.process_time()
    float((H @ H.T)[-1, -1])
    bare = time.perf_counter() - start, time.process_time() - busy
    start, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        build_graph(user_path(folder) / "graph", cosine(H), top_k=top_k)
        graph = time.perf_counter() - start, time.process_time() - busy
    return {"n": n, "width": width, "bare": bare[0], "graph": graph[0], "bare_cpu": bare[1], "graph_cpu": graph[1],
            "ratio": graph[1] / max(bare[1], 1e-9)}  # fmt: skip
