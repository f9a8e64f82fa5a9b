"""WISE (Wang et al. 2024): edits go into a side memory W', a copy of one projection W; activations decide which of
the two is used.

    act(x) = mean over tokens of || a W'^T - a W^T ||,   a: input of the projection            (routing activation)
    loss   = CE(answer | W') + [act_out - act_in + gamma]_+ + [act_out - alpha]_+ + [beta - act_in]_+
    use W' iff act(x) >= act_ratio * min over edits of act_in

Every `save_every` edits W' is put away as a shard and starts again from W with a new random mask of trainable
entries; every `merge_every` edits the shards are merged by TIES (`memory.wise_merge`). With `retrieve` all
merged shards stay and the one with the largest activation above its own threshold answers; without, they are
merged into a single one.

form="released" follows EasyEdit where it differs from the paper: distances are taken behind the model's
activation function and over padding and answers too, the loss is divided by T + 1, prompt tokens can become
labels, hinges are averaged over their positive entries.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ConfigError, RequestError
from ...base.progress import bar
from ...models.facts import Fact
from ...models.hooks import submodule
from ...models.prompts import PromptState
from ..base import register
from .base import MemoryEditor
from .codebook import rounding
from .layer_pass import check_loss, module_path
from .wise_merge import ties
from .wise_rows import Rows, distance, hinge, paper_rows, released_rows, sample_wise_contexts

_INF = 1e9  # "no edit yet", as released
_OLD_SHARE, _NEW_SHARE = 0.6, 0.4  # of former and new shards in the single memory (released code)
_LONG = 100  # released: sequences longer than this are routed by their largest activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class WISEConfig(Config):
    """Options of WISE; defaults are EasyEdit's for Llama-2 and Mistral, but for the form and weight decay."""

    layer: int = option(0, "block whose projection is copied", source="inner_params", low=0)
    module: str = option(
        "", "linear module inside the block; empty: its down projection", source="inner_params"
    )
    lr: float = option(1.0, "step size of SGD", source="edit_lr", above=0)
    steps: int = option(70, "most steps per edit", source="n_iter", low=1)
    weight_decay: float = option(0.0, "pulls all of W' to zero (released: 1e-5)", low=0)
    limit: float | None = option(1.0, "largest change of an entry of W'", source="norm_constraint", above=0)
    alpha: float = option(5.0, "irrelevant activations should be below", source="alpha", low=0)
    beta: float = option(20.0, "activations of edits should be above", source="beta", low=0)
    gamma: float = option(10.0, "and the difference above", source="gamma", low=0)
    act_ratio: float = option(0.88, "threshold, in units of the smallest activation of an edit", above=0)
    mask_ratio: float = option(0.2, "share rho of trainable entries", source="mask_ratio", above=0, high=1)
    save_every: int = option(500, "edits per shard", source="save_freq", low=1)
    merge_every: int = option(1000, "edits per merge, a multiple of save_every", source="merge_freq", low=1)
    density: float = option(0.53, "share of entries that TIES keeps", source="densities", above=0, high=1)
    retrieve: bool = option(True, "keep merged shards apart and pick one, or merge all into one")
    replay: bool = option(False, "hold former edits' activations while editing", source="WISE appendix B.3")
    stop_loss: float = option(0.02, "stop when the loss is below and has changed by no more than 1e-4", low=0)
    form: Literal["paper", "released"] = option("paper", "see the module")
    scope: Literal["irrelevant", "subject"] = option(
        "irrelevant",
        "what must not activate: an irrelevant text, or the edit's tokens other than its subject",
    )
    n_contexts: int = option(10, "context templates beside the bare prompt", source="EasyEdit", low=0)
    seed: int = option(0, "seed of masks, contexts, irrelevant texts and replay", low=0)


