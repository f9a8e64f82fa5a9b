"""What the model-level experiments share: a testbed with n requests, statistics, contexts and targets.

Targets can be optimised once, on the unedited model, and given to every arm ("shared"): one of the conditions of the
equivalence theorem, and the only way in which arms differ by their solve alone. "fresh" targets are optimised before
every batch, as in the released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ConfigError
from ..base.paths import user_path
from ..base.progress import bar
from ..locate.contexts import ContextTemplates, sample_contexts
from ..locate.moments import Covariance
from ..locate.targets import TargetConfig, optimize_targets
from ..methods import EDITORS, Editor
from ..models.facts import Fact
from ..models.lm import LM
from .arms import arm_named, make_arm, options_of
from .testbed import Statement, Testbed, open_testbed

CHUNK = 20  # facts per stored file of targets


@dataclasses.dataclass
class Bench:
    """A testbed and all that n edits need. Made by `Bench.of`; the model must be unedited at that moment.

    over: options on top of the model's own, for all locate-then-edit arms.   given: fact key -> target z.
    bystanders: true statements that no edit touches.
    """

    testbed: Testbed
    facts: list[Fact]
    over: dict[str, Any]
    statistics: Mapping[int, Covariance]
    contexts: ContextTemplates
    fingerprint: str
    cache_dir: Path | None = None
    given: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    bystanders: list[Statement] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls,
        testbed: Testbed,
        n: int,
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
        """n requests of a testbed and everything the editors need.

        options: editing options on top of (or, for a model without settings, instead of) the model's own.
        protected, n_paraphrases: probes per fact.   n_bystanders: facts no edit touches, for recall and drift.
        max_texts: random sample of texts of the second moments (None: all).
        """
        lm, over = testbed.lm, dict(options or {})
        chosen = options_of(lm, "memit", over)
        if "layers" not in chosen:
            raise ConfigError(
                f"{lm.name} has no settings of its own; give options with layers=, token=, lam= and z_*"
            )
        facts = testbed.edits(n, seed, n_paraphrases=n_paraphrases, protected=protected)
        statistics = testbed.moments(chosen["layers"], cache_dir, max_texts=max_texts)
        number = chosen.get("n_contexts", 5) if n_contexts is None else n_contexts
        contexts = sample_contexts(lm, number, chosen.get("context_length", 10), chosen.get("seed", 0))
        return cls(
            testbed, facts, over, statistics, contexts, lm.fingerprint(),
            None if cache_dir is None else user_path(cache_dir), {}, testbed.untouched(facts, n_bystanders, seed),
        )  # fmt: skip

    @property
    def lm(self) -> LM:
        return self.testbed.lm

    @property
    def stop(self) -> str:
        """What ends a stated fact."""
        return self.testbed.stop

    @property
    def options(self) -> dict[str, Any]:
        """Options of the MEMIT family on this model."""
        return self.arm_options("memit")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.options["layers"])

    @property
    def token(self) -> str:
        return self.options.get("token", "subject_last")

    def arm_options(self, arm: str) -> dict[str, Any]:
        """The options an arm is made with: the model's, those over them as far as the editor knows them, the arm's."""
        spec = arm_named(arm)
        known = {f.name for f in dataclasses.fields(EDITORS[spec.editor].Config)} - set(spec.options)
        if spec.editor == "alphaedit":
            known -= {"lam"}  # the same word for another thing
        return options_of(self.lm, arm, {k: v for k, v in self.over.items() if k in known})

    def editor(
        self, arm: str, *, contexts: ContextTemplates | None = None, shared: bool = True, **options
    ) -> Editor:
        """A fresh editor of an arm. shared: it writes the given targets instead of optimising its own."""
        made = make_arm(
            self.lm, arm, given={**self.arm_options(arm), **options}, statistics=self.statistics,
            contexts=self.contexts if contexts is None else contexts,
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


def open_bench(
    model: str = "companion", corpus: str = "world", n: int = 100, seed: int = 0, **options: Any
) -> Bench:
    """`Bench.of` on the testbed of a model; options: those of `Bench.of`."""
    return Bench.of(open_testbed(model, corpus), n, seed, **options)
