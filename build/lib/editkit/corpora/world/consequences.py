"""What an edit of the world entails: the facts that must change, and those that must not.

An edit replaces one stored fact. It entails (a) two-hop facts whose first hop it is (birth country after an
edit of the birthplace), (b) two-hop facts whose second hop it is (the employer's city of all employees after
an edit of the seat), (c) for a symmetric relation the reversed fact. Where a marriage is broken up, the facts
of the people left behind are undefined: they belong to neither list. Everything else must stay.
"""

from __future__ import annotations

import dataclasses

from ...base.errors import RequestError
from ...models.facts import Fact, Probe
from ..table import FactTable, Key


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of one fact. new is None where the edit leaves it undefined.

    kind: "edit", "two_hop" (its first hop was edited), "two_hop_via" (its second hop), "symmetric",
    "undefined".
    """

    relation: str
    subject: str
    old: str
    new: str | None
    kind: str

    @property
    def key(self) -> Key:
        """(relation, subject)."""
        return self.relation, self.subject


def changes(world: FactTable, relation: str, subject: str, new: str) -> list[Change]:
    """All facts that the edit (relation, subject) -> new touches, the edit itself first.

    Raises RequestError if the relation is derived, the edit changes nothing, or `new` is an object whose
    consequences the world cannot work out.
    """
    spec = world.relation(relation)
    if spec.derived:
        first, second = spec.derived
        raise RequestError(f"{relation!r} follows from {first!r} and {second!r}; edit one of these instead")
    old = world.value(relation, subject)
    if new == old:
        raise RequestError(f"{relation!r} of {subject!r} already is {new!r}; choose another target")
    if spec.symmetric and new == subject:
        raise RequestError(
            f"{subject!r} cannot be in relation {relation!r} with itself; choose another target"
        )
    if spec.symmetric and new not in world.subjects(relation):
        raise RequestError(
            f"target {new!r} of {relation!r} does not live in the world; choose one of world.people"
        )
    found = {(relation, subject): Change(relation, subject, old, new, "edit")}

    def add(r: str, s: str, value: str | None, kind: str) -> None:
        before = world.value(r, s) if world.has(r, s) else None
        if before != value and (r, s) not in found:
            found[r, s] = Change(r, s, before, value, kind)

    if spec.symmetric:
        add(relation, new, subject, "symmetric")
        add(relation, old, None, "undefined")
        add(relation, world.value(relation, new), None, "undefined")
    for derived in world.relations.values():
        if derived.derived is None:
            continue
        first, second = derived.derived
        if first == relation:
            if new not in world.entities(world.relation(second).subject_type):
                raise RequestError(
                    f"target {new!r} of {relation!r} has no {second!r} in the world, so what becomes of "
                    f"{derived.id!r} is unknown; choose one of world.objects({relation!r})"
                )
            known = world.has(second, new)  # a table of real facts has gaps: then nobody can say what becomes of it
            add(derived.id, subject, world.value(second, new) if known else None, "two_hop" if known else "undefined")
        if second == relation:
            for s in world.having(first, subject):
                add(derived.id, s, new, "two_hop_via")
    return list(found.values())


def dependencies(world: FactTable, relation: str, subject: str, new: str) -> set[Key]:
    """Facts that must themselves stay unedited for `changes` of this edit to hold."""
    needed: set[Key] = set()
    for derived in world.relations.values():
        if derived.derived is None:
            continue
        first, second = derived.derived
        if first == relation:
            needed.add((second, new))
        if second == relation:
            needed |= {(first, s) for s in world.having(first, subject)}
    return needed


def _changes_of(world: FactTable, fact: Fact) -> list[Change]:
    if fact.relation is None:
        raise RequestError(
            f"fact {fact.case_id or fact.text!r} names no relation of the world; set Fact.relation"
        )
    return changes(world, fact.relation, fact.subject, fact.target)


def must_change(world: FactTable, fact: Fact, *, all_templates: bool = True) -> list[Probe]:
    """Every prompt whose answer a single edit must change, the edited fact first (kinds as in `Change`).

    all_templates=False asks each fact in its first template only. Raises RequestError (see `changes`).
    """
    return [
        Probe(t.fill(c.subject), c.new, kind=c.kind, before=c.old, subject=c.subject)
        for c in _changes_of(world, fact)
        if c.new is not None
        for t in _templates(world, c.relation, all_templates)
    ]


def must_not_change(world: FactTable, fact: Fact, *, all_templates: bool = True) -> list[Probe]:
    """Every prompt of the world whose answer a single edit must leave alone.

    kind: "same_subject", "neighborhood" (same relation and old object), "same_relation" (other objects) or
    "unrelated". Undefined facts (see the module) are in neither list. Raises RequestError (see `changes`).
    """
    touched = {c.key for c in _changes_of(world, fact)}
    old = world.value(fact.relation, fact.subject)

    def kind(relation: str, subject: str, answer: str) -> str:
        if subject == fact.subject:
            return "same_subject"
        if relation != fact.relation:
            return "unrelated"
        return "neighborhood" if answer == old else "same_relation"

    probes = []
    for r in world.relations.values():
        for s in world.subjects(r.id):
            if (r.id, s) in touched:
                continue
            answer = world.value(r.id, s)
            label = kind(r.id, s, answer)
            probes += [
                Probe(t.fill(s), answer, kind=label, subject=s)
                for t in _templates(world, r.id, all_templates)
            ]
    return probes


def _templates(world: FactTable, relation: str, all_templates: bool):
    templates = world.relation(relation).templates
    return templates if all_templates else templates[:1]
