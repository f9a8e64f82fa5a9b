"""The blocks below the first edited one, run once per prompt: their states do not depend on the edits.

Published settings edit the last six of 32 blocks and run all 32 for every prompt of every step. `StateMemory`
keeps the states that enter the first edited block; `entering` makes the model start from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...models.hooks import bypassed, hidden, trace
from ...models.hooks import entering as enter_block
from ...models.lm import LM
from .data import Pair, TupleBatch
from .sites import Site


def first_block(lm: LM, sites: Sequence[Site]) -> int:
    """Index of the first block that holds a site (0 if one lies outside the blocks)."""
    found = []
    for site in sites:
        inside = [i for i in range(lm.n_layers) if site.path.startswith(lm.block_name(i) + ".")]
        found.append(inside[0] if inside else 0)
    return min(found)


@contextmanager
def entering(lm: LM, block: int, states: Tensor) -> Iterator[LM]:
    """The model with the blocks before `block` replaced by their known result, states (rows, tokens, m).

    The batch has to be the one the states are of. Nothing is replaced for block 0.
    """
    if not block:
        yield lm
        return
    names = [lm.block_name(i) for i in range(block)]
    with (
        bypassed(lm.model, names, as_tuple=lm.spec.block_output == "tuple"),
        enter_block(lm.model, lm.block_name(block), states),
    ):
        yield lm


class StateMemory:
    """States that enter the first edited block, by (prompt, answer); valid for one state of the lower blocks."""

    def __init__(self, lm: LM, sites: Sequence[Site]) -> None:
        self.lm, self.block = lm, first_block(lm, sites)
        self._states: dict[Pair, Tensor] = {}

    def __len__(self) -> int:
        return len(self._states)

    def clear(self) -> None:
        """Forget everything: the model has changed."""
        self._states.clear()

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        return list(self._states.values())

    @torch.no_grad()
    def take(self, batch: TupleBatch) -> Tensor | None:
        """States (rows, width, m) of a batch; None if there is nothing to skip or the batch has no texts."""
        if not self.block or not batch.pairs:
            return None
        mask = batch.inputs["attention_mask"].bool()
        if any(pair not in self._states for pair in batch.pairs):
            name = self.lm.block_name(self.block - 1)
            with trace(self.lm.model, [name], stop_at=name) as seen:
                self.lm.model(**batch.inputs, use_cache=False)
            found = hidden(seen.output[name])
            for pair, row, real in zip(batch.pairs, found, mask.to(found.device), strict=True):
                self._states[pair] = row[real].clone()
        some = self._states[batch.pairs[0]]
        out = some.new_zeros(*mask.shape, some.shape[-1])
        for k, pair in enumerate(batch.pairs):
            out[k, mask[k].to(out.device)] = self._states[pair]
        return out