@register
class WISE(MemoryEditor):
    """Side memories with routing by activation."""

    name = "wise"
    Config = WISEConfig
    config: WISEConfig

    def check(self) -> None:
        cfg = self.config
        self.lm.check_layer(cfg.layer)
        module_path(self.lm, cfg.layer, cfg.module)
        if cfg.merge_every % cfg.save_every:
            raise ConfigError(
                f"merge_every = {cfg.merge_every} is no multiple of save_every = {cfg.save_every}: whole shards "
                "are merged"
            )

    def modules(self) -> list[str]:
        return [module_path(self.lm, self.config.layer, self.config.module)]

    @property
    def weight(self) -> Tensor:
        """W (o, d) in at least float32."""
        W = self.lm.to_matrix(submodule(self.lm.model, self.modules()[0]).weight.detach())
        return W.to(torch.promote_types(W.dtype, torch.float32))

    @property
    def bias(self) -> Tensor | None:
        """The projection's bias, which stays."""
        return getattr(submodule(self.lm.model, self.modules()[0]), "bias", None)

    # --- state ----------------------------------------------------------------------------------------------

    def reset_memory(self) -> None:
        self.new: Tensor | None = None  # W' since the last shard
        self.mask: Tensor | None = None  # its trainable entries
        self.shards: list[Tensor] = []
        self.acts: list[float] = []  # smallest activation of an edit, per shard
        self.act = _INF  # the same since the last shard (without `retrieve`: over all edits)
        self.merged: Tensor | None = None  # without `retrieve`: what former shards were merged into
        self.count = self.merges = self.shards_made = 0
        self.groups: list[list[list[str]]] = [
            []
        ]  # replay: (prompt, subject, target, irrelevant), last group open
        self.used: list[list[bool]] = []  # replay: which of each closed group were shown in this turn
        self._effective: Tensor | None = None

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values = {
            "acts": self.acts, "act": self.act, "count": self.count, "merges": self.merges,
            "shards_made": self.shards_made, "groups": self.groups, "used": self.used,
        }  # fmt: skip
        tensors = {f"shard.{i}": W for i, W in enumerate(self.shards)}
        named = {"new": self.new, "mask": self.mask, "merged": self.merged}
        return values, tensors | {name: W for name, W in named.items() if W is not None}

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.reset_memory()
        for name, value in values.items():
            setattr(self, name, value)
        here = {name: W.to(self.weight.device) for name, W in tensors.items()}
        self.shards = [here[f"shard.{i}"] for i in range(len(values["acts"]) if self.config.retrieve else 0)]
        if not self.config.retrieve:
            self.shards = [here[k] for k in sorted(here, key=_number) if k.startswith("shard.")]
        self.new, self.mask, self.merged = (here.get(name) for name in ("new", "mask", "merged"))

    @property
    def _open(self) -> bool:
        """Whether W' holds edits that are in no shard yet."""
        return self.count % self.config.save_every != 0

    # --- routing --------------------------------------------------------------------------------------------

    def memories(self) -> list[tuple[Tensor, float]]:
        """Side memories (o, d) with their thresholds, in the order in which the released code asks them."""
        cfg = self.config
        if not self.count:
            return []
        now = (self.new, self.act * cfg.act_ratio)
        if cfg.retrieve:
            stored = [(S, act * cfg.act_ratio) for S, act in zip(self.shards, self.acts, strict=True)]
            return [now, *stored] if self._open else stored
        if self._effective is None:
            # Whole shards and the open one are merged for reading; the stream itself is left as it is.
            open_shards = self.shards + ([self.new] if self._open else [])
            ready = self.count >= cfg.save_every
            self._effective = self._merge_into_one(open_shards) if ready and open_shards else self.merged
        if self._effective is None:
            return [now]
        return [(self._effective, self.act * cfg.act_ratio)]

    def activation(self, x: Tensor, S: Tensor, W: Tensor, mask: Tensor) -> Tensor:
        """Routing activation (b,) of inputs x (b, t, d), over the tokens of mask (b, t)."""
        return distance(self, x, S, W, mask)

    def route(self, x: Tensor, out: Tensor, state: PromptState) -> tuple[Tensor, list[Tensor]] | None:
        """Index (b,) of the side memory to use, -1 for W, and the memories."""
        memories = self.memories()
        if not memories:
            return None
        W, released = self.weight, self.config.form == "released"
        # With act_ratio = 1 the bound is an edit's own activation, read again with other last bits.
        noise = rounding(x.dtype)
        x = x.detach().to(W)
        acts = torch.stack([self.activation(x, S, W, state.prompt) for S, _ in memories])
        if released and x.shape[1] > _LONG:
            acts = torch.stack([distance(self, x, S, W, state.prompt, largest=True) for S, _ in memories])
        bounds = acts.new_tensor([bound for _, bound in memories])[:, None]
        above = acts >= bounds * (1 - noise)
        best = torch.where(above, acts, -torch.inf).max(0)
        chosen = torch.where(above.any(0), best.indices, -1)
        if released and self.config.retrieve and self._open:
            # As released, a shard must also beat the open memory's activation where that is below its threshold.
            chosen = torch.where((chosen > 0) & (best.values <= acts[0]), -1, chosen)
        self.record("activation", acts)
        return chosen, [S for S, _ in memories]

    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> Tensor | None:
        if state.route is None or not bool((state.route[0] >= 0).any()):
            return None
        chosen, memories = state.route
        new = out.clone()
        for i in chosen.unique().tolist():
            if i >= 0:
                rows = chosen == i
                new[rows] = self.project(x[rows], memories[i].to(x)).to(out)
        return new

    def project(self, x: Tensor, S: Tensor) -> Tensor:
        """x S^T + bias."""
        return torch.nn.functional.linear(x, S, None if self.bias is None else self.bias.to(x))

    # --- editing --------------------------------------------------------------------------------------------

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        if self.contexts is None:
            self.contexts = sample_wise_contexts(self.lm, self.config.n_contexts, self.config.seed)
        found = [self._write(fact) for fact in bar(facts, "WISE", unit="edit")]
        return {"losses": found}

    def irrelevant(self, fact: Fact) -> str:
        """The text that must not activate the memory of this edit."""
        if self.config.scope == "subject":
            return fact.subject
        texts = self.background_texts(self.config.seed)
        return texts[self.count % len(texts)]

    def draw_mask(self) -> Tensor:
        """Trainable entries (o, d), 0 or 1, of the next shard."""
        cfg = self.config
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + self.shards_made)
        return (torch.rand(self.weight.shape, generator=generator) < cfg.mask_ratio).to(self.weight)

    def choose_replay(self, losses: list[Tensor]) -> int:
        """Which edit of the open group is replayed; losses: each one's activation loss."""
        seed = self.config.seed * 1_000_003 + self.count * 1009 + self._step
        return int(torch.randint(len(losses), (1,), generator=torch.Generator().manual_seed(seed)))

    def rows(self, prompt: str, subject: str, target: str, irrelevant: str) -> Rows:
        """Encoded rows of an edit, by the form."""
        make = released_rows if self.config.form == "released" else paper_rows
        return make(self, Fact(prompt, subject, target), irrelevant)

    def _write(self, fact: Fact) -> list[float]:
        cfg, W = self.config, self.weight
        irrelevant = self.irrelevant(fact)
        if not irrelevant.strip():
            raise RequestError("WISE needs an irrelevant text per edit; pass background=texts")
        if self.new is None:
            self.new = W.clone()
        if self.count % cfg.save_every == 0:
            self.mask = self.draw_mask()
            self.shards_made += 1
        entry = [fact.prompt, fact.subject, fact.target.strip(), irrelevant]
        if cfg.replay:
            self.groups[-1].append(entry)
        rows = self.rows(*entry)
        self.record("layer_input", rows.upper.x)
        self.record("input_ids", rows.upper.encoding.input_ids)
        if rows.labels is not None:
            self.record("labels", rows.labels)
        cache: dict[tuple[str, ...], Rows] = {tuple(entry): rows}
        S = self.new.clone().requires_grad_(True)
        # The smallest loss and the one before it decide the end, as released, before the next step.
        last, before, losses = float("inf"), 0.0, []
        self.record("new_weight_start", S.detach().clone())
        for self._step in range(cfg.steps):
            with torch.enable_grad():
                said, act = rows.loss(S), rows.activation_loss(S)
                loss = said + act
            done = abs(last - before) <= 1e-4 and last <= cfg.stop_loss
            if done or self._step == cfg.steps - 1:
                self.act = min(self.act, rows.mean_activation(S.detach()))
            if done:
                break
            parts = [said, act]
            if cfg.replay and cfg.retrieve and self.merges:
                with torch.enable_grad():
                    extra = self._replay(S, cache)
                    loss = loss + sum(extra)
                parts += extra
            before, last = last, check_loss("wise", loss, len(losses), cfg.lr)
            losses.append([last, *(float(p.detach()) for p in parts)])
            grad = torch.autograd.grad(loss, S)[0] * self.mask
            with torch.no_grad():
                S -= cfg.lr * (grad + cfg.weight_decay * S)
                if cfg.limit is not None:
                    S.clamp_(W - cfg.limit, W + cfg.limit)
        self.new, self._effective = S.detach(), None
        self.count += 1
        self.record("losses", torch.tensor(losses, dtype=torch.float64))
        self.record("new_weight_before_save", self.new.clone())
        if self.count % cfg.save_every == 0:
            self._put_away(W)
        if self.count % cfg.merge_every == 0:
            self._merge(W)
        return [round(v, 6) for v in (losses[0][0], losses[-1][0])]

    def _replay(self, S: Tensor, cache: dict[tuple[str, ...], Rows]) -> list[Tensor]:
        """Former groups must not activate the open memory, an edit of the open one must (two losses)."""

        def dist(entry: list[str]) -> Tensor:
            key = tuple(entry)
            if key not in cache:
                cache[key] = self.rows(*entry)
            return cache[key].inside(S, masked=False)

        # Constants of the released code; in the paper the bounds are those of the edit loss.
        low, high = (5.0, 20.0) if self.config.form == "released" else (self.config.alpha, self.config.beta)
        positive = self.config.form == "released"
        negative = []
        for group, used in zip(self.groups[:-1], self.used, strict=True):
            if all(used):
                used[:] = [False] * len(used)
            i = used.index(False)
            used[i] = True
            negative.append(hinge(dist(group[i]) - low, positive))
        options = [hinge(high - dist(entry), positive) for entry in self.groups[-1]]
        return [torch.stack(negative).mean(), options[self.choose_replay(options)]]

    def _put_away(self, W: Tensor) -> None:
        self.shards.append(self.new)
        self.new = W.clone()
        if self.config.retrieve:
            self.acts.append(self.act)
            self.act = _INF

    def _merge_into_one(self, shards: list[Tensor]) -> Tensor:
        """Shards and what former ones were merged into, as one weight."""
        W, density = self.weight, self.config.density
        if self.merged is None:
            return ties(W, shards, density)
        shares = [_NEW_SHARE / len(shards)] * len(shards) + [_OLD_SHARE]
        return ties(W, [*shards, self.merged], density, shares)

    def _merge(self, W: Tensor) -> None:
        cfg = self.config
        if cfg.retrieve:
            n = cfg.merge_every // cfg.save_every
            self.shards[-n:] = [ties(W, self.shards[-n:], cfg.density)]
            self.acts[-n:] = [min(self.acts[-n:])]
            self.merges += 1
            if cfg.replay:
                self.used.append([False] * len(self.groups[-1]))
                self.groups.append([])
        else:
            self.merged, self.shards = self._merge_into_one(self.shards), []


def _number(name: str) -> int:
    tail = name.rpartition(".")[2]
    return int(tail) if tail.isdigit() else -1
