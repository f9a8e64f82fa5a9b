"""Free generation with a KV cache: greedy or seeded top-k sampling, batched, with natural stops."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..errors import ConfigError, RequestError
from ..models import LM
from ..progress import bar
from ..prompts import readers
from .engine import TOKEN_BUDGET, batches, prompt_tokens


@dataclasses.dataclass(frozen=True)
class Generation:
    """ids: all tokens, prompt included (and the stop token, if one was generated).   n_prompt: prompt tokens.

    stopped: whether an end-of-sequence token ended it.   text: the new text without special tokens.
    """

    prompt: str
    ids: tuple[int, ...]
    n_prompt: int
    stopped: bool
    text: str


def stop_ids(lm: LM) -> frozenset[int]:
    """Token ids that end a text: the tokenizer's end token and those of the model's generation config."""
    config = getattr(lm.model.generation_config, "eos_token_id", None)
    ids = set(config if isinstance(config, (list, tuple)) else [config]) | {lm.tokenizer.eos_token_id}
    return frozenset(i for i in ids if i is not None)


def _next(logits: Tensor, top_k: int, generator: torch.Generator | None) -> Tensor:
    """Next token ids (rows,): the arg-max for top_k = 1, else a draw from the renormalised top k."""
    if top_k == 1:
        return logits.argmax(-1)
    probs = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    best = torch.topk(probs, min(top_k, probs.shape[1]), dim=1)
    weights = (
        best.values / best.values.sum(1, keepdim=True)
    ).cpu()  # drawn on the CPU: same draws on any device
    draw = torch.multinomial(weights, 1, generator=generator).to(logits.device)
    return best.indices.gather(1, draw)[:, 0]


@torch.no_grad()
def _extend(lm: LM, rows: list[list[int]], limits: list[int], top_k: int, generator, stops: frozenset[int]):
    """Extend token rows of any lengths to at most `limits` tokens, column by column.

    The first pass reads the columns that all rows have; from there a row takes its own next token while its
    prompt lasts and a generated one afterwards. So there is no padding and positions are always right.
    """
    column, width = min(map(len, rows)), max(limits)
    ids = torch.full((len(rows), max(width, *map(len, rows))), lm.tokenizer.pad_token_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    ids = ids.to(lm.device())
    lengths, limit = (torch.tensor(x, device=ids.device) for x in ([len(r) for r in rows], limits))
    ends = torch.tensor(sorted(stops), dtype=torch.long, device=ids.device)
    done = lengths >= limit
    stopped = torch.zeros_like(done)
    cache, start = None, 0
    while not bool(done.all()):
        positions = torch.arange(start, column, device=ids.device).expand(len(rows), -1)
        mask = torch.ones(len(rows), column, dtype=torch.long, device=ids.device)
        out = lm.model(
            input_ids=ids[:, start:column], attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True, return_dict=True,
        )  # fmt: skip
        cache = out.past_key_values
        new = _next(out.logits[:, -1], top_k, generator)
        writes = (lengths == column) & ~done
        ids[writes, column] = new[writes]
        lengths = lengths + writes.long()
        stopped |= writes & torch.isin(new, ends)
        done = stopped | (lengths >= limit)
        start, column = column, column + 1
    return [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)], stopped.tolist()


def generate(
    lm: LM,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    max_total_tokens: int | None = None,
    top_k: int = 1,
    generator: torch.Generator | None = None,
    n_per_prompt: int = 1,
    stop: bool = True,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    desc: str = "generating",
) -> list[Generation]:
    """Continue each prompt; results in the order of the prompts (n_per_prompt consecutive ones for each).

    Give exactly one of max_new_tokens (one number, or one per prompt) and max_total_tokens (ROME's
    `max_out_len`: prompt included; a prompt that is longer stays as it is).
    top_k = 1 is greedy. top_k > 1 samples from the renormalised k most likely tokens, with `generator` (a CPU
    torch.Generator, required: unseeded samples cannot be repeated).
    stop: end a row at an end-of-sequence token. False is ROME's `generate_fast`, which goes on.

    Greedy rows are batched by equal prompt length, so a result depends on its own prompt only. Sampled rows
    are drawn together, in the given order, in batches of batch_size: the draws depend on the composition of a
    batch. With a memory attached, which has to read whole prompts first, they are batched by length, too.
    Raises ConfigError or RequestError for unusable arguments.
    """
    if (max_new_tokens is None) == (max_total_tokens is None):
        raise ConfigError("give exactly one of max_new_tokens and max_total_tokens")
    if top_k < 1 or n_per_prompt < 1:
        raise ConfigError(f"top_k and n_per_prompt must be at least 1, got {top_k} and {n_per_prompt}")
    if top_k > 1 and generator is None:
        raise ConfigError(
            "sampling needs a seeded generator: pass generator=torch.Generator().manual_seed(seed)"
        )
    if isinstance(prompts, str):
        raise RequestError("prompts must be a list of texts; wrap the single prompt in a list")
    if not prompts:
        return []
    rows = prompt_tokens(lm, prompts)
    limits = _limits(lm, prompts, rows, max_new_tokens, max_total_tokens)
    texts = [p for p in prompts for _ in range(n_per_prompt)]
    rows = [r for r in rows for _ in range(n_per_prompt)]
    limits = [n for n in limits for _ in range(n_per_prompt)]
    if top_k > 1 and not readers(lm):
        size = batch_size or len(rows)
        work = [list(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]
    else:
        work = []
        for length in sorted({len(r) for r in rows}):
            same = [i for i, r in enumerate(rows) if len(r) == length]
            work += [
                [same[j] for j in b] for b in batches([limits[i] for i in same], batch_size, token_budget)
            ]
    stops = stop_ids(lm) if stop else frozenset()
    result: list[Generation | None] = [None] * len(rows)
    for batch in bar(work, desc):
        chosen = [rows[i] for i in batch]
        extended, ended = _extend(lm, chosen, [limits[i] for i in batch], top_k, generator, stops)
        for i, ids, end in zip(batch, extended, ended, strict=True):
            text = lm.tokenizer.decode(ids[len(rows[i]) :], skip_special_tokens=True)
            result[i] = Generation(texts[i], tuple(ids), len(rows[i]), end, text)
    return result  # type: ignore[return-value]


def _limits(lm: LM, prompts, rows, max_new, max_total) -> list[int]:
    """Total number of tokens allowed for each row, checked against what the model can hold."""
    if max_new is not None and not isinstance(max_new, Integral):
        if len(max_new) != len(rows):
            raise ConfigError(f"max_new_tokens has {len(max_new)} entries for {len(rows)} prompts")
        extra = list(max_new)
    else:
        extra = [max_new] * len(rows)
    limits = []
    for prompt, row, more in zip(prompts, rows, extra, strict=True):
        total = max(max_total, len(row)) if more is None else len(row) + more
        if lm.max_tokens is not None and total > lm.max_tokens:
            raise RequestError(
                f"{total} tokens wanted, {lm.name} holds {lm.max_tokens}: prompt {prompt[:80]!r}..."
            )
        limits.append(total)
    return limits


def released_text(lm: LM, ids: Sequence[int]) -> str:
    """Text of a generation as ROME/MEMIT's released code makes it for its statistics.

    The whole sequence is decoded with special tokens, NFKD-normalised, blank lines become spaces and
    "<|endoftext|>" is dropped; other special tokens stay.
    """
    text = unicodedata.normalize("NFKD", lm.tokenizer.decode(list(ids)))
    return text.replace("\n\n", " ").replace("<|endoftext|>", "")
