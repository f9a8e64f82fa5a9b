"""DEFER: a gate and a linear predictor inside one layer (the SERAC-like baseline of Hartvigsen et al. 2023).

    p = sigmoid(w^T q + b),  v = A q + c,   q: the layer's input at the prompt's last token
    training:   output = p v + (1 - p) output, at every token
    inference:  output = v at every token if p >= threshold, else untouched

One gate and one predictor serve all edits and are trained without any negative example: after a few edits the
gate is open for everything.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.progress import bar
from ...locate.contexts import ContextTemplates
from ...locate.target_rows import encode_targets
from ...models.facts import Fact
from ...models.prompts import PromptState
from ..base import register
from .base import MemoryEditor
from .layer_pass import LayerPass, check_loss, module_path, widths

_NAMES = ("gate_weight", "gate_bias", "value_weight", "value_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEFERConfig(Config):
    """Options of DEFER; defaults are EasyEdit's for Llama-2."""

    layer: int = option(0, "block that carries the gate", source="inner_params", low=0)
    module: str = option(
        "", "linear module inside the block; empty: its down projection", source="inner_params"
    )
    lr: float = option(7e-5, "Adam's step size", source="edit_lr", above=0)
    steps: int = option(100, "Adam steps per edit", source="n_iter", low=1)
    loss_threshold: float = option(0.0, "stop below this loss (released: never)", low=0)
    threshold: float = option(
        0.5, "the gate is open from this probability on", source="threshold", low=0, high=1
    )
    query: Literal["prompt_last", "sequence_last"] = option(
        "prompt_last",
        "query token in training: the prompt's last, which is also that of inference, or the answer's last "
        "as released",
    )
    seed: int = option(0, "seed of the start values", low=0)


def gate(q: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Probability (b,) and predicted output (b, o) for queries (b, d)."""
    p = torch.sigmoid(q @ memory["gate_weight"].T + memory["gate_bias"])[:, 0]
    return p, q @ memory["value_weight"].T + memory["value_bias"]


@register
class DEFER(MemoryEditor):
    """A learned gate and a learned output, shared by all edits."""

    name = "defer"
    Config = DEFERConfig
    config: DEFERConfig

    def check(self) -> None:
        self.lm.check_layer(self.config.layer)
        module_path(self.lm, self.config.layer, self.config.module)

    def modules(self) -> list[str]:
        return [module_path(self.lm, self.config.layer, self.config.module)]

    def reset_memory(self) -> None:
        cfg = self.config
        d, o = widths(self.lm, cfg.layer, cfg.module)
        generator = torch.Generator().manual_seed(cfg.seed)
        shapes = {"gate_weight": (1, d), "gate_bias": (1,), "value_weight": (o, d), "value_bias": (o,)}
        bound = d**-0.5  # torch.nn.Linear's
        self.gate = {
            name: ((2 * torch.rand(shape, generator=generator) - 1) * bound).to(self.lm.device(cfg.layer))
            for name, shape in shapes.items()
        }
        self.trained = False

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"trained": self.trained}, self.gate

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        device = self.lm.device(self.config.layer)
        self.trained = values["trained"]
        self.gate = {name: tensors[name].to(device) for name in _NAMES}

    def route(self, x: Tensor, out: Tensor, state: PromptState) -> tuple[Tensor, Tensor] | None:
        """Predicted output (b, o) and whether the gate is open (b,)."""
        if not self.trained:
            return None
        p, value = gate(state.at_last(x).float(), self.gate)
        return value.to(out), p >= self.config.threshold

    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> Tensor | None:
        if state.route is None or not bool(state.route[1].any()):
            return None
        value, is_open = state.route
        return torch.where(is_open[:, None, None], value[:, None], out)

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        return {"losses": [self._write(fact) for fact in bar(facts, "DEFER", unit="edit")]}

    def _write(self, fact: Fact) -> list[float]:
        cfg = self.config
        rows = encode_targets(self.lm, [fact], ContextTemplates(), "last")
        if cfg.query == "sequence_last":
            last = int(rows.places[0][:, 1].max()) + 1
            rows.encoding["attention_mask"][0, last] = 1  # encoded, but masked: it predicts nothing
            rows.positions[0] = last
        encoding, columns, places = rows.take([0])
        upper = LayerPass(self.lm, encoding, cfg.layer, cfg.module)
        q = upper.x[0, columns].float()
        params = {name: value.clone().requires_grad_(True) for name, value in self.gate.items()}
        optimizer = torch.optim.Adam(params.values(), lr=cfg.lr)
        losses: list[float] = []
        for _ in range(cfg.steps):
            with torch.enable_grad():
                p, value = gate(q, params)
                mixed = p[:, None, None] * value[:, None]
                said = upper.log_probs(
                    places[:, 1:],
                    lambda own, mixed=mixed, p=p: (mixed + (1 - p)[:, None, None] * own).to(own.dtype),
                )
                loss = -said.mean()
            losses.append(check_loss("defer", loss, len(losses), cfg.lr))
            if losses[-1] < cfg.loss_threshold:
                break
            grads = torch.autograd.grad(loss, list(params.values()))
            for param, grad in zip(params.values(), grads, strict=True):
                param.grad = grad
            optimizer.step()
        self.gate = {name: value.detach() for name, value in params.items()}
        self.trained = True
        self.record("losses", torch.tensor(losses, dtype=torch.float64))
        for name, value in self.gate.items():
            self.record(name, value.clone())
        return [round(v, 6) for v in (losses[:1] + losses[-1:])]
