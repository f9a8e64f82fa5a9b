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

from ...base.errors import ConfigError
from ...methods.memory.calibration import Calibration, from_data
from ...methods.memory.memoir import Memoir
from ...methods.memory.tophash import mean_features
from ...models.facts import Fact
from ...models.lm import LM
from ..arms import make_arm, options_of
from ..testbed import Testbed
from . import streams
from .data import Streams, question_streams
from .mask_study import Routing, probes

SEED = 100  # of settings: no page reports it
_POOL = 200  # held-out facts at least whose locality prompts calibrate a threshold

# Tried on the companion. Weight editors are not here: they take the presets of the companion, found by
# `preset_sweep` on other unreported seeds. WISE's shards: of five edits, or halves of the stream as in MEMOIR's runner.
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "lora": [{"lr": lr} for lr in (3e-5, 1e-4, 3e-4)],
    "grace": [
        {"layer": 3, "radius": 96.0},
        *({"layer": 4, "radius": r} for r in (1.0, 8.0, 32.0, 64.0, 96.0, 192.0)),
    ],
    "defer": [{"lr": lr} for lr in (2e-4, 5e-4, 1e-3, 2e-3, 7e-3)],
    "wise": [
        {"lr": lr, "save_every": save, "merge_every": 2 * save} for save in (5, 20) for lr in (0.03, 0.1, 0.3)
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
            editor = make_arm(lm, method, given=options, background=background, statistics=statistics)
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
    stored = frame[frame["fact"] < n]
    unrelated = frame[frame["group"] == "unrelated fact"]["prompt"]
    if not len(unrelated) or not 1 <= n <= len(facts):
        raise ConfigError(
            f"calibration needs facts with locality prompts, and n of them to store; got n = {n} of {len(facts)}"
        )
    by = {g: list(stored[stored["group"] == g]["prompt"]) for g in ("edit prompt", "rephrase")}
    return calibrate_prompts(
        lm, by["edit prompt"], list(unrelated), background, rephrases=by["rephrase"], rate=rate, **options
    )


@torch.no_grad()
def calibrate_prompts(
    lm: LM,
    stored: Sequence[str],
    unrelated: Sequence[str],
    background: Sequence[str] | None = None,
    *,
    rephrases: Sequence[str] = (),
    rate: float = 0.05,
    **options: Any,
) -> Calibration:
    """`calibrate` for prompts of any kind: those of the stored edits, and those that should pass by."""
    memory = Memoir(lm, {**options, "threshold": 1.0, "n_contexts": 0}, background=background)
    memory.prepare()
    unique = list(dict.fromkeys([*stored, *unrelated, *rephrases]))
    row = {p: i for i, p in enumerate(unique)}
    features = mean_features(lm, memory.layer, unique)

    def of(prompts: Sequence[str]) -> torch.Tensor:
        return features[torch.tensor([row[p] for p in prompts], dtype=torch.long)]

    routing = Routing.of(memory.hash, of(stored))
    found = [routing.look_up(of(part))[0] if len(part) else [] for part in (unrelated, rephrases)]
    return from_data(found[0], rate, found[1])


def thresholds(
    bed: Testbed,
    counts: Sequence[int],
    *,
    rate: float = 0.05,
    seed: int = SEED,
    n_background: int = 100,
    **options: Any,
) -> dict[int, Calibration]:
    """`calibrate` for every number of stored edits in `counts`, on edits of the settings seed."""
    n = max(max(counts), _POOL)
    facts, background = question_streams(bed, n, [seed], n_background=n_background)[seed]
    return {t: calibrate(bed.lm, facts, background, n=t, rate=rate, **options) for t in counts}


def with_threshold(
    bed: Testbed,
    n: int,
    options: Mapping[str, Mapping[str, Any]],
    reported: Sequence[int],
    *,
    rate: float = 0.05,
    seed: int = SEED,
    n_background: int = 100,
) -> dict[str, Mapping[str, Any]]:
    """The options per method with MEMOIR's threshold calibrated for n stored edits, unless they give one.

    reported: seeds of the results. Raises ConfigError if the settings seed is one of them.
    """
    if seed in reported:
        raise ConfigError(
            f"calibration_seed = {seed} is one of the reported seeds {list(reported)}; choose another"
        )
    given = options_of(bed.lm, "memoir", options.get("memoir"))
    if "threshold" in given:
        return dict(options)
    found = thresholds(bed, [n], rate=rate, seed=seed, n_background=n_background, **given)
    return {**options, "memoir": {**options.get("memoir", {}), "threshold": found[n].threshold}}


_PRESET = "the companion's preset (preset_sweep, seed 101)"
_SWEEP = f"best average of the candidates on seed {SEED}"
ORIGINS: dict[str, str] = {  # arm -> where its setting comes from, for the pages
    "ft": _PRESET, "rome": _PRESET, "memit": _PRESET, "memit-seq": _PRESET, "alphaedit": _PRESET,
    "lora": _SWEEP, "grace": _SWEEP, "defer": _SWEEP, "loka": _SWEEP, "retrieval": _SWEEP,
    "retrieval-tokens": _SWEEP, "in-context": _SWEEP,
    "wise": _SWEEP,
    "wise-merge": "those of WISE retrieve",
    "memoir": f"layer: {_SWEEP}; threshold calibrated on seed {SEED}",
    "memoir-paper": "as MEMOIR, with the paper's threshold for zsRE",
}  # fmt: skip
