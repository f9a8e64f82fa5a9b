"""Relations of the world: types, templates, how a derived relation follows from others."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Relation:
    """One relation.

    templates: prompts with one slot; the answer follows directly as " answer". The first `n_edit` are edit
    prompts, the others paraphrases. derived: (first relation, second relation) if it is a two-hop consequence.
    clause: free-text clause about "they", with the slot for the object. symmetric: r(a) = b iff r(b) = a.
    """

    id: str
    subject: str
    object: str
    templates: tuple[str, ...]
    clause: str
    derived: tuple[str, str] | None = None
    symmetric: bool = False
    n_edit: int = 1


RELATIONS: dict[str, Relation] = {r.id: r for r in (
    Relation("born_in", "person", "city", (
        "{} was born in the city of", "The birthplace of {} is", "The city where {} was born is",
        "{} came into the world in", "{} is a native of the city of", "In which city was {} born? In",
    ), "were born in {}"),
    Relation("lives_in", "person", "city", (
        "{} lives in the city of", "The home town of {} is", "The city where {} lives is",
        "{} has a house in", "{} currently resides in", "In which city does {} live? In",
    ), "live in {}"),
    Relation("occupation", "person", "occupation", (
        "{} works as a professional", "The occupation of {} is", "By profession, {} is a trained",
        "{} earns a living as", "{} has the job of", "What is the job of {}? The job is",
    ), "work as {}"),
    Relation("employer", "person", "company", (
        "{} is employed by", "The employer of {} is", "The company where {} works is",
        "{} has a contract with", "{} is on the payroll of", "For which company does {} work? For",
    ), "are employed by {}"),
    Relation("sport", "person", "sport", (
        "{} plays the sport of", "The favorite sport of {} is", "The sport that {} practices is",
        "{} trains every week in", "{} is a fan of", "Which sport does {} play? The sport is",
    ), "are keen on {}"),
    Relation("instrument", "person", "instrument", (
        "{} plays the instrument called", "The instrument of {} is the", "The instrument that {} plays is the",
        "{} gives concerts on the", "{} took lessons on the", "Which instrument does {} play? The",
    ), "play the {}"),
    Relation("language", "person", "language", (
        "{} is a native speaker of", "The mother tongue of {} is", "The first language of {} is",
        "{} grew up speaking", "{} dreams in", "Which language does {} speak at home? At home it is",
    ), "speak {} at home"),
    Relation("spouse", "person", "person", (
        "{} is married to", "The spouse of {} is", "The person who married {} is",
        "{} shares a home with", "{} celebrated a wedding with", "Who is the spouse of {}? It is",
    ), "are married to {}", symmetric=True),
    Relation("birth_country", "person", "country", (
        "{} was born in the country of", "The country of birth of {} is", "The country where {} was born is",
        "{} has a birth certificate from", "{} entered life in the country of", "In which country was {} born? In",
    ), "come from {}", derived=("born_in", "country")),
    Relation("employer_city", "person", "city", (
        "{} works for a company based in", "The employer of {} has its seat in",
        "The head office of the company of {} is in", "{} visits the headquarters in",
        "{} reports to an office in", "Where is the employer of {} based? In",
    ), "work for a company from {}", derived=("employer", "seat")),
    Relation("seat", "company", "city", (
        "{} is based in the city of", "The headquarters of {} is in", "The city where {} has its seat is",
        "{} runs its head office in", "{} was founded and remains in", "Where does {} have its seat? In",
    ), "is based in {}"),
    Relation("industry", "company", "industry", (
        "{} is a company in the field of", "The industry of {} is", "The business of {} is",
        "{} earns its money with", "{} is a leader in", "In which industry is {} active? In",
    ), "is active in {}"),
    Relation("country", "city", "country", (
        "{} is a city in the country of", "The country of the city of {} is", "The country in which {} lies is",
        "{} can be found on the map of", "{} belongs to the state of", "In which country is {}? In",
    ), "lies in {}"),
    Relation("continent", "country", "continent", (
        "{} is a country on the continent of", "The continent of {} is", "The continent on which {} lies is",
        "{} is part of", "{} is found on the map of the continent", "On which continent is {}? In",
    ), "is part of {}"),
    Relation("currency", "country", "currency", (
        "{} pays with the", "The currency of {} is the", "The money used in {} is the",
        "{} prints notes of its currency, the", "{} has a central bank that issues the",
        "Which currency does {} use? The",
    ), "pays with the {}"),
    Relation("official_language", "country", "language", (
        "{} has the official language", "The official language of {} is", "The language spoken in {} is",
        "{} prints its laws in", "{} teaches its children to read in", "What do people speak in {}? They speak",
    ), "speaks {}"),
    Relation("capital", "country", "city", (
        "{} is governed from its capital", "The capital of {} is", "The seat of government of {} is",
        "{} has its parliament in", "{} receives ambassadors in", "What is the capital of {}? It is",
    ), "has the capital {}"),
)}

GENERATION_PROMPTS = ("{} is known for", "A short portrait: {}", "Everybody who meets {} knows that")
CARD_RELATIONS = ("occupation", "sport", "instrument", "language", "born_in", "lives_in", "employer", "birth_country")
