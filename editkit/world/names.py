"""Fictional names from a small inventory of syllables, so that a BPE tokenizer cuts them into 2-4 shared pieces."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError

GIVEN_STARTS = ("Al", "Bren", "Cor", "Dal", "El", "Fen", "Gal", "Hes", "Il", "Jor", "Kel", "Lor", "Mar", "Nor", "Or",
                "Per", "Quin", "Ros", "Sel", "Tam", "Ul", "Ves", "Wil", "Yor", "Zan")
GIVEN_ENDS = ("a", "an", "is", "en", "ia", "o", "ric", "wen", "mira", "dor")
FAMILY_STARTS = ("Ash", "Bar", "Cald", "Dren", "Ekl", "Farn", "Gref", "Holt", "Ing", "Jask", "Kov", "Lind", "Mort",
                 "Nast", "Osk", "Pell", "Rask", "Stav", "Thorn", "Ulf", "Varn", "Wes", "Yel", "Zell")
FAMILY_ENDS = ("berg", "by", "den", "er", "ford", "gard", "ley", "mann", "ova", "sen", "ski", "ton", "vik", "wick")
COMPANY_STARTS = ("Ax", "Bel", "Cin", "Dom", "Er", "Fol", "Gran", "Hex", "Kin", "Lum", "Mon", "Nev", "Ond", "Prim",
                  "Tarv", "Vant", "Zor")
COMPANY_ENDS = ("ara", "ex", "ilo", "ium", "on", "os", "una")
COMPANY_KINDS = ("Group", "Works", "Holdings", "Partners", "Industries")


def _unique(rng: np.random.Generator, n: int, make, capacity: int, what: str) -> list[str]:
    if n > capacity // 2:
        raise ConfigError(f"{n} {what} asked for, the name inventory holds {capacity}; ask for at most {capacity // 2}")
    names: list[str] = []
    while len(names) < n:
        new = make(rng)
        if not any(new.startswith(old) or old.startswith(new) for old in names):
            names.append(new)
    return names


def person_names(rng: np.random.Generator, n: int) -> list[str]:
    """n different "Given Family" names of two to four syllables; none is the beginning of another."""
    pick = rng.choice

    def make(rng):
        given = pick(GIVEN_STARTS) + (pick(GIVEN_ENDS) if rng.random() < 0.7 else "")
        family = pick(FAMILY_STARTS) + (pick(FAMILY_ENDS) if rng.random() < 0.6 else "")
        return f"{given} {family}"

    return _unique(rng, n, make, len(GIVEN_STARTS) * len(GIVEN_ENDS) * len(FAMILY_STARTS) * len(FAMILY_ENDS), "people")


def company_names(rng: np.random.Generator, n: int) -> list[str]:
    """n different company names."""
    pick = rng.choice

    def make(rng):
        return f"{pick(COMPANY_STARTS)}{pick(COMPANY_ENDS)} {pick(COMPANY_KINDS)}"

    return _unique(rng, n, make, len(COMPANY_STARTS) * len(COMPANY_ENDS) * len(COMPANY_KINDS), "companies")
