"""zsRE question answering in the MEND split (Levy et al. 2017; Mitchell et al. 2022), read in two ways.

Record of both: subject, src, pred, rephrase, alt, answers, loc ("nq question: ..."), loc_ans, cond.

    form        target       locality prompt   used by
    "rome"      answers[0]   loc + "?"         ROME, MEMIT, AlphaEdit, one-time editing: writes a TRUE fact
    "easyedit"  alt          loc               EasyEdit, WISE, MEMOIR: writes a counterfactual
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..base.errors import DataError
from ..models.facts import Fact, Probe
from ..models.joining import join
from .base import Corpus, Record, read
from .fetch import fetch

NQ = "nq question: "


def load(
    path: str | Path | None = None, form: str = "rome", *, limit: int | None = None, on_error: str = "raise"
) -> Corpus:
    """Facts of a zsRE file, in file order; case_id = index of the record.

    path: the file; None fetches zsre_mend_eval.json ("rome") or zsre_mend_edit.json ("easyedit").
    form, limit, on_error: see the module and `base.read`. Raises DataError.

    The "?" is added to "nq question: ..." texts, which have none; the official code refuses other texts.
    The slot replaces the first mention of the subject (the official code replaces every mention and cannot
    use prompts with two). `meta` keeps alt, pred, and the answers as a JSON list.
    """
    if form not in ("rome", "easyedit"):
        raise DataError(f"form={form!r}; zsRE is read in the forms 'rome' and 'easyedit'")
    if path is None:
        path = fetch("zsre_eval" if form == "rome" else "zsre_edit")

    def parse(record: Record) -> Fact:
        prompt, subject = record.split("src", record.text("subject"))
        answers = record.texts("answers")
        if not answers:
            raise record.error("answers", "is an empty list; the first answer is the correct one")
        loc = record.text("loc")
        alt = record.text("alt", None) if form == "rome" else record.text("alt")
        if alt == answers[0]:
            record.note("alternative answer equals the correct one")
        meta = {
            "alt": alt,
            "pred": record.get("pred", None),
            "answers": json.dumps(answers, ensure_ascii=False),
        }
        return Fact(
            prompt=prompt,
            subject=subject,
            target=answers[0] if form == "rome" else alt,
            target_true=None if form == "rome" else answers[0],
            paraphrases=(record.text("rephrase"),),
            locality=(
                Probe(loc + "?" if form == "rome" and NQ in loc else loc, record.text("loc_ans"), kind="nq"),
            ),
            case_id=str(record.index),
            meta=tuple(sorted((k, str(v)) for k, v in meta.items() if v is not None)),
        )

    return read("zsre", path, parse, form=form, limit=limit, on_error=on_error)


def irrelevant_texts(facts: Iterable[Fact]) -> list[str]:
    """Locality question and answer of each fact as one text (form "easyedit").

    WISE and MEMOIR train and calibrate on such texts; take them from facts that are not edited or scored.
    """
    return [join(probe.prompt, probe.answer) for fact in facts for probe in fact.locality]
