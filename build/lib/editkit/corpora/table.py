"""A closed table of facts: relations as functions from subjects to objects, each with its wordings.

The generated world and the corpus of real facts are both tables, so edit requests, consequences, recall and scores are
made by the same code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from ..base.errors import RequestError
from ..models.facts import SLOT

Key = tuple[str, str]  # (relation id, subject)


@dataclasses.dataclass(frozen=True)
class Template:
    """One wording of a relation. role: "edit", "paraphrase" or "question".

    example: a sentence of the same wording about another subject, put in front of it (a worked example).
    """

    wording: str
    role: str
    example: str = ""

    @property
    def text(self) -> str:
        """What is filled: the example, if there is one, and the wording."""
        return f"{self.example} {self.wording}" if self.example else self.wording

    @property
    def subject_first(self) -> bool:
        """True if the wording opens with the subject."""
        return self.wording.startswith(SLOT)

    def fill(self, subject: str) -> str:
        """The prompt of this subject."""
        return self.text.replace(SLOT, subject)


@dataclasses.dataclass(frozen=True)
class Relation:
    """One relation, a function from subjects to objects.

    subject_type, object_type: "person", "company", "city", "country", "language", ...
    templates:  wordings whose answer follows directly.
    generation: openings for free text about the subject.
    named, pronoun: sentences of a biography, "{n}" = name, "{v}" = value, "{a}" = value with a or an.
    derived:    (first, second) if value(s) = second(first(s)), else None.
    symmetric:  True if value(value(s)) = s.
    """

    id: str
    subject_type: str
    object_type: str
    templates: tuple[Template, ...]
    generation: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    pronoun: tuple[str, ...] = ()
    derived: tuple[str, str] | None = None
    symmetric: bool = False


@dataclasses.dataclass(frozen=True)
class Statement:
    """One filled template. prompt + " " + answer states the fact; subject_span: characters of the subject."""

    relation: str
    subject: str
    template_index: int
    prompt: str
    subject_span: tuple[int, int]
    answer: str

    @property
    def text(self) -> str:
        """The full sentence."""
        return f"{self.prompt} {self.answer}."


class FactTable:
    """Relations and their values: {relation id: {subject: object}} of the stored ones; derived ones follow.

    name: of the table, part of a fact's case_id.   seed: part of every draw from the table.
    editable: the relations that are edited unless others are asked for; None: all stored ones.
    keys: the facts that may be asked and edited, None for all of them.   pools: {relation: new objects to draw from},
    None for every object that occurs. Both leave the values alone, so consequences are worked out from the whole table.
    """

    def __init__(
        self,
        relations: Mapping[str, Relation],
        values: Mapping[str, Mapping[str, str]],
        *,
        name: str,
        seed: int = 0,
        editable: Sequence[str] | None = None,
        keys: Collection[Key] | None = None,
        pools: Mapping[str, Sequence[str]] | None = None,
    ):
        self.relations = dict(relations)
        self.name, self.seed = name, seed
        self._values = values
        self.editable = tuple(editable or (r.id for r in self.relations.values() if r.derived is None))
        self._keys = None if keys is None else frozenset(keys)
        self._pools = pools
        self._subjects: dict[str, list[str]] = {}
        self._inverse: dict[str, dict[str, list[str]]] = {}

    def restricted(
        self, keys: Collection[Key] | None = None, pools: Mapping[str, Sequence[str]] | None = None
    ) -> FactTable:
        """The same table, asked and edited on these facts only (those a model knows, say), with these new objects."""
        keys = self._keys if keys is None else frozenset(keys) if self._keys is None else self._keys & set(keys)
        own = {"name": self.name, "seed": self.seed, "editable": self.editable}
        return FactTable(self.relations, self._values, **own, keys=keys, pools=pools or self._pools)

    def relation(self, relation: str) -> Relation:
        """The relation with this id. Raises RequestError for an unknown id."""
        if relation not in self.relations:
            raise RequestError(f"unknown relation {relation!r}; there are {', '.join(self.relations)}")
        return self.relations[relation]

    def entities(self, kind: str) -> frozenset[str]:
        """Everything of one type that some relation is about."""
        return self._entities.get(kind, frozenset())

    @functools.cached_property
    def _entities(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for r in self.relations.values():
            found.setdefault(r.subject_type, set()).update(self._values.get(r.id, ()))
        return {kind: frozenset(names) for kind, names in found.items()}

    def has(self, relation: str, subject: str) -> bool:
        """Whether the table says the object."""
        derived = self.relation(relation).derived
        if derived is None:
            return subject in self._values[relation]
        first, second = derived
        return self.has(first, subject) and self.has(second, self.value(first, subject))

    def value(self, relation: str, subject: str) -> str:
        """The true object. Raises RequestError for an unknown relation or subject."""
        r = self.relation(relation)
        if r.derived:
            first, second = r.derived
            return self.value(second, self.value(first, subject))
        try:
            return self._values[relation][subject]
        except KeyError:
            raise RequestError(f"{subject!r} is no subject of {relation!r} (a {r.subject_type})") from None

    def attributes(self, relation: str, subject: str) -> dict[str, str]:
        """{relation: object} of everything the table says about a subject of this relation."""
        kind = self.relation(relation).subject_type
        own = [q.id for q in self.relations.values() if q.subject_type == kind and self.has(q.id, subject)]
        return {q: self.value(q, subject) for q in own}

    def subjects(self, relation: str) -> list[str]:
        """All subjects of a relation that may be asked."""
        self.relation(relation)
        if relation not in self._subjects:
            names, keys = self._names(relation), self._keys
            self._subjects[relation] = [s for s in names if keys is None or (relation, s) in keys]
        return self._subjects[relation]

    def having(self, relation: str, value: str) -> list[str]:
        """All subjects with this object, whether they may be asked or not."""
        if relation not in self._inverse:
            inverse: dict[str, list[str]] = defaultdict(list)
            for s in self._names(relation):
                inverse[self.value(relation, s)].append(s)
            self._inverse[relation] = inverse
        return self._inverse[relation].get(value, [])

    def _names(self, relation: str) -> list[str]:
        derived = self.relation(relation).derived
        return [s for s in self._values[derived[0] if derived else relation] if self.has(relation, s)]

    def objects(self, relation: str) -> list[str]:
        """The candidates of a counterfactual, sorted: all objects that occur in a relation, or those of its pool."""
        if self._pools is not None:
            return sorted(self._pools.get(relation, ()))
        if self.relation(relation).derived is None:
            return sorted(set(self._values[relation].values()))
        return sorted({self.value(relation, s) for s in self._names(relation)})

    def statement(self, relation: str, subject: str, template_index: int) -> Statement:
        """One filled template with its answer."""
        template = self.relation(relation).templates[template_index]
        start = template.text.index(SLOT)
        return Statement(
            relation,
            subject,
            template_index,
            template.fill(subject),
            (start, start + len(subject)),
            self.value(relation, subject),
        )

    def statements(self) -> list[Statement]:
        """Every fact in every template, in the order relation, subject, template."""
        return [
            self.statement(r.id, s, t)
            for r in self.relations.values()
            for s in self.subjects(r.id)
            for t in range(len(r.templates))
        ]

    def size(self) -> dict[str, int]:
        """Counts: relations, facts (relation, subject), statements."""
        facts = Counter({r: len(self.subjects(r)) for r in self.relations})
        return {
            "relations": len(self.relations),
            "facts": facts.total(),
            "statements": sum(n * len(self.relations[r].templates) for r, n in facts.items()),
        }

    def fingerprint(self) -> str:
        """sha256 over all statements: equal tables have equal fingerprints."""
        digest = hashlib.sha256()
        for s in self.statements():
            digest.update(s.text.encode() + b"\n")
        return digest.hexdigest()
