"""Facts and probes: what an editor is asked to write and what a scorer reads back.

Every corpus, real or generated, yields `Fact` objects; every editor takes them; every scorer reads their
probes. A fact is one edit request in the sense of ROME/MEMIT (template with one slot, subject, new object)
together with the prompts on which the edited model is examined.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..base.errors import RequestError
from .joining import bare, gap, join, marked, stem

SLOT = "{}"


@dataclasses.dataclass(frozen=True)
class Probe:
    """One examined prompt: a full text, and the answer the examined model should give after the edit.

    prompt: text with the subject already filled in.
    answer: expected continuation, stored without leading space.
    kind:   free label inside an axis, e.g. "two_hop", "symmetric", "country_of_birth".
    before: answer before the edit where it differs from `answer` (consequences), else None.
    subject: subject span inside the prompt if known (needed by tracing and routing probes).
    space:  whether a space stands between prompt and answer; None: by the rule of `models.joining`.

    Raises RequestError for a field that is no text.
    """

    prompt: str
    answer: str
    kind: str = ""
    before: str | None = None
    subject: str | None = None
    space: bool | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            _check_text("probe", name, getattr(self, name))


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
    space:        whether a space stands between a prompt of this fact and its object; None: by the rule of
                  `models.joining` (see `target_text`). False for the rest of a word: "plays the vio" + "lin".

    Raises RequestError for a text where a list belongs, and for probes that are none.
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
    space: bool | None = None

    def __post_init__(self) -> None:
        where = f"fact {self.case_id}".strip()
        for name, kind in _LISTS.items():
            value = getattr(self, name)
            if isinstance(value, (str, Probe)) or not isinstance(value, Iterable):
                raise RequestError(f"{where}: {name} must be a list, got {value!r}; give a list: [{value!r}]")
            items = tuple(value)
            for item in items:
                if not isinstance(item, kind):
                    raise RequestError(
                        f"{where}: {name} must hold {'texts' if kind is str else 'Probe objects'}, got {item!r}"
                    )
            object.__setattr__(self, name, items)

    @property
    def text(self) -> str:
        """The edit prompt with the subject filled in."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def pair(self) -> tuple[str, str]:
        """(prompt, object) as `models.answers.split_tokens` takes them."""
        return self.text, marked(self.target, self.space)

    @property
    def target_text(self) -> str:
        """The object as it is written behind the prompt, with the space that belongs to it, if any."""
        prompt, answer = self.pair
        return gap(prompt, answer) + bare(answer)

    @property
    def statement(self) -> str:
        """Prompt and object as one text."""
        prompt, answer = self.pair
        return join(prompt, answer)

    @property
    def located(self) -> tuple[str, str]:
        """(template, subject) whose text ends where the object begins: a space at its end is the object's."""
        template = stem(self.prompt)
        return template, stem(self.subject) if template.endswith(SLOT) else self.subject

    @property
    def request(self) -> list[str]:
        """What decides an edit, for names of caches: prompt, subject, object, and how it is written if not as usual."""
        usual = f" {bare(self.target)}"
        return [self.prompt, self.subject, self.target, *([] if self.target_text == usual else [self.target_text])]

    @property
    def key(self) -> str:
        """md5 of "prompt|subject|target", the key of the CLaRE corpus (clare.md section 6)."""
        return hashlib.md5(f"{self.prompt}|{self.subject}|{self.target}".encode()).hexdigest()

    def replace(self, **changes) -> Fact:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


_LISTS: dict[str, type] = dict.fromkeys(("paraphrases", "generation", "reference"), str) | dict.fromkeys(
    ("neighborhood", "locality", "same_subject", "consequences"), Probe
)


