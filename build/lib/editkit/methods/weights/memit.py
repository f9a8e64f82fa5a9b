"""MEMIT (Meng et al. 2023), and MEMIT with the history of its keys.

Per layer  Delta (lam C0 + S + K K^T) = R K^T  (MEMIT equation 14; S: keys of earlier batches, zero in MEMIT
itself).
lam is in tokens: C0 is a mean over tokens, so lam says how many tokens of text weigh as much as the batch.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...base.config import option
from ...linear.normal import memit_update
from ..base import register
from .accumulate import AccumulateConfig, AccumulateEditor


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEMITConfig(AccumulateConfig):
    """Options of MEMIT."""

    lam: float = option(
        15000.0, "weight of the second moment C0, in tokens", source="mom2_update_weight", above=0
    )
    ridge: float = option(0.0, "multiple of the identity added to the prior", low=0)


@register
class MEMIT(AccumulateEditor):
    """Mass-editing memory: one batch at a time, earlier batches forgotten."""

    name = "memit"
    Config = MEMITConfig
    config: MEMITConfig

    def check(self) -> None:
        super().check()
        for layer in self.config.layers:
            self.second_moment(layer)

    def prior(self, layer: int) -> tuple[Tensor, None]:
        M0 = self.config.lam * self.second_moment(layer)
        if self.config.ridge:
            M0.diagonal().add_(self.config.ridge)
        return M0, None

    def released(self, layer: int, K: Tensor, R: Tensor, S: Tensor | None, E: Tensor | None) -> Tensor:
        cfg = self.config
        return memit_update(K, R, self.second_moment(layer), cfg.lam, S, ridge=cfg.ridge, E=E)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEMITSeqConfig(MEMITConfig):
    """Options of MEMIT with history."""

    history: bool = option(True, "keep the keys of earlier edits in the solve", source="Labyrinth Lemma 3.1")


@register
class MEMITSeq(MEMIT):
    """MEMIT with history ("MEMIT-seq"): the sequence solves the one-time problem of all its batches."""

    name = "memit_seq"
    Config = MEMITSeqConfig
