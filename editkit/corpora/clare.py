"""The CLaRE corpus (Baser et al. 2026): 11,427 facts of 212 templates, merged from three editing benchmarks.

Record: prompt (template with one slot), subject, target. A fact's key in the released entanglement graphs is
the md5 of "prompt|subject|target" (`Fact.key`), which is also its case_id here.

Two properties decide how the corpus may be used. Prompts about 265 subjects have several true answers (841
rows), so a single target must not be taken for the only right one there. And there are no counterfactual
objects, so an
editing experiment has to make them: `counterfactuals`.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..base.errors import DataError
from ..models.facts import Fact, Probe
from .base import Corpus, Record, read
from .fetch import fetch

log = logging.getLogger(__name__)


def load(path: str | Path | None = None, *, limit: int | None = None, on_error: str = "raise") -> Corpus:
    """The facts in file order, with case_id = key. None of them is altered or dropped.

    path: a file in the schema; None fetches the published one (hash checked).   limit, on_error: see
    `base.read`. What is odd about the data (see `oddities`) is logged and kept in `provenance.defects`.
    Raises DataError.
    """

    def parse(record: Record) -> Fact:
        fact = Fact(record.template("prompt"), record.text("subject"), record.text("target"))
        return fact.replace(case_id=fact.key)

    corpus = read("clare", fetch("clare") if path is None else path, parse, limit=limit, on_error=on_error,
                  one_object=False)  # fmt: skip
    found = {what: n for what, n in oddities(corpus).items() if n}
    for what, n in found.items():
        log.info("%s: %d %s", corpus.provenance.file, n, what)
    corpus.provenance.defects.update(found)
    return corpus


def answers_by_prompt(facts: Iterable[Fact]) -> dict[tuple[str, str], tuple[str, ...]]:
    """{(prompt template, subject): all recorded answers, in order of appearance}."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for fact in facts:
        found.setdefault((fact.prompt, fact.subject), {})[fact.target] = None
    return {key: tuple(answers) for key, answers in found.items()}


def unique_answers(facts: Iterable[Fact]) -> list[Fact]:
    """The facts whose prompt has exactly one recorded answer (10,586 of the corpus)."""
    facts = list(facts)
    answers = answers_by_prompt(facts)
    return [fact for fact in facts if len(answers[fact.prompt, fact.subject]) == 1]


def oddities(facts: Iterable[Fact]) -> dict[str, int]:
    """Counts of what an experiment has to know about: several answers, leaked answers, fixed name parts."""
    facts = list(facts)
    many = [a for a in answers_by_prompt(facts).values() if len(a) > 1]
    triples = collections.Counter((f.prompt, f.subject, f.target) for f in facts)
    twice = collections.Counter((f.subject, f.target) for f in facts)
    return {
        "repeated triples": sum(triples.values()) - len(triples),
        "prompts with several answers": len(many),
        "facts whose prompt has several answers": sum(map(len, many)),
        "facts whose answer is the subject": sum(f.subject == f.target for f in facts),
        "facts whose answer is written in the prompt": sum(f.target in f.text for f in facts),
        "facts that share subject and answer with another template": sum(n for n in twice.values() if n > 1),
        "facts whose template continues the subject's name": sum(_continues_name(f.prompt) for f in facts),
        "facts with double blanks": sum("  " in f.text or "  " in f.target for f in facts),
    }


