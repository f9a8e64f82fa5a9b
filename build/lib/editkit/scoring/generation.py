"""Free generation with a KV cache: greedy or seeded top-k sampling, batched, with natural stops."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..base.errors import ConfigError, RequestError
from ..base.progress import bar
from ..models.lm import LM
from ..models.prompts import readers
from .engine import TOKEN_BUDGET, batches, keeps_logits, prompt_tokens


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


def _groups(generators: Sequence[torch.Generator] | None, n: int) -> list[list[int]]:
    """Rows that are drawn together: those of one generator. Without generators every row is on its own."""
    if generators is None:
        return [[i] for i in range(n)]
    found: dict[int, list[int]] = {}
    for i, generator in enumerate(generators):
        found.setdefault(id(generator), []).append(i)
    return list(found.values())


@dataclasses.dataclass
class _Draws:
    """The next token of every row. Rows of one generator are drawn together, from the end of their shortest prompt
    until all of them are done, so their draws are the same whatever else is in the batch.

    groups: rows by generator.   first: shortest prompt of each group.
    """

    top_k: int
    generators: Sequence[torch.Generator] | None
    groups: list[list[int]]
    first: list[int]

    def next(self, logits: Tensor, live: list[int], column: int, done: Tensor) -> Tensor:
        """Tokens (rows,) for logits (rows, V) of the rows `live`; done (n,): rows that need no more."""
        if self.generators is None:
            return _next(logits, self.top_k, None)
        place = {row: k for k, row in enumerate(live)}
        finished = done.tolist()
        new = torch.zeros(len(live), dtype=torch.long, device=logits.device)
        for rows, first in zip(self.groups, self.first, strict=True):
            if column >= first and not all(finished[i] for i in rows):
                here = torch.tensor([place[i] for i in rows], device=logits.device)
                new[here] = _next(logits[here], self.top_k, self.generators[rows[0]])
        return new


@torch.no_grad()
def _extend(
    lm: LM,
    rows: list[list[int]],
    limits: list[int],
    top_k: int,
    generators: Sequence[torch.Generator] | None,
    stops: frozenset[int],
):
    """Extend token rows of any lengths to at most `limits` tokens, column by column.

    The first pass reads the columns that all rows have; from there a row takes its own next token while its
    prompt lasts and a generated one afterwards. So there is no padding and positions are always right. When half of
    the rows are done they leave the batch, unless a memory is attached, which may remember rows by their number.
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
    groups = _groups(generators, len(rows))
    draws = _Draws(top_k, generators, groups, [min(len(rows[i]) for i in group) for group in groups])
    may_leave = not readers(lm)
    keep = {"logits_to_keep": 1} if keeps_logits(lm) else {}
    live = list(range(len(rows)))  # rows still in the cache, in order
    cache, start = None, 0
    while not bool(done.all()):
        here = torch.tensor(live, device=ids.device)
        positions = torch.arange(start, column, device=ids.device).expand(len(live), -1)
        mask = torch.ones(len(live), column, dtype=torch.long, device=ids.device)
        out = lm.model(
            input_ids=ids[here, start:column], attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True, return_dict=True, **keep,
        )  # fmt: skip
        cache = out.past_key_values
        new = draws.next(out.logits[:, -1], live, column, done)
        writes = (lengths[here] == column) & ~done[here]
        written = here[writes]
        ids[written, column] = new[writes]
        lengths[written] += 1
        stopped[written] |= torch.isin(new[writes], ends)
        done = stopped | (lengths >= limit)
        start, column = column, column + 1
        if may_leave and hasattr(cache, "batch_select_indices"):
            live = _leave(cache, live, groups, done.tolist())
    return [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)], stopped.tolist()


def _leave(cache, live: list[int], groups: list[list[int]], done: list[bool]) -> list[int]:
    """Drop groups that are done from the cache, when that halves it at least; returns the rows that are left."""
    staying = {i for group in groups if not all(done[i] for i in group) for i in group}
    if not staying or 2 * sum(i in staying for i in live) > len(live):
        return live
    cache.batch_select_indices(torch.tensor([k for k, i in enumerate(live) if i in staying]))
    return [i for i in live if i in staying]


