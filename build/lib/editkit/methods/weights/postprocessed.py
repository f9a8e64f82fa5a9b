"""Post-processed updates: what RECT and PRUNE share.

A solved Delta is thinned out before it is written, so part of what it says is lost; with `compensate` the
lost part is fed back into the next solve (Labyrinth Algorithm 1), without it every step loses for good.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, Literal

from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError
from ...models.facts import Fact
from .accumulate import part
from .memit import MEMIT, MEMITConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostprocessedConfig(MEMITConfig):
    """Options of methods that post-process MEMIT's update."""

    compensate: bool = option(False, "feed the error of the last step back", source="Labyrinth Algorithm 1")
    processing: Literal["in_loop", "after_loop"] = option(
        "in_loop",
        "write the processed update of a layer before the next layer is measured, or only when all layers "
        "are solved, the later ones on the unprocessed earlier ones, as released"
    )  # fmt: skip


class PostprocessedEditor(MEMIT):
    """MEMIT whose update is processed by `post` before it is written.

    raw C_t = R K^T - E_{t-1},    W <- W + Q(raw),    E_t = (Q(raw) - raw) C_t
    """

    Config = PostprocessedConfig
    config: PostprocessedConfig
    keeps_before = True

    @abstractmethod
    def post(self, raw: Tensor, W: Tensor) -> Tensor:
        """Q(raw): what is written instead of the solved update (m, d); W (m, d) are the weights before."""

    def check(self) -> None:
        super().check()
        if self.config.compensate and not self.config.history:
            raise ConfigError(
                "compensate=True needs history=True: the error is fed back into the accumulated solve"
            )

    def reset_history(self) -> None:
        super().reset_history()
        self.error: dict[int, Tensor] = {}  # E (m, d) per layer
        self._pending: dict[int, Tensor] = {}

    def step(self, facts: list[Fact], layer: int, K: Tensor, R: Tensor, W: Tensor) -> Tensor:
        raw = self.solve(facts, layer, K, R, W, self.error.get(layer))
        written = self.post(raw, W)
        self.record(f"upd_{layer}", raw)
        self.record(f"written_{layer}", written)
        if self.config.compensate:
            self.error[layer] = self.times(layer, written - raw)
        if self.config.processing == "in_loop":
            return written
        self._pending[layer] = written
        return raw

    def finish(self, facts: list[Fact], before: dict[int, Tensor]) -> None:
        for layer, written in self._pending.items():
            self.set_matrix(layer, before[layer].to(written.device) + written)
        self._pending = {}

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().history()
        return values, tensors | {f"error.{layer}": E for layer, E in self.error.items()}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_history(values, tensors)
        self.error = {int(k): E.to(self.solve_device(int(k))) for k, E in part(tensors, "error.").items()}
