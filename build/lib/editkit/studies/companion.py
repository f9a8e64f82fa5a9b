"""What a companion knows: greedy recall of its world and of the CLaRE corpus, its facts as input of tracing.

Everything here takes an LM and a World, so it works for a companion of another size or seed as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..base.errors import DataError
from ..corpora.world.companion import corpus_pairs
from ..corpora.world.train import greedy_recall
from ..corpora.world.world import World
from ..models.facts import Fact
from ..models.lm import LM

if TYPE_CHECKING:
    pass


def sample_keys(world: World, n: int, seed: int = 0) -> set[tuple[str, str]] | None:
    """n random facts (relation, subject) of the world; None (all of them) if n is 0 or more than there are."""
    keys = [(r, s) for r in world.relations for s in world.subjects(r)]
    if not 0 < n < len(keys):
        return None
    return {keys[i] for i in np.random.default_rng(seed).choice(len(keys), n, replace=False)}


def recall(lm: LM, world: World, keys: set[tuple[str, str]] | None = None) -> pd.DataFrame:
    """Greedy recall of every statement (or those of given (relation, subject) keys).

    Columns relation, subject, template, prompt, answer, hit (1.0: answer and full stop generated exactly).
    """
    rows = [s for s in world.statements() if keys is None or (s.relation, s.subject) in keys]
    hit = greedy_recall(lm.model, lm.tokenizer, [s.prompt for s in rows], [s.answer for s in rows])
    return pd.DataFrame(
        {
            "relation": [s.relation for s in rows],
            "subject": [s.subject for s in rows],
            "template": [s.template_index for s in rows],
            "prompt": [s.prompt for s in rows],
            "answer": [s.answer for s in rows],
            "hit": hit,
        }
    )


def corpus_recall(lm: LM, n: int = 0, seed: int = 0) -> pd.DataFrame | None:
    """Greedy recall of the CLaRE corpus: columns prompt, answer, n_answers (of the prompt), hit; None if not at hand.

    n: size of a random sample of its facts; 0: all.
    """
    from ..corpora import clare

    try:
        pairs = corpus_pairs(clare.load())
    except DataError:
        return None
    count = Counter(p for p, _ in pairs)
    if 0 < n < len(pairs):
        pairs = [pairs[i] for i in np.random.default_rng(seed).choice(len(pairs), n, replace=False)]
    hit = greedy_recall(lm.model, lm.tokenizer, *zip(*pairs, strict=True))
    return pd.DataFrame(
        {
            "prompt": [p for p, _ in pairs],
            "answer": [a for _, a in pairs],
            "n_answers": [count[p] for p, _ in pairs],
            "hit": hit,
        }
    )


def statement_facts(
    world: World,
    relations: Sequence[str] | None = None,
    *,
    templates: Sequence[int] | None = None,
    subject_first: bool | None = None,
) -> list[Fact]:
    """True facts as Fact objects (target = target_true), one per template: input of tracing and interchange."""
    out = []
    for s in world.statements():
        template = world.relation(s.relation).templates[s.template_index]
        if relations is not None and s.relation not in relations:
            continue
        if templates is not None and s.template_index not in templates:
            continue
        if subject_first is not None and template.subject_first != subject_first:
            continue
        out.append(
            Fact(
                prompt=template.text,
                subject=s.subject,
                target=s.answer,
                target_true=s.answer,
                relation=s.relation,
                case_id=f"{s.relation}/{s.subject}/{s.template_index}",
            )
        )
    return out
