"""Batched token-level scoring: log-probabilities and arg-max of the tokens of a continuation.

Every teacher-forced protocol is a reading of what `score_targets` returns, so tokenisation, padding and
position ids are decided once, here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ConfigError, RequestError
from ..base.progress import bar
from ..models.lm import LM
from ..models.prompts import prompts as prompts_end
from ..models.prompts import readers

PaddingSide = Literal["left", "right"]
TOKEN_BUDGET = 8192
Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class TargetScore:
    """What a model says about the t tokens of one continuation, each given the prompt and the tokens before
    it.

    ids (t,): the tokens.   logprobs (t,): their natural-log probabilities.   argmax (t,): the most likely
    tokens.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    argmax: np.ndarray

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token (ROME/MEMIT's "probs"), in nats."""
        return float(-self.logprobs.mean())

    @property
    def nll_sum(self) -> float:
        """Negative log-likelihood of the whole continuation, in nats."""
        return float(-self.logprobs.sum())

    @property
    def correct(self) -> np.ndarray:
        """(t,) bool: the token is the most likely one."""
        return self.ids == self.argmax

    @property
    def token_accuracy(self) -> float:
        """Share of tokens that are the most likely one (teacher-forced)."""
        return float(self.correct.mean())


def join(prompt: str, answer: str) -> str:
    """The text that is scored: prompt, one space, answer."""
    return f"{prompt} {answer.lstrip()}"


def split_tokens(lm: LM, pairs: Sequence[Pair]) -> list[tuple[list[int], int]]:
    """Token ids of `prompt + " " + answer` and the number of prompt tokens, for each pair.

    The text is tokenised as a whole; by character offsets, a token belongs to the answer if it ends behind
    the prompt. For space-prefixed BPE this is the official `tok(prompt) + tok(" " + answer)`; unlike it, it
    is also right for tokenizers that mark spaces otherwise or append an end token. Raises RequestError for an
    empty answer, a prompt without tokens, or a text too long for the model.
    """
    if not pairs:
        return []
    texts = [join(p, a) for p, a in pairs]
    encoded = lm.tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    rows, limit = [], lm.max_tokens
    for (prompt, answer), ids, spans in zip(
        pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        inside = [end > len(prompt) for _, end in spans]
        if not answer.strip() or True not in inside:
            raise RequestError(f"empty answer for the prompt {prompt!r}; give the text that should follow it")
        start = inside.index(True)
        if start == 0:
            raise RequestError(
                f"the prompt {prompt!r} has no tokens; a continuation needs something before it"
            )
        stop = len(inside) - inside[::-1].index(True)
        if limit is not None and stop > limit:
            raise RequestError(
                f"prompt and answer have {stop} tokens, {lm.name} allows {limit}: {prompt[:80]!r}..."
            )
        rows.append((ids[:stop], start))
    return rows


def prompt_tokens(lm: LM, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, without the end token that some tokenizers append.

    Raises RequestError for a prompt without tokens.
    """
    if not prompts:
        return []
    encoded = lm.tokenizer(
        list(prompts), return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    rows = []
    for prompt, ids, spans in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        real = [i for i, (start, end) in enumerate(spans) if end > start]
        if not real:
            raise RequestError(f"the prompt {prompt!r} has no tokens; give a non-empty text")
        rows.append(ids[: real[-1] + 1])
    return rows


def pad_rows(lm: LM, rows: Sequence[Sequence[int]], side: PaddingSide) -> dict[str, Tensor]:
    """input_ids, attention_mask, position_ids (counting real tokens), each (rows, width), on the device."""
    if side not in ("left", "right"):
        raise ConfigError(f"padding_side must be 'left' or 'right', got {side!r}")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), lm.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    device = lm.device()
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
    }


def batches(lengths: Sequence[int], batch_size: int | None, token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length: rows x longest row <= token_budget (at least one row each).

    Longest first, so that running out of memory happens at once and not after an hour.
    """
    if token_budget < 1 or (batch_size is not None and batch_size < 1):
        raise ConfigError(
            f"batch_size and token_budget must be positive, got {batch_size} and {token_budget}"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        stop = start + (rows if batch_size is None else min(rows, batch_size))
        yield order[start:stop]
        start = stop


def _servers(contexts: list[tuple[int, ...]], share: bool) -> tuple[list[tuple[int, ...]], list[int]]:
    """Rows to feed and, for each context, the row that starts with it: a causal model needs only that."""
    if not share:
        return contexts, list(range(len(contexts)))
    ordered = sorted(set(contexts))
    server: dict[tuple[int, ...], int] = {}
    rows: list[tuple[int, ...]] = []
    for context in reversed(ordered):
        # In lexicographic order a context's extensions follow it, so the last row kept is the only candidate.
        if not rows or rows[-1][: len(context)] != context:
            rows.append(context)
        server[context] = len(rows) - 1
    return rows, [server[c] for c in contexts]


def keeps_logits(lm: LM) -> bool:
    """Whether the model can be told to compute the logits of the last positions only."""
    return "logits_to_keep" in inspect.signature(lm.model.forward).parameters


@torch.no_grad()
def score_targets(
    lm: LM,
    pairs: Sequence[Pair],
    *,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    padding_side: PaddingSide = "left",
    whole_texts: bool = False,
    desc: str = "scoring",
) -> list[TargetScore]:
    """Score the answer of each (prompt, answer) pair, teacher-forced, in one pass over the distinct texts.

    batch_size: at most so many rows per forward pass; token_budget: rows x width of a batch. whole_texts:
    feed every prompt + answer whole, in a row of its own. Needed only for models whose hooks look at the
    input in ways editkit does not know. Otherwise rows that are prefixes of others are served by them. With a
    memory attached, which routes by the prompt, a row serves only pairs of the same prompt, and the memory is
    told where the prompts end. Results do not depend on padding side or batching beyond float rounding.
    """
    unique = list(dict.fromkeys((p, a) for p, a in pairs))
    tokens = split_tokens(lm, unique)
    routed = bool(readers(lm))
    # The number of prompt tokens in front keeps prompts of different length apart.
    contexts = [(start * routed, *(ids if whole_texts else ids[:-1])) for ids, start in tokens]
    served_rows, server = _servers(contexts, share=not whole_texts)
    rows, starts = [row[1:] for row in served_rows], [row[0] for row in served_rows]
    served: list[list[int]] = [[] for _ in rows]
    for i, row in enumerate(server):
        served[row].append(i)
    result: list[TargetScore | None] = [None] * len(unique)
    keep = keeps_logits(lm) and padding_side == "left"
    work = list(batches([len(r) for r in rows], batch_size, token_budget))
    for batch in bar(work, desc):
        inputs = pad_rows(lm, [rows[i] for i in batch], padding_side)
        width = inputs["input_ids"].shape[1]
        where, spans, ids = [], [], []  # (row, column) of each logit needed; pair and slice; target tokens
        for r, i in enumerate(batch):
            offset = width - len(rows[i]) if padding_side == "left" else 0
            for pair in served[i]:
                full, start = tokens[pair]
                spans.append((pair, len(where), len(where) + len(full) - start))
                where += [(r, offset + t - 1) for t in range(start, len(full))]
                ids += full[start:]
        first = min(c for _, c in where)
        kwargs = {"logits_to_keep": width - first} if keep else {}
        with prompts_end(lm, [starts[i] for i in batch]) if routed else nullcontext():
            logits = lm.model(**inputs, use_cache=False, return_dict=True, **kwargs).logits
        shift = first if keep else 0
        logprobs, argmax = _read(logits, [(r, c - shift) for r, c in where], ids)
        for pair, a, b in spans:
            result[pair] = TargetScore(np.asarray(ids[a:b]), logprobs[a:b], argmax[a:b])
    index = {pair: i for i, pair in enumerate(unique)}
    return [result[index[p, a]] for p, a in pairs]  # type: ignore[misc]


@torch.no_grad()
def next_tokens(
    lm: LM, prompts: Sequence[str], *, batch_size: int | None = None, token_budget: int = TOKEN_BUDGET
) -> list[int]:
    """The most likely next token after each prompt."""
    unique = list(dict.fromkeys(prompts))
    rows = prompt_tokens(lm, unique)
    result: dict[str, int] = {}
    for batch in batches([len(r) for r in rows], batch_size, token_budget):
        inputs = pad_rows(lm, [rows[i] for i in batch], "left")
        keep = {"logits_to_keep": 1} if keeps_logits(lm) else {}
        logits = lm.model(**inputs, use_cache=False, return_dict=True, **keep).logits[:, -1]
        result.update(zip([unique[i] for i in batch], logits.argmax(-1).tolist(), strict=True))
    return [result[p] for p in prompts]


def _read(logits: Tensor, where: list[tuple[int, int]], ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of ids and arg-max tokens at the positions `where` of logits (rows, columns,
    vocabulary).
    """
    distinct = list(dict.fromkeys(where))
    position = {w: i for i, w in enumerate(distinct)}
    r, c = torch.tensor(distinct, device=logits.device).T
    chosen = logits[r, c]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    inverse = torch.tensor([position[w] for w in where], device=logits.device)
    logprobs = chosen[inverse, torch.tensor(ids, device=logits.device)] - chosen.logsumexp(-1)[inverse]
    return logprobs.double().cpu().numpy(), chosen.argmax(-1)[inverse].cpu().numpy()
