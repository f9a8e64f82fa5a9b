"""Fine-tuning of a few matrices on the edit prompts (FT-L of the ROME and MEMIT papers, FT-M of EasyEdit).

objective "target":       FT-M, cross entropy of the target's tokens, teacher-forced.
objective "prompt_last":  FT-L as released: all target tokens are scored at the last prompt position, so the
                          model is taught a bag of tokens; right for targets of one token only.
`limit` is FT-L's constraint: after every step the weights are clamped to W0 +- limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ConfigError, NumericsError
from ...base.progress import bar
from ...locate.contexts import ContextTemplates
from ...locate.target_rows import encode_targets
from ...models.answers import log_probs_of
from ...models.batching import Encoding
from ...models.facts import Fact
from ...models.hooks import frozen, trace
from ...models.lm import LM
from ..base import Editor, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class FTConfig(Config):
    """Options of fine-tuning."""

    layers: tuple[int, ...] = option((), "layers whose down projection is trained", low=0)
    objective: Literal["target", "prompt_last"] = option(
        "target",
        "FT-M (target tokens, teacher-forced) or FT-L as released (all at the last prompt position)",
        source="EasyEdit objective_optimization",
    )  # fmt: skip
    lr: float = option(5e-4, "Adam's step size", source="MEMIT code", above=0)
    steps: int = option(25, "passes over the facts", source="num_steps", low=1)
    weight_decay: float = option(0.0, "Adam's L2 penalty", low=0)
    limit: float | None = option(
        None, "largest change of an entry (FT-L); None: none", source="norm_constraint", above=0
    )
    batch_size: int = option(64, "facts per step", source="batch_size", low=1)
    loss_threshold: float = option(
        0.01, "no step below this loss, and the end when a pass's mean is below", low=0
    )
    biases: bool = option(False, "train the biases of the down projections too, as released (GPT-2)")
    score_padding: bool = option(
        False, "objective prompt_last: also score padded target positions, all tokens but unk, as released"
    )


@register
class FT(Editor):
    """Fine-tuning of down projections with Adam, on float32 masters."""

    name = "ft"
    Config = FTConfig
    config: FTConfig

    def check(self) -> None:
        layers = self.config.layers
        if not layers:
            raise ConfigError("ft needs the layers to train; give e.g. layers=[4]")
        for layer in layers:
            self.lm.check_layer(layer)
        if len(set(layers)) != len(layers):
            raise ConfigError(f"layers = {list(layers)} names a layer twice")

    def parameter_names(self) -> list[str]:
        parts = ("weight", "bias") if self.config.biases else ("weight",)
        paths = [f"{self.lm.down_name(layer)}.{part}" for layer in self.config.layers for part in parts]
        known = dict(self.lm.model.named_parameters())
        return [path for path in paths if path in known]

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        cfg, lm = self.config, self.lm
        names = self.parameter_names()
        params = [lm.parameter(name) for name in names]
        wide = [torch.promote_types(p.dtype, torch.float32) for p in params]
        masters = [
            self._masters.get(n, p.detach()).to(w, copy=True)
            for n, p, w in zip(names, params, wide, strict=True)
        ]
        start = [w.clone() for w in masters]
        optimizer = torch.optim.Adam(masters, lr=cfg.lr, weight_decay=cfg.weight_decay)
        losses: list[float] = []
        batches = list(self._batches(facts))
        with frozen(lm.model):
            for p in params:
                p.requires_grad_(True)
            for _ in bar(range(cfg.steps), f"fine-tuning on {len(facts)} facts", unit="pass"):
                total = 0.0
                for n, batch in batches:
                    with torch.enable_grad():
                        loss = target_loss(lm, n, *batch)
                    value = float(loss.detach())
                    if value != value or abs(value) == float("inf"):
                        raise NumericsError(
                            f"fine-tuning: the loss is {value} after {len(losses)} steps; "
                            f"lower lr = {cfg.lr:g}"
                        )
                    losses.append(value)
                    total += value * n
                    if value >= cfg.loss_threshold:
                        grads = torch.autograd.grad(loss, params)
                        for master, grad in zip(masters, grads, strict=True):
                            master.grad = grad.to(master.dtype)
                        optimizer.step()
                    if cfg.limit is not None:
                        for master, w in zip(masters, start, strict=True):
                            master.clamp_(w - cfg.limit, w + cfg.limit)
                    self.lm.write(dict(zip(names, masters, strict=True)))
                if total / len(facts) < cfg.loss_threshold:
                    break
        for name, p, master in zip(names, params, masters, strict=True):
            if p.dtype != master.dtype:
                self._masters[name] = master
        self.record("batch_losses", torch.tensor(losses, dtype=torch.float64))
        return {"losses": [losses[0], losses[-1]], "steps": len(losses)}

    def _batches(self, facts: list[Fact]) -> Iterator[tuple[int, tuple[Encoding, Tensor]]]:
        """Per batch: facts in it, encoded rows, and target tokens (t, 4: fact, row, column that predicts,
        token).
        """
        size = self.config.batch_size
        rows = encode_targets(self.lm, facts, ContextTemplates())
        for i in range(0, len(facts), size):
            batch = list(range(i, min(i + size, len(facts))))
            encoding, _, places = rows.take(batch)
            if self.config.objective == "prompt_last":
                places = self._at_prompt_end(places)
            yield len(batch), (encoding, places)

    def _at_prompt_end(self, places: Tensor) -> Tensor:
        """All target tokens at the position of the first one; with `score_padding` as the released mask has
        it.
        """
        first: dict[int, int] = {}
        targets: dict[int, list[int]] = {}
        for fact, _, column, token in places.tolist():
            first.setdefault(fact, column)
            targets.setdefault(fact, []).append(token)
        if self.config.score_padding:
            tok = self.lm.tokenizer
            width = max(map(len, targets.values()))
            targets = {
                f: [t for t in tokens + [tok.pad_token_id] * (width - len(tokens)) if t != tok.unk_token_id]
                for f, tokens in targets.items()
            }
        rows = dict(places[:, :2].tolist())
        found = [[f, rows[f], first[f], token] for f, tokens in targets.items() for token in tokens]
        return torch.tensor(found, device=places.device)


def target_loss(lm: LM, n: int, encoding: Encoding, places: Tensor) -> Tensor:
    """Mean over a fact's target tokens of -log p, then over the n facts.

    places: target tokens (t, 4: fact, row, column that predicts, token), as of `locate.targets.TargetRows`.
    """
    end = lm.block_name(lm.n_layers - 1)
    with trace(lm.model, [end], stop_at=end) as seen:
        lm.forward(encoding)
    said = log_probs_of(lm, seen.output[end], places[:, 1:])
    fact = places[:, 0].to(said.device)
    count = torch.zeros(n, dtype=said.dtype, device=said.device).index_add(0, fact, torch.ones_like(said))
    return -(said / count[fact]).sum() / n