def _check_text(where: str, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{where}: {name} must be a text, got {type(value).__name__}")


def as_texts(texts: Iterable[str], name: str = "texts") -> list[str]:
    """A list of texts; raises RequestError for a single text, which would count as a list of letters, and others."""
    if isinstance(texts, str):
        raise RequestError(f"{name}: expected a list of texts, got the single text {texts[:80]!r}; give a list: [text]")
    if not isinstance(texts, Iterable):
        raise RequestError(f"{name}: expected a list of texts, got {type(texts).__name__}")
    texts = list(texts)
    for i, text in enumerate(texts):
        _check_text(name, f"item {i}", text)
    return texts


def as_facts(facts: Fact | Iterable[Fact], what: str = "edit") -> list[Fact]:
    """One fact, or any iterable of facts, as a list of well-formed ones.

    Raises RequestError for anything else, for none, and for a malformed fact.
    """
    facts = [facts] if isinstance(facts, Fact) else facts
    if isinstance(facts, (str, bytes, Mapping)) or not isinstance(facts, Iterable):
        raise RequestError(
            f"expected editkit.Fact objects, got {type(facts).__name__}; give a list of Fact(prompt=..., subject=..., "
            "target=...)"
        )
    facts = list(facts)
    if not facts:
        raise RequestError(f"no facts to {what}: the list of requests is empty")
    for i, fact in enumerate(facts):
        if not isinstance(fact, Fact):
            raise RequestError(
                f"fact {i}: expected editkit.Fact, got {type(fact).__name__}; use Fact(prompt=..., subject=..., "
                "target=...), for a row of a table Fact(**row)"
            )
        validate_fact(fact, i)
    return facts


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
    if not bare(fact.target):
        raise RequestError(f"{where}: empty target for {fact.text!r}; give the object to be written")


def validate_facts(facts: Fact | Iterable[Fact], *, allow_conflicts: bool = False) -> list[Fact]:
    """Check a batch of edit requests (one fact, or any iterable) and return it as a list.

    Raises RequestError for an empty batch, a malformed fact, a duplicate, or (unless `allow_conflicts`) two
    different targets for one text: one least-squares batch would write their mean.
    """
    facts = as_facts(facts)
    seen: dict[str, int] = {}
    for i, fact in enumerate(facts):
        j = seen.get(asked(fact))
        if j is not None and bare(facts[j].target) == bare(fact.target):
            raise RequestError(
                f"facts {_named(facts, j)} and {_named(facts, i)} are duplicates: {fact.text!r} -> {fact.target!r}; "
                "drop one"
            )
        if j is not None and not allow_conflicts:
            raise RequestError(
                f"facts {_named(facts, j)} and {_named(facts, i)} conflict: {fact.text!r} -> {facts[j].target!r} and "
                f"{fact.target!r}; keep the latest, or edit them one after the other with a conflict policy"
            )
        seen[asked(fact)] = i
    return facts


def asked(fact: Fact) -> str:
    """The text that a fact answers: equal for one question, wherever it is cut into prompt and subject."""
    return stem(fact.text)


def _named(facts: Sequence[Fact], i: int) -> str:
    """A fact for an error: its place in the list, its id and its row in the corpus, where it has them."""
    about = [x for x in (facts[i].case_id, *(f"row {v}" for k, v in facts[i].meta if k == "row")) if x]
    return f"{i} ({', '.join(about)})" if about else str(i)


def ambiguous(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Index pairs (i, j), i < j, with one text but different objects, new or true: two things of one name."""
    return _pairs(facts, lambda f: (bare(f.target), f.target_true))


def conflicts(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Index pairs (i, j), i < j, with one text but different targets."""
    return _pairs(facts, lambda f: bare(f.target))


def _pairs(facts: Sequence[Fact], said: Callable[[Fact], object]) -> list[tuple[int, int]]:
    """Index pairs (i, j), i < j, of facts with one text of which different things are said."""
    first: dict[str, list[int]] = {}
    pairs = []
    for j, fact in enumerate(facts):
        group = first.setdefault(asked(fact), [])
        pairs += [(i, j) for i in group if said(facts[i]) != said(fact)]
        group.append(j)
    return pairs
