"""A first look at a list of facts: tables of templates, subjects, answers and lengths. Needs no model."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable

import pandas as pd

from ..models.facts import Fact
from .clare import answers_by_prompt


def entropy(counts: Iterable[int]) -> float:
    """Shannon entropy in bits of a list of counts (plug-in estimate: too small when counts are few)."""
    counts = [c for c in counts if c]
    total = sum(counts)
    return max(0.0, -sum(c / total * math.log2(c / total) for c in counts)) if total else 0.0


def summary(facts: Iterable[Fact]) -> dict[str, int]:
    """Numbers of facts, templates, subjects, answers, prompts, and of prompts with several answers."""
    facts = list(facts)
    answers = answers_by_prompt(facts)
    subjects = collections.Counter(f.subject for f in facts)
    return {
        "facts": len(facts),
        "templates": len({f.prompt for f in facts}),
        "subjects": len(subjects),
        "answers": len({f.target for f in facts}),
        "prompts": len(answers),
        "prompts_with_several_answers": sum(len(a) > 1 for a in answers.values()),
        "facts_with_unique_answer": sum(len(answers[f.prompt, f.subject]) == 1 for f in facts),
        "subjects_with_one_fact": sum(n == 1 for n in subjects.values()),
        "subjects_that_are_answers": len(set(subjects) & {f.target for f in facts}),
    }


def templates(facts: Iterable[Fact]) -> pd.DataFrame:
    """One row per template, largest first.

    n_facts, n_subjects, n_answers (distinct), several (prompts with several answers), entropy (bits, of the
    answers), effective_answers (2**entropy), top_answer and top_share (what always guessing it would score).
    """
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.prompt, []).append(fact)
    rows = []
    for prompt, group in groups.items():
        counts = collections.Counter(f.target for f in group)
        top, n_top = min(counts.items(), key=lambda item: (-item[1], item[0]))
        bits = entropy(counts.values())
        rows.append({
            "template": prompt,
            "n_facts": len(group),
            "n_subjects": len({f.subject for f in group}),
            "n_answers": len(counts),
            "several": sum(len(a) > 1 for a in answers_by_prompt(group).values()),
            "entropy": bits,
            "effective_answers": 2**bits,
            "top_answer": top,
            "top_share": n_top / len(group),
        })  # fmt: skip
    return _ranked(rows, "template")


def subjects(facts: Iterable[Fact]) -> pd.DataFrame:
    """One row per subject, most facts first: n_facts, n_templates, n_answers."""
    return _ranked(
        _grouped(facts, lambda f: f.subject, "subject", n_templates="prompt", n_answers="target"), "subject"
    )


def answers(facts: Iterable[Fact]) -> pd.DataFrame:
    """One row per answer, most facts first: n_facts, n_templates, n_subjects."""
    return _ranked(
        _grouped(facts, lambda f: f.target, "answer", n_templates="prompt", n_subjects="subject"), "answer"
    )


def several_answers(facts: Iterable[Fact]) -> pd.DataFrame:
    """One row per prompt with several answers, most first: template, subject, n_answers, answers."""
    rows = [
        {"template": prompt, "subject": subject, "n_answers": len(found), "answers": ", ".join(found)}
        for (prompt, subject), found in answers_by_prompt(facts).items()
        if len(found) > 1
    ]
    frame = pd.DataFrame(rows, columns=["template", "subject", "n_answers", "answers"])
    return frame.sort_values(
        ["n_answers", "template", "subject"], ascending=[False, True, True], ignore_index=True
    )


def lengths(facts: Iterable[Fact], tokenizer=None) -> pd.DataFrame:
    """One row per fact and part ("prompt" with subject filled in, "subject", "answer"): words, characters,
    and with a tokenizer tokens (subject and answer counted after a blank, no special tokens)."""
    rows = []
    for fact in facts:
        for part, text in (("prompt", fact.text), ("subject", fact.subject), ("answer", fact.target)):
            counted = text if part == "prompt" else " " + text
            row = {"case_id": fact.case_id, "part": part, "words": len(text.split()), "characters": len(text)}
            rows.append(row | {"text": counted})
    frame = pd.DataFrame(rows, columns=["case_id", "part", "words", "characters", "text"])
    if tokenizer is not None and len(frame):
        ids = tokenizer(frame["text"].tolist(), add_special_tokens=False)["input_ids"]
        frame["tokens"] = [len(row) for row in ids]
    return frame.drop(columns="text")


def _grouped(facts, key, name: str, **distinct: str) -> list[dict]:
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(key(fact), []).append(fact)
    return [
        {name: value, "n_facts": len(group)}
        | {c: len({getattr(f, a) for f in group}) for c, a in distinct.items()}
        for value, group in groups.items()
    ]


def _ranked(rows: list[dict], name: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    return frame.sort_values(["n_facts", name], ascending=[False, True], ignore_index=True) if rows else frame
