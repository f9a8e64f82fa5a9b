"""A testbed: a model, the facts it is asked about, and its own text. Every study runs on any of them.

    bed = open_testbed("companion")           # or "smollm2", or a folder or hub name with corpus=...
    facts = bed.edits(100, seed=0)            # counterfactual requests with all their probes
    moments = bed.moments(layers)             # second moments over the testbed's text

A `TableTestbed` asks about a table of facts: the generated world of a companion, or the real facts, as far as the model
knows them; every consequence of an edit follows from the table. A `CorpusTestbed` is a data set of requests.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.config import check_known
from ..base.downloads import download_dir
from ..base.errors import ConfigError, DataError
from ..base.paths import user_path
from ..corpora import real
from ..corpora.table import FactTable
from ..corpora.world import World, edit_facts
from ..corpora.world.companion import load_companion, load_world
from ..corpora.world.records import changes
from ..locate.moments import Covariance, second_moment
from ..models.facts import Fact
from ..models.joining import join
from ..models.lm import LM, load_lm
from ..models.pretrained import PRETRAINED, source_of
from .arms import options_of
from .real import known, sample

Statement = tuple[str, str, str]  # template, subject, true answer
CORPORA = ("world", "real", "real-all", "clare", "counterfact", "multi_counterfact", "zsre")
ASKED, HELD = 150, 500  # facts a relation that a model is asked; texts kept out of the second moments


def open_model(name: str, **options: Any) -> LM:
    """ "companion" (the shipped one), "smollm2" (fetched), or a folder, GGUF file or hub name of any causal LM of the
    architecture table. Raises DataError "not available here" for a model that has to be fetched first.
    """
    if name == "companion":
        return load_companion()
    return load_lm(source_of(name), **options)


@dataclasses.dataclass(frozen=True)
class Testbed(ABC):
    """A model with a corpus. stop: what ends a stated fact in its text ("" where the corpus does not say)."""

    __test__ = False  # not a test class, whatever its name

    lm: LM
    corpus: str
    stop: str = ""

    @abstractmethod
    def edits(
        self,
        n: int,
        seed: int,
        *,
        n_paraphrases: int = 2,
        protected: int = 3,
        n_same_subject: int | None = None,
        relations: Sequence[str] | None = None,
    ) -> list[Fact]:
        """n requests with probes. protected: probes on each axis that must not change (same_subject: as many unless
        n_same_subject says otherwise). Raises DataError if the corpus has not so many."""

    @abstractmethod
    def untouched(self, facts: Sequence[Fact], n: int, seed: int) -> list[Statement]:
        """Up to n true statements that none of the edits changes."""

    @abstractmethod
    def background(self, facts: Sequence[Fact], n: int, seed: int) -> list[str]:
        """Up to n texts about subjects that no edit and no probe of these facts is about."""

    @abstractmethod
    def texts(self) -> list[str]:
        """The text that second moments are taken over."""

    @abstractmethod
    def held_out(self, n: int, seed: int = 1) -> list[str]:
        """n texts of the testbed's language that no edit can be right or wrong about: their perplexity measures
        language alone."""

    def moments(
        self, layers: Sequence[int], cache_dir: str | Path | None = None, *, max_texts: int | None = 6000
    ) -> Mapping[int, Covariance]:
        """Second moments of the keys by layer (`locate.moments.second_moment`).

        max_texts: a random sample of that many texts; None: all of them.
        """
        if not layers:
            return {}
        texts = self.texts()
        if max_texts is not None and max_texts < len(texts):
            keep = np.random.default_rng(0).choice(len(texts), max_texts, replace=False)
            texts = [texts[i] for i in sorted(keep)]
        return second_moment(self.lm, list(layers), texts, cache_dir=cache_dir)


@dataclasses.dataclass(frozen=True)
class TableTestbed(Testbed):
    """A model and a table of facts. own_texts: its text, where the table does not bring one; held: kept out of it."""

    table: FactTable | None = None
    own_texts: tuple[str, ...] = ()
    held: tuple[str, ...] = ()

    def edits(self, n, seed, *, n_paraphrases=2, protected=3, n_same_subject=None, relations=None):
        return [] if n == 0 else edit_facts(
            self.table, n, seed, relations, n_paraphrases=n_paraphrases, n_neighbors=protected, n_locality=protected,
            n_same_subject=protected if n_same_subject is None else n_same_subject,
        )  # fmt: skip

    def untouched(self, facts, n, seed):
        table = self.table
        touched = {c.key for f in facts for c in changes(table, f.relation, f.subject, f.target)}
        rows = [s for s in table.statements() if (s.relation, s.subject) not in touched]
        picks = np.random.default_rng([seed, table.seed, 13]).permutation(len(rows))[:n]
        return [
            (table.relation(s.relation).templates[s.template_index].text, s.subject, s.answer)
            for s in (rows[i] for i in picks)
        ]

    def background(self, facts, n, seed):
        taken = {f.subject for f in facts}
        seen = {f.text for f in facts} | {p for f in facts for p in f.paraphrases}
        seen |= {p.prompt for f in facts for p in (*f.neighborhood, *f.locality, *f.same_subject, *f.consequences)}
        pool = [s for s in self.table.statements() if s.subject not in taken and s.prompt not in seen]
        rng = np.random.default_rng([seed, 77])
        return [pool[i].text for i in rng.choice(len(pool), min(n, len(pool)), replace=False)]

    def texts(self):
        return list(self.own_texts) or self.world.corpus_texts()

    def held_out(self, n, seed=1):
        """Of a world, biographies of people of another one, never met; else texts that were held back."""
        if pool := self.held or self.own_texts:
            picks = np.random.default_rng([seed, 17]).permutation(len(pool))[:n]
            return [pool[i] for i in picks]
        companies = len(self.world.companies)
        other = World(seed=self.world.seed + 1 + seed, n_people=max(4, n + n % 2), n_companies=companies)
        return [b.text for b in other.biographies(1, seed)][:n]

    @property
    def world(self) -> World:
        """The generated world. Raises ConfigError for a table that is none."""
        if not isinstance(self.table, World):
            raise ConfigError(f"this needs a generated world; {self.corpus} is none: choose the companion")
        return self.table


@dataclasses.dataclass(frozen=True)
class CorpusTestbed(Testbed):
    """A model and a data set of requests; its text is the requests' own prompts and true answers, or `own_texts`."""

    requests: tuple[Fact, ...] = ()
    own_texts: tuple[str, ...] = ()

    def _order(self, seed: int) -> list[Fact]:
        order = np.random.default_rng([seed, 11]).permutation(len(self.requests))
        distinct: dict[tuple[str, str], Fact] = {}
        for i in order:
            fact = self.requests[i]
            distinct.setdefault((fact.prompt, fact.subject), fact)
        return list(distinct.values())

    def edits(self, n, seed, *, n_paraphrases=2, protected=3, n_same_subject=None, relations=None):
        kept = [f for f in self._order(seed) if relations is None or f.relation in relations]
        if len(kept) < n:
            raise DataError(f"{self.corpus} gives {len(kept)} usable facts, {n} asked for; ask for fewer")
        same = protected if n_same_subject is None else n_same_subject
        return [
            f.replace(
                paraphrases=f.paraphrases[:n_paraphrases], neighborhood=f.neighborhood[:protected],
                locality=f.locality[:protected], same_subject=f.same_subject[:same],
            )
            for f in kept[:n]
        ]  # fmt: skip

    def untouched(self, facts, n, seed):
        edited = {f.subject for f in facts}
        rest = [f for f in self._order(seed) if f.subject not in edited and f.target_true is not None]
        return [(f.prompt, f.subject, f.target_true) for f in rest[:n]]

    def background(self, facts, n, seed):
        rows = self.untouched(facts, n, seed)
        return [join(template.replace('{}', subject), answer) for template, subject, answer in rows]

    def texts(self):
        return list(self.own_texts) or [join(f.text, f.target_true) for f in self.requests if f.target_true]

    def held_out(self, n, seed=1):
        texts = self.texts()
        return [texts[i] for i in np.random.default_rng([seed, 17]).permutation(len(texts))[:n]]


