"""Streams of single edits, scored after the last one (edit all, then evaluate all)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...base.device import synchronize
from ...base.errors import ConfigError
from ...base.progress import bar
from ...models.facts import Fact
from ...models.lm import LM
from ...scoring import Baseline, bootstrap_mean, score

AXES = {"efficacy": "reliability", "paraphrase": "generalisation", "locality": "locality",
        "neighborhood": "same relation"}  # fmt: skip
PAPER_AXES = ("efficacy", "paraphrase", "locality")


def edit_one_by_one(
    editor,
    facts: Sequence[Fact],
    counts: Sequence[int],
    look: Callable[[int], None],
    *,
    checkpoint: Path | None = None,
    every: int = 50,
) -> float:
    """Edit facts one at a time; call look(number so far) after each of `counts` edits. Returns seconds of editing.

    checkpoint: file in which the stream is saved after every `every` edits and at each count; a stream found there
    goes on where it was saved last (and is not looked at again before that). Raises ConfigError for counts that are
    not increasing or beyond the facts.
    """
    counts = list(counts)
    if not counts or counts != sorted(set(counts)) or counts[0] < 1 or counts[-1] > len(facts):
        raise ConfigError(f"counts = {counts} must increase from 1 or more to at most {len(facts)} facts")
    done = 0
    if checkpoint is not None and checkpoint.exists():
        editor.load(checkpoint)
        done = editor.n_facts
    seconds = 0.0
    for i in bar(range(done, counts[-1]), "stream", unit="edit"):
        start = time.perf_counter()
        editor.edit([facts[i]])
        seconds += time.perf_counter() - start
        if i + 1 in counts:
            look(i + 1)  # before the checkpoint: what is saved has been looked at
        if checkpoint is not None and ((i + 1) % every == 0 or i + 1 in counts):
            editor.save(checkpoint)
    return seconds


def stream_scores(
    lm: LM,
    editor,
    facts: Sequence[Fact],
    counts: Sequence[int],
    *,
    axes: Sequence[str] = PAPER_AXES,
    checkpoint: Path | None = None,
    reading: Mapping[int, Mapping[str, Any]] | None = None,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Scores of the first T facts after T single edits, for every T of counts; the editor is restored at the end.

    Protocol of EasyEdit and MEMOIR: teacher-forced token accuracy of the answer; on the axes that must not change
    agreement with the unedited model's tokens. Returns rows of `scoring.score` with a column edits, and the cost:
    seconds_per_edit (of the edits made in this call), bytes (of a memory; 0 for weights).
    checkpoint: see `edit_one_by_one`; scores are kept beside it.
    reading: per T options of the editor that hold while the model is asked after T edits and for nothing else, e.g.
    a threshold calibrated for a memory of that size.
    """
    baseline = Baseline.of(lm, facts[: counts[-1]], axes)
    tables: list[pd.DataFrame] = []

    def kept(n: int) -> Path | None:
        return None if checkpoint is None else checkpoint.with_suffix(f".{n}.csv")

    def look(n: int) -> None:
        with read_with(editor, (reading or {}).get(n, {})):
            table = score(lm, facts[:n], "easyedit", axes, baseline=baseline)
        table.insert(0, "edits", n)
        if checkpoint is not None:
            table.to_csv(kept(n), index=False, na_rep="nan")
        tables.append(table)

    resumed = checkpoint is not None and checkpoint.exists()
    try:
        seconds = edit_one_by_one(editor, facts, counts, look, checkpoint=checkpoint)
        made = counts[-1]
        if resumed:
            seen = {int(t["edits"].iloc[0]) for t in tables}
            earlier = [n for n in counts if n not in seen]
            tables = [
                pd.read_csv(kept(n), dtype={"fact_id": str}, na_values=["nan"], keep_default_na=False)
                for n in earlier
            ] + tables
            made = max(1, counts[-1] - max(earlier, default=0))
        size = float(getattr(editor, "n_bytes", 0))
    finally:
        editor.restore()
    return pd.concat(tables, ignore_index=True), {"seconds_per_edit": seconds / made, "bytes": size}


@contextmanager
def read_with(editor, options: Mapping[str, Any]) -> Iterator[None]:
    """Other options of an editor inside; the stream itself goes on, and is saved, with its own."""
    own = editor.config
    editor.config = own.replace(**options) if options else own
    try:
        yield
    finally:
        editor.config = own


def summary(
    rows: pd.DataFrame, by: Sequence[str], axes: Sequence[str] = PAPER_AXES, n_boot: int = 1000
) -> pd.DataFrame:
    """Mean and 95 % interval (bootstrap over facts inside seeds) per group and axis, with axis "average" for the
    mean of the axes of each fact.

    rows: with columns seed, fact_id, axis, success and `by`. Returns by, axis, mean, lo, hi, n (facts).
    """
    unit = [*by, "seed", "fact_id"]
    per = rows[rows["axis"].isin(axes)].groupby([*unit, "axis"], sort=False)["success"].mean().unstack("axis")
    per = per.reindex(columns=list(axes))
    per["average"] = per.mean(axis=1, skipna=False)
    found: list[dict[str, Any]] = []
    for key, part in per.groupby(list(by), sort=False):
        key = key if isinstance(key, tuple) else (key,)
        seeds = part.index.get_level_values("seed")
        for axis in part.columns:
            interval = bootstrap_mean(part[axis].to_numpy(), np.asarray(seeds), n_boot=n_boot)
            found.append({**dict(zip(by, key, strict=True)), "axis": axis, "mean": interval.mean, "lo": interval.lo,
                          "hi": interval.hi, "n": interval.n})  # fmt: skip
    return pd.DataFrame(found)


@torch.no_grad()
def inference_seconds(
    lm: LM, texts: Sequence[str], repeats: int = 5, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one forward pass over a batch of texts: the median of several, after one for warming up.

    clock: `time.process_time` leaves out what other processes do (on a CPU).
    """
    encoding = lm.encode(list(texts), "left")
    times = []
    for _ in range(repeats + 1):
        start = clock()
        lm.forward(encoding)
        synchronize(lm.device())
        times.append(clock() - start)
    return float(np.median(times[1:]))


def mask_overlaps(memoir, prompts: Sequence[str]) -> np.ndarray:
    """(n, n) share of columns that the masks of two prompts have in common, for a MEMOIR editor (no edit needed)."""
    from ...methods.memory.tophash import mean_features

    with torch.no_grad(), memoir.detached():
        memoir.prepare()
        features = mean_features(memoir.lm, memoir.layer, list(prompts))
        masks = memoir.hash(features).float()
    return (masks @ masks.T / memoir.k).cpu().numpy()
