"""Hypernetwork editors on a world: train on facts that the test does not share, edit, score, compare.

What the HORSE notebooks call. Layers, step sizes and numbers of steps were chosen on validation facts of seed 51,
which no results page reads, with the same trials for MALMEN and HORSE (notebooks/horse_training.ipynb).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from ...base.config import check_known
from ...base.errors import ConfigError
from ...methods.hypernet.data import Apart, EditRecord, TargetField, disjoint, records_of
from ...methods.hypernet.network import METHODS, Hypernetwork, make_hypernetwork
from ...methods.hypernet.training import Trainer
from ...models.facts import Fact
from ...models.lm import LM
from ...scoring.stats import Interval, bootstrap_mean
from ..arms import make_arm
from ..testbed import Testbed

if TYPE_CHECKING:
    from ...methods import Editor

AXES = {
    "rome": ("efficacy", "paraphrase", "neighborhood"),
    "rome_zsre": ("efficacy", "paraphrase", "locality"),
    "generate": ("efficacy", "paraphrase", "neighborhood", "locality"),
}
"""Axes that each protocol of the comparison reads; the last of the first two is the papers' specificity."""

# One network for all, small enough for a companion; the papers' rank is 1,920 on models of 7 billion.
PROBES = {"n_paraphrases": 2, "protected": 2, "n_same_subject": 0}  # of every edited fact
NETWORK: dict[str, Any] = {"rank": 32, "n_blocks": 2, "lr": 1e-3}
TRAINING: dict[str, dict[str, Any]] = {
    "mend": {"meta_lr": 3e-4, "locality": "kl"},
    "malmen": {"meta_lr": 3e-4, "locality": "kl"},
    "rledit": {"meta_lr": 1e-3, "locality": "kl", "loc_coef": 0.6},
    "horse": {"meta_lr": 3e-4, "locality": "cross_entropy"},
}


