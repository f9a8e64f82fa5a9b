"""Streams in which facts are revised again and again, and what each policy leaves of old values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from ...base.errors import RequestError
from ...methods import Editor
from ...models.facts import Fact
from ...models.lm import LM
from ...scoring import generate, says, score_targets
from ..bench import Bench
from ..testbed import TableTestbed
from .health import states


@dataclasses.dataclass(frozen=True)
class Stream:
    """rounds[r]: facts written in round r. Revised facts come once a round, each control once, spread
    over the rounds.

    values: (prompt, subject) -> the values written so far, in order, after the whole stream.
    """

    rounds: list[list[Fact]]
    revised: list[Fact]
    controls: list[Fact]

    @property
    def facts(self) -> list[Fact]:
        """Every edit request in order."""
        return [f for batch in self.rounds for f in batch]

    def values(self, fact: Fact, until: int | None = None) -> list[str]:
        """Values given to the prompt of a fact in the first `until` rounds (None: all), in order."""
        chosen = self.rounds if until is None else self.rounds[:until]
        return [
            f.target
            for batch in chosen
            for f in batch
            if (f.prompt, f.subject) == (fact.prompt, fact.subject)
        ]


def revision_stream(
    facts: Sequence[Fact], n_revised: int, n_rounds: int, pools: dict[str, Sequence[str]], seed: int
) -> Stream:
    """The first n_revised facts get a new value in every round, each other fact is written once.

    pools: relation (or prompt) -> objects to draw new values from; neither the true object nor an earlier
        value comes again. Raises RequestError if a pool is too small or there are no facts left as controls.
    """
    if not 0 < n_revised < len(facts) or n_rounds < 2:
        raise RequestError(
            f"{n_revised} revised of {len(facts)} facts in {n_rounds} rounds: some must be revised, some "
            "not, and a revision needs a second round"
        )
    rng = np.random.default_rng([seed, 21])
    revised, controls = list(facts[:n_revised]), list(facts[n_revised:])
    versions = []
    for fact in revised:
        taken = {fact.target, fact.target_true}
        pool = [o for o in dict.fromkeys(pools[fact.relation or fact.prompt]) if o not in taken]
        if len(pool) < n_rounds - 1:
            raise RequestError(
                f"{fact.text!r}: {n_rounds} rounds need {n_rounds - 1} more objects, there are {len(pool)}"
            )
        later = [pool[i] for i in rng.permutation(len(pool))[: n_rounds - 1]]
        versions.append([fact.target, *later])
    rounds = []
    for r in range(n_rounds):
        batch = [
            f.replace(target=v[r], case_id=f"{f.case_id}-r{r}")
            for f, v in zip(revised, versions, strict=True)
        ]
        rounds.append(batch + controls[r::n_rounds])
    return Stream(rounds, revised, controls)


def object_pools(bench: Bench) -> dict[str, list[str]]:
    """relation (or prompt) -> objects that occur in it, in the world or among the facts of the corpus."""
    if isinstance(bench.testbed, TableTestbed):
        return {r: bench.testbed.table.objects(r) for r in {f.relation for f in bench.facts}}
    pools: dict[str, list[str]] = {}
    for fact in bench.facts:
        pools.setdefault(fact.relation or fact.prompt, []).extend(
            o for o in (fact.target, fact.target_true) if o
        )
    return {k: sorted(set(v)) for k, v in pools.items()}


def write_round(editor: Editor, facts: Sequence[Fact], written: set[tuple[str, str]]) -> int:
    """Edit one round; returns how many facts the editor refused. written: (prompt, subject) in force,
    updated.

    An editor with policy "refuse" raises before it changes anything; its user then drops the known facts.
    """
    keys = {(f.prompt, f.subject) for f in facts}
    try:
        editor.edit(facts)
        written |= keys
        return 0
    except RequestError:
        new = [f for f in facts if (f.prompt, f.subject) not in written]
        if len(new) == len(facts):
            raise
        if new:
            editor.edit(new)
        written |= {(f.prompt, f.subject) for f in new}
        return len(facts) - len(new)


def state_gap(bench: Bench, facts: Sequence[Fact], before: Tensor) -> np.ndarray:
    """||z - h|| / ||z - h_0|| of each fact (n,): 0 where its target state is reached, 1 as if never written.

    before: h_0 (m, n), the states of the same prompts on the unedited model. Needs shared targets z.
    """
    Z = bench.targets(facts)
    now = states(bench, [(f.prompt, f.subject, f.target) for f in facts]).to(Z)
    return ((Z - now).norm(dim=0) / (Z - before.to(Z)).norm(dim=0)).cpu().numpy()


def read_back(lm: LM, stream: Stream, until: int) -> pd.DataFrame:
    """What the model says about every fact after `until` rounds, one row per fact already written.

    Columns: kind ("revised", "control"), subject, versions (values so far), says ("latest", "old",
        "original", "other"), p_latest, p_old (probability of the latest value, and of the most likely earlier
        one; NaN without any).
    """
    rows, chosen = [], []
    for kind, facts in (("revised", stream.revised), ("control", stream.controls)):
        chosen += [(kind, f, v) for f in facts if (v := stream.values(f, until))]
    pairs = list(dict.fromkeys((f.text, value) for _, f, values in chosen for value in values))
    chance = {p: float(np.exp(-s.nll_sum)) for p, s in zip(pairs, score_targets(lm, pairs), strict=True)}
    room = [12] * len(chosen)
    made = generate(lm, [f.text for _, f, _ in chosen], max_new_tokens=room)
    for (kind, fact, values), text in zip(chosen, made, strict=True):
        said = "other"
        for name, group in (("original", [fact.target_true]), ("old", values[:-1]), ("latest", values[-1:])):
            if any(says(text.text, v) for v in group if v):
                said = name
        old = [chance[fact.text, v] for v in values[:-1]]
        rows.append({
            "kind": kind, "subject": fact.subject, "versions": len(values), "says": said,
            "p_latest": chance[fact.text, values[-1]], "p_old": max(old) if old else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)
