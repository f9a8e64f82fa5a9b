"""The requests of the lifelong pages: generated from the world, or the real data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...base.errors import ConfigError, DataError
from ...base.paths import user_path
from ...models.facts import Fact
from ...models.lm import LM
from ..testbed import TableTestbed, Testbed
from .articles import as_facts, hallucination_records, temporal_records


@dataclasses.dataclass(frozen=True)
class Streams:
    """Facts and background texts per seed; bed: the testbed they are drawn from, or None for files.

    others: facts of the same kind per seed that are never edited (empty unless asked for).
    """

    facts: dict[int, list[Fact]]
    background: dict[int, list[str]]
    bed: Testbed | None = None
    others: dict[int, list[Fact]] = dataclasses.field(default_factory=dict)

    def __getitem__(self, seed: int) -> tuple[list[Fact], list[str]]:
        return self.facts[seed], self.background[seed]

    def statistics(self, lm: LM, layers: Sequence[int], cache_dir: str | Path | None = None) -> dict:
        """Second moments for the methods that need any: over the world's text, else over the background texts."""
        if self.bed is not None:
            return self.bed.moments(layers, cache_dir)
        from ...locate.moments import second_moment

        texts = sorted({t for part in self.background.values() for t in part})
        return second_moment(lm, list(layers), texts, cache_dir=cache_dir) if layers else {}


def _sampled(found: Sequence[Fact], n: int, seeds: Sequence[int]) -> tuple[dict, dict[int, list[Fact]]]:
    """n facts per seed, and others (never edited by that seed)."""
    if n >= len(found):
        raise DataError(
            f"{n} edits wanted, the file has {len(found)} records and some are needed as background"
        )
    chosen, others = {}, {}
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(found))
        chosen[seed] = [found[i] for i in order[:n]]
        others[seed] = [found[i] for i in order[n:]]
    return chosen, others


def _real(found: Sequence[Fact], n: int, seeds: Sequence[int], n_background: int) -> Streams:
    from ...corpora.zsre import irrelevant_texts

    chosen, others = _sampled(found, n, seeds)
    return Streams(chosen, {seed: irrelevant_texts(part)[:n_background] for seed, part in others.items()})


def _held_back(streams: Streams, n: int) -> Streams:
    """The first n facts of every seed; the others are not edited."""
    facts = {seed: part[:n] for seed, part in streams.facts.items()}
    others = {seed: part[n:] for seed, part in streams.facts.items()}
    return dataclasses.replace(streams, facts=facts, others=others)


def _drawn(bed: Testbed, make, seeds: Sequence[int], n_background: int) -> Streams:
    facts = {seed: make(seed) for seed in seeds}
    return Streams(facts, {s: bed.background(facts[s], n_background, s) for s in seeds}, bed)


def _world(bed: Testbed) -> Any:
    if not isinstance(bed, TableTestbed):
        raise ConfigError(
            f"these records are made from a generated world; {bed.corpus} is none: choose a real file"
        )
    return bed.world


def question_streams(
    bed: Testbed,
    n: int,
    seeds: Sequence[int],
    *,
    n_background: int = 100,
    n_paraphrases: int = 2,
    n_protected: int = 3,
    n_same_subject: int = 0,
    relations: Sequence[str] | None = None,
) -> Streams:
    """Short questions of a testbed, as many per seed; of zsRE in the form EasyEdit has them in.

    relations: edited relations (None: all that can be edited).
    """
    if bed.corpus == "zsre":
        from ...corpora import zsre

        return _real(list(zsre.load(form="easyedit")), n, seeds, n_background)

    def make(seed: int) -> list[Fact]:
        return bed.edits(
            n, seed, relations=relations, n_paraphrases=n_paraphrases, protected=n_protected,
            n_same_subject=n_same_subject,
        )  # fmt: skip

    return _drawn(bed, make, seeds, n_background)


def hallucination_streams(
    bed: Testbed,
    corpus: str,
    n: int,
    seeds: Sequence[int],
    folder: Path,
    *,
    n_background: int = 100,
    per_person: int = 2,
    n_other: int = 0,
) -> Streams:
    """Long prompts: corpus "world" (biographies with new values) or "selfcheck" (the real file).

    n_other: further articles per seed that are not edited, in `Streams.others`. Of the world they are one per person,
    and no correction is about these people.
    """
    from ...corpora import selfcheck

    if corpus == "selfcheck":
        return _held_back(_real(list(selfcheck.load()), n + n_other, seeds, n_background), n)
    if corpus != "world":
        raise ConfigError(f"corpus = {corpus!r}; choose 'world' or 'selfcheck'")
    world = _world(bed)

    def make(seed: int) -> list[Fact]:
        first = n + (-n) % per_person  # whole people are edited or left alone
        records = hallucination_records(world, first + n_other * per_person, seed, per_person=per_person)
        records = records[:n] + records[first::per_person]
        return as_facts(records, selfcheck.load, user_path(folder) / f"selfcheck-{seed}", f"s{seed}-")

    return _held_back(_drawn(bed, make, seeds, n_background), n)


def temporal_streams(
    bed: Testbed, corpus: str, n: int, seeds: Sequence[int], folder: Path, *, n_background: int = 100
) -> Streams:
    """Facts with a natural text: corpus "world" or "temporal" (the real file)."""
    from ...corpora import temporal

    if corpus == "temporal":
        return _real(list(temporal.load()), n, seeds, n_background)
    if corpus != "world":
        raise ConfigError(f"corpus = {corpus!r}; choose 'world' or 'temporal'")
    world = _world(bed)

    def make(seed: int) -> list[Fact]:
        return as_facts(
            temporal_records(world, n, seed), temporal.load, user_path(folder) / f"temporal-{seed}", f"s{seed}-"
        )

    return _drawn(bed, make, seeds, n_background)
