"""MQuAKE (Zhong et al. 2023): multi-hop questions whose answers change with one to four edits.

Record: case_id, requested_rewrite [{prompt, relation_id, target_new {str, id}, target_true {str, id},
subject, question}], questions (3), answer, answer_alias, new_answer, new_answer_alias, single_hops and
new_single_hops [{question, cloze, answer, answer_alias}], orig.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

from ..base.errors import DataError
from ..models.facts import Fact, Probe, asked
from .base import Corpus, Record, read
from .fetch import fetch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Hop:
    """One link of a question's chain: as question and as cloze prompt, with all accepted answers."""

    question: str
    cloze: str
    answer: str
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MultiHop:
    """One MQuAKE case.

    edits: the facts to be written, all of them together (their paraphrase is the official `question`).
    questions: phrasings of one multi-hop question; a case counts as solved if any is answered.
    answer, aliases: before the edits.   new_answer, new_aliases: after them.
    hops, new_hops: the chain before and after.   orig: the record's own bookkeeping, untouched.
    """

    case_id: str
    edits: tuple[Fact, ...]
    questions: tuple[str, ...]
    answer: str
    aliases: tuple[str, ...]
    new_answer: str
    new_aliases: tuple[str, ...]
    hops: tuple[Hop, ...]
    new_hops: tuple[Hop, ...]
    orig: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The questions as probes (kind "multi_hop"), to be asked after all edits of the case."""
        return tuple(Probe(q, self.new_answer, kind="multi_hop", before=self.answer) for q in self.questions)

    def accepts(self, text: str) -> bool:
        """Whether an answer is the new one or one of its aliases (blanks around it do not matter)."""
        return text.strip() in (self.new_answer, *self.new_aliases)


def load(path: str | Path | None = None, *, limit: int | None = None, on_error: str = "raise") -> Corpus:
    """Cases of a MQuAKE file, in file order.

    path: the file; None fetches MQuAKE-CF-3k-v2.json, the version without conflicting edits.
    limit, on_error: see `base.read`. Raises DataError.
    """
    path = fetch("mquake_cf_3k_v2") if path is None else path
    return read("mquake", path, _parse, limit=limit, on_error=on_error)


def facts(cases: Iterable[MultiHop], *, on_conflict: str = "raise") -> list[Fact]:
    """All edits of the cases as one batch, each once; a case's questions become consequences of its last
    edit.

    on_conflict: two cases that give one prompt and subject different objects (MQuAKE-CF-3k has them):
    "raise", or "first" to keep the earlier edit and drop the later case as a whole, which is logged.
    Raises DataError.
    """
    if on_conflict not in ("raise", "first"):
        raise DataError(f"on_conflict={on_conflict!r}; use 'raise' or 'first'")
    chosen: dict[str, Fact] = {}
    dropped = 0
    for case in cases:
        clash = [e for e in case.edits if asked(e) in chosen and chosen[asked(e)].target != e.target]
        if clash:
            other = chosen[asked(clash[0])]
            if on_conflict == "raise":
                raise DataError(
                    f"MQuAKE case {case.case_id}: {clash[0].text!r} -> {clash[0].target!r} conflicts with "
                    f"{other.target!r} of edit {other.case_id}; use MQuAKE-CF-3k-v2, or on_conflict='first'"
                )
            dropped += 1
            continue
        for edit in case.edits:
            chosen.setdefault(asked(edit), edit)
        last = case.edits[-1]
        kept = chosen[asked(last)]
        chosen[asked(last)] = kept.replace(consequences=kept.consequences + case.probes)
    if dropped:
        log.warning("MQuAKE: %d cases dropped, their edits conflict with earlier cases", dropped)
    return list(chosen.values())


def _parse(record: Record) -> MultiHop:
    case_id = str(record.get("case_id"))
    rewrites = record.objects("requested_rewrite")
    questions = record.texts("questions")
    if not rewrites:
        raise record.error("requested_rewrite", "is an empty list; a case needs at least one edit")
    if not questions:
        raise record.error("questions", "is an empty list; a case needs at least one question")
    hops, new_hops = _hops(record, "single_hops"), _hops(record, "new_single_hops")
    case = MultiHop(
        case_id=case_id,
        edits=tuple(_edit(r, f"{case_id}.{i}") for i, r in enumerate(rewrites)),
        questions=questions,
        answer=record.text("answer"),
        aliases=record.texts("answer_alias", ()),
        new_answer=record.text("new_answer"),
        new_aliases=record.texts("new_answer_alias", ()),
        hops=hops,
        new_hops=new_hops,
        orig=record.get("orig", {}),
    )
    if new_hops and not case.accepts(new_hops[-1].answer):
        record.note("answer of the last new hop is not the new answer")
    return case


def _edit(record: Record, case_id: str) -> Fact:
    question = record.text("question", None)
    ids = {f"{key}_id": record.get(f"{key}.id", None) for key in ("target_new", "target_true")}
    return Fact(
        prompt=record.template("prompt"),
        subject=record.text("subject"),
        target=record.text("target_new.str"),
        target_true=record.text("target_true.str"),
        paraphrases=(question,) if question else (),
        relation=record.text("relation_id", None),
        case_id=case_id,
        meta=tuple(sorted((k, str(v)) for k, v in ids.items() if v is not None)),
    )


def _hops(record: Record, field: str) -> tuple[Hop, ...]:
    return tuple(
        Hop(h.text("question"), h.text("cloze"), h.text("answer"), h.texts("answer_alias", ()))
        for h in record.objects(field, [])
    )
