"""From facts to the prompts that are examined: six axes, one item per prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ..base.errors import ConfigError, DataError, RequestError
from ..models.facts import Fact, Probe, as_facts
from ..models.joining import bare, marked, wanted_space

REWRITE_AXES = ("efficacy", "paraphrase", "consequence")
KEEP_AXES = ("neighborhood", "locality", "same_subject")
AXES = ("efficacy", "paraphrase", "neighborhood", "locality", "same_subject", "consequence")


@dataclasses.dataclass(frozen=True)
class Item:
    """One examined prompt.

    answer: what an edited model should say.   new, true: the two objects that are compared in likelihood: on
    efficacy and paraphrase the fact's target and target_true, on consequences the answer and the former one,
    on the axes that must not change the fact's target and the probe's answer.
    """

    fact: int
    fact_id: str
    axis: str
    kind: str
    relation: str | None
    prompt: str
    answer: str
    new: str
    true: str | None
    space: bool | None = None

    def pair(self, answer: str) -> tuple[str, str]:
        """(prompt, answer) as `models.answers.split_tokens` takes them."""
        return self.prompt, marked(answer, self.space)

    @property
    def contrast(self) -> str | None:
        """The object that must not win: the old one where the edit writes, the new one elsewhere."""
        return self.new if self.axis in KEEP_AXES else self.true

    @property
    def row(self) -> dict:
        """The columns that every protocol's table starts with."""
        return {
            "fact_id": self.fact_id, "axis": self.axis, "kind": self.kind, "prompt": self.prompt,
            "answer": self.answer, "contrast": self.contrast,
        }  # fmt: skip


def fact_ids(facts: Sequence[Fact]) -> list[str]:
    """case_id of each fact, else its key. Raises RequestError if they are not unique."""
    ids = [f.case_id or f.key for f in facts]
    seen: dict[str, int] = {}
    for i, name in enumerate(ids):
        if name in seen:
            raise RequestError(
                f"facts {seen[name]} and {i} have the same id {name!r}; give each fact its own case_id"
            )
        seen[name] = i
    return ids


def _of_fact(index: int, fact: Fact, name: str) -> Iterator[Item]:
    def item(axis: str, prompt: str, answer: str, new: str, true: str | None, probe: Probe | None = None) -> Item:
        kind, space = ("", wanted_space(fact.target, fact.space))
        if probe is not None:
            kind, space = probe.kind, wanted_space(probe.answer, probe.space)
        return Item(index, name, axis, kind, fact.relation, prompt, answer, new, true, space)

    target = bare(fact.target)
    true = bare(fact.target_true) if fact.target_true else None
    yield item("efficacy", fact.text, target, target, true)
    for prompt in fact.paraphrases:
        yield item("paraphrase", prompt, target, target, true)
    for axis in KEEP_AXES:
        for probe in getattr(fact, axis):
            answer = bare(probe.answer)
            yield item(axis, probe.prompt, answer, target, answer, probe)
    for probe in fact.consequences:
        answer = bare(probe.answer)
        before = bare(probe.before) if probe.before else None
        yield item("consequence", probe.prompt, answer, answer, before, probe)


def expand(facts: Sequence[Fact], axes: Sequence[str] | None = None) -> list[Item]:
    """Items of all facts on the wanted axes (default: every axis that has probes), fact by fact.

    Raises RequestError for malformed facts, empty prompts or answers and repeated ids, ConfigError for an
    unknown axis, DataError if a wanted axis has no probe in any fact.
    """
    facts = as_facts(facts, "score")
    wanted = AXES if axes is None else tuple(axes)
    unknown = sorted(set(wanted) - set(AXES))
    if unknown or isinstance(axes, str):
        raise ConfigError(f"unknown axes {unknown or axes!r}; choose from {', '.join(AXES)} and give a list")
    named = zip(facts, fact_ids(facts), strict=True)
    items = [x for i, (fact, name) in enumerate(named) for x in _of_fact(i, fact, name) if x.axis in wanted]
    for x in items:
        if not x.prompt.strip() or not x.answer:
            part = "prompt" if not x.prompt.strip() else "answer"
            raise RequestError(
                f"fact {x.fact} ({x.fact_id}): {x.axis} probe {x.prompt!r} has an empty {part}"
            )
    missing = [] if axes is None else sorted(set(wanted) - {x.axis for x in items})
    if missing:
        raise DataError(
            f"no fact has probes on {', '.join(missing)}; leave these axes out or fill the facts' fields"
        )
    return items
