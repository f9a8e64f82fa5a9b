"""Hypernetwork editors (`editkit.methods.hypernet`) under the contract of all editors.

    editor = make_editor("horse", lm, hypernetwork="horse.safetensors")
    editor = HORSE(lm, hypernetwork=net)             # or a trained object

An edit takes keys and gradients of the facts on the model as it is, and adds the shifts the network plans. All
facts of one call are edited at once; a later call starts from the edited model (RLEdit is trained for that).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ConfigError
from ...models.facts import Fact
from ..base import Editor, register
from .cache import RowFiles, RowMemory, check_memory, count_rows
from .data import encode_pairs
from .network import Hypernetwork, Rows, load_hypernetwork, require
from .sites import oriented


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperEditorConfig(Config):
    """Options of hypernetwork editors; what is edited and how was fixed when the network was trained."""

    hypernetwork: str = option("", "file of the trained network (Hypernetwork.save)")
    batch_size: int = option(32, "rows of the language model", source="data.batch_size", low=1)
    folder: str = option("", "keep keys and gradients in shards in this folder; empty: in memory")
    memory_limit: float | None = option(
        None, "bytes that keys and gradients may take; None: what is free", above=0
    )


class HyperEditor(Editor):
    """Base of the four. hypernetwork: a trained object instead of a file."""

    Config = HyperEditorConfig
    config: HyperEditorConfig
    name: ClassVar[str]

    def __init__(self, lm, config=None, *, hypernetwork: Hypernetwork | None = None, **options: Any) -> None:
        self.net = hypernetwork
        super().__init__(lm, config, **options)

    def check(self) -> None:
        if (self.net is None) == (not self.config.hypernetwork):
            raise ConfigError(
                f"{self.name} needs a trained hypernetwork: train one (editkit.methods.hypernet.Trainer), then give "
                "hypernetwork=FILE, or the object to the editor's class"
            )
        if self.net is None:
            self.net = load_hypernetwork(self.config.hypernetwork, self.lm, force=self.force)
        require(self.net, self.name)
        self._refuse_unless_forced(
            f"this {self.name} hypernetwork was trained for another model than {self.lm.name}",
            self.net.differences(self.lm), "load its model, or train a hypernetwork for this one",
        )  # fmt: skip
        self._digest = self.net.digest()

    def parameter_names(self) -> list[str]:
        return self.net.parameter_names()

    def history(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"hypernetwork": self._digest}, {}

    def load_history(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if values.get("hypernetwork") != self._digest:
            raise ConfigError("the saved stream was edited by another hypernetwork; load that one")

    def rows(self, pairs: list[tuple[str, str]]) -> Rows:
        """Keys and gradients of (prompt, answer) pairs, on the model as it is.

        Raises RequestError if they need more memory than there is.
        """
        cfg, net = self.config, self.net
        n_rows = count_rows(encode_pairs(self.lm, pairs, cfg.batch_size), net.config.tokens)
        check_memory(len(pairs), n_rows, net.sites, cfg.memory_limit, bool(cfg.folder))
        size = cfg.batch_size, net.config.tokens
        if cfg.folder:
            return RowFiles(self.lm, net.sites, *size, folder=cfg.folder).take(pairs)
        return RowMemory(self.lm, net.sites, *size).take(pairs)

    @torch.no_grad()
    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        net = self.net
        rows = self.rows([f.pair for f in facts])
        plan = net.plan(rows)
        self._broken = True
        for i, (site, shift) in enumerate(zip(net.sites, plan.shifts, strict=True)):
            for part in ("residuals", "written"):
                if hasattr(plan, part):
                    self.record(f"{part}_{i}", getattr(plan, part)[i])
            self.record(f"shift_{i}", shift)
            self._add(site.weight_name, oriented(self.lm, site, shift))
        return {"rows": len(rows), "shift_norms": [round(float(s.norm()), 6) for s in plan.shifts]}

    def _add(self, name: str, shift: Tensor) -> None:
        """Add to a weight (its float32 master, below float32), cast once."""
        weight = self.lm.parameter(name)
        master = self._masters.get(name, weight.detach()).double() + shift.to(weight.device)
        self.lm.write({name: master})
        if torch.promote_types(weight.dtype, torch.float32) != weight.dtype:
            self._masters[name] = master.float()


@register
class MEND(HyperEditor):
    """Mitchell et al. 2022."""

    name = "mend"


@register
class MALMEN(HyperEditor):
    """Tan et al. 2024."""

    name = "malmen"


@register
class RLEdit(HyperEditor):
    """RLEdit: for sequences of batches."""

    name = "rledit"


@register
class HORSE(HyperEditor):
    """arXiv 2601.11441."""

    name = "horse"