def last_half(lm: LM) -> list[int]:
    """The layers that hypernetworks edit: the upper half of the model (published: the last six of 32).

    On validation facts of the companion they do better there than in MEMIT's layers (horse_training.ipynb).
    """
    return list(range(lm.n_layers // 2, lm.n_layers))


def as_released_field(facts: Sequence[Fact]) -> list[Fact]:
    """The same requests with the object that is true already as the target: CounterFact's `ground_truth`."""
    return [f.replace(target=f.target_true) for f in facts]


def training_records(
    bed: Testbed,
    test: Sequence[Fact],
    seed: int,
    *,
    target: TargetField = "target_new",
    n: int = 300,
    draws: int = 3,
    by: Apart = "subject",
) -> list[EditRecord]:
    """Training records from `draws` draws of n edits each, disjoint from the test facts.

    target: "target_new", or "ground_truth" as the published HORSE code reads CounterFact.   by: see `disjoint`.
    """
    facts = [f for k in range(draws) for f in bed.edits(n, 1000 + draws * seed + k, **PROBES)]
    return disjoint(records_of(facts, target), test, by=by)


def make_trainer(
    lm: LM,
    records: Sequence[EditRecord],
    method: str,
    *,
    layers: Sequence[int],
    n_edits: int,
    n_probes: int | None = None,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Trainer:
    """A trainer with an untrained network; RLEdit's steps are sequences of four batches of n_edits / 2.

    n_probes: facts of a step that the loss asks about (RLEdit: half of it in each batch).
    network, training: options over `NETWORK` and `TRAINING`.
    """
    check_known([method], sorted(METHODS), "hypernetwork method")
    net = make_hypernetwork(method, lm, layers=layers, **{**NETWORK, "seed": seed, **(network or {})})
    options = {**TRAINING[method], "n_edits": n_edits, "n_probes": n_probes, "seed": seed}
    if method == "rledit":
        probes = n_probes and max(1, n_probes // 2)
        options |= {"length": 4, "n_edits": max(1, n_edits // 2), "n_probes": probes}
    return Trainer(lm, net, records, {**options, **(training or {})})


def train(lm: LM, records: Sequence[EditRecord], method: str, *, steps: int, **options: Any) -> Trainer:
    """A trained hypernetwork (in `.net`) that has edited steps x n_edits facts, with repetition.

    RLEdit's sequences hold twice as many facts as a step, so it makes half as many updates.
    options: those of `make_trainer`.
    """
    trainer = make_trainer(lm, records, method, **options)
    trainer.train(max(1, steps // 2) if method == "rledit" else steps)
    return trainer


def learning_curve(
    lm: LM,
    records: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    method: str,
    *,
    steps: int,
    every: int,
    **options: Any,
) -> pd.DataFrame:
    """Token accuracy on validation facts, all edited at once, after every `every` steps of training.

    Columns: facts (edited so far in training, with repetition), edits, paraphrases, unrelated and their mean
    average, and the training losses since the last row. RLEdit makes half as many updates (see `train`).
    options: those of `make_trainer`.
    """
    trainer, rows = make_trainer(lm, records, method, **options), []
    for begin in range(0, steps, every):
        part = min(every, steps - begin)
        log = trainer.train(max(1, part // 2) if method == "rledit" else part)
        found = trainer.validate(validation)
        rows.append(
            {"step": begin + part, "facts": (begin + part) * options["n_edits"], **found,
             "average": sum(found.values()) / len(found),
             "paraphrase loss": sum(e.generalization for e in log) / len(log),
             "locality loss": sum(e.locality for e in log) / len(log)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def scores_now(lm: LM, facts: Sequence[Fact], protocols: Sequence[str] = tuple(AXES)) -> pd.DataFrame:
    """Rows of `scoring.score` of the model as it is, each protocol on its axes."""
    from ...scoring import score

    return pd.concat([score(lm, facts, p, axes=AXES[p]) for p in protocols], ignore_index=True)


def edit_and_score(
    lm: LM,
    facts: Sequence[Fact],
    editor: Editor,
    *,
    protocols: Sequence[str] = tuple(AXES),
    facts_per_edit: int | None = None,
) -> tuple[pd.DataFrame, float]:
    """Edit (all facts at once, or in batches), score after the last edit, restore: rows and seconds of editing."""
    size = facts_per_edit or len(facts)
    try:
        begin = time.perf_counter()
        for k in range(0, len(facts), size):
            editor.edit(facts[k : k + size])
        seconds = time.perf_counter() - begin
        return scores_now(lm, facts, protocols), seconds
    finally:
        editor.restore()


def make_any_editor(
    lm: LM,
    method: str,
    trained: Hypernetwork | None,
    statistics: Mapping[int, Any] | None,
    *,
    targets: dict[str, Tensor] | None = None,
    **options,
) -> Editor:
    """The editor of a method: a trained hypernetwork's, or a locate-then-edit one at the model's preset.

    targets: an empty dictionary for one list of facts and the unedited model. The first locate-then-edit
        method leaves its targets there, the next ones, whose targets are the same, take them. Targets of
        the first k facts are their first k columns.
    """
    if method in METHODS:
        return make_arm(lm, method, given=options, networks={} if trained is None else {method: trained})

    def keep(key: str, value: Tensor) -> None:
        if key == "z" and targets is not None:
            targets.setdefault(key, value)

    made = make_arm(lm, method, given=options, statistics=statistics, record=keep)
    if targets and "z" in targets:
        made.targets = lambda facts: targets["z"]  # replaces this one step of the pipeline, in this instance
    return made


def units(rows: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """One row per method, seed and fact: the mean on each axis of the protocol, and their mean "average"."""
    part = rows[(rows["protocol"] == protocol) & rows["axis"].isin(AXES[protocol])]
    table = part.pivot_table(
        index=["editor", "seed", "fact_id"], columns="axis", values="success", aggfunc="mean"
    )
    table["average"] = table[list(AXES[protocol])].mean(axis=1)
    return table.reset_index()


def gain(rows: pd.DataFrame, protocol: str, method: str, others: Sequence[str], column: str) -> Interval:
    """Mean over facts of (method - mean of the others) in a column of `units`; facts resampled inside seeds.

    Where no fact differs, the interval is +- the exact binomial bound on the share of facts that would.
    """
    table = units(rows, protocol).pivot(index=["seed", "fact_id"], columns="editor", values=column)
    missing = [m for m in (method, *others) if m not in table]
    if missing:
        raise ConfigError(f"the scores hold no method {missing[0]!r}")
    difference = table[method] - table[list(others)].mean(axis=1)
    found = bootstrap_mean(difference.to_numpy(), difference.index.get_level_values("seed").to_numpy())
    if not difference.any():
        return dataclasses.replace(found, lo=-found.hi)
    return found
