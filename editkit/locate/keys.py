"""Keys and other states at the lookup token.

A key is the input of the MLP's down projection at the lookup token (ROME equation 3, MEMIT equation 19),
averaged over context templates. Matrices hold one fact per column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import overload

import torch
from torch import Tensor

from ..base.errors import NumericsError, RequestError
from ..models.batching import by_length
from ..models.facts import Fact
from ..models.hooks import pick, trace
from ..models.lm import LM
from ..models.lookup import PADDING, Where, find_positions
from .contexts import Average, ContextTemplates

Prompt = Fact | tuple[str, str]
TOKENS_PER_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class States:
    """Values at the lookup token: module name -> float64 tensor (width, n), one prompt per column."""

    input: dict[str, Tensor]
    output: dict[str, Tensor]


def as_pairs(prompts: Fact | Iterable[Prompt]) -> list[tuple[str, str]]:
    """(template, subject) of one fact or several; pairs pass through. Raises RequestError for anything else."""
    if isinstance(prompts, Fact):
        return [prompts.located]
    prompts = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    for i, p in enumerate(prompts):
        pair = isinstance(p, (tuple, list)) and len(p) == 2 and all(isinstance(x, str) for x in p)
        if not isinstance(p, Fact) and not pair:
            raise RequestError(f"prompt {i}: expected editkit.Fact or a (template, subject) pair, got {p!r}")
    return [p.located if isinstance(p, Fact) else tuple(p) for p in prompts]


@torch.no_grad()
def _iterate(
    lm: LM,
    pairs: Sequence[tuple[str, str]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    token: Where,
    tokens_per_batch: int,
    padding_side: PADDING,
) -> Iterator[tuple[list[int], dict[str, Tensor], dict[str, Tensor]]]:
    """Yield (rows, inputs, outputs) per batch: states (b, width) at the lookup token of these prompts."""
    encoding, positions = find_positions(lm, pairs, token, padding_side)
    for rows in by_length(encoding.lengths.tolist(), tokens_per_batch):
        batch, cut = encoding.take(rows)
        where = positions[rows] - cut
        names = [*inputs, *outputs]
        with trace(lm.model, names, inputs=bool(inputs), outputs=bool(outputs), stop_early=True) as seen:
            lm.forward(batch)
        yield (
            rows,
            {name: pick(seen.input[name], where) for name in inputs},
            {name: pick(seen.output[name], where) for name in outputs},
        )


def _check_finite(states: dict[str, Tensor], what: str) -> None:
    for name, value in states.items():
        if not torch.isfinite(value).all():
            raise NumericsError(
                f"the {what} of {name} has NaN or Inf at a lookup token; "
                "check that the model's weights are finite and try float32"
            )


def read_states(
    lm: LM,
    prompts: Sequence[Prompt],
    *,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    token: Where = "subject_last",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    padding_side: PADDING = "right",
) -> States:
    """Inputs and outputs of named modules at the lookup token of each prompt (no context templates).

    prompts: facts or (template, subject) pairs. inputs, outputs: module paths, see `LM.down_name`,
    `LM.mlp_name`, `LM.block_name`. One pass serves all modules and ends after the last of them.
    Returns float64 tensors (width, n). Raises RequestError, ModelError, NumericsError.
    """
    pairs = as_pairs(prompts)
    if not pairs:
        raise RequestError("no prompts to read states from: the list is empty")
    if not inputs and not outputs:
        raise RequestError("name at least one module in inputs or outputs")
    found_in: dict[str, list[Tensor]] = {name: [] for name in inputs}
    found_out: dict[str, list[Tensor]] = {name: [] for name in outputs}
    order: list[int] = []
    for rows, values_in, values_out in _iterate(
        lm, pairs, inputs, outputs, token, tokens_per_batch, padding_side
    ):
        order += rows
        for found, values in ((found_in, values_in), (found_out, values_out)):
            for name, value in values.items():
                found[name].append(value.double())
    back = torch.tensor(order).argsort()  # batches are sorted by length; put the prompts back in their order

    def collect(found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.cat(parts)[back.to(parts[0].device)].T.contiguous() for name, parts in found.items()
        }

    states = States(collect(found_in), collect(found_out))
    _check_finite(states.input, "input")
    _check_finite(states.output, "output")
    return states


@overload
def compute_keys(lm: LM, facts: Sequence[Prompt], layers: int, **options) -> Tensor: ...
@overload
def compute_keys(lm: LM, facts: Sequence[Prompt], layers: Sequence[int], **options) -> dict[int, Tensor]: ...
def compute_keys(
    lm: LM,
    facts: Sequence[Prompt],
    layers: int | Sequence[int],
    *,
    token: Where = "subject_last",
    contexts: ContextTemplates | Sequence[str | Sequence[str]] | None = None,
    average: Average = "groups",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    padding_side: PADDING = "right",
) -> Tensor | dict[int, Tensor]:
    """Keys K of shape (d, n), float64, one fact per column; for a list of layers a dict layer -> K.

    facts:    facts or (template, subject) pairs.
    contexts: templates around the edit prompt; None is the bare prompt.
    average:  "groups" takes the mean inside each group of contexts, then the mean of the groups (MEMIT);
              "flat" the mean over all contexts (ROME).
    All layers are read in one pass on the current weights; methods that edit layer after layer call this
    again before each layer. Raises RequestError, ModelError, NumericsError.
    """
    pairs = as_pairs(facts)
    if not pairs:
        raise RequestError("no facts to compute keys for: the list is empty")
    several = not isinstance(layers, Integral)
    names = {layer: lm.down_name(layer) for layer in (layers if several else [layers])}
    if not names:
        raise RequestError("no layers given; name at least one layer")
    contexts = ContextTemplates.of(contexts)
    weights = torch.tensor(contexts.weights(average), dtype=torch.float64)
    prompts = [(filled, subject) for template, subject in pairs for filled in contexts.fill(template)]
    per_fact = len(contexts.flat)
    K = {
        layer: torch.zeros(
            len(pairs), lm.weight_shape(layer)[1], dtype=torch.float64, device=lm.device(layer)
        )
        for layer in names
    }
    for rows, values, _ in _iterate(
        lm, prompts, list(names.values()), (), token, tokens_per_batch, padding_side
    ):
        index = torch.tensor(rows)
        for layer, name in names.items():
            key = values[name].double()
            weight = weights[index % per_fact].to(key.device)[:, None]
            K[layer].index_add_(0, (index // per_fact).to(key.device), weight * key)
    result = {layer: value.T.contiguous() for layer, value in K.items()}
    _check_finite({names[layer]: value for layer, value in result.items()}, "input")
    return result if several else result[layers]
