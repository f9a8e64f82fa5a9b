"""Edits of facts that a real model knows: draws, questions, and what an arm makes of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ..corpora import real
from ..corpora.table import FactTable, Key
from ..corpora.world.consequences import changes
from ..corpora.world.records import edit_facts
from ..locate.tracing import CausalTrace
from ..models.facts import Fact
from ..models.lm import LM
from ..models.products import Products, products
from ..scoring.generation import generate
from ..scoring.protocols import says
from .arms import make_arm
from .real import known
from .testbed import TableTestbed, open_model

AXES = ("efficacy", "paraphrase", "others")
N_ENGLISH = 1500


@dataclasses.dataclass(frozen=True)
class Draw:
    """Edits of known facts and what is asked about them.

    facts: edit requests with paraphrases.   others: (prompt, answer) of known facts of the edited relations that no
    edit touches.
    """

    facts: list[Fact]
    others: list[tuple[str, str]]

    def questions(self) -> list[tuple[str, str, str]]:
        """(axis, prompt, wanted answer) of everything that is asked after the edits."""
        asked = [("efficacy", f.text, f.target) for f in self.facts]
        asked += [("paraphrase", p, f.target) for f in self.facts for p in f.paraphrases]
        return asked + [("others", prompt, answer) for prompt, answer in self.others]


def draw(
    known: FactTable, n: int, seed: int, *, n_others: int = 200, relations: Sequence[str] | None = None
) -> Draw:
    """n edits of a table of known facts. n_others: at most that many protected facts, drawn like the edits' relations.

    Raises RequestError if the table has not enough edits.
    """
    probes = {"n_neighbors": 0, "n_locality": 0, "n_same_subject": 0, "n_consequences": 0}
    facts = edit_facts(known, n, seed, relations, n_paraphrases=3, **probes)
    touched = {c.key for f in facts for c in changes(known, f.relation, f.subject, f.target)}
    subjects = {f.subject for f in facts}
    used = sorted({f.relation for f in facts})
    left = [(r, s) for r in used for s in known.subjects(r) if (r, s) not in touched and s not in subjects]
    rng = np.random.default_rng([seed, 7])
    chosen = [left[i] for i in rng.permutation(len(left))[:n_others]]
    return Draw(facts, [(known.relation(r).templates[0].fill(s), known.value(r, s)) for r, s in chosen])


def true_facts(table: FactTable, keys: Iterable[Key]) -> list[Fact]:
    """Facts of a table as they are, in the first wording: input of tracing and interchange."""
    return [
        Fact(
            prompt=table.relation(r).templates[0].text, subject=s, target=table.value(r, s),
            target_true=table.value(r, s), relation=r, case_id=f"{r}/{s}",
        )
        for r, s in keys
    ]  # fmt: skip


def profile(trace: CausalTrace, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Average indirect effect with 95 % percentile bootstrap intervals over facts: columns group, layer, effect, lo,
    hi, n (facts that have the group). All cells are resampled together.
    """
    n, groups, layers = trace.effect.shape
    effect = trace.effect.reshape(n, -1)
    present = ~np.isnan(effect)
    times = np.random.default_rng(seed).multinomial(
        n, np.full(n, 1 / n), size=n_boot
    )  # of each fact in each resample
    with np.errstate(invalid="ignore", divide="ignore"):
        means = times @ np.where(present, effect, 0.0) / (times @ present)
    lo, hi = (np.nanquantile(means[:, present.any(0)], q, axis=0) for q in (0.025, 0.975))
    index = np.indices((groups, layers)).reshape(2, -1)[:, present.any(0)]
    return pd.DataFrame(
        {
            "group": np.array(trace.groups)[index[0]],
            "layer": index[1],
            "effect": trace.average().reshape(-1)[present.any(0)],
            "lo": lo,
            "hi": hi,
            "n": present.sum(0)[present.any(0)],
        }
    )


@dataclasses.dataclass(frozen=True)
class RealTestbed(TableTestbed):
    """A model and the real facts that it says. Its text: their statements, and as many texts of ordinary English, at
    least `N_ENGLISH` of them, so that the moments have full rank.

    The statements matter: with second moments of English alone, the same edits cost twice as many other facts.
    """

    @property
    def n_editable(self) -> int:
        """Known facts of relations that are edited."""
        return sum(len(self.table.subjects(r)) for r in self.table.editable)

    def texts(self) -> list[str]:
        statements = real.prompts(self.table)
        return [*statements, *real.english()[: max(N_ENGLISH, len(statements))]]


def open_real(
    model: str, n_asked: int = 0, *, seed: int = 0, cache_dir: str | Path | None = None
) -> RealTestbed:
    """A model with those of the real facts that it says, of at most n_asked asked per relation (0: all).

    Raises DataError "not available here" for a model that has to be fetched first.
    """
    lm = open_model(model)
    with products(lm):  # a fact is known or not; the edits themselves are scored as the model computes
        table = known(lm, real.load(), n_asked, seed=seed, cache_dir=cache_dir)
    return RealTestbed(lm, "real", "", table, real.english())


def ask(lm: LM, drawn: Draw, how: Products = "model") -> pd.DataFrame:
    """What the model says to all questions of a draw: columns axis, prompt, wanted, said, success.

    A question counts if the greedy continuation begins with the wanted answer and a word ends there. how: kind of
    products, see `models.products`.
    """
    rows = pd.DataFrame(drawn.questions(), columns=["axis", "prompt", "wanted"])
    tokens = [len(lm.tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) + 1 for w in rows["wanted"]]
    with products(lm, how):
        rows["said"] = [g.text for g in generate(lm, list(rows["prompt"]), max_new_tokens=tokens)]
    rows["success"] = [says(t, w, "prefix") for t, w in zip(rows["said"], rows["wanted"], strict=True)]
    return rows


def attempt(
    lm: LM,
    drawn: Draw,
    arm: str,
    options: Mapping[str, Any] | None = None,
    *,
    Z: Tensor | None = None,
    alone: bool = False,
    how: Products = "model",
    **needs: Any,
) -> dict[str, float]:
    """Write a draw with an arm and ask: share of right answers by axis, and how many were asked ("n ...").

    options: over the model's own.   Z: (m, n) targets of the facts, instead of the editor's own.   alone: every fact
    is edited by itself and taken back; it is asked about itself and about its share of the protected facts.
    needs: statistics, contexts, background, networks, as in `make_arm`. The model is restored.
    """
    parts = [drawn]
    if alone:
        n = len(drawn.facts)
        parts = [Draw([fact], drawn.others[i::n]) for i, fact in enumerate(drawn.facts)]
    said = []
    for i, part in enumerate(parts):
        editor = make_arm(lm, arm, given=options, **needs)
        if Z is not None:
            ready = Z[:, i : i + 1] if alone else Z
            editor.targets = lambda facts, ready=ready: (
                ready
            )  # replaces this one step of the pipeline, in this instance
        try:
            editor.edit(part.facts)
            said.append(ask(lm, part, how))
        finally:
            editor.restore()
    found = pd.concat(said).groupby("axis")["success"]
    return {**found.mean().to_dict(), **{f"n {axis}": int(n) for axis, n in found.size().items()}}


def grid(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of the values of some options."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
