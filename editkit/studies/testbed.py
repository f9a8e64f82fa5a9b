"""The companion as a testbed: what it knows, where it keeps it, whether it can be edited.

Everything here takes an LM and a World, so it works for a companion of another size or seed as well.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..base.cached import content_key
from ..base.errors import DataError
from ..corpora.world.companion import corpus_pairs, load_companion
from ..corpora.world.records import edit_facts
from ..corpora.world.train import greedy_recall
from ..corpora.world.world import World
from ..models.facts import Fact
from ..models.lm import LM, load_lm

if TYPE_CHECKING:
    from ..scoring import Baseline

PRESET_FILE = "editing.json"

# name on the pages -> (registered editor, options that make the variant)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ft-l": ("ft", {"objective": "prompt_last"}),
    "ft-m": ("ft", {"objective": "target"}),
    "rome": ("rome", {}),
    "memit": ("memit", {}),
    "memit-seq": ("memit_seq", {}),
    "alphaedit": ("alphaedit", {}),
}


def open_model(name: str, **options) -> LM:
    """ "companion" (the shipped one), or a folder / hub name of any causal LM of the architecture table."""
    return load_companion() if name == "companion" else load_lm(name, **options)


def preset(lm: LM, method: str = "memit") -> dict[str, Any]:
    """Options of a method of `METHODS` (or of any registered editor) on this model; a fresh dictionary.

    Companions carry a file editing.json: the site from interchange interventions, step sizes and lam from a sweep on
    seeds that no results page uses. Raises DataError for a model without one.
    """
    folder = Path(getattr(lm.model.config, "_name_or_path", "") or "")
    path = folder / PRESET_FILE
    if not path.exists():
        raise DataError(
            f"{lm.name} has no {PRESET_FILE}; run the page 'The world and the model' on it, then pass "
            "layers=, token=, lam= and z_* to make_editor"
        )
    table = json.loads(path.read_text())
    editor, own = METHODS.get(method, (method, {}))
    family = dict(table["methods"].get(editor, table["methods"]["memit"]))
    return (
        {**table["site"], **table["targets"], **family, **own}
        if editor != "ft"
        else {"layers": table["site"]["layers"][-1:], **family, **own}
    )


def statistics(
    lm: LM,
    world: World,
    layers: Sequence[int],
    cache_dir: str | Path | None = None,
    *,
    max_texts: int | None = 6000,
):
    """Second moments of the keys over the world's text, by layer (see `editkit.locate.moments.second_moment`).

    max_texts: a random sample of that many texts (about 70,000 tokens at the default); None: all of them.
    """
    from ..locate.moments import second_moment

    texts = world.corpus_texts()
    if max_texts is not None and max_texts < len(texts):
        keep = np.random.default_rng(0).choice(len(texts), max_texts, replace=False)
        texts = [texts[i] for i in sorted(keep)]
    return second_moment(lm, list(layers), texts, cache_dir=cache_dir)


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


def edit_and_score(
    lm: LM,
    world: World,
    editor: str,
    n: int,
    *,
    seed: int = 0,
    facts_per_edit: int | None = None,
    protected: int = 3,
    n_paraphrases: int = 2,
    protocols: Sequence[str] = ("generate",),
    statistics_by_layer: Mapping | None = None,
    cache_dir: str | Path | None = None,
    before: bool = True,
    unedited: dict[str, Baseline] | None = None,
    **options,
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Write n counterfactual edits with a method (of `METHODS`, or a registered editor) at the model's preset and
    score them after the last one.

    facts_per_edit: batch size of the stream (None: one batch). protected: probes per fact on each axis that must
    not change. options: override the preset. unedited: see `run_method`. The model is restored afterwards, also after
    an error.
    Returns (rows of `scoring.evaluate`, {"before": summary, "after_all": summary}), summaries per axis with 95 %
    bootstrap intervals over facts for the first protocol.
    """
    from ..methods import make_editor
    from ..scoring import evaluate, summarize

    facts = edit_facts(
        world,
        n,
        seed,
        n_paraphrases=n_paraphrases,
        n_neighbors=protected,
        n_locality=protected,
        n_same_subject=protected,
    )
    settings = {**preset(lm, editor), **options}
    if statistics_by_layer is None:
        statistics_by_layer = statistics(lm, world, settings["layers"], cache_dir)
    made = make_editor(METHODS.get(editor, (editor,))[0], lm, statistics=statistics_by_layer, **settings)
    rows = evaluate(
        lm, made, facts, "after_all", protocols, facts_per_edit=facts_per_edit, before=before,
        unedited=_read_once(lm, facts, protocols, unedited),
    )  # fmt: skip
    first = rows[rows["protocol"] == protocols[0]]
    return rows, {when: summarize(part, ["axis"]) for when, part in first.groupby("when", sort=False)}


