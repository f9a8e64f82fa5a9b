"""Facts and probes: what an editor is asked to write and what a scorer reads back.

Every corpus, real or generated, yields `Fact` objects; every editor takes them; every scorer reads their
probes. A fact is one edit request in the sense of ROME/MEMIT (template with one slot, subject, new object)
together with the prompts on which the edited model is examined.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from ..base.errors import RequestError

SLOT = "{}"


@dataclasses.dataclass(frozen=True)
class Probe:
    """One examined prompt: a full text, and the answer the examined model should give after the edit.

    prompt: text with the subject already filled in, no trailing space.
    answer: expected continuation, stored without leading space.
    kind:   free label inside an axis, e.g. "two_hop", "symmetric", "country_of_birth".
    before: answer before the edit where it differs from `answer` (consequences), else None.
    subject: subject span inside the prompt if known (needed by tracing and routing probes).
    """

    prompt: str
    answer: str
    kind: str = ""
    before: str | None = None
    subject: str | None = None


@dataclasses.dataclass(frozen=True)
class Fact:
    """One edit request with its probes.

    prompt:       template with exactly one "{}" for the subject, e.g. "The mother tongue of {} is".
    subject:      text that fills the slot.
    target:       object to be written (CounterFact's target_new), without leading space.
    target_true:  object that holds before the edit (CounterFact's target_true), if known.
    paraphrases:  full prompts that ask the same fact in other words.
    neighborhood: same relation, other subjects whose true answer must not change (axis "neighborhood").
    locality:     unrelated prompts (zsRE's loc / loc_ans) that must not change.
    same_subject: other relations of the edited subject that must not change.
    consequences: prompts whose answer must change because of the edit (one-hop, two-hop, symmetric...).
    generation:   prompts for free text about the subject (fluency, consistency).
    reference:    reference text(s) about subjects with the new object (consistency).
    relation:     relation id, if known.   case_id: stable id, unique inside a list of facts.
    meta:         anything else a loader wants to keep, as sorted (key, value) pairs.
    """

    prompt: str
    subject: str
    target: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[Probe, ...] = ()
    locality: tuple[Probe, ...] = ()
    same_subject: tuple[Probe, ...] = ()
    consequences: tuple[Probe, ...] = ()
    generation: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    relation: str | None = None
    case_id: str = ""
    meta: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The edit prompt with the subject filled in."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def key(self) -> str:
        """md5 of "prompt|subject|target", the key of the CLaRE corpus (clare.md section 6)."""
        return hashlib.md5(f"{self.prompt}|{self.subject}|{self.target}".encode()).hexdigest()

    def replace(self, **changes) -> Fact:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def validate_fact(fact: Fact, index: int | None = None) -> None:
    """Raise RequestError if the fact cannot be edited: slot, subject, target or answer text is malformed."""
    where = "fact" if index is None else f"fact {index}"
    if fact.case_id:
        where += f" ({fact.case_id})"
    for name in ("prompt", "subject", "target"):
        if not isinstance(getattr(fact, name), str):
            raise RequestError(f"{where}: {name} must be a string, got {type(getattr(fact, name)).__name__}")
    if fact.prompt.count(SLOT) != 1:
        raise RequestError(
            f"{where}: the prompt {fact.prompt!r} must contain the slot '{{}}' exactly once; "
            "write the prompt as a template, e.g. 'The capital of {} is'"
        )
    if not fact.subject.strip():
        raise RequestError(f"{where}: empty subject; give the text that fills the slot of {fact.prompt!r}")
    if SLOT in fact.subject:
        raise RequestError(f"{where}: the subject {fact.subject!r} contains a slot '{{}}'")
    if not fact.target.strip():
        raise RequestError(f"{where}: empty target for {fact.text!r}; give the object to be written")


def validate_facts(facts: Iterable[Fact], *, allow_conflicts: bool = False) -> list[Fact]:
    """Check a batch of edit requests and return it as a list.

    Raises RequestError for an empty batch, a malformed fact, a duplicate, or (unless `allow_conflicts`) two
    different targets for one prompt and subject: one least-squares batch would write their mean.
    """
    facts = list(facts)
    if not facts:
        raise RequestError("no facts to edit: the list of requests is empty")
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for i, fact in enumerate(facts):
        if not isinstance(fact, Fact):
            raise RequestError(f"fact {i}: expected editkit.Fact, got {type(fact).__name__}; use Fact(prompt=..., ...)")
        validate_fact(fact, i)
        key = (fact.prompt, fact.subject)
        if key in seen:
            j, other = seen[key]
            if other == fact.target:
                raise RequestError(f"facts {j} and {i} are duplicates: {fact.text!r} -> {fact.target!r}; drop one")
            if not allow_conflicts:
                raise RequestError(
                    f"facts {j} and {i} conflict: {fact.text!r} -> {other!r} and {fact.target!r}; "
                    "keep the latest, or edit them one after the other with a conflict policy"
                )
        seen[key] = (i, fact.target)
    return facts


def conflicts(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Index pairs (i, j), i < j, with equal prompt and subject but different targets."""
    first: dict[tuple[str, str], list[int]] = {}
    pairs = []
    for j, fact in enumerate(facts):
        group = first.setdefault((fact.prompt, fact.subject), [])
        pairs += [(i, j) for i in group if facts[i].target != fact.target]
        group.append(j)
    return pairs
