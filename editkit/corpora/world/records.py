"""Edit requests in the world with all their probes, and their export in the schemas of CounterFact and
zsRE."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ...base.errors import RequestError
from ...models.facts import SLOT, Fact, Probe
from ..table import FactTable
from .consequences import Change, Key, changes, dependencies, must_change, must_not_change
from .relations import EDITABLE

__all__ = [
    "EDITABLE", "Change", "changes", "choose_edits", "edit_facts", "must_change", "must_not_change",
    "statistics", "to_counterfact", "to_zsre",
]  # fmt: skip

def _as_requested(world: FactTable, relations: Sequence[str] | None) -> tuple[str, ...]:
    relations = world.editable if relations is None else tuple(relations)
    for r in relations:
        derived = world.relation(r).derived
        if derived:
            raise RequestError(
                f"{r!r} follows from {derived[0]!r} and {derived[1]!r}; edit one of these instead"
            )
    return relations


def choose_edits(
    world: FactTable, n: int, seed: int = 0, relations: Sequence[str] | None = None
) -> list[tuple[str, str, str]]:
    """n edits (relation, subject, new object) that can all hold at once.

    Every subject is edited once before any is edited twice. The new object is drawn uniformly among the
    objects of the relation that the subject does not have already in any relation. An edit that would touch,
    or rest on, a fact touched by an earlier one is skipped, so `changes` of each edit holds in the presence
    of all the others. The first k of n edits are the same for every n. Raises RequestError if the world has
    not enough such edits.
    """
    relations = _as_requested(world, relations)
    if n < 1:
        raise RequestError(f"n={n}: ask for at least one edit")
    rng = np.random.default_rng([seed, world.seed, 3])
    pairs: list[Key] = [(r, s) for r in relations for s in world.subjects(r)]
    turn: dict[str, int] = defaultdict(int)
    ranked = []
    for i in rng.permutation(len(pairs)):
        r, s = pairs[i]
        turn[s] += 1  # the k-th edit of a subject waits until every subject has had k - 1
        ranked.append((turn[s], r, s))
    ranked.sort(key=lambda row: row[0])

    objects = {r: world.objects(r) for r in relations}
    written: set[Key] = set()
    rests_on: set[Key] = set()
    edits = []
    for _, r, s in ranked:
        if len(edits) == n:
            break
        old = world.value(r, s)
        own = {*world.attributes(r, s).values(), s}
        pool = [o for o in objects[r] if o not in own] or [o for o in objects[r] if o not in (old, s)]
        if not pool:
            continue
        new = pool[rng.integers(len(pool))]
        writes = {c.key for c in changes(world, r, s, new)}
        needs = dependencies(world, r, s, new)
        if writes & written or writes & rests_on or needs & written:
            continue
        written |= writes
        rests_on |= needs
        edits.append((r, s, new))
    if len(edits) < n:
        raise RequestError(
            f"{n} edits asked for, {len(edits)} can hold together in {', '.join(relations)}; "
            "ask for fewer, allow more relations, or generate a larger world"
        )
    return edits


def edit_facts(
    world: FactTable,
    n: int,
    seed: int = 0,
    relations: Sequence[str] | None = None,
    *,
    edit_template: int = 0,
    n_paraphrases: int | None = None,
    n_neighbors: int = 10,
    n_locality: int = 5,
    n_same_subject: int | None = None,
    n_consequences: int | None = None,
) -> list[Fact]:
    """n counterfactual edit requests with all probes, deterministic under `seed`.

    relations:      stored relations to edit (default: those of the table, `EDITABLE` in the world); "spouse", "seat",
                    "country"... are possible.
    edit_template:  index of the edit prompt; the other templates are the paraphrases (None = all of them; a smaller
                    number takes subject-first and relation-first wordings in turn). Probes about other facts
                    use the first template, or the question if the edit prompt is a question.
    neighborhood:   same relation, same true object, other subjects (none exist for one-to-one relations).
    same_subject:   None = every other relation of the subject.
    consequences:   every other fact that must take a new value (or n_consequences of them, drawn); facts left undefined
                    are listed in meta.
    No protected probe of any fact is touched by any edit of the list. kind of protected probes = relation id.
    Raises RequestError if there are not enough edits (see `choose_edits`) or the template does not exist.
    """
    edits = choose_edits(world, n, seed, relations)
    rng = np.random.default_rng([seed, world.seed, 4])
    entailed = [changes(world, *edit) for edit in edits]
    touched = {c.key for found in entailed for c in found}
    having: dict[Key, list[str]] = defaultdict(list)  # (relation, object) -> subjects that keep it
    for r in world.relations:
        for s in world.subjects(r):
            if (r, s) not in touched:
                having[r, world.value(r, s)].append(s)
    kept = [(r, s) for (r, _), subjects in having.items() for s in subjects]
    untouched = set(kept)

    def take(pool: Sequence, k: int | None) -> list:
        return [pool[i] for i in rng.permutation(len(pool))[:k]]

    def some(found: Sequence[Change]) -> Sequence[Change]:
        known = [c for c in found[1:] if c.new is not None]
        if n_consequences is None or len(known) <= n_consequences:
            return known
        own = np.random.default_rng([seed, world.seed, 5, len(facts)])  # a stream of its own: nothing else shifts
        return [known[j] for j in sorted(own.choice(len(known), n_consequences, replace=False))]

    facts = []
    for i, ((relation, subject, new), found) in enumerate(zip(edits, entailed, strict=True)):
        spec, old = world.relation(relation), world.value(relation, subject)
        if not -len(spec.templates) <= edit_template < len(spec.templates):
            raise RequestError(
                f"edit_template={edit_template}: {relation!r} has {len(spec.templates)} templates"
            )
        template = spec.templates[edit_template]
        others = [t for t in spec.templates if t is not template]
        ask = -1 if template.role == "question" else 0
        own = [(r, subject) for r in world.attributes(relation, subject) if (r, subject) in untouched]
        far = [kept[j] for j in rng.integers(len(kept), size=8 * n_locality)] if kept else []
        far = list(dict.fromkeys((r, s) for r, s in far if r != relation and s != subject))
        undefined = [list(c.key) for c in found if c.new is None]
        facts.append(
            Fact(
                prompt=template.text,
                subject=subject,
                target=new,
                target_true=old,
                paraphrases=tuple(t.fill(subject) for t in _mixed(others, n_paraphrases)),
                neighborhood=tuple(
                    _probe(world, relation, s, ask) for s in take(having[relation, old], n_neighbors)
                ),
                locality=tuple(_probe(world, r, s, ask) for r, s in far[:n_locality]),
                same_subject=tuple(_probe(world, r, s, ask) for r, s in take(own, n_same_subject)),
                consequences=tuple(
                    Probe(
                        _ask(world, c.relation, c.subject, ask),
                        c.new,
                        c.kind,
                        before=c.old,
                        subject=c.subject,
                    )
                    for c in some(found)
                ),
                generation=tuple(g.replace("{}", subject) for g in spec.generation),
                reference=tuple(
                    f"{t.wording.replace(SLOT, s)} {new}."
                    for s in take(having[relation, new], 3)
                    for t in spec.templates
                    if t.role != "question"
                ),
                relation=relation,
                case_id=f"{world.name}-s{seed}-{i}",
                meta=(("undefined", json.dumps(undefined)),) if undefined else (),
            )
        )
    return facts


def _ask(world: FactTable, relation: str, subject: str, template: int) -> str:
    return world.relation(relation).templates[template].fill(subject)


def _probe(world: FactTable, relation: str, subject: str, template: int) -> Probe:
    return Probe(
        _ask(world, relation, subject, template), world.value(relation, subject), relation, subject=subject
    )


def _mixed(templates: Sequence, k: int | None) -> list:
    """k templates, relation-first and subject-first in turn."""
    if k is None:
        return list(templates)
    rank = {False: 0, True: 0}
    order = []
    for t in templates:
        order.append((rank[t.subject_first], t.subject_first))
        rank[t.subject_first] += 1
    return [templates[i] for i in sorted(range(len(templates)), key=order.__getitem__)[:k]]


def to_counterfact(facts: Sequence[Fact]) -> list[dict]:
    """Records in the official CounterFact schema; `corpora.counterfact.load` gives the facts back.

    Locality, same-subject and consequence probes have no field there. Attribute prompts, which no table of
    the papers uses, are empty. Raises RequestError for a fact without relation or true object.
    """
    records = []
    for i, f in enumerate(facts):
        if f.relation is None or f.target_true is None:
            raise RequestError(
                f"fact {i} ({f.case_id}) lacks its relation or true object, which CounterFact needs"
            )
        records.append({
            "case_id": f.case_id,
            "pararel_idx": i,
            "requested_rewrite": {
                "prompt": f.prompt,
                "relation_id": f.relation,
                "target_new": {"str": f.target, "id": f.target},
                "target_true": {"str": f.target_true, "id": f.target_true},
                "subject": f.subject,
            },
            "paraphrase_prompts": list(f.paraphrases),
            "neighborhood_prompts": [p.prompt for p in f.neighborhood],
            "attribute_prompts": [],
            "generation_prompts": list(f.generation),
        })  # fmt: skip
    return records


def to_zsre(facts: Sequence[Fact]) -> list[dict]:
    """Records in the official zsRE schema: answers[0] is the true object, alt the counterfactual one.

    The reading `corpora.zsre.load(path, "easyedit")` gives edit, first paraphrase and first locality probe
    back; "rome" writes answers[0], so it edits towards what already holds, as on the real zsRE. The locality
    prompt goes without the prefix "nq question: ", which the companion model never saw; both readings then
    keep it as it is. `edit_facts(..., edit_template=-1)` gives questions, as zsRE has them. Raises
    RequestError for a fact without paraphrase, locality probe or true object.
    """
    records = []
    for i, f in enumerate(facts):
        if not f.paraphrases or not f.locality or f.target_true is None:
            raise RequestError(
                f"fact {i} ({f.case_id}) lacks a paraphrase, a locality probe or its true object; "
                "the zsRE schema needs all three"
            )
        records.append({
            "subject": f.subject,
            "src": f.text,
            "pred": f.target_true,
            "rephrase": f.paraphrases[0],
            "alt": f.target,
            "answers": [f.target_true],
            "loc": f.locality[0].prompt,
            "loc_ans": f.locality[0].answer,
            "cond": f"{f.target_true} >> {f.target} || {f.text}",
        })  # fmt: skip
    return records


def statistics(world: FactTable):
    """One row per relation (pandas): n_facts, n_objects, entropy of the answers (bits) and two chance levels.

    chance_uniform: guessing one of the objects at random; chance_mode: always giving the most frequent one.
    """
    import pandas as pd

    rows = []
    for r in world.relations.values():
        _, counts = np.unique([world.value(r.id, s) for s in world.subjects(r.id)], return_counts=True)
        p = counts / counts.sum()
        rows.append({
            "relation": r.id,
            "subject": r.subject_type,
            "object": r.object_type,
            "n_facts": int(counts.sum()),
            "n_objects": len(counts),
            "entropy": float(-(p * np.log2(p)).sum()),
            "chance_uniform": 1 / len(counts),
            "chance_mode": float(p.max()),
            "n_templates": len(r.templates),
            "derived_from": " + ".join(r.derived or ()),
        })  # fmt: skip
    return pd.DataFrame(rows)
