"""PRUNE (Ma et al. 2025): singular values of the update above the largest one of the weights are squashed.

As published once, for the total update of the whole stream: W = W_0 + squash(A_T) (`when="total"`; the model
carries that after every batch, while the stream itself goes on with the unsquashed weights). `when="step"`
squashes each batch's update against the current weights, which is what can be combined with compensation.

Released behaviour: `double_add=True` puts the squashed total on top of the already edited weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError
from ...linear.postprocess import prune_spectrum
from ...models.facts import Fact
from ..base import register
from .accumulate import part
from .postprocessed import PostprocessedConfig, PostprocessedEditor


@dataclasses.dataclass(frozen=True, kw_only=True)
class PRUNEConfig(PostprocessedConfig):
    """Options of PRUNE."""

    when: Literal["total", "step"] = option(
        "total", "squash the total update, or each batch's", source="PRUNE section 4"
    )
    curve: Literal["log", "log2", "log1.5", "log1.2", "linear"] = option(
        "log", "map of the singular values above the limit", source="PRUNE code"
    )
    double_add: bool = option(
        False, "add the squashed total to the edited instead of the original weights (released)"
    )


@register
class PRUNE(PostprocessedEditor):
    """MEMIT with a bounded spectrum."""

    name = "prune"
    Config = PRUNEConfig
    config: PRUNEConfig

    def check(self) -> None:
        super().check()
        cfg = self.config
        if cfg.when == "total" and (cfg.compensate or cfg.processing != "in_loop"):
            raise ConfigError(
                "prune: compensate and processing need when='step'; the total is squashed only once"
            )
        if cfg.when == "step" and cfg.double_add:
            raise ConfigError("prune: double_add needs when='total'")

    @property
    def remembers(self) -> bool:
        return self.config.history or self.config.when == "total"

    def reset_history(self) -> None:
        super().reset_history()
        self.unsquashed: dict[int, Tensor] = {}  # W (m, d) of the stream itself
        self._original: dict[int, Tensor] = {}

    def post(self, raw: Tensor, W: Tensor) -> Tensor:
        return raw if self.config.when == "total" else prune_spectrum(raw, W, self.config.curve)

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        for layer, W in self.unsquashed.items():
            self.set_matrix(layer, W)
        return super().write_facts(facts)

    def finish(self, facts: list[Fact], before: dict[int, Tensor]) -> None:
        super().finish(facts, before)
        if self.config.when == "step":
            return
        for layer in self.config.layers:
            W0 = self._original.setdefault(layer, before[layer])
            W = self.unsquashed[layer] = self.matrix(layer)
            squashed = prune_spectrum(W - W0, W0, self.config.curve)
            self.record(f"squashed_{layer}", squashed)
            self.set_matrix(layer, (W if self.config.double_add else W0) + squashed)

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().history()
        tensors |= {f"unsquashed.{layer}": W for layer, W in self.unsquashed.items()}
        tensors |= {f"original.{layer}": W for layer, W in self._original.items()}
        return values, tensors

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_history(values, tensors)
        for name, target in (("unsquashed.", self.unsquashed), ("original.", self._original)):
            target.update({int(k): W.to(self.lm.device(int(k))) for k, W in part(tensors, name).items()})
