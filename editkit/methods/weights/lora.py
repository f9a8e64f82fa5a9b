"""LoRA as an editor, through peft (Hu et al. 2022): a low-rank adapter trained on the edit prompts.

The released baseline (EasyEdit) trains one adapter on the attention's query and value projections, edit after
edit, without any measure against forgetting. Here the adapter lives in the editor; the model gets W + s B A,
so that an edited model is an ordinary checkpoint and the contract of weight editors holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...base.config import Config, option
from ...base.device import is_accelerator
from ...base.errors import ConfigError, ModelError, NumericsError
from ...base.progress import bar
from ...locate.contexts import ContextTemplates
from ...locate.target_rows import encode_targets
from ...models.facts import Fact
from ...models.hooks import submodule
from ..base import Editor, register
from ..delta import snapshot
from .ft import target_loss

_ADAPTER = "editkit"
# Inside the attention: what the released baseline adapts, by the names that architectures use.
_ATTENTION = (("q_proj", "v_proj"), ("c_attn",), ("query_key_value",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Options of LoRA. Defaults are EasyEdit's, but for AdaLoRA (its Llama files) and for dropout."""

    modules: tuple[str, ...] = option(
        (), "names of the adapted linear modules, anywhere in a block; none: the attention's query and value",
        source="target_modules",
    )  # fmt: skip
    blocks: tuple[int, ...] = option((), "adapted blocks; none: all of them", low=0)
    rank: int = option(8, "rank of an adapter", source="rank", low=1)
    alpha: float = option(32.0, "the update is alpha / rank times B A", source="lora_alpha", above=0)
    dropout: float = option(0.0, "dropout on the adapter's input", source="lora_dropout (released: 0.1)",
                            low=0, high=0.99)  # fmt: skip
    lr: float = option(5e-3, "Adam's step size", source="lr", above=0)
    steps: int = option(70, "passes over the facts of an edit", source="num_steps", low=1)
    batch_size: int = option(64, "facts per step", source="batch_size", low=1)
    loss_threshold: float = option(0.0, "stop when a pass's mean loss is below (released: never)", low=0)
    seed: int = option(0, "seed of the adapter's start and of dropout", low=0)


