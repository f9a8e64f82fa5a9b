"""Facts as encoded rows: every prompt with its target as one text, and where the target's tokens are predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.errors import RequestError
from ..models.batching import Encoding
from ..models.facts import Fact
from ..models.lm import LM
from ..models.lookup import Where, find_spans
from .contexts import ContextTemplates


@dataclasses.dataclass(frozen=True)
class TargetRows:
    """Encoded rows of all facts, fact-major: per fact one row per context (prompt and target), then the KL
    row if any.

    positions: (n, rows) lookup column of each row.   lengths: (n,) longest row.
    places:    per fact a LongTensor (t, 3) of target tokens: row inside the fact, column that predicts,
               token.
    """

    encoding: Encoding
    positions: Tensor
    lengths: list[int]
    places: list[Tensor]

    @property
    def per_fact(self) -> int:
        return self.positions.shape[1]

    def take(self, facts: Sequence[int]) -> tuple[Encoding, Tensor, Tensor]:
        """Encoding, lookup columns (flat), target tokens (t, 4: fact, row, column, token) of some facts."""
        R = self.per_fact
        encoding, left = self.encoding.take([f * R + r for f in facts for r in range(R)])
        places = [
            torch.cat([torch.full_like(self.places[f][:, :1], i), self.places[f]], dim=1)
            for i, f in enumerate(facts)
        ]
        places = torch.cat(places)
        places[:, 1] += places[:, 0] * R
        places[:, 2] -= left
        return encoding, self.positions[list(facts)].reshape(-1) - left, places


def encode_targets(
    lm: LM,
    facts: Sequence[Fact],
    contexts: ContextTemplates,
    token: Where = "subject_last",
    kl_prompt: str | None = None,
) -> TargetRows:
    """Tokenize prompt and target as one text; by character offsets a token is the target's if it ends behind
    the prompt. The last target token is predicted but never read, so it is masked like padding.

    With `kl_prompt` each fact gets one more row, without a target. Raises RequestError naming prompt and
    subject.
    """
    pairs, cuts = [], []
    for fact in facts:
        for filled in contexts.fill(fact.prompt):
            pairs.append((f"{filled} {fact.target.strip()}", fact.subject))
            # Characters of the filled prompt; the slot itself has two.
            cuts.append(len(filled) - 2 + len(fact.subject))
        if kl_prompt is not None:
            pairs.append((kl_prompt, fact.subject))
            cuts.append(-1)
    encoding, first, last = find_spans(lm, pairs)
    begin, end = encoding.offsets.unbind(-1)
    cut = torch.tensor(cuts, device=end.device)[:, None]
    text = (end > begin) & encoding.attention_mask.bool()
    target = text & (end > cut) & (cut >= 0)
    columns = torch.arange(text.shape[1], device=text.device)
    prompt_last = torch.where(text & ~target, columns, -1).amax(-1)
    where = {
        "subject_last": last, "subject_first": first, "subject_first_after": last + 1, "last": prompt_last,
    }[token]  # fmt: skip
    per_fact = len(contexts.flat) + (kl_prompt is not None)
    if token in ("last", "subject_first_after"):
        # Such a token carries the relation of its own prompt; drift of the subject is measured at the
        # subject.
        kl_row = (cut < 0)[:, 0]
        where = torch.where(kl_row, last, where)
    bad = where > prompt_last
    if bad.any():
        template, subject = pairs[int(bad.nonzero()[0])]
        raise RequestError(
            f"nothing follows the subject {subject!r} in the prompt {template!r} before its target; "
            "use the lookup token 'subject_last', or a template with text after its slot"
        )
    found: list[list[int]] = [[] for _ in pairs]
    for row, column in target.nonzero().tolist():
        found[row].append(column)
    ids = encoding.input_ids.tolist()
    places: list[list[list[int]]] = [[] for _ in facts]
    stop = encoding.lengths.tolist()
    for i, cols in enumerate(found):
        fact, row = divmod(i, per_fact)
        if cuts[i] < 0:
            continue
        if not cols or cols[0] == 0:
            raise RequestError(
                f"the tokenizer of {lm.name} gives no token to the target {facts[fact].target!r} behind "
                f"{facts[fact].text!r}; write the target differently"
            )
        places[fact] += [[row, c - 1, ids[i][c]] for c in cols]
        stop[i] = cols[-1]
    encoding["attention_mask"] = (columns < torch.tensor(stop, device=columns.device)[:, None]).long()
    lengths = encoding.attention_mask.sum(-1).reshape(len(facts), per_fact).amax(-1).tolist()
    positions = where.reshape(len(facts), per_fact)
    return TargetRows(encoding, positions, lengths, [torch.tensor(p, device=last.device) for p in places])
