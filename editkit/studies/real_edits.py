"""Edits of facts that a real model knows: draws, scores, and sweeps that optimise targets once for all priors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..corpora.table import FactTable, Key
from ..corpora.world.consequences import changes
from ..corpora.world.records import edit_facts
from ..locate.moments import second_moment
from ..locate.targets import TargetConfig, optimize_targets
from ..locate.tracing import CausalTrace
from ..methods import make_editor
from ..models.facts import Fact
from ..models.lm import LM
from ..models.products import Products, products
from ..scoring.generation import generate
from ..scoring.protocols import says
from ..scoring.stats import bootstrap_mean
from .real import moment_texts

AXES = ("efficacy", "paraphrase", "others")


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
    facts = edit_facts(
        known, n, seed, relations, n_neighbors=0, n_locality=0, n_same_subject=0, n_consequences=0
    )
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


def profile(trace: CausalTrace) -> pd.DataFrame:
    """Average indirect effect with 95 % bootstrap intervals over facts: columns group, layer, effect, lo, hi, n."""
    rows = []
    for g, group in enumerate(trace.groups):
        for layer in range(trace.effect.shape[2]):
            values = trace.effect[:, g, layer]
            if not np.isnan(values).all():
                found = bootstrap_mean(values, n_boot=500)
                rows.append((group, layer, found.mean, found.lo, found.hi, found.n))
    return pd.DataFrame(rows, columns=["group", "layer", "effect", "lo", "hi", "n"])


def statistics(
    lm: LM,
    table: FactTable,
    layers: Iterable[int],
    cache_dir: str | Path | None = None,
    n_tokens: int = 80_000,
):
    """Second moments by layer, over prompts of the table and ordinary English, half and half.

    The prompts matter: without text like what is edited, the same edits cost twice as many other facts.
    """
    return second_moment(lm, list(layers), moment_texts("both", n_tokens, lm, table), cache_dir=cache_dir)


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


def sweep(
    lm: LM,
    drawn: Draw,
    moments: Mapping,
    targets: Mapping[str, Any],
    contexts,
    settings: Sequence[Mapping[str, Any]],
    *,
    cache_dir: str | Path | None = None,
    how: Products = "bfloat16",
) -> pd.DataFrame:
    """One row per setting: the draw written in one batch towards the same targets, and the share of right answers.

    targets: options of `TargetConfig`.   settings: {"editor": name, "layers": ..., further options}; all end at one
    layer, whose targets are optimised once.
    """
    last = {s["layers"][-1] for s in settings}
    if len(last) != 1:
        raise ValueError(f"settings of one sweep share their last layer, got {sorted(last)}")
    Z = optimize_targets(
        lm, drawn.facts, last.pop(), TargetConfig.make(targets), contexts=contexts, cache_dir=cache_dir
    ).z
    rows = []
    for setting in settings:
        own = {k: v for k, v in setting.items() if k != "editor"}
        editor = make_editor(setting["editor"], lm, statistics=moments, contexts=contexts, **own)
        editor.targets = lambda facts: Z  # replaces this one step of the pipeline, in this instance
        try:
            editor.edit(drawn.facts)
            found = ask(lm, drawn, how).groupby("axis")["success"].mean()
        finally:
            editor.restore()
        rows.append({**setting, "layers": str(list(setting["layers"])), **{a: found[a] for a in AXES}})
    return pd.DataFrame(rows)
