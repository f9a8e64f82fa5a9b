"""Streams of single edits, scored after the last one (edit all, then evaluate all)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...base.device import synchronize
from ...base.errors import ConfigError
from ...models.facts import Fact
from ...models.lm import LM
from ...scoring import Baseline, bootstrap_mean, score
from ..streams import Keep, Timed, edit_stream

AXES = {"efficacy": "reliability", "paraphrase": "generalisation", "locality": "locality",
        "neighborhood": "same relation"}  # fmt: skip
PAPER_AXES = ("efficacy", "paraphrase", "locality")


def stream_scores(
    lm: LM,
    editor,
    facts: Sequence[Fact],
    counts: Sequence[int],
    *,
    axes: Sequence[str] = PAPER_AXES,
    keep: Keep | None = None,
    reading: Mapping[int, Mapping[str, Any]] | None = None,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Scores of the first T facts after T single edits, for every T of counts; the editor is restored at the end.

    Protocol of EasyEdit and MEMOIR: teacher-forced token accuracy of the answer; on the axes that must not change
    agreement with the unedited model's tokens. Returns rows of `scoring.score` with a column edits, and the cost:
    seconds_per_edit (of the edits made in this call), bytes (of a memory; 0 for weights).
    keep: where an interrupted stream goes on.
    reading: per T options of the editor that hold while the model is asked after T edits and for nothing else, e.g.
    a threshold calibrated for a memory of that size.
    """
    if not counts or list(counts) != sorted(set(counts)) or not 1 <= counts[0] <= counts[-1] <= len(facts):
        raise ConfigError(
            f"counts = {list(counts)} must increase, from 1 or more to at most {len(facts)} facts"
        )
    baseline = Baseline.of(lm, facts[: counts[-1]], axes)
    timed = Timed(editor)

    def look(n: int) -> dict[str, list]:
        with read_with(editor, (reading or {}).get(n, {})):
            table = score(lm, facts[:n], "easyedit", axes, baseline=baseline)
        return table.assign(edits=n).to_dict("list")

    try:
        notes = edit_stream(timed, facts[: counts[-1]], checkpoint=look, at=counts, keep=keep)
        size = float(getattr(editor, "n_bytes", 0))
    finally:
        editor.restore()
    rows = pd.concat([pd.DataFrame(note) for note in notes], ignore_index=True)
    return rows, {"seconds_per_edit": timed.seconds_per_edit, "bytes": size}


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
