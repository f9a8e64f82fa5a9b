"""What the model-level experiments share: a model, facts, statistics, contexts, targets, and named arms.

An arm is one row of a comparison: an editor with options and a fixed look. Targets can be optimised once,
    on the unedited model, and given to every arm ("shared"): one of the conditions of the equivalence
    theorem, and the only way in which arms differ by their solve alone. "fresh" targets are optimised before
    every batch, as in the released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base.config import check_known
from ...base.errors import ConfigError, DataError
from ...base.paths import user_path
from ...base.progress import bar
from ...corpora.world import World
from ...locate.contexts import ContextTemplates, sample_contexts
from ...locate.moments import Covariance
from ...locate.targets import TargetConfig, optimize_targets
from ...methods import EDITORS, Editor, make_editor
from ...models.facts import Fact
from ...models.lm import LM
from ...press.plotting import Look, look

CHUNK = 20  # facts per stored file of targets


@dataclasses.dataclass(frozen=True)
class Arm:
    """A row of a comparison. family: whose preset and colour it takes."""

    label: str
    editor: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    family: str = "memit"
    linestyle: str | None = None

    @property
    def look(self) -> Look:
        """Colour and marker of the family, this arm's label and dash."""
        base = look(self.family)
        return dataclasses.replace(base, label=self.label, linestyle=self.linestyle or base.linestyle)


_COMPENSATED = {"history": True, "compensate": True}
_ONE_PASS = {"alpha": 0.0, "upper_bound": 1e9, "passes": 1}  # NSE: every fact once, like the others
ARMS: dict[str, Arm] = {
    "memit": Arm("MEMIT", "memit", {}, "memit", ":"),
    "memit-seq": Arm("MEMIT + history", "memit_seq", {}, "memit-seq", "-"),
    "alphaedit": Arm("AlphaEdit", "alphaedit", {}, "alphaedit", "-"),
    "alphaedit-naive": Arm("AlphaEdit, no history", "alphaedit", {"history": False}, "alphaedit", ":"),
    "rect": Arm("RECT, naive", "rect", {}, "rect", ":"),
    "rect-history": Arm("RECT + history", "rect", {"history": True}, "rect", "--"),
    "rect-compensated": Arm("RECT + history + compensation", "rect", _COMPENSATED, "rect", "-"),
    "prune-total": Arm("PRUNE, as published", "prune", {"when": "total"}, "prune", "-."),
    "prune": Arm("PRUNE, naive", "prune", {"when": "step"}, "prune", ":"),
    "prune-history": Arm("PRUNE + history", "prune", {"when": "step", "history": True}, "prune", "--"),
    "prune-compensated": Arm(
        "PRUNE + history + compensation", "prune", {"when": "step", **_COMPENSATED}, "prune", "-"
    ),
    "nse": Arm("NSE", "nse", _ONE_PASS, "nse", ":"),
    "nse-compensated": Arm("NSE + compensation", "nse", {**_ONE_PASS, "compensate": True}, "nse", "-"),
    "latest-full": Arm("latest batch only, full", "memorize_latest", {}, "memit", "--"),
    "latest-null": Arm(
        "latest batch only, null space", "memorize_latest", {"simplified": True}, "alphaedit", "--"
    ),
}  # fmt: skip


