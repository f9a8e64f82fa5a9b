"""Relations of the real facts: wordings, worked examples, and what follows from what.

The first wording of each relation is the edit prompt, the others are its paraphrases. There are no questions: a small
model of text does not answer them, and a paraphrase that it cannot follow says nothing about an edit. Each prompt
begins with the same sentence about another subject: a model that was trained on text, not on this table, has to be
told what kind of answer is wanted. The subject of the example is no subject of the relation.
"""

from __future__ import annotations

from ..table import Relation, Template

EXAMPLES: dict[str, tuple[str, str]] = {
    "capital": ("Peru", "Lima"),
    "continent": ("Italy", "Europe"),
    "currency": ("Sweden", "krona"),
    "language": ("Italy", "Italian"),
    "country": ("Munich", "Germany"),
    "state": ("Seattle", "Washington"),
    "nationality": ("Vincent van Gogh", "Dutch"),
    "profession": ("Vincent van Gogh", "painter"),
    "symbol": ("helium", "He"),
    "element_series": ("helium", "noble gas"),
    "landform": ("Danube", "river"),
    "mythology": ("Osiris", "Egyptian"),
    "city_capital": ("Lyon", "Paris"),
    "city_continent": ("Lyon", "Europe"),
    "city_currency": ("Lyon", "euro"),
    "city_language": ("Lyon", "French"),
}

# id: (subject type, object type, wordings, openings of free text, (first, second) of a derived relation)
_RELATIONS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...], tuple[str, str] | None]] = {
    "capital": (
        "country", "city",
        (
            "The capital city of {} is called",
            "{} has as its capital the city of",
            "The capital of {} is",
            "The government of {} sits in",
            "{}'s capital is",
        ),
        ("{} is governed", "The parliament of {}", "Visitors to {} often go to"),
        None,
    ),
    "continent": (
        "country", "continent",
        (
            "The continent of {} is",
            "{} lies on the continent of",
            "On the map, {} is found in",
            "{}'s continent is",
        ),
        ("{} is located", "The landscape of {}", "The neighbours of {}"),
        None,
    ),
    "currency": (
        "country", "currency",
        (
            "The currency of {} is the",
            "People in {} pay with the",
            "The money used in {} is the",
            "{}'s currency is the",
            "The central bank of {} issues the",
        ),
        ("The economy of {}", "Prices in {} are", "The banks of {}"),
        None,
    ),
    "language": (
        "country", "language",
        (
            "The language spoken in {} is",
            "The official language of {} is",
            "People in {} speak",
            "Newspapers in {} are written in",
            "{}'s official language is",
        ),
        ("The people of {}", "Schools in {} teach", "The culture of {}"),
        None,
    ),
    "country": (
        "city", "country",
        (
            "The city of {} lies in the country of",
            "{} is a city in the country of",
            "The country in which {} lies is",
            "{} can be found in the country of",
            "{}'s country is",
        ),
        ("{} is a city", "The city of {} is known for", "Visitors to {}"),
        None,
    ),
    "state": (
        "city", "state",
        (
            "{} is a city in the state of",
            "The city of {} lies in the state of",
            "The state in which {} lies is",
            "{} can be found in the state of",
            "{}'s state is",
        ),
        ("{} is a city", "The city of {} is known for", "Visitors to {}"),
        None,
    ),
    "nationality": (
        "person", "nationality",
        (
            "The nationality of {} was",
            "{} was by nationality",
            "By nationality, {} was",
            "{}'s nationality was",
            "In books, the nationality of {} is given as",
        ),
        ("{} was born", "The life of {}", "{} is remembered for"),
        None,
    ),
    "profession": (
        "person", "profession",
        (
            "In books, {} is listed as a",
            "{} worked as a",
            "The profession of {} was that of a",
            "By profession, {} was a",
            "{}'s occupation was that of a",
        ),
        ("{} was born", "The work of {}", "{} is remembered for"),
        None,
    ),
    "symbol": (
        "element", "symbol",
        (
            "In the periodic table, {} has the symbol",
            "The chemical symbol of {} is",
            "Chemists abbreviate {} as",
            "The symbol for the element {} is",
            "In formulas, {} is written as",
        ),
        ("The element {}", "In nature, {} occurs", "Chemists use {}"),
        None,
    ),
    "element_series": (
        "element", "series",
        (
            "The element {} is classed as a",
            "In the periodic table, {} counts as a",
            "Chemists call {} a",
            "By its series, {} is a",
            "A chemist would describe {} as a",
        ),
        ("The element {}", "In nature, {} occurs", "Chemists use {}"),
        None,
    ),
    "landform": (
        "place", "landform",
        (
            "In geography, {} is the name of a",
            "{} is the name of a",
            "On maps, the name {} stands for a",
            "The geographical feature called {} is a",
            "{} is known as a",
        ),
        ("Geographers describe {}", "The region around {}", "On a map, {}"),
        None,
    ),
    "mythology": (
        "figure", "mythology",
        (
            "The mythology to which {} belongs is",
            "{} is a figure of a mythology that is",
            "The stories about {} are",
            "{}'s mythology is",
            "Among the mythologies of the world, that of {} is",
        ),
        ("In the myths, {}", "The story of {}", "{} is known as"),
        None,
    ),
    "city_capital": (
        "city", "city",
        (
            "The country of {} has as its capital",
            "{} lies in a country whose capital is",
            "The capital of the country in which {} lies is",
            "The government in charge of {} sits in",
        ),
        (),
        ("country", "capital"),
    ),
    "city_continent": (
        "city", "continent",
        (
            "The continent on which {} lies is",
            "{} lies on the continent of",
            "The continent of the city of {} is",
            "{} is found on the continent of",
        ),
        (),
        ("country", "continent"),
    ),
    "city_currency": (
        "city", "currency",
        (
            "In the city of {}, people pay with the",
            "Shops in {} take the",
            "The currency used in the city of {} is the",
            "Salaries in {} are paid in the",
        ),
        (),
        ("country", "currency"),
    ),
    "city_language": (
        "city", "language",
        (
            "Street signs in {} are written in",
            "The language of the country in which {} lies is",
            "The official language in the city of {} is",
            "The people of the city of {} speak",
        ),
        (),
        ("country", "language"),
    ),
}  # fmt: skip


def relations(*, examples: bool = True) -> dict[str, Relation]:
    """All relations by id; examples=False leaves out the worked example in front of each wording."""
    made = {}
    for name, (subject_type, object_type, wordings, generation, derived) in _RELATIONS.items():
        subject, answer = EXAMPLES[name]
        roles = ("edit", "edit", *["paraphrase"] * (len(wordings) - 2))
        templates = tuple(
            Template(text, role, f"{text.replace('{}', subject)} {answer}." if examples else "")
            for text, role in zip(wordings, roles, strict=True)
        )
        made[name] = Relation(name, subject_type, object_type, templates, generation, derived=derived)
    return made
