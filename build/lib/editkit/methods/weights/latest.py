"""Memorize-the-latest (Labyrinth section 3): only the newest batch and general knowledge are in force.

Full:        Delta (lam C0 + ridge I + K K^T) = R K^T - lam A C0,   A the sum of all earlier updates
Simplified:  Delta (ridge I + K K^T) = R K^T                        (C0 dropped as if C0 P = 0 held exactly)

optionally restricted to the null space of C0. The paper's falsification experiment: if the null-space
projection were what keeps AlphaEdit stable, the simplified form would be as good as the full one; it
collapses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError
from ...linear.normal import Projector, null_projector
from ...linear.sequential import latest_update
from ...models.facts import Fact
from ..base import register
from .accumulate import part
from .locate_then_edit import LayerwiseEditor, LocateConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatestConfig(LocateConfig):
    """Options of memorize-the-latest."""

    lam: float = option(15000.0, "weight of C0, in tokens", source="mom2_update_weight", above=0)
    ridge: float = option(0.0, "weight of ||Delta||^2", low=0)
    simplified: bool = option(False, "drop the terms in C0 (needs a threshold or a ridge)")
    threshold: float | None = option(
        None,
        "edit only directions of C0 with an eigenvalue below; None: all",
        source="nullspace_threshold",
        above=0,
    )


@register
class MemorizeLatest(LayerwiseEditor):
    """Forgets earlier facts on purpose, and stays anchored at the original weights (unless simplified)."""

    name = "memorize_latest"
    Config = LatestConfig
    config: LatestConfig

    def check(self) -> None:
        super().check()
        cfg = self.config
        if cfg.simplified and cfg.threshold is None and not cfg.ridge:
            raise ConfigError(
                "memorize_latest: simplified=True leaves no prior; give a threshold (null space) or ridge"
            )
        for layer in cfg.layers:
            self.second_moment(layer)

    @property
    def remembers(self) -> bool:
        return True

    def reset_history(self) -> None:
        self.total: dict[int, Tensor] = {}  # A (m, d), sum of all updates
        self._projectors: dict[int, Projector] = getattr(self, "_projectors", {})

    def step(self, facts: list[Fact], layer: int, K: Tensor, R: Tensor, W: Tensor) -> Tensor:
        cfg, C0 = self.config, self.second_moment(layer)
        if cfg.threshold is not None and layer not in self._projectors:
            self._projectors[layer] = null_projector(C0, cfg.threshold)
        A = self.total.get(layer)
        Delta = latest_update(
            K,
            R,
            C0,
            cfg.lam,
            A,
            projector=self._projectors.get(layer),
            ridge=cfg.ridge,
            simplified=cfg.simplified,
        )
        self._broken = True
        self.total[layer] = Delta if A is None else A + Delta
        self.record(f"upd_{layer}", Delta)
        return Delta

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {f"total.{layer}": A for layer, A in self.total.items()}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.total = {int(k): A.to(self.solve_device(int(k))) for k, A in part(tensors, "total.").items()}
