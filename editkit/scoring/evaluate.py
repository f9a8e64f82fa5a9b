"""Edit, then score: evaluation after all edits or after each edit, chosen explicitly and kept in every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import pandas as pd

from ..base.errors import ConfigError
from ..base.progress import bar
from ..models.facts import Fact, validate_facts
from ..models.lm import LM
from .probes import expand
from .protocols import PROTOCOLS, Baseline, note_edits, score

When = Literal["after_all", "after_each"]
Restore = Literal["end", "each", "never"]
_BATCHING = ("batch_size", "token_budget", "padding_side", "whole_texts")


class EditsModel(Protocol):
    """What `evaluate` needs of an editor: `edit` leaves the model edited, `restore` undoes all its edits."""

    def edit(self, facts: Sequence[Fact]): ...

    def restore(self) -> None: ...


def evaluate(
    lm: LM,
    editor: EditsModel,
    facts: Sequence[Fact],
    when: When = "after_all",
    protocols: Sequence[str] = ("rome",),
    *,
    axes: Sequence[str] | None = None,
    facts_per_edit: int | None = None,
    restore: Restore = "end",
    before: bool = True,
    unedited: Baseline | None = None,
    **options,
) -> pd.DataFrame:
    """Edit `facts` in chunks, in the given order, and score them under each protocol.

    when: "after_all" edits every chunk, then scores every fact on the final model: what is left of the first
        edits (sequential runs of AlphaEdit and MEMOIR). "after_each" scores each chunk on the model as it is
        right after that chunk (EasyEdit's sequential_edit; for one fact per chunk the easiest protocol there
        is).
    facts_per_edit: facts per call of `editor.edit`; None is one batch of all.
    restore: "end" restores when done, also after an error. "each" restores after every chunk, so chunks are
        independent (MEMIT's script; only with "after_each"). "never" leaves the model edited.
    before: score the unedited model too (a warning says if it carries edits already). options: those of `score`
        (match, candidates, batch_size, ...); a baseline is taken here, before the first edit, for the protocols that
        use one.
    unedited: that baseline, if it has been read before (`Baseline.of` on this model as it is now, for these facts,
        axes and protocols): several methods on the same facts need to read the unedited model once.

    Returns the rows of `score` with the columns when ("before", "after_all" or "after_each") and step (number
    of facts edited when the row was scored) in front. Raises ConfigError or RequestError before any edit.
    """
    facts = validate_facts(facts, allow_conflicts=facts_per_edit is not None)  # a later chunk may overwrite
    _check(when, protocols, restore, facts_per_edit, options)
    expand(facts, axes)
    lookups = [p for p in protocols if p in ("easyedit", "generate")]
    baseline = unedited
    if lookups and baseline is None:
        batching = {k: v for k, v in options.items() if k in _BATCHING}
        baseline = Baseline.of(lm, facts, axes, protocols=lookups, **batching)
    elif before:
        note_edits(lm)
    tables: list[pd.DataFrame] = []

    def take(chosen: Sequence[Fact], label: str, step: int, chosen_axes: Sequence[str] | None) -> None:
        for protocol in protocols if chosen_axes is None or chosen_axes else ():
            known = {"from_baseline": True} if label == "before" and protocol == "generate" else {}
            table = score(lm, chosen, protocol, chosen_axes, baseline=baseline, **known, **options)
            table.insert(0, "when", label)
            table.insert(1, "step", step)
            tables.append(table)

    if before:
        take(facts, "before", 0, axes)
    size = facts_per_edit or len(facts)
    chunks = [facts[i : i + size] for i in range(0, len(facts), size)]
    done = 0
    try:
        for chunk in bar(chunks, "editing", unit="batch"):
            editor.edit(chunk)
            done = len(chunk) if restore == "each" else done + len(chunk)
            if when == "after_each":
                take(chunk, when, done, _present(chunk, axes))
            if restore == "each":
                editor.restore()
        if when == "after_all":
            take(facts, when, done, axes)
    finally:
        if restore != "never":
            editor.restore()
    return pd.concat(tables, ignore_index=True)


def _present(chunk: Sequence[Fact], axes: Sequence[str] | None) -> Sequence[str] | None:
    """The wanted axes that this chunk has probes on: facts need not all have probes on every axis."""
    if axes is None:
        return None
    return [a for a in axes if any(x.axis == a for x in expand(chunk))]


def _check(
    when: str, protocols: Sequence[str], restore: str, facts_per_edit: int | None, options: dict
) -> None:
    if when not in ("after_all", "after_each"):
        raise ConfigError(f"when must be 'after_all' or 'after_each', got {when!r}")
    if restore not in ("end", "each", "never"):
        raise ConfigError(f"restore must be 'end', 'each' or 'never', got {restore!r}")
    if restore == "each" and when == "after_all":
        raise ConfigError("restore='each' leaves nothing to score after_all; use when='after_each'")
    if isinstance(protocols, str) or not protocols or set(protocols) - set(PROTOCOLS):
        raise ConfigError(f"protocols must be a list out of {', '.join(PROTOCOLS)}, got {protocols!r}")
    if facts_per_edit is not None and facts_per_edit < 1:
        raise ConfigError(f"facts_per_edit must be at least 1, got {facts_per_edit}")
    if "baseline" in options:
        raise ConfigError("evaluate takes the baseline itself, before the first edit; do not pass one")
