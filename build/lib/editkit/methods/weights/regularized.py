"""Sequential editing under a general convex regulariser (Labyrinth Proposition 3.4).

One-time problem after t batches:  min_A  tr(A M0 A^T) + ||(W0 + A) K_1:t - V_1:t||^2 + rho(A).  The
sequential step is the difference of two consecutive one-time solutions; it is found directly, as the
minimiser of the accumulated objective shifted by the current total update. rho: entries (sparse, like RECT),
singular values (low rank, like PRUNE) or neurons (columns, like NSE).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import option
from ...linear.sequential import Regularizer, convex_step, l1, neuron_groups, nuclear
from ...models.facts import Fact
from ..base import register
from .accumulate import part
from .locate_then_edit import LayerwiseEditor, LocateConfig

_REGULARIZERS = {"entries": l1, "singular_values": nuclear, "neurons": neuron_groups}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegularizedConfig(LocateConfig):
    """Options of regularised sequential editing."""

    lam: float = option(15000.0, "weight of C0, in tokens", source="mom2_update_weight", above=0)
    ridge: float = option(
        1e-6, "multiple of the identity in the prior, for a solver that needs full rank", low=0
    )
    regularizer: Literal["entries", "singular_values", "neurons"] = option(
        "neurons", "what rho sums the sizes of"
    )
    weight: float = option(1.0, "weight of rho", low=0)
    tolerance: float = option(1e-9, "relative step at which the solver stops", above=0)
    max_iterations: int = option(50_000, "iterations of the proximal gradient solver", low=1)


@register
class Regularized(LayerwiseEditor):
    """MEMIT with history and a convex regulariser inside the accumulated objective."""

    name = "regularized"
    Config = RegularizedConfig
    config: RegularizedConfig

    def check(self) -> None:
        super().check()
        for layer in self.config.layers:
            self.second_moment(layer)

    @property
    def remembers(self) -> bool:
        return True

    def reset_history(self) -> None:
        # Per layer: S (d, d) sum of k k^T, B (m, d) sum of (v - W0 k) k^T, A (m, d) total update.
        self.problem: dict[int, dict[str, Tensor]] = {}

    def regularizer(self) -> Regularizer:
        return _REGULARIZERS[self.config.regularizer](self.config.weight)

    def step(self, facts: list[Fact], layer: int, K: Tensor, R: Tensor, W: Tensor) -> Tensor:
        cfg = self.config
        prior = cfg.lam * self.second_moment(layer)
        prior.diagonal().add_(cfg.ridge)
        zero = {"S": torch.zeros_like(prior), "B": torch.zeros_like(W), "A": torch.zeros_like(W)}
        old = self.problem.get(layer, zero)
        A, S = old["A"], old["S"] + K @ K.T
        B = old["B"] + (R + A @ K) @ K.T
        Delta = convex_step(
            A, prior + S, B, self.regularizer(), tol=cfg.tolerance, max_iter=cfg.max_iterations
        )
        self._broken = True
        self.problem[layer] = {"S": S, "B": B, "A": A + Delta}
        self.record(f"upd_{layer}", Delta)
        return Delta

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {f"{layer}.{k}": v for layer, parts in self.problem.items() for k, v in parts.items()}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for layer in sorted({int(name.split(".")[0]) for name in tensors}):
            device = self.solve_device(layer)
            self.problem[layer] = {k: v.to(device) for k, v in part(tensors, f"{layer}.").items()}