@dataclasses.dataclass
class Bench:
    """A model and all that its edits need. Made by `open_bench`; the model must be unedited at that
    moment.

    options: editing options of the MEMIT family.   alphaedit: those of AlphaEdit.   given: fact key -> target
        z.
    bystanders: (template, subject, true answer) of facts that no edit touches.
    """

    lm: LM
    world: World
    corpus: str
    facts: list[Fact]
    options: dict[str, Any]
    alphaedit: dict[str, Any]
    statistics: Mapping[int, Covariance]
    contexts: ContextTemplates
    fingerprint: str
    cache_dir: Path | None = None
    given: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    bystanders: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.options["layers"])

    @property
    def token(self) -> str:
        return self.options.get("token", "subject_last")

    @property
    def stop(self) -> str:
        """What ends a stated fact: the world's sentences end after the answer, other corpora do not say."""
        return "." if self.corpus == "world" else ""

    def arm_options(self, arm: str) -> dict[str, Any]:
        """The options an arm is made with: the preset's, then the arm's own."""
        spec = arm_named(arm)
        preset = dict(self.alphaedit if spec.editor == "alphaedit" else self.options)
        if arm == "latest-null":  # the null space and ridge of AlphaEdit
            preset |= {k: self.alphaedit[k] for k in ("threshold", "ridge") if k in self.alphaedit}
            preset = {"threshold": 0.02, "ridge": 10.0, **preset}
        known = {f.name for f in dataclasses.fields(EDITORS[spec.editor].Config)}
        return {k: v for k, v in preset.items() if k in known} | dict(spec.options)

    def editor(
        self, arm: str, *, contexts: ContextTemplates | None = None, shared: bool = True, **options
    ) -> Editor:
        """A fresh editor of an arm. shared: it writes the given targets instead of optimising its own."""
        made = make_editor(
            arm_named(arm).editor, self.lm, statistics=self.statistics,
            contexts=self.contexts if contexts is None else contexts, **{**self.arm_options(arm), **options},
        )  # fmt: skip
        if shared:
            made.targets = self.targets  # replaces this one step of the pipeline, in this instance
        return made

    def targets(self, facts: Sequence[Fact]) -> Tensor:
        """Z (m, n) of facts whose targets have been prepared."""
        missing = [f.text for f in facts if f.key not in self.given]
        if missing:
            raise ConfigError(
                f"{len(missing)} facts have no shared target, first {missing[0]!r}; call prepare(facts)"
            )
        return torch.stack([self.given[f.key] for f in facts], dim=1)

    def prepare(self, facts: Sequence[Fact] | None = None) -> None:
        """Optimise the targets of facts on the unedited model, once; found again in the cache folder."""
        facts = self.facts if facts is None else list(facts)
        todo = [f for f in facts if f.key not in self.given]
        if not todo:
            return
        if self.lm.fingerprint() != self.fingerprint:
            raise ConfigError(
                "the model carries an edit; shared targets belong to the unedited model: restore it"
            )
        config = TargetConfig(**{
            f.name: self.options[f"z_{f.name}"]
            for f in dataclasses.fields(TargetConfig) if f"z_{f.name}" in self.options
        })  # fmt: skip
        for chunk in bar([todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)], "targets", unit="chunk"):
            Z = self._stored(chunk, config)
            self.given |= {f.key: z for f, z in zip(chunk, Z.T, strict=True)}

    def _stored(self, facts: Sequence[Fact], config: TargetConfig) -> Tensor:
        return optimize_targets(
            self.lm, list(facts), self.layers[-1], config, contexts=self.contexts, token=self.token,
            cache_dir=self.cache_dir,
        ).z  # fmt: skip


def arm_named(name: str) -> Arm:
    """The arm of that name; ConfigError names the nearest one."""
    check_known([name], ARMS, "arm")
    return ARMS[name]


def open_bench(
    model: str = "companion",
    corpus: str = "world",
    n: int = 100,
    seed: int = 0,
    *,
    options: Mapping[str, Any] | None = None,
    n_paraphrases: int = 2,
    protected: int = 3,
    n_bystanders: int = 200,
    max_texts: int | None = 6000,
    n_contexts: int | None = None,
    cache_dir: str | Path | None = None,
) -> Bench:
    """Open a model with n edit requests and everything the editors need.

    model:    "companion", or a folder / hub name.
    corpus:   "world", "clare", "counterfact", "multi_counterfact" or "zsre".
    options:  editing options on top of (or, for a model without preset, instead of) the model's preset.
    protected, n_paraphrases: probes per fact.   n_bystanders: facts no edit touches, for recall and drift.
    max_texts: random sample of texts of the second moments (None: all of the world's).
    Raises ConfigError for an unknown corpus, DataError where files or a preset are missing.
    """
    from ...corpora.world import load_world
    from .. import testbed

    lm = testbed.open_model(model)
    world = load_world(model if (user_path(model) / "world.json").exists() else None)
    chosen, alphaedit = _options(testbed, lm, dict(options or {}))
    facts, bystanders = _facts(world, corpus, n, seed, n_paraphrases, protected, n_bystanders)
    statistics = testbed.statistics(lm, world, chosen["layers"], cache_dir, max_texts=max_texts)
    number = chosen.get("n_contexts", 5) if n_contexts is None else n_contexts
    contexts = sample_contexts(lm, number, chosen.get("context_length", 10), chosen.get("seed", 0))
    return Bench(
        lm, world, corpus, facts, chosen, alphaedit, statistics, contexts, lm.fingerprint(),
        None if cache_dir is None else user_path(cache_dir), {}, bystanders,
    )  # fmt: skip


