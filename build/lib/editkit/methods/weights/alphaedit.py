"""AlphaEdit (Fang et al. 2025): edits restricted to the null space of the second moment.

Per layer  Delta (S + K K^T + L2 I) P = R K^T P  on the directions P in which C0 has next to no energy. As the
Labyrinth shows (Proposition 3.2), what keeps long sequences exact is the history S, not P; `history=False` is
the ablation.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError
from ...linear.normal import Projector, alphaedit_update, null_projector
from ..base import register
from .accumulate import AccumulateConfig, AccumulateEditor


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(AccumulateConfig):
    """Options of AlphaEdit."""

    history: bool = option(True, "keep the keys of earlier edits in the solve", source="cache_c")
    threshold: float = option(
        0.02, "eigenvalues of C0 below it span the null space; absolute, so the rank depends on the model",
        source="nullspace_threshold", above=0,
    )  # fmt: skip
    ridge: float = option(10.0, "weight of ||Delta||^2", source="L2", low=0)
    lam: float = option(0.0, "weight of C0 kept inside the null space (0: dropped, as published)", low=0)


@register
class AlphaEdit(AccumulateEditor):
    """Null-space constrained editing, with history unless switched off."""

    name = "alphaedit"
    Config = AlphaEditConfig
    config: AlphaEditConfig

    def check(self) -> None:
        super().check()
        cfg = self.config
        if cfg.solver == "released" and (cfg.lam or not cfg.ridge):
            raise ConfigError(
                "alphaedit: solver='released' knows no lam and needs ridge > 0; use 'symmetric'"
            )
        for layer in cfg.layers:
            self.second_moment(layer)

    def reset_history(self) -> None:
        super().reset_history()
        self._projectors: dict[int, Projector] = getattr(self, "_projectors", {})

    def projector(self, layer: int) -> Projector:
        """P and its basis U (d, r); kept by the instance. Raises NumericsError if no eigenvalue is small
        enough.
        """
        if layer not in self._projectors:
            self._projectors[layer] = null_projector(self.second_moment(layer), self.config.threshold)
        return self._projectors[layer]

    def prior(self, layer: int) -> tuple[Tensor | float, Tensor]:
        cfg = self.config
        U = self.projector(layer).U
        if not cfg.lam:
            return torch.tensor(cfg.ridge, dtype=torch.float64, device=U.device), U
        C0 = self.second_moment(layer)
        return cfg.lam * C0 + cfg.ridge * torch.eye(len(C0), dtype=C0.dtype, device=C0.device), U

    def released(self, layer: int, K: Tensor, R: Tensor, S: Tensor | None, E: Tensor | None) -> Tensor:
        P = self.projector(layer)
        return alphaedit_update(K, R, P, S, self.config.ridge, form="released", dtype=torch.float32)
