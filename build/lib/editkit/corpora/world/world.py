"""The companion world: a generated knowledge base whose every consequence is known.

Fictional people and companies live in a gazetteer of real cities and countries. Every person has every
attribute. Everything is a function of the seed and the sizes; each part draws from a random stream of its
own.
"""

from __future__ import annotations

import zlib

import numpy as np

from ...base.errors import ConfigError
from ..table import FactTable
from . import gazetteer
from .biographies import Biography, biography, card
from .names import company_names, person_names
from .relations import EDITABLE, RELATIONS


class World(FactTable):
    """People, companies, cities, countries and their relations.

    n_people must be even (everybody is married inside the world). Raises ConfigError for impossible sizes.
    """

    def __init__(self, seed: int = 0, n_people: int = 400, n_companies: int = 60):
        if n_people < 4 or n_people % 2:
            raise ConfigError(
                f"n_people={n_people}: needs an even number of at least 4 (everybody has a spouse)"
            )
        if n_companies < 2:
            raise ConfigError(f"n_companies={n_companies}: needs at least 2, or no employer could be edited")
        self.seed = seed
        self.people = person_names(n_people, self._rng("people"))
        self.companies = company_names(n_companies, self._rng("companies"))
        self.cities = list(gazetteer.CITIES)
        self.countries = list(gazetteer.COUNTRIES)
        values: dict[str, dict[str, str]] = {
            "born_in": self._draw("born_in", self.people, self.cities),
            "occupation": self._draw("occupation", self.people, gazetteer.OCCUPATIONS),
            "employer": self._draw("employer", self.people, self.companies),
            "sport": self._draw("sport", self.people, gazetteer.SPORTS),
            "instrument": self._draw("instrument", self.people, gazetteer.INSTRUMENTS),
            "language": self._draw("language", self.people, gazetteer.LANGUAGES),
            "seat": self._draw("seat", self.companies, self.cities),
            "industry": self._draw("industry", self.companies, gazetteer.INDUSTRIES),
            "country": dict(gazetteer.COUNTRY),
            "continent": dict(gazetteer.CONTINENT),
            "currency": dict(gazetteer.CURRENCY),
            "capital": dict(gazetteer.CAPITAL),
        }
        values["lives_in"] = self._residences(values["born_in"])
        values["spouse"] = self._couples()
        super().__init__(RELATIONS, values, name=f"w{seed}", seed=seed, editable=EDITABLE)

    def _rng(self, *labels) -> np.random.Generator:
        """A random stream of its own for each purpose, so that one part never shifts another."""
        return np.random.default_rng([self.seed, *(zlib.crc32(str(x).encode()) for x in labels)])

    def _draw(self, relation: str, subjects, objects) -> dict[str, str]:
        picks = self._rng(relation).integers(len(objects), size=len(subjects))
        return {s: objects[k] for s, k in zip(subjects, picks, strict=True)}

    def _residences(self, born: dict[str, str]) -> dict[str, str]:
        rng, n = self._rng("lives_in"), len(self.cities)
        index = {c: i for i, c in enumerate(self.cities)}
        steps = rng.integers(1, n, size=len(self.people))  # never 0: nobody lives where they were born
        return {p: self.cities[(index[born[p]] + k) % n] for p, k in zip(self.people, steps, strict=True)}

    def _couples(self) -> dict[str, str]:
        order = [self.people[i] for i in self._rng("spouse").permutation(len(self.people))]
        pairs = list(zip(order[::2], order[1::2], strict=True))
        return dict(pairs) | {b: a for a, b in pairs}

    def _names(self, relation: str) -> list[str]:
        kind = self.relation(relation).subject_type
        return {"person": self.people, "company": self.companies, "city": self.cities, "country": self.countries}[kind]

    def biographies(self, n_per_person: int = 4, seed: int = 0) -> list[Biography]:
        """n texts per person, biographies and profile cards in turn; a text depends on (person, number,
        seed)."""
        texts = []
        for name in self.people:
            for i in range(n_per_person):
                write = card if i % 2 else biography
                texts.append(write(self.value, name, self._rng("biography", seed, name, i)))
        return texts

    def corpus_texts(self, seed: int = 0, n_per_person: int = 4) -> list[str]:
        """Free text for covariances and perplexity: all statements as sentences, then the biographies."""
        return [s.text for s in self.statements()] + [b.text for b in self.biographies(n_per_person, seed)]

    def size(self) -> dict[str, int]:
        """Counts: people, companies, cities, countries, relations, facts (relation, subject), statements."""
        return {
            "people": len(self.people),
            "companies": len(self.companies),
            "cities": len(self.cities),
            "countries": len(self.countries),
            **super().size(),
        }