@register
class LoRA(Editor):
    """One low-rank adapter for the whole stream, merged into the weights after every edit."""

    name = "lora"
    Config = LoRAConfig
    config: LoRAConfig

    def check(self) -> None:
        for layer in self.config.blocks:
            self.lm.check_layer(layer)
        self.module_names()

    def module_names(self) -> list[str]:
        """Module paths of the adapted projections. Raises ModelError if a block has none of that name."""
        lm, cfg = self.lm, self.config
        found = []
        for layer in cfg.blocks or range(lm.n_layers):
            block = lm.block_name(layer)
            linear = {
                name: module
                for name, module in submodule(lm.model, block).named_modules()
                if isinstance(module, (nn.Linear, Conv1D))
            }
            wanted = cfg.modules
            if not wanted:
                inside = {n.rpartition(".")[2] for n in linear if n.startswith(f"{lm.spec.attn}.")}
                wanted = next((names for names in _ATTENTION if inside.issuperset(names)), ())
            for name in wanted or ("query and value projection",):
                match = [n for n in linear if n == name or n.endswith(f".{name}")]
                if not match:
                    raise ModelError(
                        f"{block} of {lm.name} has no linear module {name!r}; pass modules= out of "
                        f"{', '.join(sorted(linear))}"
                    )
                found += [f"{block}.{n}" for n in match]
        return found

    def parameter_names(self) -> list[str]:
        return [f"{name}.weight" for name in self.module_names()]

    @property
    def remembers(self) -> bool:
        return True

    def reset_history(self) -> None:
        self.adapter: dict[str, Tensor] = {}  # "module:A" (rank, in), "module:B" (out, rank)
        self.base: dict[str, Tensor] = {}  # weights under the adapter

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {**self.adapter, **{f"base:{k}": v for k, v in self.base.items()}}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.base = {k.removeprefix("base:"): v for k, v in tensors.items() if k.startswith("base:")}
        self.adapter = {k: v for k, v in tensors.items() if not k.startswith("base:")}

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        names = self.parameter_names()
        base = self.base or {name: v.cpu() for name, v in snapshot(self.lm, names).items()}
        self._broken = True
        self.lm.write(base)
        with _adapted(self.lm, self.module_names(), self.config, self.adapter, self.n_facts) as layers:
            losses = self._train(facts, layers)
            updates = {
                f"{name}.weight": layer.get_delta_weight(_ADAPTER).detach().clone()
                for name, layer in layers.items()
            }
            adapter = {
                f"{name}:{part}": getattr(layer, f"lora_{part}")[_ADAPTER].weight.detach().cpu().clone()
                for name, layer in layers.items()
                for part in "AB"
            }
        self.base, self.adapter = base, adapter
        for name, update in updates.items():
            weight = self.lm.parameter(name)
            wide = torch.promote_types(weight.dtype, torch.float32)
            new = base[name].to(weight.device, wide) + update.to(wide)
            if not torch.isfinite(new).all():
                raise NumericsError(f"lora: {name} has NaN or Inf; lower lr = {self.config.lr:g}")
            if wide != weight.dtype:
                self._masters[name] = new
            self.lm.write({name: new})
        return {"losses": [losses[0], losses[-1]], "steps": len(losses)}

    def _train(self, facts: list[Fact], layers: dict[str, Any]) -> list[float]:
        cfg = self.config
        rows = encode_targets(self.lm, facts, ContextTemplates())
        batches = [
            list(range(i, min(i + cfg.batch_size, len(facts)))) for i in range(0, len(facts), cfg.batch_size)
        ]
        params = [
            getattr(layer, f"lora_{part}")[_ADAPTER].weight for layer in layers.values() for part in "AB"
        ]
        optimizer = torch.optim.Adam(params, lr=cfg.lr)
        losses: list[float] = []
        for _ in bar(range(cfg.steps), f"LoRA on {len(facts)} facts", unit="pass"):
            total = 0.0
            for batch in batches:
                encoding, _, places = rows.take(batch)
                with torch.enable_grad():
                    loss = target_loss(self.lm, len(batch), encoding, places)
                grads = torch.autograd.grad(loss, params)
                value = float(loss.detach())
                if value != value or value == float("inf"):
                    raise NumericsError(
                        f"lora: the loss is {value} after {len(losses)} steps; lower lr = {cfg.lr:g}"
                    )
                losses.append(value)
                total += value * len(batch)
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
            if total / len(facts) < cfg.loss_threshold:
                break
        return losses


@contextmanager
def _adapted(
    lm, names: list[str], cfg: LoRAConfig, state: dict[str, Tensor], edits: int
) -> Iterator[dict[str, Any]]:
    """The model with peft's LoRA layers at `names`, as {name: layer}; without a trace of them afterwards.

    state: A and B of an adapter to continue.   edits: number of facts so far, part of the seed of dropout.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("the editor 'lora' needs peft: pip install peft") from error
    flags = [(p, p.requires_grad) for p in lm.model.parameters()]
    modules = {name: submodule(lm.model, name) for name in names}
    known = set(vars(lm.model))
    devices = [d for d in {p.device for p, _ in flags} if is_accelerator(d)]
    kind = {"device_type": devices[0].type} if devices else {}
    with torch.random.fork_rng(devices=devices, **kind):
        torch.manual_seed(cfg.seed * 1_000_003 + edits)
        conv = isinstance(next(iter(modules.values())), Conv1D)
        try:
            inject_adapter_in_model(
                LoraConfig(
                    r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=names,
                    fan_in_fan_out=conv,
                ),
                lm.model, adapter_name=_ADAPTER,
            )  # fmt: skip
            layers = {name: submodule(lm.model, name) for name in names}
            with torch.no_grad():
                for key, value in state.items():
                    name, _, part = key.rpartition(":")
                    getattr(layers[name], f"lora_{part}")[_ADAPTER].weight.copy_(value)
            if cfg.dropout:
                for layer in layers.values():
                    layer.lora_dropout.train()
            yield layers
        finally:
            for name, module in modules.items():
                path, _, leaf = name.rpartition(".")
                setattr(submodule(lm.model, path), leaf, module)
            for attribute in set(vars(lm.model)) - known:
                delattr(lm.model, attribute)
            for p, flag in flags:
                p.requires_grad_(flag)
