"""ROME (Meng et al. 2022): one fact, one layer, one rank-one update.

    u = C^{-1} k / ||C^{-1} k||,    W <- W + (v - W k) u^T / (k . u),    so that W k = v  (equation 2)

k is the mean key over context templates, v the MLP output that makes the model say the new object. Facts of a
batch are written one after the other, each on the weights the former ones left. Released behaviour that
differs from the paper: `key="released"` takes u from the mean key but imposes v at the bare prompt's key
(cause of model collapse; the paper's form is what R-ROME restored).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError
from ...base.progress import bar
from ...linear.normal import rome_direction, rome_update
from ...linear.system import Factor, as_gram, factorize
from ...locate.contexts import ContextTemplates
from ...locate.keys import compute_keys
from ...locate.targets import TargetResult, optimize_targets
from ...models.facts import Fact
from ...models.hooks import submodule
from ..base import register
from .locate_then_edit import LocateConfig, LocateEditor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ROMEConfig(LocateConfig):
    """Options of ROME."""

    z_clamp_factor: float | None = option(
        4.0, "longest ||delta|| in units of ||m||", source="clamp_norm_factor", above=0
    )
    n_contexts: int = option(
        20, "sampled context templates beside the bare prompt", source="ROME code", low=0
    )
    whiten: bool = option(True, "whiten the key with C0 (else u = k / ||k||)", source="mom2_adjustment")
    key: Literal["mean", "released"] = option(
        "mean", "key at which v is imposed: the mean over contexts, or the bare prompt's as released"
    )


@register
class ROME(LocateEditor):
    """Rank-one model editing."""

    name = "rome"
    Config = ROMEConfig
    config: ROMEConfig

    def check(self) -> None:
        super().check()
        if len(self.config.layers) != 1:
            raise ConfigError(
                f"ROME edits one layer, got layers = {list(self.config.layers)}; choose one, or use memit"
            )
        if self.config.whiten:
            self.second_moment(self.config.layers[0])

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        for fact in bar(facts, f"ROME, {len(facts)} facts"):
            self.write_fact(fact)
        return {}

    def value(self, fact: Fact) -> TargetResult:
        """The MLP output v (m, 1) that makes the model say the new object, on the current weights."""
        cfg = self.config
        return optimize_targets(
            self.lm, [fact], cfg.layers[0], cfg.targets, contexts=self.templates(), token=cfg.token,
            module="mlp", cache_dir=self.cache_dir,
        )  # fmt: skip

    def key(self, fact: Fact, contexts: ContextTemplates | None) -> Tensor:
        """Mean key (d,) over context templates, or that of the bare prompt, on the current weights."""
        cfg = self.config
        return compute_keys(
            self.lm, [fact], cfg.layers[0], token=cfg.token, contexts=contexts, average="flat",
            tokens_per_batch=cfg.tokens_per_batch,
        )[:, 0]  # fmt: skip

    def direction(self, k: Tensor) -> Tensor:
        """u (d,) of a key; the second moment is factorised once and serves all facts."""
        if not self.config.whiten:
            return rome_direction(None, k)
        if self._factor is None:
            self._factor = factorize(as_gram(self.second_moment(self.config.layers[0]), "C"), "C")
        return rome_direction(self._factor, k.to(self.solve_device(self.config.layers[0]))).to(k.device)

    def reset_history(self) -> None:
        self._factor: Factor | None = None

    def write_fact(self, fact: Fact) -> None:
        cfg, lm, layer = self.config, self.lm, self.config.layers[0]
        mean = self.key(fact, self.templates())
        u = self.direction(mean)
        found = self.value(fact)
        v = found.z[:, 0]
        k = mean if cfg.key == "mean" else self.key(fact, None)
        # The MLP's output is W k + b: what is left for W k is v - b.
        bias = getattr(submodule(lm.model, lm.down_name(layer)), "bias", None)
        b = torch.zeros_like(v) if bias is None else bias.detach().to(v)
        W = self.matrix(layer)
        Delta = rome_update(W, k, v - b, u)
        recorded = {"key": mean, "u": u, "v": v, "losses": found.losses[0], "imposed_key": k, "upd": Delta}
        for name, value in recorded.items():
            self.record(name, value)
        self.set_matrix(layer, W + Delta)
