"""Fictional names of people and companies from a small inventory of name words.

A person's name is two to four words out of 56: given name, up to one middle name, one or two family names.
The words are frequent enough that a subword tokenizer keeps each as about one piece, so a name is two to four
pieces, every piece is shared by many people, and only the combination identifies a person - as in real names.
"""

from __future__ import annotations

import numpy as np

from ...base.errors import ConfigError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIVEN = _words(
    """Ada Bram Celia Dario Edda Fynn Greta Hugo Ilka Joren Kaja Lior Maren Nils Oona Pavel Rosa Sven Tilda
    Ugo Vera Wanda Yara Zeno"""
)
FAMILY = _words(
    """Abrell Bracken Corvin Dalmar Elster Farrow Gorlan Hasker Ibsley Jarrod Kestrel Lomax Marlow Norrim
    Ostrand Pellam Quillan Renfield Sorrel Tarnow Ulrin Vashti Wexham Yorrick Zander Ambrel Brandis Calder
    Dorsey Ferris Hollin Lunt"""
)
SHARE_OF_LENGTH = {2: 0.45, 3: 0.40, 4: 0.15}

_STEM_START = _words("Tar Bel Cor Dun Fal Gran Hel Kor Lan Mer Nor Pol Ser Tol Ver Zan")
_STEM_END = _words("vel dex mark tron lis bury nox wick gard pine rus mont")
_COMPANY = _words("Group Works Holdings Partners Company Union Brothers Trust")


def person_names(n: int, rng: np.random.Generator) -> list[str]:
    """n different names; none is contained in another (so none is a prefix of another).

    At most a quarter of all (given, family) pairs become two-word names: the rest must stay free as endings
    of longer names. Raises ConfigError if n exceeds what the inventory can give.
    """
    pairs = len(GIVEN) * len(FAMILY)
    longest = len(GIVEN) * (len(GIVEN) - 1) * len(FAMILY) * (len(FAMILY) - 1)
    if n < 0 or n > longest // 10:
        raise ConfigError(f"n_people={n}: the name inventory serves 0 to {longest // 10} people")
    n_two = min(int(SHARE_OF_LENGTH[2] * n), pairs // 4)
    three = SHARE_OF_LENGTH[3] / (SHARE_OF_LENGTH[3] + SHARE_OF_LENGTH[4])
    n_three = min(int(three * (n - n_two)), pairs * len(GIVEN) // 4)
    taken: set[tuple[str, ...]] = set()
    names = []
    for length, count in ((2, n_two), (3, n_three), (4, n - n_two - n_three)):
        while count:
            given = rng.choice(GIVEN, 2 if length > 2 else 1, replace=False)
            family = rng.choice(FAMILY, 2 if length > 3 else 1, replace=False)
            words = (*given.tolist(), *family.tolist())
            parts = {words[i:j] for i in range(length) for j in range(i + 2, length + 1)}
            if parts & taken:
                continue
            taken.add(words)
            names.append(" ".join(words))
            count -= 1
    return [names[i] for i in rng.permutation(n)]


def company_names(n: int, rng: np.random.Generator) -> list[str]:
    """n different names such as "Tarvel Group"; every stem is used once before any is used again.

    Raises ConfigError if n exceeds what the inventory can give.
    """
    stems = [a + b for a in _STEM_START for b in _STEM_END]
    if n < 0 or n > len(stems) * len(_COMPANY):
        raise ConfigError(
            f"n_companies={n}: the name inventory serves 0 to {len(stems) * len(_COMPANY)} companies"
        )
    order = rng.permutation(len(stems))
    shift = rng.integers(len(_COMPANY), size=len(stems))
    names = []
    for i in range(n):
        stem = order[i % len(stems)]
        names.append(f"{stems[stem]} {_COMPANY[(shift[stem] + i // len(stems)) % len(_COMPANY)]}")
    return names
