"""Merging of several edited copies of one weight (TIES; Yadav et al. 2023), as WISE merges its shards.

Task vectors D_j = W_j - W of n copies are (1) trimmed to their largest entries, (2) brought to one sign per
entry, that of the weighted sum, (3) averaged over the copies that have this sign. Without the sign step two
shards that disagree about an entry would cancel there and both lose their edits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...base.errors import ConfigError, NumericsError


def trim(delta: Tensor, density: float) -> Tensor:
    """The share `density` of entries with the largest magnitude, the others zero; floor(density * size) of
    them are kept.

    Raises ConfigError if nothing would be left.
    """
    if density >= 1:
        return delta
    keep = int(density * delta.numel())
    if keep < 1:
        raise ConfigError(f"density = {density} keeps none of {delta.numel()} entries; raise it")
    chosen = delta.abs().float().reshape(-1).topk(keep).indices
    mask = torch.zeros(delta.numel(), dtype=delta.dtype, device=delta.device)
    mask[chosen] = 1
    return delta * mask.view_as(delta)


def ties(
    base: Tensor, copies: Sequence[Tensor], density: float = 0.53, weights: Sequence[float] | None = None
) -> Tensor:
    """W + merged task vectors, in the shape and dtype of `base`.

    base:    the common origin W.   copies: edited weights W_j of the same shape.
    density: share of every task vector's entries that is kept (step 1).
    weights: one per copy, default 1/n each. An entry's value is the weighted mean over the copies that agree
             with the majority sign there; a sum of zero counts as positive. Where nobody is left the entry
             stays as in `base`.
    Raises ConfigError for an empty list or wrong weights, NumericsError for unequal shapes.
    """
    copies = list(copies)
    if not copies:
        raise ConfigError("nothing to merge: the list of edited weights is empty")
    weights = [1 / len(copies)] * len(copies) if weights is None else [float(w) for w in weights]
    if len(weights) != len(copies) or min(weights) <= 0:
        raise ConfigError(f"give one positive weight for each of the {len(copies)} copies, got {weights}")
    if any(c.shape != base.shape for c in copies):
        raise NumericsError(
            f"weights of shapes {[tuple(c.shape) for c in copies]} cannot be merged into {tuple(base.shape)}"
        )
    deltas = torch.stack([trim(c - base, density) for c in copies])
    share = torch.tensor(weights, dtype=deltas.dtype, device=deltas.device)
    share = share.view(-1, *[1] * base.ndim)
    weighted = deltas * share
    majority = (weighted.sum(0) >= 0).to(base.dtype) * 2 - 1
    agree = (weighted.sign() == majority).to(deltas.dtype)
    divisor = (share * agree).sum(0)
    divisor[divisor == 0] = 1
    return (base + (weighted * agree).sum(0) / divisor).to(base.dtype)
