"""LOKA (arXiv 2502.00158): a codebook of knowledge memories, after its description.

The paper stores updates in several memories, maps similar knowledge to the same one, keeps conflicting updates in
memories of their own (conflict score of gradients), and finds the memory by a learned router. Its hyper-parameters
and code are not known to us; the choices here are ours and stated as options:

    feature   f(x): input of the down projection, mean over the prompt, background mean taken off, unit length
    mapping   nearest centre by cosine (running means); a new memory below `similarity` while there is room
    memory    R_m (o, d), zero at first: output + a R_m^T at every token
    conflict  cosine of the new edit's gradient step with what the memory has learned; below -`conflict` the edit
              is written into the cluster's second memory instead of undoing the first
    router    logistic regression on the cosine of a prompt with its nearest edit, fitted after every edit to
              the edits' prompts in other contexts (use) and to background texts (leave alone)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ConfigError
from ...base.progress import bar
from ...locate.target_rows import encode_targets
from ...models.facts import Fact
from ...models.hooks import trace
from ...models.prompts import PromptState
from ..base import register
from .base import MemoryEditor
from .layer_pass import LayerPass, check_loss
from .wise_rows import sample_wise_contexts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LOKAConfig(Config):
    """Options of LOKA; all values are ours."""

    layer: int = option(0, "block whose down projection gets the memories", low=0)
    n_memories: int = option(4, "clusters; each has a second memory for conflicts", low=1)
    similarity: float = option(0.3, "cosine with a centre below which a new memory is opened", low=-1, high=1)
    conflict: float = option(
        0.05, "an edit conflicts if its step points against the memory by this cosine", low=0
    )
    lr: float = option(1.0, "step size of gradient descent", above=0)
    steps: int = option(30, "most steps per edit", low=1)
    clip: float = option(1.0, "largest norm of a gradient", above=0)
    stop_loss: float = option(0.02, "an edit ends below this loss", low=0)
    n_contexts: int = option(4, "contexts beside the bare prompt", low=1)
    seed: int = option(0, "seed of contexts and background", low=0)


def fit_router(used: Tensor, unused: Tensor, ridge: float = 1e-2, steps: int = 25) -> Tensor:
    """(slope, offset) of p(use) = sigmoid(slope * cosine + offset) by Newton's method; both classes weigh the same.

    used, unused: cosines of prompts that should and should not find an edit.
    """
    X = torch.stack([torch.cat([used, unused]), torch.ones(len(used) + len(unused))], dim=1).double()
    y = torch.cat([torch.ones(len(used)), torch.zeros(len(unused))]).double()
    weight = torch.where(y > 0, 0.5 / max(len(used), 1), 0.5 / max(len(unused), 1))
    theta = torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):
        p = torch.sigmoid(X @ theta)
        gradient = X.T @ (weight * (p - y)) + ridge * theta * torch.tensor([1e-2, 1e-4])
        curvature = X.T @ ((weight * p * (1 - p))[:, None] * X) + torch.eye(2) * ridge * 1e-2
        theta = theta - torch.linalg.solve(curvature, gradient)
        theta = theta.clamp(-200, 200)
    return theta


@register
class LOKA(MemoryEditor):
    """Clustered residual memories with a learned router."""

    name = "loka"
    Config = LOKAConfig
    config: LOKAConfig

    def check(self) -> None:
        self.lm.check_layer(self.config.layer)

    def modules(self) -> list[str]:
        return [self.lm.down_name(self.config.layer)]

    def reset_memory(self) -> None:
        m, d = self.lm.weight_shape(self.config.layer)
        device = self.lm.device(self.config.layer)
        self.memories = torch.zeros(
            0, m, d, device=device
        )  # cluster c: memories 2c (shared) and 2c + 1 (conflicts)
        self.centers = torch.zeros(0, d, device=device)  # sums of unit features
        self.features = torch.zeros(0, d, device=device)  # of every edit
        self.where: list[int] = []  # memory of every edit
        self.cosines = torch.zeros(0)  # of the edits' prompts in other contexts with their own edit
        self.mean = torch.zeros(0, device=device)
        self.background_features = torch.zeros(0, d, device=device)
        self.router = torch.zeros(2, dtype=torch.float64)

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        names = ("memories", "centers", "features", "cosines", "mean", "background_features", "router")
        return {"where": self.where}, {name: getattr(self, name) for name in names}

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.reset_memory()
        self.where = values["where"]
        for name, value in tensors.items():
            setattr(self, name, value.to(getattr(self, name).device))

    # --- reading --------------------------------------------------------------------------------------------

    def _unit(self, features: Tensor) -> Tensor:
        centered = features.detach().to(self.mean) - self.mean
        return centered / centered.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def route(self, x: Tensor, out: Tensor, state: PromptState) -> Tensor | None:
        """(b,) memory of each row, -1 for none."""
        if not self.where:
            return None
        cosine, nearest = (self._unit(state.mean(x)) @ self.features.T).max(-1)
        use = self.router[0] * cosine.double().cpu() + self.router[1] >= 0
        where = torch.tensor(self.where)[nearest.cpu()]
        return torch.where(use, where, -1)

    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> Tensor | None:
        if state.route is None or not bool((state.route >= 0).any()):
            return None
        new = out.clone()
        for i in state.route.unique().tolist():
            if i >= 0:
                rows = (state.route == i).to(out.device)
                new[rows] = out[rows] + (x[rows].to(self.memories) @ self.memories[i].T).to(out)
        return new

    # --- editing --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure_background(self) -> None:
        name = self.modules()[0]
        texts = self.background_texts(self.config.seed)
        encoding = self.lm.encode(texts)
        with trace(self.lm.model, [name], inputs=True, outputs=False, stop_at=name) as seen:
            self.lm.forward(encoding)
        x = seen.input[name].float()
        mask = encoding.attention_mask.to(x)
        features = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        self.mean = features.mean(0)
        self.background_features = self._unit(features)

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        cfg = self.config
        if self.contexts is None:
            self.contexts = sample_wise_contexts(self.lm, cfg.n_contexts, cfg.seed)
        if len(self.contexts.flat) < 2:
            raise ConfigError(
                "loka fits its router to the edits in other contexts; give two templates or more"
            )
        if not self.mean.numel():
            self._measure_background()
        found = [self._write(fact) for fact in bar(facts, "LOKA", unit="edit")]
        self._fit()
        return {"memory": self.where[-len(facts) :], "losses": found}

    def _fit(self) -> None:
        # Rounded, so that a loaded memory gets the same router: the last bits of products depend on alignment.
        cosine = self.background_features.double() @ self.features.double().T
        unused = (cosine.max(-1).values.cpu() * 1e7).round() / 1e7
        self.router = fit_router(self.cosines.double().cpu(), unused)

    def _assign(self, feature: Tensor) -> int:
        """Cluster of a feature (d,); its centre moves along."""
        if len(self.centers):
            centers = self.centers / self.centers.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            best, cluster = (centers @ feature).max(-1)
            if best >= self.config.similarity or len(self.centers) == self.config.n_memories:
                self.centers[cluster] += feature
                return int(cluster)
        self.centers = torch.cat([self.centers, feature[None]])
        empty = torch.zeros_like(self.memories[:1]) if len(self.memories) else self.memories.new_zeros(
            1, *self.memories.shape[1:]
        )  # fmt: skip
        self.memories = torch.cat([self.memories, empty, empty])
        return len(self.centers) - 1

    def _write(self, fact: Fact) -> list[float]:
        cfg = self.config
        encoding, last, places = encode_targets(self.lm, [fact], self.contexts, "last").take([0])
        rows = LayerPass(self.lm, encoding, cfg.layer)
        columns = torch.arange(encoding.input_ids.shape[1], device=last.device)
        prompt = ((columns <= last[:, None]) & encoding.attention_mask.bool()).to(
            rows.x.device, torch.float32
        )
        means = (rows.x.float() * prompt[..., None]).sum(1) / prompt.sum(1, keepdim=True)
        features = self._unit(means)
        index = 2 * self._assign(features[0])
        R = self.memories[index].clone().requires_grad_(True)
        x = rows.x.to(R)

        def loss_of(R: Tensor) -> Tensor:
            with torch.enable_grad():
                return -rows.log_probs(places[:, 1:], lambda own: own + (x @ R.T).to(own)).mean()

        loss = loss_of(R)
        gradient = torch.autograd.grad(loss, R)[0]
        size = float(gradient.norm() * R.detach().norm())
        if size > 0 and float((-gradient * R.detach()).sum()) / size < -cfg.conflict:
            index += 1
            R = self.memories[index].clone().requires_grad_(True)
            loss = loss_of(R)
            gradient = torch.autograd.grad(loss, R)[0]
        losses = [check_loss("loka", loss, 0, cfg.lr)]
        while losses[-1] >= cfg.stop_loss and len(losses) <= cfg.steps:
            with torch.no_grad():
                R -= cfg.lr * gradient * min(1.0, cfg.clip / float(gradient.norm().clamp(min=1e-12)))
            loss = loss_of(R)
            losses.append(check_loss("loka", loss, len(losses), cfg.lr))
            gradient = torch.autograd.grad(loss, R)[0]
        self.memories[index] = R.detach()
        self._remember(features, index)
        return [round(v, 6) for v in (losses[0], losses[-1])]

    def _remember(self, features: Tensor, index: int) -> None:
        known = (self.features @ features[0] > 1 - 1e-5).nonzero().flatten().tolist()
        if known:  # a prompt edited again is found in the memory of its latest edit
            self.where[known[0]] = index
            return
        self.features = torch.cat([self.features, features[:1]])
        self.where.append(index)
        self.cosines = torch.cat([self.cosines, (features[1:] @ features[0]).cpu()])
