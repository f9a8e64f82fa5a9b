"""The pipeline that locate-then-edit methods share (MEMIT algorithm 1).

    targets z at the last layer  ->  for each layer: keys, current state, residual  ->  solve  ->  write

A method supplies the solve, a few lines of `editkit.linear`; everything that touches the model is here.

Symbols: d key width, m value width, n facts; K (d, n), Z and R (m, n), W and Delta (m, d).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ConfigError
from ...locate.contexts import ContextTemplates, sample_contexts
from ...locate.keys import compute_keys, read_states
from ...locate.targets import TargetConfig, optimize_targets
from ...models.facts import Fact
from ...models.lookup import Where
from ..base import Editor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocateConfig(Config.with_fields("TargetOptions", TargetConfig, prefix="z_")):  # type: ignore[misc]
    """Options of every locate-then-edit method; z_* are those of `locate.targets.TargetConfig`."""

    layers: tuple[int, ...] = option((), "edited layers in order; targets belong to the last one", low=0)
    token: Where = option("subject_last", "lookup token", source="ROME section 2.2")  # noqa: RUF009
    n_contexts: int = option(
        5, "sampled context templates beside the bare prompt", source="MEMIT code", low=0
    )
    context_length: int = option(10, "tokens of a sampled context", source="MEMIT code", low=1)
    seed: int = option(0, "seed of the sampled contexts", low=0)
    tokens_per_batch: int = option(8192, "rows x longest row of a forward pass for keys", low=1)

    @property
    def targets(self) -> TargetConfig:
        """The z_* options."""
        return TargetConfig(
            **{f.name: getattr(self, f"z_{f.name}") for f in dataclasses.fields(TargetConfig)}
        )


class LocateEditor(Editor):
    """Base of ROME, MEMIT and their descendants: checks, contexts, keys and targets."""

    Config = LocateConfig
    config: LocateConfig

    def parameter_names(self) -> list[str]:
        return [self.lm.weight_name(layer) for layer in self.config.layers]

    def check(self) -> None:
        cfg = self.config
        if not cfg.layers:
            raise ConfigError(
                f"{self.name} needs the layers to edit; give e.g. layers=[4, 5, 6] "
                "(causal tracing shows which)"
            )
        for layer in cfg.layers:
            self.lm.check_layer(layer)
        if len(set(cfg.layers)) != len(cfg.layers):
            raise ConfigError(f"layers = {list(cfg.layers)} names a layer twice")
        if cfg.z_loss_layer is not None:
            self.lm.check_layer(cfg.z_loss_layer)

    def templates(self) -> ContextTemplates:
        """Context templates; sampled from the model at the first call, then kept and saved."""
        if self.contexts is None:
            cfg = self.config
            self.contexts = sample_contexts(self.lm, cfg.n_contexts, cfg.context_length, cfg.seed)
        return self.contexts

    def targets(self, facts: list[Fact]) -> Tensor:
        """Z (m, n): target block outputs at the last edited layer, on the current weights."""
        cfg = self.config
        found = optimize_targets(
            self.lm, facts, cfg.layers[-1], cfg.targets, contexts=self.templates(), token=cfg.token,
            cache_dir=self.cache_dir,
        )  # fmt: skip
        self.record("z", found.z)
        self.record("zloss", found.losses)
        return found.z

    def keys(self, facts: list[Fact], layer: int) -> Tensor:
        """K (d, n): keys on the current weights, mean inside each group of contexts, then over the groups."""
        cfg = self.config
        return compute_keys(
            self.lm,
            facts,
            layer,
            token=cfg.token,
            contexts=self.templates(),
            tokens_per_batch=cfg.tokens_per_batch,
        )

    def current(self, facts: list[Fact]) -> Tensor:
        """Block outputs (m, n) at the last edited layer, bare prompts, on the current weights."""
        cfg = self.config
        name = self.lm.block_name(cfg.layers[-1])
        states = read_states(
            self.lm, facts, outputs=[name], token=cfg.token, tokens_per_batch=cfg.tokens_per_batch
        )
        return states.output[name]


class LayerwiseEditor(LocateEditor):
    """MEMIT's loop: the residual at the last layer is spread over the layers that are still to come, and
    measured again after each layer has been written.
    """

    keeps_before: ClassVar[bool] = False  # whether `finish` reads the weights of before the batch

    @abstractmethod
    def step(self, facts: list[Fact], layer: int, K: Tensor, R: Tensor, W: Tensor) -> Tensor:
        """Delta (m, d) to add to W of this layer. K (d, n), R (m, n) this layer's share of the residual."""

    def share(self, residuals: list[Tensor], left: int) -> Tensor:
        """R (m, n), the part of the residual that this layer writes: an equal share for each layer to come.

        residuals: Z - h_L as measured before this layer (last) and before each layer already written;
        left: layers to come, this one included.
        """
        return residuals[-1] / left

    def finish(self, facts: list[Fact], before: dict[int, Tensor]) -> None:
        """Called when all layers are written; before: layer -> W (m, d) of before this batch, for
        methods with `keeps_before`.
        """

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        Z = self.targets(facts)
        before = {layer: self.matrix(layer) for layer in self.config.layers if self.keeps_before}
        return self.write_targets(facts, Z, before)

    def write_targets(self, facts: list[Fact], Z: Tensor, before: dict[int, Tensor]) -> dict[str, Any]:
        """One pass over the layers towards the targets Z (m, n)."""
        layers = self.config.layers
        residuals: list[Tensor] = []
        for i, layer in enumerate(layers):
            K = self.keys(facts, layer)
            now = self.current(facts).to(Z.device)
            residuals.append(Z - now)
            R = self.share(residuals, len(layers) - i).to(K.device)
            self.record(f"K_{layer}", K)
            self.record(f"curz_{layer}", now)
            self.record(f"resid_{layer}", R)
            place = self.solve_device(layer)
            W, K, R = self.matrix(layer).to(place), K.to(place), R.to(place)
            self.set_matrix(layer, W + self.step(facts, layer, K, R, W))
        self.finish(facts, before)
        gap = (Z - self.current(facts).to(Z.device)).norm(dim=0)
        return {"residual": [round(float(g), 6) for g in gap]}
