"""A prediction trial: facts to edit, facts to watch, editors, and what the predictors said beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ...base.errors import DataError
from ...corpora import clare
from ...corpora.world import World, edit_facts
from ...corpora.world.consequences import changes
from ...entanglement.plans import delta_shift, probe_representations
from ...entanglement.predictors import editor_scores, shared_scores
from ...entanglement.ripple import Ripple, SharedTargets, Watch, choose, measure
from ...methods.delta import Delta
from ...models.facts import Fact
from ...models.lm import LM
from ..arms import arm_named
from ..bench import Bench
from ..companion import statement_facts
from ..testbed import open_testbed

# The arms of the trials, and which of them edit one layer; by name the arms of `studies.arms`.
ARMS: dict[str, str] = {
    "rome": "rome", "memit-1": "memit-1", "alphaedit-1": "alphaedit-1", "memit": "memit", "prune": "prune-total",
    "rect": "rect", "alphaedit": "alphaedit",
}  # fmt: skip
LABELS = {name: arm_named(arm).label.split(",")[0] if name in ("prune", "rect") else arm_named(arm).label
          for name, arm in ARMS.items()}  # fmt: skip
SINGLE = ("rome", "memit-1", "alphaedit-1")


def open_setting(
    model: str = "companion",
    options: Mapping[str, Any] | None = None,
    *,
    cache_dir: str | Path | None = None,
    max_texts: int | None = 6000,
) -> Bench:
    """The bench of a model's own testbed, without requests: shared by the trials of all seeds.

    options: editing options on top of (for a model without settings, instead of) the model's own.
    """
    return Bench.of(
        open_testbed(model), 0, options=options, n_bystanders=0, cache_dir=cache_dir, max_texts=max_texts
    )


@dataclasses.dataclass
class Trial:
    """Facts to edit and to watch, of one seed."""

    setting: Bench
    edits: list[Fact]
    probes: list[Fact]
    seed: int
    _watches: dict[int, Watch] = dataclasses.field(default_factory=dict)
    _shared: SharedTargets | None = None

    @property
    def targets(self) -> SharedTargets:
        """Optimised targets, shared by the editors of this trial."""
        if self._shared is None:
            self._shared = SharedTargets(self.setting.lm, self.edits)
        return self._shared

    def watch(self, first_layer: int) -> Watch:
        """The probes, read from a layer on; kept."""
        if first_layer not in self._watches:
            self._watches[first_layer] = Watch(self.setting.lm, self.probes, first_layer=first_layer)
        return self._watches[first_layer]

    def scores(self, layer: int, names: Sequence[str], **options: Any) -> dict[str, np.ndarray]:
        """Tables of the predictors that do not depend on the editor (`predictors.shared_scores`)."""
        return shared_scores(
            self.setting.lm, self.edits, self.probes, layer, names, token="last", seed=self.seed, **options
        )

    def run(self, arm: str, names: Sequence[str] = ()) -> tuple[Ripple, dict[str, np.ndarray]]:
        """Predict first, then edit and measure: the ripples of an arm and the tables of its own predictors."""
        editor, lm = self.setting.editor(ARMS.get(arm, arm), shared=False), self.setting.lm
        layers = editor.config.layers
        keys, scale = probe_representations(lm, self.probes, layers, editor.config.token)
        residuals = self.targets.residuals(editor) if "whitened-targets" in names else None
        tables = editor_scores(
            editor, self.edits, self.probes, names, residuals=residuals, representations=(keys, scale)
        )
        self.targets.give(editor)
        deltas: list[Delta] = []
        found = measure(editor, self.edits, self.watch(min(layers)), keep=deltas)
        if "written" in names:
            tables["written"] = np.stack([delta_shift(lm, delta, keys, scale) for delta in deltas])
        return found, tables


def known_facts(lm: LM, facts: Sequence[Fact], n: int) -> list[Fact]:
    """The first n facts whose answer the model gives, in their order; fewer if there are not so many."""
    found: list[Fact] = []
    for start in range(0, len(facts), max(n, 1)):
        part = list(facts[start : start + max(n, 1)])
        found += [f for f, known in zip(part, Watch(lm, part).before.known.tolist(), strict=True) if known]
        if len(found) >= n:
            break
    return found[:n]


DESIGN_SEED = 100


def design_facts(corpus: Sequence[Fact]) -> list[Fact]:
    """The facts on which the several-layer predictor and its `length` were designed: 44 candidates for edits and 200
    probes. Trials leave them out."""
    sure = clare.unique_answers(corpus)
    order = np.random.default_rng([DESIGN_SEED, 21]).permutation(len(sure))
    edits, pool = [sure[i] for i in order[:44]], [sure[i] for i in order[44:]]
    return [*edits, *choose(edits, pool, min(200, len(pool)), DESIGN_SEED)]


def corpus_trial(
    setting: Bench, n_edits: int, n_probes: int, seed: int, *, corpus: Sequence[Fact] | None = None
) -> Trial:
    """Counterfactual edits and probes drawn from the CLaRE corpus: prompts with one recorded answer, which the model
    knows, without `design_facts`. Raises DataError if the corpus is missing or too small."""
    corpus = list(clare.load() if corpus is None else corpus)
    used = {f.key for f in design_facts(corpus)}
    sure = [f for f in clare.unique_answers(corpus) if f.key not in used]
    order = np.random.default_rng([seed, 21]).permutation(len(sure))
    half = len(order) // 2
    known = known_facts(setting.lm, [sure[i] for i in order[:half]], 2 * n_edits)
    tokenizer = setting.lm.tokenizer
    edits = clare.counterfactuals(known, seed, corpus=corpus, tokenizer=tokenizer)[:n_edits]
    if len(edits) < n_edits:
        raise DataError(f"the corpus gives {len(edits)} edits that the model knows, {n_edits} asked for")
    pool = known_facts(setting.lm, [sure[i] for i in order[half:]], n_probes)
    return Trial(setting, edits, choose(edits, pool, min(n_probes, len(pool)), seed), seed)


def world_trial(setting: Bench, n_edits: int, n_probes: int, seed: int) -> Trial:
    """Counterfactual edits of the world. Probes: every statement (first template) that an edit must change, other
    wordings of the edited facts, then random statements of the world up to n_probes."""
    world = setting.testbed.world
    edits = edit_facts(world, n_edits, seed)
    statements = statement_facts(world)
    touched = {c.key for f in edits for c in changes(world, f.relation, f.subject, f.target)}
    edited = {(f.prompt, f.subject) for f in edits}
    must = [
        f for f in statements if (f.relation, f.subject) in touched and (f.prompt, f.subject) not in edited
    ]
    order = np.random.default_rng([seed, 23]).permutation(len(statements))
    taken = {f.case_id for f in must} | {f.case_id for f in statements if (f.prompt, f.subject) in edited}
    rest = [statements[i] for i in order if statements[i].case_id not in taken]
    return Trial(setting, edits, [*must, *rest][: max(n_probes, len(must))], seed)


def wanted(world: World, edits: Sequence[Fact], probes: Sequence[Fact]) -> np.ndarray:
    """(n_e, n_p) labels: "wanted" where the edit must change the probe's answer, "unwanted" where it must not,
    "undefined" where the world does not say. Facts need their relation."""
    labels = np.full((len(edits), len(probes)), "unwanted", dtype=object)
    for i, fact in enumerate(edits):
        found = {c.key: c for c in changes(world, fact.relation, fact.subject, fact.target)}
        for j, probe in enumerate(probes):
            change = found.get((probe.relation, probe.subject))
            if change is not None:
                labels[i, j] = "undefined" if change.new is None else "wanted"
    return labels


def pair_kinds(world: World, edits: Sequence[Fact], probes: Sequence[Fact]) -> np.ndarray:
    """(n_e, n_p) finer labels: the kind of `consequences.Change` ("edit": other wordings of the edited fact, "two_hop",
    "two_hop_via", "symmetric", "undefined"), else "same subject", "same relation" or "unrelated"."""
    labels = np.full((len(edits), len(probes)), "unrelated", dtype=object)
    for i, fact in enumerate(edits):
        found = {c.key: c.kind for c in changes(world, fact.relation, fact.subject, fact.target)}
        for j, probe in enumerate(probes):
            key = (probe.relation, probe.subject)
            if key in found:
                labels[i, j] = found[key]
            elif probe.subject == fact.subject:
                labels[i, j] = "same subject"
            elif probe.relation == fact.relation:
                labels[i, j] = "same relation"
    return labels


def separation(tables: Mapping[str, Sequence[np.ndarray]], labels: Sequence[np.ndarray]) -> pd.DataFrame:
    """How well each table (a predictor, or the ripple itself) tells wanted from unwanted pairs.

    auc: chance that a wanted pair has the larger value (Mann-Whitney); mean_wanted, mean_unwanted: of the values.
    """
    rows = []
    label = np.concatenate([x.reshape(-1) for x in labels])
    for name, parts in tables.items():
        values = np.concatenate([np.asarray(p).reshape(-1) for p in parts])
        a, b = values[label == "wanted"], values[label == "unwanted"]
        if not len(a) or not len(b):
            raise DataError("separation needs wanted and unwanted pairs; use more probes or other edits")
        auc = float(stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))
        rows.append({"table": name, "auc": auc, "mean_wanted": a.mean(), "mean_unwanted": b.mean(),
                     "n_wanted": len(a), "n_unwanted": len(b)})  # fmt: skip
    return pd.DataFrame(rows)
