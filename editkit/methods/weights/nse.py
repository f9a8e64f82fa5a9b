"""NSE, neuron-level sequential editing (Jiang et al. 2024).

Per layer only the neurons I (columns of W) that carry most of the batch's key mass are edited:

    Delta_I (lam C0 + S + K K^T)_II = [R K^T - E]_I,    zero elsewhere.

Targets are optimised on the original model, and facts whose state is still away from its target, but not
hopelessly, are edited again. As published S holds the keys of earlier batches and E is zero, which forgets
the gradient that restricted steps leave behind; `compensate=True` keeps it, and every step is then a
block-coordinate minimisation of the one-time objective.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError
from ...linear.nse import nse_step, select_neurons
from ...models.facts import Fact
from ..base import register
from ..delta import snapshot
from .accumulate import part
from .locate_then_edit import LocateConfig, LocateEditor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSEConfig(LocateConfig):
    """Options of NSE."""

    lam: float = option(15000.0, "weight of C0, in tokens", source="mom2_update_weight", above=0)
    neuron_threshold: float = option(
        0.8, "share of the key mass that the edited neurons carry", above=0, high=1
    )
    alpha: float = option(2.5, "a fact is edited (again) while ||z - h|| is above", source="alpha", low=0)
    upper_bound: float = option(50.0, "and below", source="upper_bound", above=0)
    passes: int = option(2, "most passes over the layers for one batch", source="max_iterations - 1", low=1)
    z_from: Literal["original", "current"] = option("original", "model on which targets are optimised")
    history: bool = option(True, "keep the keys of earlier edits in the solve", source="NSE code, cache_c")
    compensate: bool = option(
        False, "keep the gradient that restricted steps leave", source="Labyrinth section 4"
    )


@register
class NSE(LocateEditor):
    """Neuron-level sequential editing."""

    name = "nse"
    Config = NSEConfig
    config: NSEConfig

    def check(self) -> None:
        super().check()
        cfg = self.config
        if cfg.compensate and not cfg.history:
            raise ConfigError(
                "compensate=True needs history=True: the error is fed back into the accumulated solve"
            )
        if cfg.alpha >= cfg.upper_bound:
            raise ConfigError(f"alpha = {cfg.alpha} must be below upper_bound = {cfg.upper_bound}")
        for layer in cfg.layers:
            self.second_moment(layer)

    @property
    def remembers(self) -> bool:
        return True  # the original weights, for the targets

    def reset_history(self) -> None:
        self.S: dict[int, Tensor] = {}  # (d, d) sums of k k^T
        self.error: dict[int, Tensor | None] = {}  # E (m, d)

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        cfg = self.config
        Z = self._original_targets(facts)
        self._pairs: dict[int, dict[int, tuple[Tensor, Tensor]]] = {layer: {} for layer in cfg.layers}
        edited = []
        for number in range(cfg.passes):
            now = self.current(facts).to(Z.device)
            self.record(f"state_{number}", now)
            distance = (Z - now).norm(dim=0)
            active = ((distance > cfg.alpha) & (distance < cfg.upper_bound)).nonzero().flatten().tolist()
            edited.append(len(active))
            if not active:
                break
            self._pass(facts, active, Z, number)
        if cfg.history:
            self._remember(facts)
        return {"edited_per_pass": edited}

    def _original_targets(self, facts: list[Fact]) -> Tensor:
        if self.config.z_from == "current" or self._start is None:
            return self.targets(facts)
        now = snapshot(self.lm, self.parameter_names())
        self.lm.write(self._start)
        try:
            return self.targets(facts)
        finally:
            self.lm.write(now)

    def _pass(self, facts: list[Fact], active: list[int], Z: Tensor, number: int) -> None:
        cfg = self.config
        chosen = [facts[i] for i in active]
        for i, layer in enumerate(cfg.layers):
            K = self.keys(chosen, layer)
            now = self.current(chosen).to(Z.device)
            R = ((Z[:, active] - now) / (len(cfg.layers) - i)).to(K.device)
            place = self.solve_device(layer)
            W, K, R = self.matrix(layer).to(place), K.to(place), R.to(place)
            Delta = self._solve(layer, active, K, R, W)
            for name, value in (("K", K), ("curz", now), ("upd", Delta)):
                self.record(f"{name}_{number}_{layer}", value)
            self.set_matrix(layer, W + Delta)

    def _solve(self, layer: int, active: list[int], K: Tensor, R: Tensor, W: Tensor) -> Tensor:
        prior = self.config.lam * self.second_moment(layer)
        S = self.S.get(layer, torch.zeros_like(prior))
        neurons = select_neurons(K, self.config.neuron_threshold)
        if not self.config.compensate:
            return nse_step(K, R, prior + S + K @ K.T, neurons, consistent=False)[0]
        # A fact that comes again in a later pass replaces the pair it left in this batch.
        E, pairs = self.error.get(layer), self._pairs[layer]
        again = [pairs[i] for i in active if i in pairs]
        if again:
            K_old, V_old = (torch.stack(column, dim=1) for column in zip(*again, strict=True))
            S = S - K_old @ K_old.T
            E = E + (V_old - W @ K_old) @ K_old.T
        S = S + K @ K.T
        Delta, self.error[layer] = nse_step(K, R, prior + S, neurons, E)
        self.S[layer] = S
        pairs.update({i: (k, v) for i, k, v in zip(active, K.T, (W @ K + R).T, strict=True)})
        return Delta

    def _remember(self, facts: list[Fact]) -> None:
        """Keys of the batch on the edited model. With compensation those that were edited are in S already;
        the others enter with the value they have, a zero residual.
        """
        for layer in self.config.layers:
            new = [
                f for i, f in enumerate(facts) if not self.config.compensate or i not in self._pairs[layer]
            ]
            if new:
                K = self.keys(new, layer).to(self.solve_device(layer))
                self.record(f"Kpost_{layer}", K)
                G = K @ K.T
                self.S[layer] = self.S[layer] + G if layer in self.S else G

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"S.{layer}": S for layer, S in self.S.items()}
        return {}, tensors | {f"error.{layer}": E for layer, E in self.error.items() if E is not None}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, target in (("S.", self.S), ("error.", self.error)):
            target.update({int(k): v.to(self.solve_device(int(k))) for k, v in part(tensors, name).items()})
