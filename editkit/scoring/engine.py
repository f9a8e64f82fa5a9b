"""Batched token-level scoring: log-probabilities and arg-max of the tokens of a continuation.

Every teacher-forced protocol is a reading of what `score_targets` returns; tokens come from `models.answers`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ConfigError
from ..base.progress import bar
from ..models.answers import Pair, pad_rows, prompt_tokens, split_tokens
from ..models.batching import PaddingSide
from ..models.facts import as_texts
from ..models.lm import LM
from ..models.prompts import prompts as prompts_end
from ..models.prompts import readers

TOKEN_BUDGET = 8192


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
    unique = list(dict.fromkeys(as_texts(prompts, "prompts")))
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