def counterfactuals(
    facts: Sequence[Fact],
    seed: int,
    *,
    corpus: Sequence[Fact] | None = None,
    tokenizer=None,
    n_neighborhood: int = 10,
    n_same_subject: int = 10,
) -> list[Fact]:
    """Edit requests that make the facts false: another object of the same template as `target`.

    facts:     what to edit; of several facts on one prompt and subject only the first becomes a request.
    corpus:    the facts that objects and probes are drawn from and checked against (default `facts`); give
               the whole corpus when `facts` is a sample.
    tokenizer: if given, the new object has as many tokens as the old one (counted 1, 2, "3 or more", after a
               blank) and another first token, where the template has such an object.
    n_neighborhood: probes with the same template and old object about other subjects.
    n_same_subject: probes on other templates about the subject whose answer is not the old object.

    An object that the corpus records for the subject, under whatever template, is never chosen. The choice
    depends on seed, fact and corpus only, not on the other facts. Facts without any candidate (templates
    with a single object) are left out and counted in the log (level INFO). `target_true` is the old object,
    case_id the old key. Probes are drawn from prompts with one answer. Raises DataError if nothing is left.
    """
    corpus = list(facts if corpus is None else corpus)
    found: dict[str, set[str]] = {}
    taken: dict[str, set[str]] = {}
    for fact in corpus:
        found.setdefault(fact.prompt, set()).add(fact.target)
        taken.setdefault(fact.subject, set()).add(fact.target.casefold())
    objects = {prompt: [(o, o.casefold()) for o in sorted(by)] for prompt, by in found.items()}
    sure = unique_answers(corpus)
    alike, about = collections.defaultdict(list), collections.defaultdict(list)
    for fact in sure:
        alike[fact.prompt, fact.target].append(fact)
        about[fact.subject].append(fact)
    shapes = _shapes({f.target for f in (*corpus, *facts)}, tokenizer)

    requests, without, seen = [], 0, set()
    for fact in facts:
        if (fact.prompt, fact.subject) in seen:
            continue
        seen.add((fact.prompt, fact.subject))
        wrong = taken.get(fact.subject, set()) | {fact.target.casefold()}
        pool = [o for o, folded in objects.get(fact.prompt, ()) if folded not in wrong]
        if tokenizer is not None and pool:
            size, first = shapes[fact.target]
            other_first = [o for o in pool if shapes[o][1] != first]
            pool = [o for o in other_first if shapes[o][0] == size] or other_first or pool
        if not pool:
            without += 1
            continue
        rng = np.random.default_rng([seed, int(fact.key[:15], 16)])
        target = pool[int(rng.integers(len(pool)))]
        near = [f for f in alike[fact.prompt, fact.target] if f.subject != fact.subject]
        same = [f for f in about[fact.subject] if f.prompt != fact.prompt and f.target != fact.target]
        requests.append(
            fact.replace(
                target=target,
                target_true=fact.target,
                case_id=fact.key,
                neighborhood=tuple(_probe(f, "same_object") for f in _sample(near, n_neighborhood, rng)),
                same_subject=tuple(_probe(f, "other_relation") for f in _sample(same, n_same_subject, rng)),
            )
        )
    if without:
        log.info("%d facts left out: no other object of their template is wrong for the subject", without)
    if not requests:
        raise DataError("no counterfactual object for any fact; pass the whole corpus as `corpus`")
    return requests


def _continues_name(prompt: str) -> bool:
    """Whether a capitalised word follows the slot, as in "{} Islands": the subject is only part of a name."""
    tail = prompt.split("{}")[1].split()
    return bool(tail) and tail[0][:1].isupper()


def _shapes(objects: Iterable[str], tokenizer) -> dict[str, tuple[int, int]]:
    """{object: (token count capped at 3, first token id)}, each counted after a blank."""
    if tokenizer is None:
        return {}
    objects = sorted(objects)
    rows = tokenizer([" " + o for o in objects], add_special_tokens=False)["input_ids"]
    return {o: (min(len(ids), 3), ids[0]) for o, ids in zip(objects, rows)}


def _sample(facts: list[Fact], n: int, rng: np.random.Generator) -> list[Fact]:
    if len(facts) <= n:
        return facts
    return [facts[i] for i in sorted(rng.choice(len(facts), size=n, replace=False))]


def _probe(fact: Fact, kind: str) -> Probe:
    return Probe(fact.text, fact.target, kind=kind, subject=fact.subject)
