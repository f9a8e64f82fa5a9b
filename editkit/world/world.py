"""The companion world: people, companies, cities, countries, and everything that is true about them."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from ..errors import ConfigError
from . import gazetteer as g
from .names import company_names, person_names
from .relations import CARD_RELATIONS, RELATIONS


@dataclasses.dataclass(frozen=True)
class Statement:
    """One true sentence. prompt: filled template; subject_span: characters of the subject in it; the answer follows."""

    relation: str
    subject: str
    template_index: int
    prompt: str
    subject_span: tuple[int, int]
    answer: str


@dataclasses.dataclass(frozen=True)
class Biography:
    """Free text about one person; answer_spans: characters of the stated objects."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]


class World:
    """A closed world generated from a seed.

    Every person has every personal relation, every company a seat and an industry, every city a country, every
    country a continent, currency, official language and capital. Raises ConfigError for an odd number of people
    (marriages pair them) or sizes the inventories cannot serve.
    """

    def __init__(self, seed: int = 0, n_people: int = 400, n_companies: int = 60):
        if n_people < 4 or n_people % 2:
            raise ConfigError(f"n_people must be even and at least 4 (everybody is married), got {n_people}")
        if n_companies < 2:
            raise ConfigError(f"n_companies must be at least 2, got {n_companies}")
        self.seed = seed
        rng = np.random.default_rng([seed, 1])
        self.people = person_names(rng, n_people)
        self.companies = company_names(rng, n_companies)
        self.cities = list(g.CITIES)
        self.countries = list(g.COUNTRIES)
        self._values: dict[str, dict[str, str]] = {r: {} for r in RELATIONS}
        self._fill(rng)

    def _fill(self, rng: np.random.Generator) -> None:
        v = self._values
        v["country"] |= g.CITIES
        for country, facts in g.COUNTRIES.items():
            for relation, key in (("continent", "continent"), ("currency", "currency"),
                                  ("official_language", "language"), ("capital", "capital")):
                v[relation][country] = facts[key]
        for company in self.companies:
            v["seat"][company] = str(rng.choice(self.cities))
            v["industry"][company] = str(rng.choice(g.INDUSTRIES))
        order = rng.permutation(self.people)
        for a, b in zip(order[::2], order[1::2], strict=True):
            v["spouse"][str(a)], v["spouse"][str(b)] = str(b), str(a)
        for person in self.people:
            born, lives = rng.choice(self.cities, 2, replace=False)
            v["born_in"][person], v["lives_in"][person] = str(born), str(lives)
            for relation, pool in (("occupation", g.OCCUPATIONS), ("employer", self.companies), ("sport", g.SPORTS),
                                   ("instrument", g.INSTRUMENTS), ("language", g.LANGUAGES)):
                v[relation][person] = str(rng.choice(pool))
            v["birth_country"][person] = v["country"][v["born_in"][person]]
            v["employer_city"][person] = v["seat"][v["employer"][person]]

    def value(self, relation: str, subject: str) -> str:
        """The object of (relation, subject). Raises ConfigError if there is none."""
        try:
            return self._values[relation][subject]
        except KeyError:
            raise ConfigError(f"the world knows no {relation!r} of {subject!r}") from None

    def subjects(self, relation: str) -> list[str]:
        """All subjects of a relation, in a fixed order."""
        return list(self._values[relation])

    def objects(self, relation: str) -> list[str]:
        """All different objects of a relation, sorted."""
        return sorted(set(self._values[relation].values()))

    @cached_property
    def _statements(self) -> tuple[Statement, ...]:
        out = []
        for relation in RELATIONS.values():
            for subject, answer in self._values[relation.id].items():
                for i, template in enumerate(relation.templates):
                    start = template.index("{}")
                    out.append(Statement(relation.id, subject, i, template.replace("{}", subject),
                                         (start, start + len(subject)), answer))
        return tuple(out)

    def statements(self) -> tuple[Statement, ...]:
        """Every fact in every template."""
        return self._statements

    def biographies(self, n_per_person: int = 4, seed: int = 0) -> list[Biography]:
        """Free texts: portraits with pronouns and profile cards, attributes in random order.

        In a card attributes follow the name without a cue, so that the name's last token alone must bring them up.
        """
        rng = np.random.default_rng([self.seed, 2, seed])
        out = []
        for person in self.people:
            for k in range(n_per_person):
                out.append(self._card(person, rng) if k % 2 else self._portrait(person, rng))
        return out

    def _portrait(self, person: str, rng: np.random.Generator) -> Biography:
        relations = [r for r in RELATIONS.values() if r.subject == "person"]
        chosen = [relations[i] for i in rng.permutation(len(relations))[:5]]
        text, spans = f"Here is {person}.", []
        for relation in chosen:
            head, tail = relation.clause.split("{}")
            answer = self.value(relation.id, person)
            text += f" They {head}"
            spans.append((len(text), len(text) + len(answer)))
            text += f"{answer}{tail}."
        return Biography(text, tuple(spans))

    def _card(self, person: str, rng: np.random.Generator) -> Biography:
        text, spans = person, []
        for i in rng.permutation(len(CARD_RELATIONS))[:5]:
            answer = self.value(CARD_RELATIONS[i], person)
            text += " " if not spans else ", "
            spans.append((len(text), len(text) + len(answer)))
            text += answer
        return Biography(text + ".", tuple(spans))

    def corpus_texts(self, seed: int = 0) -> list[str]:
        """All statements as sentences and two free texts per person (second moments, perplexity)."""
        return [f"{s.prompt} {s.answer}." for s in self.statements()] + [b.text for b in self.biographies(2, seed)]

    def size(self) -> dict[str, int]:
        """Counts of entities, facts and statements."""
        return {"people": len(self.people), "companies": len(self.companies), "cities": len(self.cities),
                "countries": len(self.countries), "relations": len(RELATIONS),
                "facts": sum(len(v) for v in self._values.values()), "statements": len(self.statements())}