def _read_once(
    lm: LM, facts: Sequence[Fact], protocols: Sequence[str], kept: dict[str, Baseline] | None
) -> Baseline | None:
    """What the model says to the probes now, for the protocols that ask, from `kept` if it has been read before."""
    from ..scoring import Baseline

    lookups = [p for p in protocols if p in ("easyedit", "generate")]
    if kept is None or not lookups:
        return None
    content = [lm.fingerprint(), lookups, repr(facts)]
    key = content_key(content)
    if key not in kept:
        kept[key] = Baseline.of(lm, facts, protocols=lookups)
    return kept[key]


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """scores: rows of `scoring.evaluate`; texts: rows of `score_text` on the edited model; seconds: the edit alone;
    relative_change: ||W' - W|| / ||W|| over the edited matrices."""

    scores: pd.DataFrame
    texts: pd.DataFrame
    seconds: float
    relative_change: float


def run_method(
    lm: LM,
    world: World,
    method: str,
    n: int,
    *,
    seed: int,
    statistics_by_layer: Mapping,
    protected: int = 3,
    n_paraphrases: int = 2,
    generated: int = 20,
    text_tokens: int = 40,
    protocols: Sequence[str] = ("generate", "rome"),
    before: bool = True,
    unedited: dict[str, Baseline] | None = None,
    **options,
) -> MethodResult:
    """One method on one draw of n edits in one call: scores after (and before), free text, cost. Restores the model.

    unedited: filled with what the unedited model says to each draw; pass the same dictionary for all methods on a
    model, and it is read once per draw.
    """
    from ..methods import make_editor
    from ..scoring import evaluate, score_text

    drawn = {"n_paraphrases": n_paraphrases, "n_neighbors": protected, "n_locality": protected}
    facts = edit_facts(world, n, seed, **drawn, n_same_subject=protected)
    baseline = _read_once(lm, facts, protocols, unedited)
    settings = {**preset(lm, method), **options}
    editor = make_editor(METHODS.get(method, (method,))[0], lm, statistics=statistics_by_layer, **settings)
    clock = _Timed(editor)
    try:
        scores = evaluate(
            lm, clock, facts, "after_all", protocols, restore="never", before=before, unedited=baseline
        )
        texts = score_text(lm, facts[:generated], seed=seed, max_total_tokens=text_tokens)
    finally:
        editor.restore()
    return MethodResult(scores, texts, clock.seconds, clock.change)


class _Timed:
    """An editor that adds up the wall time of its edits and measures the last change."""

    def __init__(self, editor):
        self.editor, self.seconds, self.change = editor, 0.0, 0.0

    def edit(self, facts):
        start = time.perf_counter()
        delta = self.editor.edit(facts)
        self.seconds += time.perf_counter() - start
        moved = sum(float((delta.after[k] - delta.before[k]).double().square().sum()) for k in delta.after)
        size = sum(float(v.double().square().sum()) for v in delta.before.values())
        self.change = (moved / size) ** 0.5
        return delta

    def restore(self):
        self.editor.restore()
