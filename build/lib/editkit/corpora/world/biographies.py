"""Free text about the people of a world: biographies and profile cards.

A biography names its person once; every later sentence says "They" or "Their", so what the model knows about
a person must be fetched through the name. A profile card puts values straight behind the name, in random
order, so the last token of the name must itself predict attributes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..table import Relation
from .relations import relations_of

CARDS = (
    "{n} ",
    "{n}, ",
    "{n} (",
)  # what stands before the first value; the first wording is drawn half the time
CARD_SHARES = (0.5, 0.25, 0.25)


@dataclasses.dataclass(frozen=True)
class Biography:
    """A text about one person. answer_spans: (start, end) characters of every stated value, in text order."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]
    subject: str
    kind: str  # "biography" or "card"


class _Writer:
    """Collects text and the spans of values."""

    def __init__(self):
        self.text, self.spans = "", []

    def plain(self, text: str) -> None:
        self.text += text

    def value(self, value: str) -> None:
        self.spans.append((len(self.text), len(self.text) + len(value)))
        self.text += value

    def sentence(self, form: str, name: str, value: str) -> None:
        form = form.replace("{n}", name)
        if "{a}" in form:
            form = form.replace("{a}", ("an " if value[0] in "aeiou" else "a ") + "{v}")
        before, after = form.split("{v}")
        self.plain(before)
        self.value(value)
        self.plain(after)


def biography(value, name: str, rng: np.random.Generator) -> Biography:
    """A multi-sentence biography; value: function (relation id, subject) -> str.

    All stored attributes appear, each derived one with probability one half, in random order.
    """
    relations = [r for r in relations_of("person") if r.derived is None or rng.random() < 0.5]
    out = _Writer()
    for i, k in enumerate(rng.permutation(len(relations))):
        relation: Relation = relations[k]
        forms = relation.pronoun if i else relation.named
        out.plain(" " if i else "")
        out.sentence(forms[rng.integers(len(forms))], name, value(relation.id, name))
    return Biography(out.text, tuple(out.spans), name, "biography")


def card(value, name: str, rng: np.random.Generator) -> Biography:
    """A profile card: name, then all stored attributes in random order (never the spouse first)."""
    relations = [r.id for r in relations_of("person", derived=False)]
    order = [relations[k] for k in rng.permutation(len(relations))]
    if order[0] == "spouse":  # two names in a row would read as one
        order.append(order.pop(0))
    opening = CARDS[rng.choice(len(CARDS), p=CARD_SHARES)]
    out = _Writer()
    out.plain(opening.replace("{n}", name))
    for i, relation in enumerate(order):
        out.plain(", " if i else "")
        out.value(value(relation, name))
    out.plain(")." if opening.endswith("(") else ".")
    return Biography(out.text, tuple(out.spans), name, "card")
