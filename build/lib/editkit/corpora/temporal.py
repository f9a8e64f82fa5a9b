"""Temporal data of WISE (out-of-distribution generalisation; Wang et al. 2024): facts newer than the model.

Record: prompt, subject, target_new, ood_rephrase (a natural text about the new fact), locality_prompt,
locality_ground_truth.
"""

from __future__ import annotations

from pathlib import Path

from ..models.facts import Fact
from .base import Corpus, Record, read
from .fetch import fetch
from .selfcheck import parse_article


def load(path: str | Path | None = None, *, limit: int | None = None, on_error: str = "raise") -> Corpus:
    """Facts whose `reference` holds the natural text `ood_rephrase`; case_id = index of the record.

    EasyEdit's out-of-distribution score reads that text as a whole and never the target, so it is not among
    the paraphrases (prompts for the same target).
    path: the file; None takes temporal-edit.json from EDITKIT_DATA.   limit, on_error: see `base.read`.
    Raises DataError.
    """

    def parse(record: Record) -> Fact:
        return parse_article(record).replace(reference=(record.text("ood_rephrase"),))

    path = fetch("temporal_edit") if path is None else path
    return read("temporal", path, parse, limit=limit, on_error=on_error)
