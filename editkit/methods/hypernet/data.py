"""What hypernetworks are trained on: edit, paraphrase and unrelated (prompt, answer) pairs, and their batches.

Labels are shifted: the label at a position is the token that follows it; -100 where nothing is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ...base.errors import ConfigError, DataError, RequestError
from ...models.answers import Pair, logits_of, pad_rows, split_tokens
from ...models.facts import Fact
from ...models.hooks import trace
from ...models.joining import marked
from ...models.lm import LM

Tokens = Literal["answer", "all"]
TargetField = Literal["target_new", "ground_truth"]
Apart = Literal["subject", "fact", "edit"]
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class TupleBatch:
    """Padded rows with labels, all (rows, width). inputs: input_ids, attention_mask, position_ids.

    pairs: the texts behind the rows, where there are any.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    pairs: tuple[Pair, ...] = ()

    @property
    def asked(self) -> Tensor:
        """(rows, width) bool: positions with a label."""
        return self.labels != IGNORED

    @property
    def targets(self) -> Tensor:
        """(answer tokens,) the labels, row by row."""
        return self.labels[self.asked]

    def rows(self, tokens: Tokens) -> Tensor:
        """(rows, width) bool: positions whose keys and gradients an editor takes."""
        return self.asked if tokens == "answer" else self.inputs["attention_mask"].bool()


def encode_pairs(lm: LM, pairs: Sequence[Pair], batch_size: int) -> list[TupleBatch]:
    """Batches of `batch_size` pairs, longest first. Raises RequestError for an empty list or answer."""
    if not pairs:
        raise RequestError("no (prompt, answer) pairs to encode: the list is empty")
    rows = split_tokens(lm, pairs)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batches = []
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        inputs = pad_rows(lm, [rows[i][0][:-1] for i in part], "right")
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for k, i in enumerate(part):
            ids, start = rows[i]
            labels[k, start - 1 : len(ids) - 1] = torch.as_tensor(ids[start:], device=labels.device)
        batches.append(TupleBatch(inputs, labels, tuple(pairs[i] for i in part)))
    return batches


def answer_logits(lm: LM, batch: TupleBatch) -> Tensor:
    """(answer tokens, vocabulary) logits at the labelled positions, at least float32."""
    end = lm.block_name(lm.n_layers - 1)
    with trace(lm.model, [end], stop_at=end) as seen:
        lm.model(**batch.inputs, use_cache=False)
    states = seen.output[end]
    return logits_of(lm, states[batch.asked.to(states.device)])


def cross_entropy(lm: LM, batch: TupleBatch) -> Tensor:
    """Mean over the batch's answer tokens of -log p."""
    logits = answer_logits(lm, batch)
    return torch.nn.functional.cross_entropy(logits, batch.targets.to(logits.device))


def kl_divergence(lm: LM, batch: TupleBatch, before: Tensor) -> Tensor:
    """Mean over the answer tokens of KL(before || now). before: (answer tokens, vocabulary) log-probabilities."""
    now = log_softmax(answer_logits(lm, batch), -1)
    before = before.to(now)
    return (before.exp() * (before - now)).sum(-1).mean()


@dataclasses.dataclass(frozen=True)
class EditRecord:
    """A training example: what is edited, the same asked otherwise, and what must stay."""

    edit: Pair
    paraphrases: tuple[Pair, ...]
    unrelated: tuple[Pair, ...]
    subject: str = ""


def records_of(facts: Sequence[Fact], target: TargetField = "target_new") -> list[EditRecord]:
    """Training records of facts with paraphrases and protected probes.

    target: "target_new", or "ground_truth": the field that the published HORSE code reads from CounterFact,
        which holds the object that is true already.
    Unrelated pairs are the locality and neighborhood probes. Raises DataError for a fact without one of them.
    """
    if target not in ("target_new", "ground_truth"):
        raise ConfigError(f"target = {target!r}; choose 'target_new' or 'ground_truth'")
    records = []
    for i, fact in enumerate(facts):
        answer = fact.target if target == "target_new" else fact.target_true
        unrelated = tuple((p.prompt, marked(p.answer, p.space)) for p in (*fact.locality, *fact.neighborhood))
        missing = [
            name
            for name, value in (
                ("target_true", answer),
                ("paraphrases", fact.paraphrases),
                ("locality", unrelated),
            )
            if not value
        ]
        if missing:
            raise DataError(f"fact {i} ({fact.text!r}) has no {missing[0]}, which training needs")
        records.append(
            EditRecord(
                (fact.text, marked(answer, fact.space)),
                tuple((p, marked(answer, fact.space)) for p in fact.paraphrases),
                unrelated,
                fact.subject,
            )
        )
    return records


def disjoint(
    records: Sequence[EditRecord], test: Sequence[Fact], *, by: Apart = "subject"
) -> list[EditRecord]:
    """The training records that share nothing with the facts of a test.

    by: "subject" drops every record about an edited subject of the test; "fact", for tests that edit nearly all
        subjects, only those that ask what a probe of the test asks; "edit", for tests that ask about nearly all
        facts, only those that edit what the test edits. What a test only protects may then be edited in training.
    Unrelated pairs whose prompt the test asks are dropped in all three. Raises DataError if nothing is left.
    """
    if by not in ("subject", "fact", "edit"):
        raise ConfigError(f"by = {by!r}; choose 'subject', 'fact' or 'edit'")
    subjects = {f.subject for f in test} if by == "subject" else set()
    asked = {f.text for f in test} | {p for f in test for p in f.paraphrases}
    edits = set(asked)
    for fact in test:
        for axis in (fact.neighborhood, fact.locality, fact.same_subject, fact.consequences):
            asked |= {p.prompt for p in axis}
    kept = []
    for record in records:
        unrelated = tuple(pair for pair in record.unrelated if pair[0] not in asked)
        prompts = {record.edit[0], *(p for p, _ in record.paraphrases)}
        if record.subject not in subjects and unrelated and not prompts & (edits if by == "edit" else asked):
            kept.append(dataclasses.replace(record, unrelated=unrelated))
    if not kept:
        raise DataError(
            "no training record is left beside the test facts; draw more of them, test fewer facts, or keep them "
            "apart by fact (by='fact') or by edit (by='edit') only"
        )
    return kept


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one training step sees: pairs to edit, one paraphrase and one unrelated pair of each, or of some."""

    edits: tuple[Pair, ...]
    paraphrases: tuple[Pair, ...]
    unrelated: tuple[Pair, ...]


def draw(records: Sequence[EditRecord], n: int, seed: int, step: int, probes: int | None = None) -> Draw:
    """n records for one step, a function of seed and step alone, no edit prompt twice.

    probes: facts whose paraphrase and unrelated pair are asked, a random choice of the n; None: all of them.

    Raises DataError if there are fewer different prompts than n.
    """
    rng = np.random.default_rng([seed, step])
    taken: dict[str, EditRecord] = {}
    for i in rng.permutation(len(records)):
        taken.setdefault(records[i].edit[0], records[i])
        if len(taken) == n:
            break
    if len(taken) < n:
        raise DataError(
            f"a training step needs {n} facts, the records hold {len(taken)} different prompts; "
            "lower n_edits or give more records"
        )
    chosen = list(taken.values())
    one = lambda pairs: pairs[rng.integers(len(pairs))]  # noqa: E731
    probed = chosen[:probes]  # in the random order of the draw
    return Draw(
        tuple(r.edit for r in chosen),
        tuple(one(r.paraphrases) for r in probed),
        tuple(one(r.unrelated) for r in probed),
    )
