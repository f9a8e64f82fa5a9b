"""Hallucination and out-of-distribution records made from a world, in the schemas of the real data sets.

SelfCheckGPT (GRACE, WISE, MEMOIR): the beginning of an article, and the sentence that should come next; the model's
own sentence is the hallucination. Here the article is a biography in which some values are new: each sentence
with a new value is one record, its prompt everything before it (earlier corrections included).

Temporal (WISE): a short prompt with its new object, and a natural text about the new fact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...base.errors import RequestError
from ...base.paths import user_path
from ...corpora.world.biographies import biography
from ...corpora.world.records import EDITABLE, edit_facts
from ...models.facts import Fact

_SENTENCES = 3  # of an out-of-distribution text


def _sentences(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) characters of the sentence that holds each value."""
    found, start = [], 0
    for i, (_, end) in enumerate(spans):
        stop = len(text) if i + 1 == len(spans) else text.index(". ", end) + 1
        found.append((start, stop))
        start = stop + 1
    return found


def _told(world, name: str, rng: np.random.Generator, values: dict[str, str]) -> tuple[str, list[str], list]:
    """A biography with some values replaced: text, relation of each sentence, sentences."""
    order: list[str] = []

    def value(relation: str, subject: str) -> str:
        order.append(relation)
        return values.get(relation, world.value(relation, subject))

    made = biography(value, name, rng)
    return made.text, order, _sentences(made.text, made.answer_spans)


def _other(world, relation: str, subject: str, rng: np.random.Generator) -> str:
    taken = set(world.attributes(relation, subject).values())
    choices = [o for o in world.objects(relation) if o not in taken]
    return choices[rng.integers(len(choices))]


def hallucination_records(
    world, n: int, seed: int = 0, *, per_person: int = 2, n_before: int = 1
) -> list[dict]:
    """n records {prompt, subject, target_new, locality_prompt, locality_ground_truth}, person by person.

    per_person: corrected sentences per biography.   n_before: sentences that stand before the first of them at
    least. Raises RequestError if the world has too few people.
    """
    rng = np.random.default_rng([seed, world.seed, 11])
    people = [world.people[i] for i in rng.permutation(len(world.people))]
    need = -(-n // per_person)
    if not 0 < need < len(people):
        raise RequestError(f"{n} records at {per_person} per person need {need} of {len(people)} people")
    unrelated = people[need:]
    records: list[dict] = []
    for name in people[:need]:
        probe = np.random.default_rng(rng.integers(2**32))
        state = probe.bit_generator.state
        _, order, _ = _told(world, name, probe, {})
        places = [i for i, r in enumerate(order) if i >= n_before and r in EDITABLE]
        chosen = sorted(rng.choice(places, min(per_person, len(places)), replace=False).tolist())
        new = {order[i]: _other(world, order[i], name, rng) for i in chosen}
        probe.bit_generator.state = state  # the same biography, told again with the new values
        text, _, sentences = _told(world, name, probe, new)
        for i in chosen:
            start, stop = sentences[i]
            other = unrelated[rng.integers(len(unrelated))]
            relation = EDITABLE[rng.integers(len(EDITABLE))]
            asked = world.statement(relation, other, 0)
            records.append({
                "prompt": text[: start - 1], "subject": name, "target_new": text[start:stop],
                "locality_prompt": asked.prompt, "locality_ground_truth": asked.answer,
            })  # fmt: skip
    return records[:n]


def temporal_records(world, n: int, seed: int = 0) -> list[dict]:
    """n records {prompt, subject, target_new, ood_rephrase, locality_prompt, locality_ground_truth}.

    ood_rephrase: the sentences of a new biography up to and including the one with the new value, at most three.
    """
    rng = np.random.default_rng([seed, world.seed, 12])
    relations = [r for r in EDITABLE if r != "employer"]
    records = []
    for fact in edit_facts(
        world, n, seed, relations, n_paraphrases=0, n_neighbors=0, n_locality=1, n_same_subject=0
    ):
        text, order, sentences = _told(world, fact.subject, rng, {str(fact.relation): fact.target})
        i = order.index(str(fact.relation))
        first = max(0, i - _SENTENCES + 1)
        body = text[sentences[first][0] : sentences[i][1]]
        if first:  # later sentences say "They"
            body = f"{fact.subject}. {body}"
        [probe] = fact.locality or (None,)
        records.append({
            "prompt": fact.text, "subject": fact.subject, "target_new": fact.target, "ood_rephrase": body,
            "locality_prompt": probe.prompt, "locality_ground_truth": probe.answer,
        })  # fmt: skip
    return records


def as_facts(records: Sequence[dict], load: Callable, folder: Path, prefix: str = "") -> list[Fact]:
    """Records through the loader of the real data set (`corpora.selfcheck.load`, `corpora.temporal.load`)."""
    path = user_path(folder) / "records.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(records), ensure_ascii=False), encoding="utf-8")
    return [fact.replace(case_id=f"{prefix}{fact.case_id}") for fact in load(path)]


def answer_in_text(fact: Fact) -> tuple[str, str] | None:
    """(what stands before the new value in the natural text, the value), or None if the text does not name it."""
    text = fact.reference[0]
    at = text.rfind(fact.target)
    return (text[:at].rstrip(), fact.target) if at > 0 else None
