"""Streams of batches on a model: the papers' scores, and the distance to one-time editing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from torch import Tensor

from ...base.errors import DataError
from ...locate.contexts import ContextTemplates
from ...locate.keys import compute_keys
from ...models.facts import Fact
from ...scoring import Interval, bootstrap_mean, score, score_text, summarize
from ..bench import Bench
from ..streams import edit_stream, spread
from .sequences import relative

AXES = ("efficacy", "paraphrase", "neighborhood", "same_subject")


def scores_now(
    bench: Bench,
    facts: Sequence[Fact],
    *,
    axes: Sequence[str] = AXES,
    protocols: Sequence[str] = ("rome", "generate"),
    n_text: int = 0,
    text_tokens: int = 100,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score facts on the model as it is: rows of `scoring.score`, and of `scoring.score_text` (fluency).

    Axes without any probe are left out.   n_text: facts whose free text of text_tokens tokens is scored; the
    second table is empty for 0.
    """
    present = [a for a in axes if any(_has(f, a) for f in facts)]
    rows = pd.concat([score(bench.lm, facts, p, present) for p in protocols], ignore_index=True)
    chosen = spread([f for f in facts if f.generation], n_text)
    if not chosen or not n_text:
        return rows, pd.DataFrame(columns=["fact_id", "fluency", "consistency", "text"])
    return rows, score_text(bench.lm, chosen, seed=seed, max_total_tokens=text_tokens)


def _has(fact: Fact, axis: str) -> bool:
    field = {"paraphrase": "paraphrases", "consequence": "consequences"}.get(axis, axis)
    return axis == "efficacy" or bool(getattr(fact, field))


PAPER_COLUMNS = {"efficacy": "Eff", "paraphrase": "Gen", "neighborhood": "Spe", "same_subject": "Same"}


def paper_row(
    rows: pd.DataFrame, text: pd.DataFrame, protocol: str, *, n_boot: int = 1000
) -> dict[str, dict]:
    """One line of the papers' tables: column -> {"mean", "lo", "hi", "n"}; Flu in bits, the others 0..1.

    Eff, Gen, Spe are the averages over facts on efficacy, paraphrase and neighborhood; Same is the
    same-subject axis, which the papers do not have. Intervals are 95 % bootstrap over facts (and seeds,
    if the rows have several).
    """
    found: dict[str, dict] = {}
    summary = summarize(rows[rows["protocol"] == protocol], ["axis"], n_boot=n_boot)
    for row in summary.itertuples():
        if row.axis in PAPER_COLUMNS:
            found[PAPER_COLUMNS[row.axis]] = {"mean": row.mean, "lo": row.lo, "hi": row.hi, "n": row.n_facts}
    for column, metric in (("Flu", "fluency"), ("Con", "consistency")):
        values = text[metric].dropna() if metric in text else []
        if len(values):
            groups = text.loc[values.index, "seed"] if "seed" in text else None
            interval = bootstrap_mean(values, groups, n_boot=n_boot)
            found[column] = {"mean": interval.mean, "lo": interval.lo, "hi": interval.hi, "n": interval.n}
    return found


def paired_gain(
    a: pd.DataFrame, b: pd.DataFrame, axis: str, protocol: str, *, n_boot: int = 1000
) -> Interval:
    """Mean success of a minus that of b on the same facts, 95 % bootstrap interval over facts (and seeds).

    a, b: rows of `scores_now` with a column seed. Raises DataError if they do not hold the same facts.
    """
    x, y = (
        t[(t["axis"] == axis) & (t["protocol"] == protocol)].groupby(["seed", "fact_id"])["success"].mean()
        for t in (a, b)
    )
    if set(x.index) != set(y.index) or not len(x):
        raise DataError(f"not the same facts on {axis}: {len(x)} and {len(y)}; score both on one list")
    gain = (x - y.reindex(x.index)).reset_index()
    values, groups = gain["success"], gain["seed"] if gain["seed"].nunique() > 1 else None
    if values.nunique() > 1:
        return bootstrap_mean(values, groups, n_boot=n_boot)
    # Equal differences cannot be resampled; the interval of a share of zero, on both sides.
    same, width = float(values.iloc[0]), bootstrap_mean(0 * values.abs(), n_boot=n_boot).hi
    return Interval(same, max(-1.0, same - width), min(1.0, same + width), len(values), "equal differences")


def total_updates(bench: Bench, layers: Sequence[int]) -> Callable[[], dict[int, Tensor]]:
    """Remember the weights now; the returned function gives the change since then, layer -> (m, d)."""
    before = {layer: bench.lm.get_matrix(layer) for layer in layers}
    return lambda: {layer: bench.lm.get_matrix(layer) - W for layer, W in before.items()}


SETTINGS = {
    # label: (all layers, sampled contexts, shared targets)
    "one layer, bare prompt, fixed targets": (False, False, True),
    "one layer, mean keys, fixed targets": (False, True, True),
    "one layer, bare prompt, re-optimised targets": (False, False, False),
    "all layers, bare prompt, fixed targets": (True, False, True),
    "all layers, mean keys, re-optimised targets": (True, True, False),
}


def pipeline_gap(
    bench: Bench, batch: int, *, arm: str = "memit-seq", settings: Sequence[str] = tuple(SETTINGS)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Distance between editing in batches and editing at once on the model, condition by condition.

    Returns (gaps, drift). gaps: setting, layer, distance ||A_seq - A_one|| / ||A_one||, and the share of
    facts that the model states (greedy) after each: sequential, one_time. drift: setting, layer, the
    relative distance between the keys on the unedited and on the finally edited model, one row per fact.
    """
    gaps, drift = [], []
    protocol = "generate"
    bench.prepare()
    for setting in settings:
        everywhere, mean_keys, fixed = SETTINGS[setting]
        layers = bench.layers if everywhere else bench.layers[-1:]
        contexts = bench.contexts if mean_keys else ContextTemplates()
        K0 = compute_keys(bench.lm, bench.facts, layers, token=bench.token, contexts=contexts)
        found, stated = {}, {}
        # In one batch, re-optimised targets are those of the unedited model: shared ones, if contexts agree.
        runs = (("one_time", len(bench.facts), fixed or mean_keys), ("sequential", batch, fixed))
        for name, size, shared in runs:
            editor = bench.editor(arm, contexts=contexts, shared=shared, layers=layers)
            change = total_updates(bench, layers)
            try:
                edit_stream(editor, bench.facts, size)
                found[name] = change()
                stated[name] = score(bench.lm, bench.facts, protocol, ["efficacy"])["success"].mean()
                if name == "sequential":
                    K = compute_keys(bench.lm, bench.facts, layers, token=bench.token, contexts=contexts)
            finally:
                editor.restore()
        for layer in layers:
            distance = relative(found["sequential"][layer], found["one_time"][layer])
            gaps.append({"setting": setting, "layer": layer, "distance": distance, **stated})
            moved = (K[layer] - K0[layer]).norm(dim=0) / K0[layer].norm(dim=0)
            drift += [{"setting": setting, "layer": layer, "drift": float(x)} for x in moved]
    return pd.DataFrame(gaps), pd.DataFrame(drift)
