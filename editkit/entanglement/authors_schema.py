"""The JSON files of the CLaRE authors: reading and writing (clare.md section 5).

    {"triplets": [{"key", "prompt", "subject", "answer", "formatted"}, ...],
     "entanglement_metrics": {"key1:key2": {"value": {"cosine_sim": 0.606...}}, ...}}

A key is the md5 of "prompt|subject|target" (`Fact.key`). All pairs of the corpus make a file of several GB,
so it is read and written piece by piece. The authors' files are not at hand; the schema is that of their
README, and which of a pair's keys comes first is not documented: here it is the fact that comes first.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import ConfigError, DataError
from ..base.paths import user_path, written
from ..base.progress import bar
from ..models.facts import Fact
from .graph import EntanglementGraph, excluded_pairs, facts_hash, prompt_groups
from .graph_io import GraphWriter, sha256_of
from .similarity import Score, blocks

METRIC = "cosine_sim"
_CHUNK = 1 << 20
_LONGEST = 64  # pieces that one value may take


def triplet(fact: Fact) -> dict[str, str]:
    """A fact as the authors list it: `formatted` is "filled prompt -> answer"."""
    return {
        "key": fact.key, "prompt": fact.prompt, "subject": fact.subject, "answer": fact.target,
        "formatted": f"{fact.text} -> {fact.target}",
    }  # fmt: skip


def all_pairs(score: Score, rows: int = 1024) -> Iterator[tuple[int, int, float]]:
    """Every pair i < j of a symmetric score, one block of rows at a time."""
    if not score.symmetric:
        raise ConfigError(f"the score {score.name!r} is not symmetric, but the schema has one value per pair")
    for part in blocks(len(score), rows):
        values = score.block(part).cpu().numpy()
        for i in range(part.start, part.stop):
            yield from ((i, j, float(values[i - part.start, j])) for j in range(i + 1, len(score)))


def write_json(
    path: str | os.PathLike,
    facts: Sequence[Fact],
    pairs: EntanglementGraph | Score | Iterable[tuple[int, int, float]],
    *,
    metric: str = METRIC,
) -> Path:
    """Write facts and pairs in the authors' schema: a graph's edges, all pairs of a score, or (i, j, value)s.

    metric: name of the value, "cosine_sim" in the released files. The file appears when it is complete.
    Raises DataError for a graph of other facts or pairs of facts that do not exist.
    """
    if isinstance(pairs, EntanglementGraph):
        pairs.check(facts=facts)
        pairs = pairs.pairs()
    elif isinstance(pairs, Score):
        if len(pairs) != len(facts):
            raise DataError(f"the score is of {len(pairs)} facts, {len(facts)} were given")
        pairs = all_pairs(pairs)
    keys = [f.key for f in facts]
    with written(path) as part, open(part, "w", encoding="utf-8") as out:
        out.write('{"triplets": ')
        json.dump([triplet(f) for f in facts], out, ensure_ascii=False)
        out.write(', "entanglement_metrics": {')
        for count, (i, j, value) in enumerate(pairs):
            if not (0 <= i < len(keys) and 0 <= j < len(keys)):
                raise DataError(f"pair ({i}, {j}) names a fact that does not exist; there are {len(keys)}")
            comma = ", " if count else ""
            out.write(f'{comma}"{keys[i]}:{keys[j]}": {{"value": {{"{metric}": {json.dumps(value)}}}}}')
        out.write("}}\n")
    return user_path(path)


class _Stream:
    """JSON values one after the other from a file that does not fit into memory."""

    def __init__(self, path: Path):
        self.path, self.handle = path, open(path, encoding="utf-8")  # noqa: SIM115 (closed by read_json)
        self.text, self.at = "", 0
        self.decode = json.JSONDecoder().raw_decode

    def fail(self, what: str) -> DataError:
        near = self.text[max(self.at - 20, 0) : self.at + 40]
        return DataError(f"{self.path}: {what} near {near!r}; the file is not in the authors' schema")

    def more(self) -> bool:
        chunk = self.handle.read(_CHUNK)
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not blank."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                raise self.fail("the file ends too early")

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self.fail(f"expected {expected!r}")
        self.at += 1

    def value(self) -> Any:
        """The next whole value; a number has to be followed by something, as inside an object it is."""
        self.peek()
        for _ in range(_LONGEST):
            try:
                found, end = self.decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self.more():
                    break
                continue
            if end == len(self.text):  # a number may go on in the next piece
                end -= self.at
                if self.more():
                    continue
            self.at = end
            return found
        raise self.fail("a value is not valid JSON")

    def items(self, kind: str) -> Iterator[Any]:
        """Members of the next array ("[]"), or keys of the next object ("{}"), up to and with its end."""
        self.take(kind[0])
        first = True
        while self.peek() != kind[1]:
            if not first:
                self.take(",")
            first = False
            member = self.value()
            if kind == "{}":
                self.take(":")
            yield member
        self.take(kind[1])


def read_json(
    path: str | os.PathLike, *, metric: str = METRIC, threshold: float | None = None
) -> tuple[list[Fact], np.ndarray, np.ndarray]:
    """Facts, pairs (p, 2) int32 and values (p,) float32 of a file in the authors' schema.

    threshold: keep only values >= threshold (12 bytes of memory per kept pair). The facts' targets are the
    file's "answer". Raises DataError: not the schema, a key that is not the md5 of its triplet, a pair of an
    unknown key, a missing metric.
    """
    path = user_path(path)
    facts: list[Fact] = []
    number: dict[str, int] = {}
    keys: list[str] = []
    ends, values = array("i"), array("f")
    try:
        stream = _Stream(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    with stream.handle:
        for section in stream.items("{}"):
            if section == "triplets":
                facts += [_fact(path, t) for t in stream.items("[]")]
            elif section == "entanglement_metrics":
                for pair in stream.items("{}"):
                    value = _value(path, pair, stream.value(), metric)
                    if threshold is not None and value < threshold:
                        continue
                    for key in pair.split(":"):
                        if key not in number:
                            number[key] = len(keys)
                            keys.append(key)
                        ends.append(number[key])
                    values.append(value)
            else:
                stream.value()
    rows = {fact.key: i for i, fact in enumerate(facts)}
    if unknown := [key for key in keys if key not in rows]:
        raise DataError(f"{path} has pairs of {unknown[0]!r}, which is none of its {len(facts)} triplets")
    place = np.array([rows[key] for key in keys], dtype=np.int32)
    pairs = np.frombuffer(ends, dtype=np.int32).reshape(-1, 2) if len(ends) else np.empty((0, 2), np.int32)
    return facts, place[pairs] if len(pairs) else pairs, np.array(values, dtype=np.float32)


def _fact(path: Path, record: Any) -> Fact:
    try:
        fact = Fact(record["prompt"], record["subject"], record["answer"], case_id=record["key"])
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: a triplet lacks {error}; each needs key, prompt, subject, answer") from None
    if fact.key != fact.case_id:
        raise DataError(
            f"{path}: the key {fact.case_id} is not the md5 of 'prompt|subject|answer' of {fact.text!r}; "
            "the file was changed, or its triplets and keys do not belong together"
        )
    return fact


def _value(path: Path, pair: Any, record: Any, metric: str) -> float:
    try:
        value = record["value"][metric]
    except (TypeError, KeyError):
        raise DataError(f"{path}: the pair {pair} has no value.{metric}; give metric=...") from None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or pair.count(":") != 1:
        raise DataError(f"{path}: {pair!r}: {value!r} is not a number for two keys")
    return float(value)


def import_json(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    metric: str = METRIC,
    about: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> tuple[EntanglementGraph, list[Fact]]:
    """A graph from a file of the authors, and its facts; each pair counts in both directions.

    top_k, threshold: as in `graph.build_graph`; without either everything in the file is kept. Pairs that
    share prompt and subject are left out. The graph's model is unknown: say what you know in `about`.
    Raises DataError: bad files, a pair given twice, nothing left.
    """
    facts, pairs, values = read_json(path, metric=metric, threshold=threshold)
    n = len(facts)
    groups = prompt_groups(facts)
    keep = groups[pairs[:, 0]] != groups[pairs[:, 1]]
    pairs, values = pairs[keep], values[keep]
    if not len(pairs):
        raise DataError(f"{path}: the graph is empty: no pair of {n} facts is left; lower the threshold")
    ends = np.concatenate([pairs, pairs[:, ::-1]])
    weights = np.concatenate([values, values])
    order = np.lexsort((ends[:, 1], -weights, ends[:, 0]))
    ends, weights = ends[order], weights[order]
    code = ends[:, 0].astype(np.int64) * n + ends[:, 1]
    if len(np.unique(code)) < len(code):
        raise DataError(f"{path}: a pair of keys occurs twice; the file must have one value per pair")
    counts = np.bincount(ends[:, 0], minlength=n)
    if top_k is not None:
        place = np.arange(len(ends)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends, weights = ends[place < top_k], weights[place < top_k]
        counts = np.minimum(counts, top_k)
    skip = excluded_pairs(n, groups)
    identity = {
        "score": metric, "symmetric": True, "absolute": False, "threshold": threshold, "top_k": top_k,
        "block": n, "matrices": sha256_of(user_path(path)), "facts": facts_hash(facts),
        "excluded_pairs": len(skip) - n, "model": None, "fingerprint": None,
        "about": {"source": "CLaRE schema", **(about or {})},
    }  # fmt: skip
    writer = GraphWriter(folder, identity, n, dtype)
    first = np.concatenate([[0], np.cumsum(counts)])
    for part in bar(list(blocks(n, 1024)), "writing the graph", unit="block"):
        edges = slice(first[part.start], first[part.stop])
        writer.append(counts[part], ends[edges, 1], weights[edges])
    writer.finish()
    return EntanglementGraph.open(folder), facts
