"""What editing does to everything else: recall, perplexity, hidden states, downstream tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...base.errors import ConfigError, NumericsError
from ...locate.keys import read_states
from ...models.lm import LM
from ...scoring import perplexity, score, score_targets
from ..bench import Bench
from ..streams import edit_stream, kept_stream
from ..testbed import Statement


def recall(lm: LM, statements: Sequence[Statement], *, stop: str = ".") -> np.ndarray:
    """(n,) 1.0 where greedy generation after the prompt gives the answer and then `stop`.

    Greedy generation says the answer exactly if each of its tokens is the arg-max after the ones before
    it, which one teacher-forced pass shows.
    """
    pairs = [(template.replace("{}", subject), answer + stop) for template, subject, answer in statements]
    return np.array([float(s.correct.all()) for s in score_targets(lm, pairs, desc="recall")])


def text_perplexity(lm: LM, texts: Sequence[str]) -> np.ndarray:
    """(n,) log perplexity of each text, nats per token."""
    return np.log(perplexity(lm, texts))


def states(bench: Bench, statements: Sequence[Statement]) -> Tensor:
    """(m, n) outputs of the last edited block at the lookup token, bare prompts."""
    name = bench.lm.block_name(bench.layers[-1])
    pairs = [(template, subject) for template, subject, _ in statements]
    return read_states(bench.lm, pairs, outputs=[name], token=bench.token).output[name]


def drift(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far a cloud of hidden states (m, n) has moved.

    shift:   ||mean after - mean before|| over the root mean square distance of the states from their mean
        before.
    cosine:  mean cosine between a state before and after.
    frechet: squared Frechet distance of the two Gaussians fitted to the clouds, over the total variance
        before.
    """
    if before.shape != after.shape or before.shape[1] < 2:
        raise NumericsError(
            f"two clouds of the same states are needed, got {tuple(before.shape)}, {tuple(after.shape)}"
        )
    a, b = before.double(), after.double()
    mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    n = a.shape[1]
    A, B = (a - mean_a) / n**0.5, (b - mean_b) / n**0.5  # covariances A A^T and B B^T
    total = float((A * A).sum())
    if total == 0.0:
        raise NumericsError("all states are equal; drift needs prompts with different states")
    # tr sqrt(A A^T B B^T) is the sum of the singular values of A^T B.
    cross = float(torch.linalg.svdvals(A.T @ B).sum())
    shift = float(((mean_b - mean_a) ** 2).sum())
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).mean()
    return {
        "shift": (shift / total) ** 0.5, "cosine": float(cosine),
        "frechet": max(0.0, shift + total + float((B * B).sum()) - 2 * cross) / total,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checkup:
    """What is examined at every checkpoint of a stream. before: states of the bystanders, unedited
    model."""

    bench: Bench
    texts: Sequence[str]
    before: Tensor
    tasks: Sequence[str] = ()
    limit: int | None = None

    @classmethod
    def of(
        cls, bench: Bench, texts: Sequence[str], tasks: Sequence[str] = (), limit: int | None = None
    ) -> Checkup:
        """For the model as it is now, which must be unedited. tasks, limit: those of `downstream`."""
        return cls(bench, texts, states(bench, bench.bystanders), tasks, limit)

    def take(self) -> tuple[dict[str, float], pd.DataFrame]:
        """(scalars, rows) now. scalars: `drift`, and "task.NAME" per task. rows: metric, item, value with
        metric "recall" for each bystander and "log_perplexity" for each text."""
        bench = self.bench
        found = {
            "recall": recall(bench.lm, bench.bystanders, stop=bench.stop),
            "log_perplexity": text_perplexity(bench.lm, self.texts),
        }
        scalars = drift(self.before, states(bench, bench.bystanders))
        scalars |= {f"task.{k}": v for k, v in downstream(bench.lm, self.tasks, limit=self.limit).items()}
        return scalars, _long(found)


def _long(found: dict[str, Sequence[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"metric": metric, "item": i, "value": float(x)}
            for metric, values in found.items()
            for i, x in enumerate(values)
        ]
    )


def watch(
    checkup: Checkup, arm: str, batch: int, every: int, *, shared: bool = True, start=None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Edit the facts of the bench with one arm and take a checkup after each `every` facts; then restore.

    start: result of `checkup.take()` on the unedited model, if it is known already.
    Returns (rows, scalars) with a column edits; rows also have metric "kept": for each fact so far,
    whether the model states it (greedy generation).
    """
    bench = checkup.bench

    def look_at(done: int) -> dict:
        numbers, table = start if done == 0 and start is not None else checkup.take()
        if done:
            kept = score(bench.lm, bench.facts[:done], "generate", ["efficacy"])["success"]
            table = pd.concat([table, _long({"kept": kept})], ignore_index=True)
        return {"scalars": {"edits": done, **numbers}, "rows": table.assign(edits=done).to_dict("list")}

    editor = bench.editor(arm, shared=shared)
    seen = [
        every,
        list(checkup.texts),
        [list(b) for b in bench.bystanders],
        list(checkup.tasks),
        checkup.limit,
    ]
    keep = kept_stream(bench, editor, batch, shared, *seen)
    try:
        found = edit_stream(editor, bench.facts, batch, checkpoint=look_at, every=every, keep=keep)
    finally:
        editor.restore()
    rows = pd.concat([pd.DataFrame(f["rows"]) for f in found], ignore_index=True)
    return rows, pd.DataFrame([f["scalars"] for f in found])


def downstream(lm: LM, tasks: Sequence[str], *, limit: int | None = None) -> dict[str, float]:
    """Accuracy (or the task's first metric) of lm-evaluation-harness tasks, e.g. ("sst2", "mrpc", "cola",
    "rte").

    limit: examples per task. Raises ConfigError if the optional package is missing.
    """
    if not tasks:
        return {}
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            "downstream tasks need the optional packages: pip install 'editkit[eval]'"
        ) from error
    made = lm_eval.simple_evaluate(
        HFLM(pretrained=lm.model, tokenizer=lm.tokenizer), tasks=list(tasks), limit=limit, bootstrap_iters=0
    )
    return {name: first_metric(found) for name, found in made["results"].items()}


def first_metric(found: dict) -> float:
    """acc if a task reports it, else its first number ("mcc,none" of CoLA)."""
    numbers = {k.split(",")[0]: v for k, v in found.items() if isinstance(v, float) and "stderr" not in k}
    if not numbers:
        raise ConfigError(f"the task reports no number: {found}")
    return numbers.get("acc", next(iter(numbers.values())))
