"""GRACE (Hartvigsen et al. 2023): a codebook beside one layer, found by the last prompt token.

The input q of a layer at the prompt's last token is the query. If it lies within the radius of its nearest
key, the layer's output at that token is replaced by the key's value, a vector trained for the answer; the
weights stay as they are. How keys are made, split and widened is in `memory.codebook`.

The radius belongs to the activations: where distances of rephrases are many times `radius` (it is 1 as released), an
edit is found by its own wording only; where they are not, generalisation comes with it (book, page "Questions").
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ConfigError
from ...base.progress import bar
from ...locate.contexts import ContextTemplates
from ...locate.target_rows import encode_targets
from ...models.facts import Fact
from ...models.prompts import PromptState
from ..base import register
from .base import MemoryEditor
from .codebook import Codebook, Label
from .layer_pass import LayerPass, check_loss, module_path, widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRACEConfig(Config):
    """Options of GRACE; defaults are EasyEdit's for Llama-2."""

    layer: int = option(0, "block that carries the codebook", source="inner_params", low=0)
    module: str = option(
        "", "linear module inside the block; empty: its down projection", source="inner_params"
    )
    radius: float = option(1.0, "eps_init, radius of a new key", source="eps", above=0)
    lr: float = option(1.0, "Adam's step size on the value", source="edit_lr", above=0)
    steps: int = option(50, "Adam steps per edit", source="n_iter", low=1)
    loss_threshold: float = option(0.0, "stop below this loss (released: never)", low=0)
    value_init: Literal["cold", "warm"] = option(
        "cold", "start of a value: uniform in [0, 1), or the layer's own output", source="val_init"
    )
    replacement: Literal["last", "prompt", "all"] = option(
        "last", "tokens whose output becomes the value: the prompt's last one, those before it, or all",
        source="replacement",
    )  # fmt: skip
    expand: Literal["coverage", "moving_average"] = option(
        "coverage", "how a key widens for the same answer", source="eps_expand"
    )
    match: Literal["answer", "released"] = option(
        "answer", "when two edits have the same answer: equal tokens, or as released (see memory.codebook)"
    )
    seed: int = option(0, "seed of cold values", low=0)


@register
class GRACE(MemoryEditor):
    """One value vector per edit, found by exact wording."""

    name = "grace"
    Config = GRACEConfig
    config: GRACEConfig
    book: Codebook

    def check(self) -> None:
        self.lm.check_layer(self.config.layer)
        module_path(self.lm, self.config.layer, self.config.module)

    def modules(self) -> list[str]:
        return [module_path(self.lm, self.config.layer, self.config.module)]

    def reset_memory(self) -> None:
        cfg = self.config
        d, o = widths(self.lm, cfg.layer, cfg.module)
        self.book = Codebook(d, o, cfg.radius, cfg.expand, cfg.match).to(self.lm.device(cfg.layer))

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        labels, tensors = self.book.state()
        return {"labels": labels}, tensors

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.book.load_state(values["labels"], tensors)

    # --- reading --------------------------------------------------------------------------------------------

    def route(self, x: Tensor, out: Tensor, state: PromptState) -> tuple[Tensor, Tensor] | None:
        """Value (b, o) of the nearest key and whether it is used (b,)."""
        if not len(self.book):
            return None
        nearest, _, hit = self.book.find(state.at_last(x))
        return self.book.values[nearest].to(out), hit.to(out.device)

    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> Tensor | None:
        if state.route is None or not bool(state.route[1].any()):
            return None
        value, hit = state.route
        if state.prefill:
            where = self._where(state.last, state.real)
        elif self.config.replacement == "all":
            where = state.real
        else:
            return None  # the value stands at the prompt; answers see it through attention
        return torch.where((where.to(hit.device) & hit[:, None])[..., None], value[:, None], out)

    def _where(self, last: Tensor, real: Tensor) -> Tensor:
        """Tokens (b, t) whose output is replaced. last: (b,) column of the prompts' last tokens."""
        columns = torch.arange(real.shape[1], device=real.device)
        if self.config.replacement == "last":
            return columns == last[:, None]
        return real & (columns < last[:, None]) if self.config.replacement == "prompt" else real

    # --- editing --------------------------------------------------------------------------------------------

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        done = []
        for fact in bar(facts, "GRACE", unit="edit"):
            done.append(self._write(fact))
        return {"places": [place for place, _ in done], "losses": [losses for _, losses in done]}

    def initial_value(self, out: Tensor) -> Tensor:
        """Start value (o,) of the next entry; out (o,): the layer's own output at the key token."""
        if self.config.value_init == "warm":
            return out.clone()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + len(self.book))
        return torch.rand(len(out), generator=generator).to(out.device)

    def _write(self, fact: Fact) -> tuple[str, list[float]]:
        cfg = self.config
        encoding, columns, places = encode_targets(self.lm, [fact], ContextTemplates(), "last").take([0])
        column = int(columns[0])
        if cfg.replacement == "prompt" and column == 0:
            raise ConfigError(f"replacement='prompt' needs a prompt of two tokens or more, got {fact.text!r}")
        upper = LayerPass(self.lm, encoding, cfg.layer, cfg.module)
        query, out = upper.x[0, column], upper.out
        prompt = tuple(encoding.input_ids[0, : column + 1].tolist())
        label = Label(tuple(places[:, 3].tolist()), column + 1, prompt)
        index, place = self.book.place(query, self.initial_value(out[0, column].float()), label)
        value = self.book.values[index].clone().requires_grad_(True)
        hit = bool(self.book.find(query[None])[2][0])
        where = self._where(columns, torch.ones_like(encoding.attention_mask, dtype=torch.bool))[..., None]
        optimizer = torch.optim.Adam([value], lr=cfg.lr)
        losses: list[float] = []
        # A key that a released split has left without a radius is never read: nothing to train then.
        for _ in range(cfg.steps if hit else 0):
            with torch.enable_grad():
                said = upper.log_probs(places[:, 1:], lambda own: torch.where(where, value.to(own), own))
                loss = -said.mean()
            losses.append(check_loss("grace", loss, len(losses), cfg.lr))
            if losses[-1] < cfg.loss_threshold:
                break
            value.grad = torch.autograd.grad(loss, value)[0]
            optimizer.step()
        self.book.values[index] = value.detach()
        self.record("losses", torch.tensor(losses, dtype=torch.float64))
        self.record("chosen", torch.tensor([index]))
        for name, tensor in self.book.state()[1].items():
            self.record(name, tensor.clone())
        return place, [round(v, 6) for v in (losses[:1] + losses[-1:])]
