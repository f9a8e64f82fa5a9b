"""How the settings of the lifelong pages are chosen: on a seed that no page reports, by one rule for all methods.

A candidate is a set of options of an arm. Each is run on the same stream of the settings seed and scored as the pages
score; the one with the best average of reliability, generalisation and locality is taken. MEMOIR's threshold is not
searched but calibrated: see `calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..errors import ConfigError
from ..facts import Fact
from ..memory.calibration import Calibration, from_data
from ..memory.memoir import Memoir
from ..memory.study import Routing, probes
from ..memory.tophash import mean_features
from ..models import LM
from . import arms, streams
from .data import Streams, question_streams

SEED = 100  # of settings: no page reports it
_POOL = 200  # held-out facts at least whose locality prompts calibrate a threshold

# Tried on the companion. Weight editors are not here: they take the presets of the companion, found by
# `preset_sweep` on other unreported seeds. For "wise" save_every and merge_every are shares of the stream.
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "lora": [{"lr": 1e-4}, {"lr": 3e-4}],
    "grace": [{"layer": layer, "radius": radius} for layer in (3, 4) for radius in (0.3, 1.0, 2.0, 4.0)],
    "defer": [{"lr": lr} for lr in (2e-3, 7e-3)],
    "wise": [
        *({"lr": lr, "save_every": 5, "merge_every": 10} for lr in (0.03, 0.1, 0.3)),
        *({"lr": lr, "save_every": 20, "merge_every": 40} for lr in (0.03, 0.1, 0.3)),
    ],
    "loka": [{"layer": layer} for layer in (3, 4)],
    "memoir-paper": [{"layer": layer} for layer in (3, 4)],
    "retrieval": [{"threshold": t} for t in (0.6, 0.7, 0.8, 0.9)],
    "retrieval-tokens": [{"threshold": t} for t in (0.2, 0.4, 0.6, 0.8)],
    "in-context": [{"threshold": t} for t in (0.3, 0.5, 0.8)],
}


def sweep(
    lm: LM,
    data: Streams,
    seed: int,
    candidates: Mapping[str, Sequence[Mapping[str, Any]]],
    statistics: Mapping | None = None,
) -> pd.DataFrame:
    """Scores of every candidate after the whole stream of a seed.

    Returns method, options (text), reliability, generalisation, locality, average, seconds per edit, chosen (the best
    average of its method, the first of several).
    """
    facts, background = data[seed]
    rows = []
    for method, given in candidates.items():
        for options in given:
            editor = arms.make_arm(
                lm, method, options={method: options}, background=background, statistics=statistics
            )
            table, cost = streams.stream_scores(lm, editor, facts, [len(facts)])
            means = table.groupby(["fact_id", "axis"])["success"].mean().unstack("axis").mean()
            scores = {streams.AXES[a]: float(means[a]) for a in streams.PAPER_AXES}
            rows.append({
                "method": method, "options": ", ".join(f"{k}={v}" for k, v in options.items()), **scores,
                "average": float(np.mean(list(scores.values()))), "seconds": cost["seconds_per_edit"],
            })  # fmt: skip
    found = pd.DataFrame(rows)
    best = found.groupby("method", sort=False)["average"].transform("max")
    chosen = (found["average"] == best) & ~found[found["average"] == best].duplicated("method").reindex(
        found.index, fill_value=True
    )
    return found.assign(chosen=chosen)


@torch.no_grad()
def calibrate(
    lm: LM,
    facts: Sequence[Fact],
    background: Sequence[str] | None = None,
    *,
    n: int | None = None,
    rate: float = 0.05,
    **options: Any,
) -> Calibration:
    """MEMOIR's threshold for a wanted false-positive rate when n edits are stored (None: all of `facts`).

    facts: held-out edits, none of which is reported; the first n are stored. The locality prompts of all are
    what should pass by, the rephrases of the stored ones what should be found. Nothing is trained: masks depend on
    frozen features alone. options: of MEMOIR (layer, k, ...); rate: wanted share of unrelated prompts that use it.
    Raises ConfigError if the facts have no locality prompts.
    """
    n = len(facts) if n is None else n
    frame = probes(facts)
    wanted = (frame["fact"] < n) & frame["group"].isin(["edit prompt", "rephrase"])
    frame = frame[wanted | (frame["group"] == "unrelated fact")]
    group = frame["group"].to_numpy()
    if "unrelated fact" not in group or not 1 <= n <= len(facts):
        raise ConfigError(
            f"calibration needs facts with locality prompts, and n of them to store; got n = {n} of {len(facts)}"
        )
    memory = Memoir(lm, {**options, "threshold": 1.0, "n_contexts": 0}, background=background)
    memory.prepare()
    unique = list(dict.fromkeys(frame["prompt"]))
    row = {p: i for i, p in enumerate(unique)}
    features = mean_features(lm, memory.layer, unique)[torch.tensor([row[p] for p in frame["prompt"]])]
    routing = Routing.of(memory.hash, features[torch.from_numpy(group == "edit prompt")])
    overlap, _ = routing.look_up(features)
    return from_data(overlap[group == "unrelated fact"], rate, overlap[group == "rephrase"])


def thresholds(
    lm: LM,
    corpus: str,
    counts: Sequence[int],
    *,
    rate: float = 0.05,
    seed: int = SEED,
    n_background: int = 100,
    **options: Any,
) -> dict[int, Calibration]:
    """`calibrate` for every number of stored edits in `counts`, on edits of the settings seed."""
    n = max(max(counts), _POOL)
    facts, background = question_streams(corpus, n, [seed], n_background=n_background)[seed]
    return {t: calibrate(lm, facts, background, n=t, rate=rate, **options) for t in counts}


_PRESET = "the companion's preset (preset_sweep, seed 101)"
_SWEEP = f"best average of the candidates on seed {SEED}"
ORIGINS: dict[str, str] = {  # arm -> where its setting comes from, for the pages
    "ft": _PRESET, "rome": _PRESET, "memit": _PRESET, "memit-seq": _PRESET, "alphaedit": _PRESET,
    "lora": _SWEEP, "grace": _SWEEP, "defer": _SWEEP, "loka": _SWEEP, "retrieval": _SWEEP,
    "retrieval-tokens": _SWEEP, "in-context": _SWEEP,
    "wise": _SWEEP + "; shards as in the paper's runner: one per half of the stream",
    "wise-merge": "those of WISE retrieve",
    "memoir": f"layer: {_SWEEP}; threshold calibrated on seed {SEED}",
    "memoir-paper": "as MEMOIR, with the paper's threshold for zsRE",
}  # fmt: skip
