"""RippleEdits (Cohen et al. 2024): edits with tests on six kinds of consequences.

Record: example_type, edit {prompt, subject_id, relation, target_id, previous_fact}, and six lists of tests
{test_queries, test_condition "OR" | "AND", condition_queries}; query: {prompt, answers [{value, aliases}],
query_type "regular" | "two_hop", subject_id, relation, target_ids, phrase, ...}.

The edit is given as a sentence ("The mother of X is Y.") without marking X and Y. The loader learns the
template of each relation from the prompts in the file (every query names its relation) and reads X and Y off
with it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..base.errors import DataError
from ..base.paths import user_path
from ..models.facts import SLOT, Fact, Probe
from .base import Corpus, Record, read, read_json
from .fetch import fetch

# criterion -> must the answer change with the edit? (else it must stay)
CRITERIA = {
    "Relation_Specificity": False,
    "Logical_Generalization": True,
    "Subject_Aliasing": True,
    "Compositionality_I": True,
    "Compositionality_II": True,
    "Forgetfulness": False,
}
_SPELLINGS = {"Relation_Specificity": ("Relation_Specificity", "Relation_Specifity")}
_PREVIOUS = ("previous_fact", "original_fact")


@dataclasses.dataclass(frozen=True)
class Query:
    """One prompt. answers: for every required answer the accepted spellings, the main one first."""

    prompt: str
    answers: tuple[tuple[str, ...], ...]
    kind: str = "regular"
    subject_id: str = ""
    relation: str = ""
    target_ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Test:
    """A test counts only if the model answers all `conditions` before the edit; it passes if any ("OR") or
    all ("AND") of its queries are answered after it."""

    __test__ = False  # not a pytest class

    queries: tuple[Query, ...]
    condition: str
    conditions: tuple[Query, ...] = ()


@dataclasses.dataclass(frozen=True)
class RippleEdit:
    """One edit with its tests.

    fact: the edit. Its `consequences` and `same_subject` hold the queries of all tests with their main
    answers (kind = criterion in lower case), enough for the scorers; the official protocol needs `criteria`.
    subset: "recent", "random" or "popular".   criteria: {criterion: tests}, all six always present.
    """

    case_id: str
    fact: Fact
    subset: str
    subject_id: str
    target_id: str
    criteria: dict[str, tuple[Test, ...]] = dataclasses.field(compare=False, repr=False)


def load(
    path: str | Path | None = None,
    *,
    subset: str = "popular",
    templates: Mapping[str, str] | None = None,
    limit: int | None = None,
    on_error: str = "raise",
) -> Corpus:
    """RippleEdits of a file, in file order; case_id = index of the record.

    path:      the file; None fetches <subset>.json.
    templates: {relation: "The mother of {} is"} for relations whose template cannot be learnt from the file.
    limit, on_error: see `base.read`. Raises DataError, also for an edit sentence that cannot be taken apart.
    """
    if path is None:
        if subset not in ("recent", "random", "popular"):
            raise DataError(f"subset={subset!r}; RippleEdits has 'recent', 'random' and 'popular'")
        path = fetch(f"ripple_{subset}")
    rows, _ = read_json(user_path(path))
    known = learn_templates(rows if isinstance(rows, list) else []) | dict(templates or {})

    def parse(record: Record) -> RippleEdit:
        return _parse(record, known)

    return read("ripple", path, parse, limit=limit, on_error=on_error)


def learn_templates(rows: list) -> dict[str, str]:
    """{relation: template} from the prompts of the queries: what all prompts of a relation share around the
    subject.

    Needs prompts about at least two subjects; "the" or "is" shared by chance is avoided by cutting at
    blanks, and by the many prompts of a real file.
    """
    prompts: dict[str, dict[str, str]] = {}
    for node in _walk(rows):
        # Two-hop queries and queries with a phrase of their own do not follow the relation's template.
        if node.get("query_type") != "regular" or node.get("phrase") or not node.get("subject_id"):
            continue
        if isinstance(node.get("relation"), str) and isinstance(node.get("prompt"), str):
            prompts.setdefault(node["relation"], {})[str(node["subject_id"])] = node["prompt"].strip()
    found = {}
    for relation, by_subject in prompts.items():
        texts = sorted(set(by_subject.values()))
        if len(texts) < 2:
            continue
        head, tail = _common_start(texts), _common_start([t[::-1] for t in texts])[::-1]
        head = head[: head.rfind(" ") + 1]
        tail = tail[tail.index(" ") :] if " " in tail else ""
        if (head or tail) and all(len(t) > len(head) + len(tail) for t in texts):
            found[relation] = head + SLOT + tail
    return found


def _common_start(texts: list[str]) -> str:
    first, last = min(texts), max(texts)  # in sorted order these two differ earliest
    n = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:n]


def _walk(node) -> Iterator[dict]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def _parse(record: Record, templates: Mapping[str, str]) -> RippleEdit:
    relation, sentence = record.text("edit.relation"), record.text("edit.prompt")
    subject_id, target_id = str(record.get("edit.subject_id")), str(record.get("edit.target_id"))
    if relation not in templates:
        raise record.error(
            "edit.relation",
            f"is {relation!r}, whose template cannot be learnt from the queries of this file; "
            f"pass templates={{{relation!r}: '... {{}} ...'}}",
        )
    criteria = {name: _tests(record, name) for name in CRITERIA}
    about = [q.prompt for tests in criteria.values() for t in tests for q in (*t.queries, *t.conditions)
             if q.subject_id == subject_id and q.kind == "regular"]  # fmt: skip
    subject, target = _take_apart(record, "edit.prompt", sentence, templates[relation], about)
    previous = next((p for p in _PREVIOUS if record.get(f"edit.{p}", None)), None)
    old = None
    if previous:
        field = f"edit.{previous}.prompt"
        same, old = _take_apart(record, field, record.text(field), templates[relation], [subject])
        if same != subject:
            record.note("previous fact names the subject otherwise")
    probes = {changes: [] for changes in (True, False)}
    for name, tests in criteria.items():
        for query in (q for test in tests for q in test.queries):
            probes[CRITERIA[name]].append(Probe(query.prompt, query.answers[0][0], kind=name.lower()))
    case_id = str(record.index)
    fact = Fact(
        prompt=templates[relation],
        subject=subject,
        target=target,
        target_true=old,
        same_subject=tuple(dict.fromkeys(probes[False])),
        consequences=tuple(dict.fromkeys(probes[True])),
        relation=relation,
        case_id=case_id,
        meta=(("subject_id", subject_id), ("target_id", target_id)),
    )
    return RippleEdit(case_id, fact, record.text("example_type", ""), subject_id, target_id, criteria)


def _take_apart(
    record: Record, field: str, sentence: str, template: str, about: list[str]
) -> tuple[str, str]:
    """(subject, target) of "<template with subject> <target>."; `about` are texts that name the subject."""
    head, tail = template.split(SLOT)
    body = sentence.removesuffix(".")
    ends = [m.start() for m in re.finditer(re.escape(tail + " "), body)] if body.startswith(head) else []
    splits = [(body[len(head) : e], body[e + len(tail) + 1 :].strip()) for e in ends if e > len(head)]
    splits = [(s, t) for s, t in splits if s.strip() and t]
    if not splits:
        raise record.error(field, f"is not '{template} <object>.': {sentence!r}")
    # An ambiguous sentence ("X is Y is Z") is settled by the other prompts about the subject.
    confirmed = [(s, t) for s, t in splits if any(s in text for text in about)]
    if len(splits) > 1 and len(confirmed) != 1:
        record.note(f"'{field}' can be split in several ways, the longest confirmed subject taken")
    return max(confirmed or splits[:1], key=lambda pair: len(pair[0]))


def _tests(record: Record, name: str) -> tuple[Test, ...]:
    key = next((k for k in _SPELLINGS.get(name, (name,)) if record.get(k, None) is not None), name)
    tests = []
    for node in record.objects(key):
        condition = node.text("test_condition", "OR")
        if condition not in ("OR", "AND"):
            raise node.error("test_condition", f"is {condition!r}; use 'OR' or 'AND'")
        queries = [_query(q) for q in node.objects("test_queries")]
        conditions = [_query(q) for q in node.objects("condition_queries", [])]
        queries = [q for q in queries if q]
        if not queries or None in conditions:  # could never pass, or would never be executed
            record.note("test that cannot be executed left out")
            continue
        tests.append(Test(tuple(queries), condition, tuple(conditions)))
    return tuple(tests)


def _query(record: Record) -> Query | None:
    """One query, or None if a required answer cannot be checked (official filter: two characters or a
    digit)."""
    answers = []
    for answer in record.objects("answers"):
        spellings = [answer.get("value", ""), *answer.get("aliases", [])]
        spellings = [s.strip() for s in map(str, spellings) if len(s.strip()) > 1 or s.strip().isdigit()]
        answers.append(tuple(dict.fromkeys(spellings)))
    if not all(answers) or not answers:
        record.note("query with an answer that cannot be checked")
        return None
    return Query(
        prompt=record.text("prompt"),
        answers=tuple(answers),
        kind=record.text("query_type", "regular"),
        subject_id=str(record.get("subject_id", "")),
        relation=record.text("relation", ""),
        target_ids=tuple(map(str, record.get("target_ids", []))),
    )
