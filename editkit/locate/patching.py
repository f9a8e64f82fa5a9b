"""Forward passes with hidden states patched in, and the position groups tracing reports on.

Shared by causal tracing (`tracing.py`) and interchange interventions (`interchange.py`): both run a prompt,
put states of another run into some positions of some modules, and look at the prediction after the last
token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..base.errors import ConfigError
from ..models.answers import Pair, split_tokens
from ..models.batching import Encoding
from ..models.hooks import EditFn, pick, trace
from ..models.lm import LM
from ..models.lookup import find_positions, find_spans
from .keys import Prompt, as_pairs
from .replay import Replay, run

Kind = Literal["block", "mlp", "attn"]
GROUPS = ("subject_first", "subject_middle", "subject_last", "after", "last")


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the groups of a batch of prompts lie.

    encoding: right-padded prompts, n rows. final: (n,) column of the last token of the text.
    groups: per prompt a dict group -> columns. subject_last is the subject's last token, also of a one-token
    subject; subject_first the first of several; subject_middle those between; after the tokens behind the
    subject but for the last of the prompt; last that one. Absent groups have no entry.
    """

    encoding: Encoding
    final: Tensor
    groups: list[dict[str, list[int]]]


def position_groups(lm: LM, prompts: Sequence[Prompt]) -> Positions:
    """The position groups of filled prompts (facts or (template, subject) pairs), as in ROME figure 2."""
    pairs = as_pairs(prompts)
    encoding, first, last = find_spans(lm, pairs)
    _, final = find_positions(lm, pairs, "last")
    groups = []
    for a, b, end in zip(first.tolist(), last.tolist(), final.tolist(), strict=True):
        found = {
            "subject_first": [a] if a < b else [],
            "subject_middle": list(range(a + 1, b)),
            "subject_last": [b],
            "after": list(range(b + 1, end)),
            "last": [end] if end > b else [],
        }
        groups.append({name: columns for name, columns in found.items() if columns})
    return Positions(encoding, final, groups)


def module_names(lm: LM, kind: Kind, layers: Sequence[int] | None = None) -> list[str]:
    """Module paths of the blocks, MLPs or attentions of some layers (default all)."""
    if kind not in get_args(Kind):
        raise ConfigError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    name = {"block": lm.block_name, "mlp": lm.mlp_name, "attn": lm.attn_name}[kind]
    return [name(layer) for layer in (range(lm.n_layers) if layers is None else layers)]


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """The `window` layers around a layer, cut at the ends (ROME section 2.2 uses windows of 10 for MLPs)."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


@torch.no_grad()
def final_logits(
    lm: LM,
    batch: Encoding | Replay,
    final: Tensor,
    *,
    record: Sequence[str] = (),
    edit: Mapping[str, EditFn] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits after the last prompt token, (rows, vocabulary), and the outputs of recorded modules.

    The head is applied to that one position only.
    """
    top = lm.block_name(lm.n_layers - 1)
    with trace(lm.model, [*record, top], edit=edit, stop_early=True) as seen:
        run(lm, batch)
    return lm.head(pick(seen.output[top], final)), {name: seen.output[name] for name in record}


def put(values: Tensor, mask: Tensor, source: Tensor | None = None) -> EditFn:
    """An edit that replaces masked positions by given states.

    values: (rows, source tokens, width). mask: (rows, tokens) bool, positions to replace. source: (rows,
    tokens) column of `values` for each position (ignored where the mask is off); None takes the same column.
    """

    def edit(h: Tensor) -> Tensor:
        new = values.to(h.device, h.dtype)
        if source is not None:
            rows = torch.arange(len(new), device=h.device)[:, None]
            new = new[rows, source.to(h.device)]
        return torch.where(mask.to(h.device)[..., None], new, h)

    return edit


def first_answer_ids(lm: LM, pairs: Sequence[Pair]) -> Tensor:
    """First token of each answer as it follows its prompt, (n,). Raises RequestError as `split_tokens` does."""
    return torch.tensor([ids[start] for ids, start in split_tokens(lm, pairs)], device=lm.device())


def chunks(rows: int, tokens: int, tokens_per_batch: int) -> list[slice]:
    """Slices of equal-length rows under a token budget."""
    step = max(1, tokens_per_batch // max(tokens, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
