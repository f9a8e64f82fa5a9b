"""Prompt and answer as tokens, and what a model says about the answer: once for editors, probes and scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..base.errors import RequestError
from .batching import PaddingSide, token_rows
from .joining import NO_SPACE, gap, join, stem
from .lm import LM

Pair = tuple[str, str]
_ANCHOR = "\n"


def _inside_text(lm: LM, text: str) -> list[int]:
    """Token ids of a text as it is cut behind other text, without what tokenizers do at the start of one."""
    (ids,), spans = token_rows(lm.tokenizer, [_ANCHOR + text], add_special_tokens=False)
    if spans is not None:
        behind = [k for k, (_, end) in enumerate(spans[0]) if end > len(_ANCHOR)]
        if behind and spans[0][behind[0]][0] >= len(_ANCHOR):
            return ids[behind[0] :]
    return token_rows(lm.tokenizer, [text], add_special_tokens=False)[0][0]


def split_tokens(lm: LM, pairs: Sequence[Pair]) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer as one text (`joining.join`) and the number of prompt tokens, for each pair.

    The prompt's tokens are those it has alone, since that is what the model reads when it is asked. The answer's are
    the rest of the whole text's tokens. Where a token of the whole text would lie across the border ("vio" + "lin"),
    the answer is cut by itself. Raises RequestError for an empty answer, a prompt without tokens, or a text too long
    for the model.
    """
    if not pairs:
        return []
    whole, _ = token_rows(lm.tokenizer, [join(p, a) for p, a in pairs])
    fronts, _ = token_rows(lm.tokenizer, [stem(p) for p, _ in pairs])
    rows = []
    for (prompt, answer), ids, front in zip(pairs, whole, fronts, strict=True):
        bare = answer.removeprefix(NO_SPACE).lstrip()
        if not bare:
            raise RequestError(f"empty answer for the prompt {prompt!r}; give the text that should follow it")
        start = len(front)
        if start == 0:
            raise RequestError(
                f"the prompt {prompt!r} has no tokens; a continuation needs something before it"
            )
        if ids[:start] != front:
            ids = front + _inside_text(lm, gap(prompt, answer) + bare)
        if len(ids) == start:
            raise RequestError(
                f"the tokenizer of {lm.name} gives no token to the answer {answer!r} behind {prompt!r}; write it "
                "differently"
            )
        if lm.max_tokens is not None and len(ids) > lm.max_tokens:
            raise RequestError(
                f"prompt and answer have {len(ids)} tokens, {lm.name} allows {lm.max_tokens}: {prompt[:80]!r}..."
            )
        rows.append((ids, start))
    return rows


def prompt_tokens(lm: LM, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt. Raises RequestError for a prompt without tokens."""
    if not prompts:
        return []
    rows, _ = token_rows(lm.tokenizer, prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if not prompt or not row:
            raise RequestError(f"the prompt {prompt!r} has no tokens; give a non-empty text")
    return rows


def pad_rows(lm: LM, rows: Sequence[Sequence[int]], side: PaddingSide) -> dict[str, Tensor]:
    """input_ids, attention_mask, position_ids (counting real tokens), each (rows, width), on the model's device."""
    return lm.pad(rows, side)


def logits_of(lm: LM, states: Tensor) -> Tensor:
    """Logits (t, vocabulary) of states of the last block (t, m), at least float32."""
    logits = lm.head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_probs_of(lm: LM, states: Tensor, places: Tensor) -> Tensor:
    """Log-probabilities (t,) of answer tokens, at least float32: the term of every answer loss.

    states: (rows, tokens, m) output of the last block.   places: (t, 3) row, column that predicts, token.
    """
    row, column, token = places.unbind(-1)
    said = log_softmax(logits_of(lm, states[row.to(states.device), column.to(states.device)]), dim=-1)
    return said.gather(-1, token.to(said.device)[:, None])[:, 0]