def generate(
    lm: LM,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    max_total_tokens: int | None = None,
    top_k: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
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

    Greedy rows are batched by similar prompt length; a result depends on its own prompt only, up to float rounding.
    Sampled rows are drawn together, in the given order, in batches of batch_size: the draws depend on the composition
    of a batch. With one generator per prompt, the prompts of one generator are drawn as if they were alone, and
    batch_size is ignored. With a memory attached, which has to read whole prompts first, rows are batched by equal
    length. Raises ConfigError or RequestError for unusable arguments.
    """
    if (max_new_tokens is None) == (max_total_tokens is None):
        raise ConfigError("give exactly one of max_new_tokens and max_total_tokens")
    if top_k < 1 or n_per_prompt < 1:
        raise ConfigError(f"top_k and n_per_prompt must be at least 1, got {top_k} and {n_per_prompt}")
    if top_k > 1 and generator is None:
        raise ConfigError(
            "sampling needs a seeded generator: pass generator=torch.Generator().manual_seed(seed)"
        )
    if isinstance(generator, Sequence) and len(generator) != len(prompts):
        raise ConfigError(
            f"{len(generator)} generators for {len(prompts)} prompts; give one, or one per prompt"
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
    several = None
    if top_k > 1 and not isinstance(generator, torch.Generator):
        several = [g for g in generator for _ in range(n_per_prompt)]
    if readers(lm):
        work = _equal_lengths(rows, limits, batch_size, token_budget)
    elif several is not None:
        work = _whole_groups(rows, limits, several, token_budget)
    elif top_k > 1:
        size = batch_size or len(rows)
        work = [list(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]
    else:
        work = _similar_lengths(rows, limits, batch_size, token_budget)
    stops = stop_ids(lm) if stop else frozenset()
    result: list[Generation | None] = [None] * len(rows)
    for batch in bar(work, desc):
        chosen = [rows[i] for i in batch]
        drawn_by = None if top_k == 1 else [several[i] if several else generator for i in batch]
        extended, ended = _extend(lm, chosen, [limits[i] for i in batch], top_k, drawn_by, stops)
        for i, ids, end in zip(batch, extended, ended, strict=True):
            text = lm.tokenizer.decode(ids[len(rows[i]) :], skip_special_tokens=True)
            result[i] = Generation(texts[i], tuple(ids), len(rows[i]), end, text)
    return result  # type: ignore[return-value]


def _equal_lengths(rows, limits, batch_size: int | None, token_budget: int) -> list[list[int]]:
    """Batches of rows of one length."""
    work = []
    for length in sorted({len(r) for r in rows}):
        same = [i for i, r in enumerate(rows) if len(r) == length]
        found = batches([limits[i] for i in same], batch_size, token_budget)
        work += [[same[j] for j in batch] for batch in found]
    return work


def _similar_lengths(rows, limits, batch_size: int | None, token_budget: int) -> list[list[int]]:
    """Batches of rows sorted by length. The next length joins a batch where the passes that it adds, one for each
    token of difference, are no more than those of a batch of its own.
    """
    work: list[list[int]] = []
    batch: list[int] = []
    widest = 0
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i]), i)):
        wide = max(widest, limits[i])
        full = (batch and (len(batch) + 1) * wide > token_budget) or len(batch) == batch_size
        if full or (batch and len(rows[i]) - len(rows[batch[-1]]) > limits[i] - len(rows[i])):
            work.append(batch)
            batch, wide = [], limits[i]
        batch.append(i)
        widest = wide
    return [*work, batch] if batch else work


def _whole_groups(rows, limits, generators, token_budget: int) -> list[list[int]]:
    """Batches of whole groups (rows of one generator), those with short prompts first."""
    work: list[list[int]] = []
    batch: list[int] = []
    for group in sorted(_groups(generators, len(rows)), key=lambda g: min(len(rows[i]) for i in g)):
        together = batch + group
        if batch and len(together) * max(limits[i] for i in together) > token_budget:
            work.append(batch)
            together = group
        batch = together
    return [*work, batch]


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