def preset(lm: LM, arm: str = "memit") -> dict[str, Any]:
    """Options of an arm on this model (`arms.options_of`), to be passed to `make_editor`."""
    return options_of(lm, arm)


def statistics(
    lm: LM,
    world: World,
    layers: Sequence[int],
    cache_dir: str | Path | None = None,
    *,
    max_texts: int | None = 6000,
) -> Mapping[int, Covariance]:
    """Second moments over the text of a companion's world (`Testbed.moments`)."""
    return TableTestbed(lm, "world", ".", world).moments(layers, cache_dir, max_texts=max_texts)


def open_testbed(model: str = "companion", corpus: str = "auto", **options: Any) -> Testbed:
    """The testbed of a model. corpus: one of `CORPORA`, or "auto": real facts for a pretrained model, else the world.

    "real" are the facts that the model says when asked (`real.known`, at most `ASKED` of each relation, kept under the
    model's hash); "real-all" are all of them, known or not.
    The world is that of the companion's folder, or the shipped one. options: of `load_lm`. Raises ConfigError for an
    unknown corpus, DataError where files are missing or the model is not available here.
    """
    check_known([corpus], (*CORPORA, "auto"), "corpus")
    if corpus == "auto":
        corpus = "real" if model in PRETRAINED else "world"
    lm = open_model(model, **options)
    if corpus == "world":
        world = load_world(model if (user_path(model) / "world.json").exists() else None)
        return TableTestbed(lm, corpus, ".", world)
    texts = real.english() if model != "companion" else tuple(load_world().corpus_texts())
    if corpus in ("real", "real-all"):
        table = real.load()
        if corpus == "real":
            table = known(lm, table, ASKED, cache_dir=download_dir("recall"))
        own = (*real.prompts(table, sample(table, ASKED)), *real.english()[:-HELD])
        return TableTestbed(lm, corpus, "", table, own, real.english()[-HELD:])
    return CorpusTestbed(lm, corpus, "", tuple(_requests(corpus)), texts)


def _requests(corpus: str) -> list[Fact]:
    from ..corpora import clare, counterfact, zsre

    if corpus == "clare":  # states the truth: new objects are drawn from the corpus
        known = list(clare.load())
        return clare.counterfactuals(known, 0, corpus=known, n_neighborhood=3, n_same_subject=3)
    found = zsre.load() if corpus == "zsre" else counterfact.load(multi=corpus == "multi_counterfact")
    return [f for f in found if f.target_true is not None]
