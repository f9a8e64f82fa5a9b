"""Sequential editing as one least-squares problem: a prior and a history (Labyrinth section 3).

Per layer the editors here solve  Delta C_t = R K^T - E,  C_t = M_0 + S_{t-1} + K K^T, where

    M_0  is the method's prior (MEMIT: lam C0; AlphaEdit: a ridge on the null space of C0),
    S    are the keys of earlier batches if `history` is on, else zero: every batch starts from the prior,
    E    is zero, or the feedback of methods that do not write Delta as solved (`postprocessed`).

With history the sequence of batches equals the one-time edit of all facts, exactly for a single layer with
fixed keys and targets (book, derivation of the Labyrinth).
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError, RequestError
from ...linear.conflicts import EditStream
from ...linear.engines import make_engine
from ...linear.spread import spread
from ...models.facts import Fact
from .locate_then_edit import LayerwiseEditor, LocateConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccumulateConfig(LocateConfig):
    """Options of the methods whose solve is an accumulated least-squares step."""

    history: bool = option(False, "keep the keys of earlier edits in the solve", source="Labyrinth Lemma 3.1")
    engine: Literal["direct", "inverse", "cholesky", "keys"] = option(
        "direct",
        "how the accumulated Gram matrix is kept solvable (linear.recursive); same result, other cost",
    )
    conflicts: Literal["append", "replace", "refuse"] = option(
        "append",
        "a fact (relation or prompt, subject) written before: keep both values (as published), retire the "
        "old one, or raise RequestError; the last two store d + m numbers per fact and layer",
        source="Labyrinth Proposition 3.5",
    )  # fmt: skip
    spread: Literal["linear_decay", "uniform", "consecutive", "gram_schmidt"] = option(
        "linear_decay",
        "how the residual, measured before each layer, is divided among the layers: an equal share for each "
        "to come (as published), all of it, or what of it is orthogonal to the residual before the previous "
        "layer, or to those of all previous layers (linear.spread)",
        source="MEMIT algorithm 1; HORSE",
    )
    spread_by: Literal["layer", "fact"] = option(
        "layer", "one projection coefficient for all facts of a layer, or one per fact", source="HORSE code"
    )
    solver: Literal["symmetric", "released"] = option(
        "symmetric",
        "float64 throughout, or as released: history in float32, and AlphaEdit's non-symmetric float32 solve",
    )  # fmt: skip


def fact_id(fact: Fact) -> str:
    """What makes two requests the same fact: relation (or prompt) and subject."""
    return json.dumps([fact.relation or fact.prompt, fact.subject], ensure_ascii=False)


class AccumulateEditor(LayerwiseEditor):
    """Base of MEMIT, AlphaEdit, RECT and PRUNE, with and without history."""

    Config = AccumulateConfig
    config: AccumulateConfig

    @abstractmethod
    def prior(self, layer: int) -> tuple[Tensor | float, Tensor | None]:
        """M_0 as a (d, d) matrix or a scalar ridge, and an orthonormal basis (d, r) of allowed updates or
        None.
        """

    @abstractmethod
    def released(self, layer: int, K: Tensor, R: Tensor, S: Tensor | None, E: Tensor | None) -> Tensor:
        """Delta (m, d) as released; S (d, d) is the float32 sum of k k^T over earlier facts, or None."""

    def check(self) -> None:
        super().check()
        cfg = self.config
        if cfg.solver == "released" and (cfg.conflicts != "append" or cfg.engine != "direct"):
            raise ConfigError("solver='released' knows no conflicts and no other engine; use 'symmetric'")
        if cfg.conflicts != "append" and not cfg.history:
            raise ConfigError(
                f"conflicts={cfg.conflicts!r} needs history=True: without it nothing is remembered"
            )
        if cfg.history and list(cfg.layers) != sorted(cfg.layers):
            raise ConfigError(
                f"layers = {list(cfg.layers)}: with history they must ascend, else stored keys of a layer "
                "change when a lower one is written after it"
            )

    @property
    def remembers(self) -> bool:
        return self.config.history

    def reset_history(self) -> None:
        self.streams: dict[int, EditStream] = {}
        self.caches: dict[int, Tensor] = {}  # float32 sums of k k^T, of the released solver only

    def stream(self, layer: int) -> EditStream:
        """The layer's accumulated constraints; a fresh one at every call if history is off."""
        if self.config.history and layer in self.streams:
            return self.streams[layer]
        M0, basis = self.prior(layer)
        d = self.lm.weight_shape(layer)[1]
        tag = f"layer {layer} of {list(self.config.layers)}"
        engine = make_engine(self.config.engine, M0, d, basis=basis, tag=tag)
        stream = EditStream(engine, self.config.conflicts)
        if self.config.history:
            self.streams[layer] = stream
        return stream

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        policy = self.config.conflicts
        if policy != "append":
            stream = self.streams.get(self.config.layers[0])
            written = stream.pairs if stream is not None and policy == "refuse" else {}
            first: dict[str, int] = {}
            for i, name in enumerate(map(fact_id, facts)):
                if first.setdefault(name, i) != i:
                    raise RequestError(
                        f"facts {first[name]} and {i} are the same fact, {name}; keep the latest, or edit "
                        "them one after the other"
                    )
                if name in written:
                    raise RequestError(
                        f"fact {i}, {name}, is already written; drop it, or use conflicts='replace'"
                    )
        return super().write_facts(facts)

    def solve(
        self, facts: list[Fact], layer: int, K: Tensor, R: Tensor, W: Tensor, E: Tensor | None = None
    ) -> Tensor:
        """Delta (m, d); the batch joins the history. E (m, d) is subtracted from the right-hand side."""
        self._broken = self.remembers
        if self.config.solver == "released":
            S = self.caches.get(layer)
            Delta = self.released(layer, K, R, S, E)
            if self.config.history:
                G = K.float() @ K.float().T
                self.caches[layer] = G if S is None else S + G
            return Delta
        stream = self.stream(layer)
        if self.config.conflicts == "append":
            return stream.engine.add(K, R, E)
        return stream.write([fact_id(f) for f in facts], K, R + W @ K, W, E)

    def times(self, layer: int, X: Tensor) -> Tensor:
        """X C_t (m, d) for X (m, d)."""
        if self.config.solver == "symmetric":
            return self.stream(layer).engine.times(X)
        M0, _ = self.prior(layer)
        return X @ M0 + X @ self.caches[layer].double()

    def share(self, residuals: list[Tensor], left: int) -> Tensor:
        cfg = self.config
        if cfg.spread == "linear_decay":
            return super().share(residuals, left)
        return spread(residuals, cfg.spread, axis=0 if cfg.spread_by == "fact" else None)[-1]

    def step(self, facts: list[Fact], layer: int, K: Tensor, R: Tensor, W: Tensor) -> Tensor:
        Delta = self.solve(facts, layer, K, R, W)
        self.record(f"upd_{layer}", Delta)
        return Delta

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for layer, stream in self.streams.items():
            state = stream.state_dict()
            values[str(layer)] = {
                "meta": state["engine"]["meta"],
                "ids": state["ids"],
                "policy": state["policy"],
            }
            tensors |= {f"engine.{layer}.{k}": v for k, v in state["engine"]["tensors"].items()}
            tensors |= {f"pairs.{layer}.{k}": state[k] for k in ("K", "V") if k in state}
        return values, tensors | {f"cache.{layer}": S for layer, S in self.caches.items()}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key, saved in values.items():
            layer = int(key)
            pairs = {k: v.to(self.solve_device(layer)) for k, v in part(tensors, f"pairs.{layer}.").items()}
            engine = {"meta": saved["meta"], "tensors": part(tensors, f"engine.{layer}.")}
            self.stream(layer).load_state_dict({"engine": engine, "ids": saved["ids"], **pairs})
        self.caches = {int(k): S.to(self.solve_device(int(k))) for k, S in part(tensors, "cache.").items()}

    def gram(self, layer: int) -> Tensor:
        """C_t (d, d) of a layer's history, on the basis if there is one (U U^T C_t U U^T); M_0 before any
        edit.
        """
        engine = self.stream(layer).engine
        return engine.times(torch.eye(engine.d, dtype=torch.float64, device=engine.device))


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
