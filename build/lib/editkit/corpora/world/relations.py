"""Relations of the companion world: types, templates, free-text forms.

A template has one slot "{}" for the subject and ends where the answer follows directly (" answer"). The first
two of each relation are edit prompts, the others paraphrases, the last one a question. Subject-first and
relation-first wordings are mixed.
"""

from __future__ import annotations

from ..table import Relation, Template

ROLES = ("edit", "paraphrase", "question")
# stored one-directional relations of people: the default edits
EDITABLE = ("born_in", "lives_in", "occupation", "employer", "sport", "instrument", "language")


def _relation(id, types, texts, **fields) -> Relation:
    subject_type, object_type = types.split(" > ")
    last = len(texts) - 1
    templates = tuple(
        Template(t, "edit" if i < 2 else "question" if i == last else "paraphrase")
        for i, t in enumerate(texts)
    )
    return Relation(id, subject_type, object_type, templates, **fields)


_ALL = (
    _relation(
        "born_in",
        "person > city",
        (
            "{} was born in the city of",
            "The birthplace of {} is",
            "The city where {} was born is",
            "{}'s native city is",
            "{} first saw the light of day in",
            "According to the records, {} was born in",
            "In which city was {} born?",
        ),
        generation=("{} was born", "The childhood of {} began in", "The story of {} starts in"),
        named=("{n} was born in {v}.", "{n} is a native of {v}."),
        pronoun=("They were born in {v}.", "Their birthplace is {v}."),
    ),
    _relation(
        "lives_in",
        "person > city",
        (
            "{} lives in the city of",
            "The current residence of {} is in",
            "The city where {} lives now is",
            "{} has settled in",
            "{}'s house stands in",
            "Today the home of {} is in",
            "In which city does {} live?",
        ),
        generation=("{} lives", "The neighbors of {} say that", "A visit to {} leads to"),
        named=("{n} lives in {v}.", "{n} has a house in {v}."),
        pronoun=("They live in {v}.", "Their home is in {v}."),
    ),
    _relation(
        "occupation",
        "person > occupation",
        (
            "The occupation of {} is",
            "{} has the profession of",
            "{}'s job title is",
            "The profession of {} is",
            "The business card of {} says",
            "{} made a career as",
            "What is the occupation of {}?",
        ),
        generation=("{} is known for", "The career of {} started when", "Colleagues describe {} as"),
        named=("{n} is {a}.", "{n} works as {a}."),
        pronoun=("They work as {a}.", "Their occupation is {v}."),
    ),
    _relation(
        "employer",
        "person > company",
        (
            "{} is employed by",
            "The employer of {} is",
            "{} works for",
            "The company that employs {} is",
            "{} has a desk at",
            "The salary of {} is paid by",
            "Which company does {} work for?",
        ),
        generation=("{} goes to work", "At the office, {} is", "The boss of {} knows that"),
        named=("{n} works for {v}.", "{n} has a contract with {v}."),
        pronoun=("They work for {v}.", "Their employer is {v}."),
    ),
    _relation(
        "sport",
        "person > sport",
        (
            "The sport practiced by {} is",
            "{} is associated with the sport of",
            "The favorite sport of {} is",
            "{} competes in",
            "{}'s trophies were won in",
            "When it comes to sports, {} prefers",
            "Which sport does {} practice?",
        ),
        generation=("{} trains", "On weekends, {} can be found", "The coach of {} said that"),
        named=("{n} competes in {v}.", "{n} is a fan of {v}."),
        pronoun=("They compete in {v}.", "Their sport is {v}."),
    ),
    _relation(
        "instrument",
        "person > instrument",
        (
            "{} plays the",
            "The instrument played by {} is the",
            "The musical instrument of {} is the",
            "{} performs on the",
            "{} owns a room with a",
            "In the orchestra, {} sits down with the",
            "Which instrument does {} play?",
        ),
        generation=("{} makes music", "In concert, {} appears with", "The music teacher of {} said that"),
        named=("{n} plays the {v}.", "{n} has mastered the {v}."),
        pronoun=("They play the {v}.", "Their instrument is the {v}."),
    ),
    _relation(
        "language",
        "person > language",
        (
            "The mother tongue of {} is",
            "{} is a native speaker of",
            "The native language of {} is",
            "{} grew up speaking",
            "{}'s first language is",
            "At home, {} talks in",
            "What is the mother tongue of {}?",
        ),
        generation=("{} speaks", "The parents of {} taught", "The letters of {} are written in"),
        named=("{n} grew up speaking {v}.", "{n} speaks {v} at home."),
        pronoun=("They grew up speaking {v}.", "Their mother tongue is {v}."),
    ),
    _relation(
        "spouse",
        "person > person",
        (
            "{} is married to",
            "The spouse of {} is",
            "The person married to {} is",
            "{} exchanged rings with",
            "{}'s partner in marriage is",
            "The wedding guests of {} also congratulated",
            "Who is the spouse of {}?",
        ),
        generation=("{} fell in love", "The family of {} includes", "The wedding of {} was"),
        named=("{n} is married to {v}.", "{n} exchanged rings with {v}."),
        pronoun=("They are married to {v}.", "Their spouse is {v}."),
        symmetric=True,
    ),
    _relation(
        "birth_country",
        "person > country",
        (
            "{} was born in the country of",
            "The country where {} was born is",
            "The native country of {} is",
            "{}'s country of birth is",
            "{} comes from a city that lies in",
            "On the birth certificate of {}, the country is",
            "In which country was {} born?",
        ),
        generation=("{} comes from", "The passport of {} shows", "As a child, {} lived in"),
        named=("{n} was born in a city of {v}.", "{n} has roots in {v}."),
        pronoun=("Their country of birth is {v}.", "They have roots in {v}."),
        derived=("born_in", "country"),
    ),
    _relation(
        "employer_city",
        "person > city",
        (
            "{} works for a company based in",
            "The employer of {} has its seat in",
            "The head office of the company that employs {} is in",
            "{}'s employer is located in",
            "{} is paid by a firm from",
            "The company behind the job of {} is registered in",
            "In which city is the employer of {} based?",
        ),
        generation=("{} travels to the head office", "The firm of {} is", "The company where {} works is"),
        named=("{n} is on the payroll of a firm from {v}.",),
        pronoun=("Their employer is based in {v}.", "They work for a company from {v}."),
        derived=("employer", "seat"),
    ),
    _relation(
        "seat",
        "company > city",
        (
            "{} has its headquarters in",
            "The seat of {} is in",
            "The headquarters of {} are found in",
            "{} is run from",
            "{}'s main office is in",
            "The directors of {} meet in",
            "In which city is {} based?",
        ),
        generation=("{} was founded", "The headquarters of {}", "The history of {} began in"),
    ),
    _relation(
        "industry",
        "company > industry",
        (
            "{} operates in the industry of",
            "The line of business of {} is",
            "The industry of {} is",
            "{} makes its money in",
            "{}'s field of business is",
            "The products of {} belong to",
            "In which industry does {} operate?",
        ),
        generation=("{} sells", "Customers of {} say that", "The products of {} are"),
    ),
    _relation(
        "country",
        "city > country",
        (
            "{} is a city in",
            "The country in which {} lies is",
            "The city of {} belongs to",
            "{} can be found in",
            "{}'s location is in",
            "On the map, {} is a place in",
            "In which country does {} lie?",
        ),
        generation=("{} is famous for", "Visitors to {} often", "The old town of {} is"),
    ),
    _relation(
        "continent",
        "country > continent",
        (
            "{} lies on the continent of",
            "The continent to which {} belongs is",
            "The continent of {} is",
            "{} is a country in",
            "{}'s continent is",
            "Geographers place {} in",
            "On which continent does {} lie?",
        ),
        generation=("{} is located", "The landscape of {} is", "Geography books describe {} as"),
    ),
    _relation(
        "currency",
        "country > currency",
        (
            "People in {} pay with the",
            "The money used in {} is the",
            "{} has as its currency the",
            "{}'s central bank issues the",
            "Salaries in {} are paid in the",
            "{} prints banknotes of the",
            "Which currency is used in {}?",
        ),
        generation=("{} has an economy", "Prices in {} are", "The banks of {} are"),
    ),
    _relation(
        "capital",
        "country > city",
        (
            "The capital city of {} is",
            "{} has as its capital",
            "The city that serves as capital of {} is",
            "{}'s capital city is",
            "Maps mark the capital of {} as",
            "{} celebrates its national day in",
            "What is the capital city of {}?",
        ),
        generation=("{} is governed", "The parliament of {} is", "Tourists in {} go to"),
    ),
)

RELATIONS: dict[str, Relation] = {r.id: r for r in _ALL}


def relations_of(subject_type: str, *, derived: bool | None = None) -> tuple[Relation, ...]:
    """Relations of one subject type; derived=True/False keeps only (non-)derived ones."""
    return tuple(
        r
        for r in _ALL
        if r.subject_type == subject_type and (derived is None or (r.derived is not None) == derived)
    )
