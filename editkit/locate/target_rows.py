"""Facts as encoded rows: every prompt with its target as one text, and where the target's tokens are predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.errors import RequestError
from ..models.answers import pad_rows, split_tokens
from ..models.batching import Encoding
from ..models.facts import SLOT, Fact
from ..models.joining import marked
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
    """Prompts in all contexts with their targets, tokenised by `models.answers.split_tokens`. The last target token
    is predicted but never read, so it is masked like padding.

    With `kl_prompt` each fact gets one more row, without a target. Raises RequestError naming prompt and
    subject.
    """
    prompts: list[tuple[str, str]] = []
    pairs: list[tuple[str, str] | None] = []
    for fact in facts:
        template, subject = fact.located
        answer = marked(fact.target, fact.target_text.startswith(" "))  # the same in every context
        for filled in contexts.fill(template):
            prompts.append((filled, subject))
            pairs.append((filled.replace(SLOT, subject), answer))
        if kl_prompt is not None:
            prompts.append((kl_prompt, fact.subject))
            pairs.append(None)
    encoding, first, last = find_spans(lm, prompts)
    split = iter(split_tokens(lm, [pair for pair in pairs if pair]))
    own = [row[keep].tolist() for row, keep in zip(encoding.input_ids, encoding.attention_mask.bool(), strict=True)]
    rows = [(ids, len(ids)) if pair is None else next(split) for pair, ids in zip(pairs, own, strict=True)]
    device = last.device
    prompt_last = torch.tensor([start - 1 for _, start in rows], device=device)
    where = {
        "subject_last": last, "subject_first": first, "subject_first_after": last + 1, "last": prompt_last,
    }[token]  # fmt: skip
    per_fact = len(contexts.flat) + (kl_prompt is not None)
    if token in ("last", "subject_first_after"):
        # Such a token carries the relation of its own prompt; drift of the subject is measured at the
        # subject.
        where = torch.where(torch.tensor([pair is None for pair in pairs], device=device), last, where)
    bad = where > prompt_last
    if bad.any():
        template, subject = prompts[int(bad.nonzero()[0])]
        raise RequestError(
            f"nothing follows the subject {subject!r} in the prompt {template!r} before its target; "
            "use the lookup token 'subject_last', or a template with text after its slot"
        )
    places: list[list[list[int]]] = [[] for _ in facts]
    stops = []
    for i, (ids, start) in enumerate(rows):
        fact, row = divmod(i, per_fact)
        places[fact] += [[row, c - 1, ids[c]] for c in range(start, len(ids))]
        stops.append(len(ids) - (pairs[i] is not None))
    tensors = pad_rows(lm, [ids for ids, _ in rows], "right")
    columns = torch.arange(tensors["input_ids"].shape[1], device=device)
    tensors["attention_mask"] = (columns < torch.tensor(stops, device=device)[:, None]).long()
    encoding = Encoding(tensors, [text for text, _ in prompts], None, "right")
    lengths = torch.tensor(stops).reshape(len(facts), per_fact).amax(-1).tolist()
    positions = where.reshape(len(facts), per_fact)
    return TargetRows(encoding, positions, lengths, [torch.tensor(p, device=device) for p in places])
