"""Continual-learning precedents of MEMOIR as editors of the same residual memory.

They differ in what an edit may touch; how an edit is found again is MEMOIR's overlap look-up for all (the
originals are told the task, or guess it from the output's entropy), so that only one mechanism varies at a time.

    packnet  columns of its own, chosen by magnitude, frozen afterwards      Mallya & Lazebnik 2018
    gpm      everything, but orthogonally to the inputs of earlier edits     Saha, Garg & Roy 2021
    supsup   nothing: a mask over frozen random weights is learned instead   Wortsman et al. 2020
    sparcl   the important entries of one shared sparse matrix               Wang et al. 2022
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...base.config import option
from ...models.facts import Fact
from ..base import register
from .masks import pack, unpack
from .memoir import Memoir, MemoirConfig, Route
from .training_rows import TrainingRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackNetConfig(MemoirConfig):
    """Options of PackNet."""

    keep: int = option(16, "columns an edit keeps after pruning, frozen from then on", low=1)


@register
class PackNet(Memoir):
    """Train all free columns, keep those of largest norm, train these again, freeze them.

    Edit i is read with the columns of edits up to i. When no free column is left, nothing is written any more.
    """

    name = "packnet"
    Config = PackNetConfig
    config: PackNetConfig

    def reset_memory(self) -> None:
        super().reset_memory()
        self.owner = torch.full((self.d,), -1, dtype=torch.int64, device=self.weight.device)

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().memory()
        return values, {**tensors, "owner": self.owner} if tensors else {}

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_memory(values, tensors)
        self.owner = tensors["owner"].to(self.weight.device, copy=True)

    def columns(self, index: Tensor) -> Tensor:
        last = {mask: edit for edit, mask in enumerate(self.mask_of_edit)}
        edits = torch.tensor([last[i] for i in index.tolist()], dtype=torch.int64, device=self.owner.device)
        return (self.owner >= 0) & (self.owner <= edits[:, None])

    def train(self, rows: TrainingRows, mask: Tensor, index: int, fact: Fact) -> list[float]:
        x = rows.x.to(self.weight)
        free, losses = (self.owner < 0).nonzero()[:, 0], []
        fixed = linear(x * (self.owner >= 0), self.weight)

        def run(columns: Tensor) -> None:
            def loss_of(w: Tensor) -> Tensor:
                return rows.loss(fixed + linear(x[..., columns], w), self._extra)

            for own in self._descend(self.weight[:, columns].clone(), loss_of, losses, fact):
                self.step_weight(columns, own)

        if not len(free):
            with torch.no_grad():
                return [float(rows.loss(fixed, self._extra))]
        run(free)
        best = self.weight[:, free].norm(dim=0).topk(min(self.config.keep, len(free))).indices
        kept = free[best.sort().values]
        drop = torch.ones_like(self.owner, dtype=torch.bool)
        drop[kept] = False
        self.weight[:, drop & (self.owner < 0)] = 0
        run(kept)
        self.owner[kept] = len(self.mask_of_edit)
        return losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPMConfig(MemoirConfig):
    """Options of GPM."""

    energy: float = option(
        0.9, "share of an edit's squared inputs that later edits must leave alone", above=0, high=1
    )


@register
class GPM(Memoir):
    """Gradient projection memory: G <- G - G B B^T with a basis B (d, r) of the inputs of earlier edits."""

    name = "gpm"
    Config = GPMConfig
    config: GPMConfig

    def reset_memory(self) -> None:
        super().reset_memory()
        self.basis = torch.zeros(self.d, 0, dtype=self.weight.dtype, device=self.weight.device)

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().memory()
        return values, {**tensors, "basis": self.basis} if tensors else {}

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_memory(values, tensors)
        self.basis = tensors["basis"].to(self.weight.device, copy=True)

    def columns(self, index: Tensor) -> Tensor:
        return torch.ones(len(index), self.d, dtype=torch.bool, device=self.weight.device)

    def train(self, rows: TrainingRows, mask: Tensor, index: int, fact: Fact) -> list[float]:
        x, losses, B = rows.x.to(self.weight), [], self.basis
        every = torch.arange(self.d, device=x.device)
        steps = self._descend(
            self.weight.clone(), lambda w: rows.loss(linear(x, w), self._extra), losses, fact,
            project=lambda g: g - (g @ B) @ B.T,
        )  # fmt: skip
        for own in steps:
            self.step_weight(every, own)
        self.basis = self._extend(x[rows.encoding.attention_mask.bool()])
        return losses

    def _extend(self, inputs: Tensor) -> Tensor:
        """The basis with the leading directions of new inputs (n, d), until `energy` of them is covered."""
        rest = inputs - (inputs @ self.basis) @ self.basis.T
        total, left = float(inputs.square().sum()), float(rest.square().sum())
        _, sizes, directions = torch.linalg.svd(rest, full_matrices=False)
        uncovered = left - sizes.square().cumsum(0)
        n = int((uncovered > (1 - self.config.energy) * total).sum()) + 1
        if left <= (1 - self.config.energy) * total:
            n = 0
        n = min(n, self.d - self.basis.shape[1])
        # Orthonormal again, so that rounding does not pile up over a long stream.
        return torch.linalg.qr(torch.cat([self.basis, directions[:n].T], dim=1)).Q if n else self.basis


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupSupConfig(MemoirConfig):
    """Options of SupSup."""

    density: float = option(0.5, "share of the random entries in a mask", above=0, high=1)
    score_lr: float = option(0.1, "step of the scores, relative to their norm", above=0)
    gain: float = option(2.0, "size of the random entries, relative to those of the frozen matrix", above=0)


@register
class SupSup(Memoir):
    """Frozen random weights +-c; per edit the `density` best-scored entries, scores by straight-through descent."""

    name = "supsup"
    Config = SupSupConfig
    config: SupSupConfig

    def reset_memory(self) -> None:
        super().reset_memory()
        m, d = self.weight.shape
        generator = torch.Generator().manual_seed(self.config.seed)
        signs = torch.randint(2, (m, d), generator=generator).to(self.weight) * 2 - 1
        size = self.config.gain * self.lm.weight(self.layer).detach().float().std()
        self.weight = signs * size.to(signs)
        self.start = torch.rand(m, d, generator=generator).to(self.weight)
        self.entries: dict[int, Tensor] = {}

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().memory()
        return values, {**tensors, **{f"entries.{i}": v for i, v in self.entries.items()}} if tensors else {}

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_memory(values, tensors)
        device = self.weight.device
        self.entries = {
            int(k.removeprefix("entries.")): v.to(device)
            for k, v in tensors.items()
            if k.startswith("entries.")
        }

    def columns(self, index: Tensor) -> Tensor:
        return torch.ones(len(index), self.d, dtype=torch.bool, device=self.weight.device)

    def recall(self, x: Tensor, route: Route) -> Tensor:
        found = route.found.index[route.rows].tolist()
        parts = [linear(a, self.weight * self._entries(i)) for a, i in zip(x, found, strict=True)]
        return torch.stack(parts)

    def _entries(self, index: int) -> Tensor:
        return unpack(self.entries[index], self.weight.numel())[0].view_as(self.weight)

    def _best(self, scores: Tensor) -> Tensor:
        """The mask (m, d) of the best-scored entries."""
        keep = max(1, round(self.config.density * scores.numel()))
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[scores.flatten().topk(keep).indices] = True
        return mask.view_as(scores)

    def train(self, rows: TrainingRows, mask: Tensor, index: int, fact: Fact) -> list[float]:
        x, cfg = rows.x.to(self.weight), self.config
        scores, size = self.start.clone(), float(self.start.norm())
        losses: list[float] = []
        for step in range(cfg.steps + 1):
            chosen = self._best(scores)
            leaf = (self.weight * chosen).requires_grad_(True)
            with torch.enable_grad():
                loss = rows.loss(linear(x, leaf), self._extra)
            losses.append(float(loss.detach()))
            self.entries[index] = pack(chosen.reshape(1, -1))
            if losses[-1] <= cfg.stop_loss or step == cfg.steps:
                break
            (gradient,) = torch.autograd.grad(loss, leaf)
            gradient = gradient * self.weight  # straight through: as if the scores scaled the weights
            scores = scores - cfg.score_lr * size * gradient / gradient.norm().clamp(min=1e-12)
        return losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparCLConfig(MemoirConfig):
    """Options of SparCL."""

    density: float = option(0.05, "share of entries of the memory that are not zero", above=0, high=1)
    alpha: float = option(1.0, "weight of the gradient against the weight in an entry's importance", low=0)


@register
class SparCL(Memoir):
    """One sparse matrix for all edits: before each, its entries of least |w| + alpha |gradient| are dropped."""

    name = "sparcl"
    Config = SparCLConfig
    config: SparCLConfig

    def columns(self, index: Tensor) -> Tensor:
        return torch.ones(len(index), self.d, dtype=torch.bool, device=self.weight.device)

    def train(self, rows: TrainingRows, mask: Tensor, index: int, fact: Fact) -> list[float]:
        x, losses = rows.x.to(self.weight), []

        def loss_of(w: Tensor) -> Tensor:
            return rows.loss(linear(x, w), self._extra)

        leaf = self.weight.clone().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
        importance = self.weight.abs() + self.config.alpha * gradient.abs() / gradient.abs().max().clamp(
            min=1e-12
        )
        kept = torch.zeros(importance.numel(), dtype=torch.bool, device=x.device)
        kept[importance.flatten().topk(max(1, round(self.config.density * kept.numel()))).indices] = True
        kept = kept.view_as(self.weight)
        every = torch.arange(self.d, device=x.device)
        self.step_weight(every, self.weight * kept)
        for own in self._descend(self.weight.clone(), loss_of, losses, fact, project=lambda g: g * kept):
            self.step_weight(every, own)
        return losses
