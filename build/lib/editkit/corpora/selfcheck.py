"""SelfCheckGPT hallucination data in the form of GRACE, WISE and MEMOIR (Hartvigsen et al. 2023; Wang et al.
2024).

Record: prompt (beginning of an article), subject, target_new (the corrected sentence), locality_prompt,
locality_ground_truth. There is no paraphrase; the score is perplexity of the target.
"""

from __future__ import annotations

from pathlib import Path

from ..models.facts import Fact, Probe
from .base import Corpus, Record, read
from .fetch import fetch


def load(path: str | Path | None = None, *, limit: int | None = None, on_error: str = "raise") -> Corpus:
    """Facts whose prompt is a long text and whose target is a sentence; case_id = index of the record.

    path: the file; None takes hallucination-edit.json from EDITKIT_DATA.   limit, on_error: see `base.read`.
    The slot is at the first mention of the subject. Raises DataError.
    """
    path = fetch("selfcheck_edit") if path is None else path
    return read("selfcheck", path, parse_article, limit=limit, on_error=on_error)


def parse_article(record: Record) -> Fact:
    """prompt, subject, target_new and the locality pair of one record."""
    prompt, subject = record.split("prompt", record.text("subject"))
    locality = record.first_text("locality_prompt")
    return Fact(
        prompt=prompt,
        subject=subject,
        target=record.text("target_new"),
        locality=(Probe(locality, record.first_text("locality_ground_truth"), kind="nq"),),
        case_id=str(record.get("case_id", record.index)),
    )