def _options(testbed, lm: LM, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        memit, alphaedit = testbed.preset(lm, "memit"), testbed.preset(lm, "alphaedit")
    except DataError:
        if "layers" not in given:
            raise
        memit, alphaedit = {}, {}
    both = {**memit, **given}
    known = {f.name for f in dataclasses.fields(EDITORS["alphaedit"].Config)}
    # AlphaEdit optimises the same targets at the same place; lam means something else there.
    place = {k: v for k, v in both.items() if k in known and k != "lam"}
    return both, {**place, **{k: v for k, v in alphaedit.items() if k not in given}}


def _facts(world, corpus, n, seed, n_paraphrases, protected, n_bystanders):
    if corpus == "world":
        from ...corpora.world.records import edit_facts

        facts = edit_facts(
            world, n, seed, n_paraphrases=n_paraphrases, n_neighbors=protected, n_locality=protected,
            n_same_subject=protected,
        )  # fmt: skip
        return facts, untouched(world, facts, n_bystanders, seed)
    from ...corpora import clare, counterfact, zsre

    check_known([corpus], ["world", "clare", "counterfact", "multi_counterfact", "zsre"], "corpus")
    if corpus == "clare":  # states the truth: new objects are drawn from the corpus
        known = list(clare.load())
        pick = np.random.default_rng([seed, 11]).permutation(len(known))
        usable = clare.counterfactuals(
            [known[i] for i in pick[: 2 * (n + n_bystanders)]], seed, corpus=known, n_neighborhood=protected,
            n_same_subject=protected,
        )  # fmt: skip
    else:
        found = zsre.load() if corpus == "zsre" else counterfact.load(multi=corpus == "multi_counterfact")
        pick = np.random.default_rng([seed, 11]).permutation(len(found))
        usable = [found[i] for i in pick if found[i].target_true is not None]
    return split_facts(usable, n, n_bystanders, corpus)


def split_facts(usable: Sequence[Fact], n: int, n_bystanders: int, corpus: str = "the corpus"):
    """The first n facts as requests, the true statements of later ones about other subjects as
    bystanders."""
    distinct: dict[tuple[str, str], Fact] = {}
    for fact in usable:
        distinct.setdefault((fact.prompt, fact.subject), fact)
    chosen = list(distinct.values())
    if len(chosen) < n:
        raise DataError(f"{corpus} gives {len(chosen)} usable facts, {n} asked for; ask for fewer")
    edited = {f.subject for f in chosen[:n]}
    rest = [(f.prompt, f.subject, f.target_true) for f in chosen[n:] if f.subject not in edited]
    return chosen[:n], rest[:n_bystanders]


def untouched(world: World, facts: Sequence[Fact], n: int, seed: int) -> list[tuple[str, str, str]]:
    """n true statements (template, subject, answer) of the world that no edit changes, in all
    templates."""
    from ...corpora.world.records import changes

    touched = {c.key for f in facts for c in changes(world, f.relation, f.subject, f.target)}
    rows = [s for s in world.statements() if (s.relation, s.subject) not in touched]
    picks = np.random.default_rng([seed, world.seed, 13]).permutation(len(rows))[:n]
    return [
        (world.relation(s.relation).templates[s.template_index].text, s.subject, s.answer)
        for s in (rows[i] for i in picks)
    ]
