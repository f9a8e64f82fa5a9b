"""MEMOIR: a residual memory with minimal overwrite and informed retention (arXiv 2506.07899).

Beside the down projection W0 (m, d) of one layer lives a residual memory Wm (m, d), zero at first:

    out_t = W0 a_t + Wm (M o a_t)          one mask M in {0,1}^d per sequence, k ones                       (1)

Minimal overwrite: edit i has the TopHash mask M_i of its bare prompt and trains Wm under it, so it changes only
the k columns in M_i. Informed retention: a query takes the stored mask that shares most columns with its own; if
they share fewer than threshold x k, the memory is not used and the output is that of the base model, bit for bit.

The defaults are the paper's mathematics. What the released code does besides has options of its own:
weight_decay = 1e-5 shrinks all of Wm at every step, and loss_divisor = "released" divides by one token too many.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ConfigError, NumericsError, RequestError
from ...base.progress import bar
from ...locate.contexts import ContextTemplates, generate
from ...locate.target_rows import TargetRows, encode_targets
from ...models.facts import SLOT, Fact
from ...models.lm import LM
from ...models.prompts import PromptState
from ..base import register
from .base import MemoryEditor
from .calibration import Null
from .masks import MaskStore
from .tophash import TopHash, check_k, draw_permutation, mean_features, random_masks
from .training_rows import TrainingRows

SHARE = 4096 / 14336  # columns per mask in the paper, as a share of the layer
PREFIX_STARTS = ("I", "You", "Because", "Yes", "Q: ")
PREFIX_TOKENS = (5, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoirConfig(Config):
    """Options of MEMOIR."""

    layer: int | None = option(None, "block whose down projection gets the memory", source="27 of 32", low=0)
    k: int | None = option(None, "columns per mask; None: 2/7 of the layer", source="4096 of 14336", low=1)
    threshold: float = option(
        0.4, "least overlap with a stored mask at which the memory is used",
        source="irr_threshold: 0.4 (zsRE), 0.9 (hallucination)", above=0,
    )  # fmt: skip
    lr: float = option(1.0, "step size of gradient descent", source="edit_lr", above=0)
    steps: int = option(30, "most steps per edit", source="n_iter", low=1)
    clip: float = option(1.0, "largest norm of a gradient", source="released code", above=0)
    stop_loss: float = option(0.02, "an edit ends below this loss ...", source="released code", low=0)
    stop_change: float | None = option(
        1e-4, "... if the loss changed by at most this; None: at once", source="released code", low=0
    )
    weight_decay: float = option(
        0.0, "shrinks all of the memory at every step, also other edits' columns (released code: 1e-5)", low=0
    )
    loss_divisor: Literal["tokens", "released"] = option(
        "tokens", "mean over the target's tokens, or the released code's sum / (tokens + 1)"
    )
    features: Literal["centered", "mean"] = option(
        "centered", "mean of the prompt with or without the background mean taken off",
        source="mean_decentered",
    )  # fmt: skip
    mask: Literal["tophash", "random"] = option(
        "tophash", "mask from the prompt's features, or a random function of its tokens (ablation)"
    )
    permute: bool = option(True, "send the top columns to random ones; False is the paper's ablation")
    activation: Literal["threshold", "nearest", "own"] = option(
        "threshold",
        "conditional; or always on with the nearest stored mask, or with the query's own (ablation)",
    )
    n_background: int = option(
        100, "texts behind the background mean, at most", source="released code", low=1
    )
    n_contexts: int = option(10, "prefixes per edit, if no contexts are given", source="released code", low=0)
    seed: int = option(42, "of permutation, prefixes and background", source="released code", low=0)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What prompts find in the memory, each (n,). overlap: best ratio with a stored mask (0 for an empty memory).

    index: that mask.   active: whether the memory is used.
    """

    overlap: Tensor
    index: Tensor
    active: Tensor


@dataclasses.dataclass(frozen=True)
class Route:
    """A batch's decision at its prompts: the look-up, and for the active rows their index and masks (a, d)."""

    found: Lookup
    rows: Tensor
    masks: Tensor


@register
class Memoir(MemoryEditor):
    """MEMOIR. Facts of one call are written one after the other, in their order."""

    name = "memoir"
    Config = MemoirConfig
    config: MemoirConfig

    # --- options and state ----------------------------------------------------------------------------------

    def check(self) -> None:
        cfg, n = self.config, self.lm.n_layers
        if cfg.layer is None:
            raise ConfigError(
                f"{self.name} needs the layer of its memory; give e.g. layer={round(27 / 32 * n) - 1}, as late "
                f"among the {n} blocks of {self.lm.name} as the paper's 27 of 32"
            )
        self.layer = self.lm.check_layer(cfg.layer)
        self.d = self.lm.weight_shape(self.layer)[1]
        self.k = cfg.k if cfg.k is not None else max(1, round(SHARE * self.d))
        check_k(self.k, self.d)
        null = Null(self.d, self.k)
        if cfg.activation == "threshold" and cfg.threshold <= null.mean:
            warnings.warn(
                f"threshold {cfg.threshold:g} is vacuous: two random masks of {self.k} out of {self.d} columns share "
                f"{null.mean:.3f} +- {null.sd:.3f} of them, so unrelated prompts will use the memory; raise the "
                "threshold or lower k",
                stacklevel=3,
            )

    def reset_memory(self) -> None:
        device = self.lm.device(self.layer)
        dtype = torch.promote_types(self.lm.dtype, torch.float32)
        self.weight = torch.zeros(self.lm.weight_shape(self.layer), dtype=dtype, device=device)
        self.masks = MaskStore(self.d, device)
        self.mask_of_edit: list[int] = []  # equal masks are stored once, so that edit and mask may differ
        self.hash: TopHash | None = None
        self._last_rows: TrainingRows | None = None

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.hash is None:
            return {}, {}
        tensors = {
            "weight": self.weight, "masks": self.masks.packed,
            "center": self.hash.center, "permutation": self.hash.permutation,
        }  # fmt: skip
        return {"mask_of_edit": self.mask_of_edit}, tensors

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        device = self.lm.device(self.layer)
        self.weight = tensors["weight"].to(device, copy=True)
        self.masks = MaskStore.of(tensors["masks"], self.d, device)
        self.hash = TopHash(tensors["center"].to(device), tensors["permutation"].to(device), self.k)
        self.mask_of_edit = [int(i) for i in values["mask_of_edit"]]

    # --- reading --------------------------------------------------------------------------------------------

    def modules(self) -> list[str]:
        return [self.lm.down_name(self.layer)]

    def route(self, x: Tensor, out: Tensor, state: PromptState) -> Route | None:
        if not len(self.masks):
            return None
        query = self.query(state.mean(x), state)
        found = self._find(query)
        rows = found.active.nonzero()[:, 0]
        masks = query[rows] if self.config.activation == "own" else self.columns(found.index[rows])
        return Route(found, rows, masks.to(self.weight))

    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> Tensor | None:
        route: Route | None = state.route
        if route is None or not len(route.rows):
            return None
        whole = len(route.rows) == len(x)
        x, rest = (x, out) if whole else (x[route.rows], out[route.rows])
        new = (rest + self.recall(x.to(self.weight), route)).to(out.dtype)
        return new if whole else out.index_copy(0, route.rows, new)

    def recall(self, x: Tensor, route: Route) -> Tensor:
        """Wm (M o a_t) of the active rows: (a, t, d) -> (a, t, m)."""
        return torch.nn.functional.linear(x * route.masks[:, None], self.weight)

    def columns(self, index: Tensor) -> Tensor:
        """Columns (a, d) bool that are read for the stored masks `index` (a,)."""
        return self.masks.masks(index)

    def query(self, features: Tensor, state: PromptState) -> Tensor:
        """Masks (b, d) of the prompts' mean features."""
        if self.config.mask == "tophash":
            return self.hash(features)
        if state.ids is None:
            raise RequestError("random masks are a function of token ids; call the model with input_ids")
        prompts = [ids[keep].tolist() for ids, keep in zip(state.ids, state.prompt, strict=True)]
        return random_masks(prompts, self.d, self.k, self.config.seed).to(features.device)

    def _find(self, query: Tensor) -> Lookup:
        overlap, index = self.masks.best(query)
        ratio = overlap.float() / self.k
        active = ratio >= self.config.threshold
        if self.config.activation != "threshold":
            active = torch.ones_like(active)
        return Lookup(ratio, index, active)

    @torch.no_grad()
    def look_up(self, prompts: Sequence[str], *, batch_size: int = 64) -> Lookup:
        """What each prompt finds; the model is only run up to the memory's layer."""
        if not len(self.masks):
            zero = torch.zeros(len(prompts))
            return Lookup(zero, torch.full((len(prompts),), -1), zero.bool())
        with self.detached():
            features = mean_features(self.lm, self.layer, prompts, batch_size=batch_size)
        encoding = self.lm.encode(prompts)
        real = encoding.attention_mask.bool()
        state = PromptState(real, real, encoding.lengths, encoding.input_ids, prefill=True)
        return self._find(self.query(features, state))

    # --- writing --------------------------------------------------------------------------------------------

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        self.prepare()
        encoded = encode_targets(self.lm, facts, self.contexts, token="last")
        losses, steps, masks = [], [], []
        for i, fact in enumerate(bar(facts, self.name, unit="edit")):
            rows = self._rows(encoded, i)
            mask = self.query(rows.feature, rows.state)[0]
            index = self.masks.add(mask)
            seen = self.train(rows, mask, index, fact)
            self.mask_of_edit.append(index)
            masks.append(index)
            losses.append(seen[-1])
            steps.append(len(seen))
        return {"losses": losses, "steps": steps, "masks": masks}

    def prepare(self) -> None:
        """Permutation, background mean and contexts, before the first edit. The model is unedited."""
        cfg = self.config
        if self.contexts is None:
            self.contexts = sample_prefixes(self.lm, cfg.n_contexts, cfg.seed)
        if self.hash is not None:
            return
        center = torch.zeros(self.d, dtype=self.weight.dtype, device=self.weight.device)
        if cfg.features == "centered" and cfg.mask == "tophash":
            texts = self.background_texts(cfg.seed)[: cfg.n_background]
            center = mean_features(self.lm, self.layer, texts).mean(0).to(center)
        permutation = draw_permutation(self.d, cfg.seed) if cfg.permute else torch.arange(self.d)
        self.hash = TopHash(center, permutation.to(center.device), self.k)

    def _rows(self, encoded: TargetRows, i: int) -> TrainingRows:
        """The training rows of edit i, run once up to the memory's layer."""
        encoding, positions, places = encoded.take([i])
        state = PromptState(
            (torch.arange(encoding.input_ids.shape[1], device=positions.device) <= positions[:1, None]),
            encoding.attention_mask[:1].bool(), positions[:1] + 1, encoding.input_ids[:1], prefill=True,
        )  # fmt: skip
        self._last_rows = TrainingRows(self.lm, self.layer, encoding, places, state, like=self._last_rows)
        return self._last_rows

    def train(self, rows: TrainingRows, mask: Tensor, index: int, fact: Fact) -> list[float]:
        """Gradient descent on the columns of one mask; returns the losses of the evaluated steps."""
        columns = mask.nonzero()[:, 0]
        x = rows.x[..., columns].to(self.weight)
        start = self.weight[:, columns].clone()
        losses: list[float] = []

        def loss_of(weight: Tensor) -> Tensor:
            return rows.loss(torch.nn.functional.linear(x, weight), self._extra)

        for own in self._descend(start, loss_of, losses, fact):
            self.step_weight(columns, own)
        return losses

    def step_weight(self, columns: Tensor, own: Tensor) -> None:
        """Put the trained columns (m, k) into the memory after one step."""
        if self.config.weight_decay:
            self.weight.mul_(1 - self.config.lr * self.config.weight_decay)
        self.weight[:, columns] = own
        self.record("weight", self.weight)

    @property
    def _extra(self) -> int:
        return 1 if self.config.loss_divisor == "released" else 0

    def _descend(self, own: Tensor, loss_of, losses: list[float], fact: Fact, project=None):
        """Yield the trained tensor after each step of clipped gradient descent."""
        cfg = self.config
        for _ in range(cfg.steps):
            leaf = own.detach().requires_grad_(True)
            with torch.enable_grad():
                loss = loss_of(leaf)
            losses.append(float(loss.detach()))
            if not abs(losses[-1]) < float("inf"):
                raise NumericsError(
                    f"{self.name}: the loss of {fact.text!r} is {losses[-1]} at step {len(losses) - 1}; lower "
                    f"lr = {cfg.lr:g}"
                )
            settled = cfg.stop_change is None or (
                len(losses) > 1 and abs(losses[-1] - losses[-2]) <= cfg.stop_change
            )
            if settled and losses[-1] <= cfg.stop_loss:
                return
            (gradient,) = torch.autograd.grad(loss, leaf)
            gradient = gradient if project is None else project(gradient)
            norm = gradient.norm()
            self.record("norm", norm)
            gradient = gradient * (cfg.clip / (norm + 1e-6)).clamp(max=1.0)
            self.record("gradient", gradient)
            own = own - cfg.lr * (gradient + cfg.weight_decay * own)
            yield own


def sample_prefixes(lm: LM, n: int = 10, seed: int = 42) -> ContextTemplates:
    """The bare prompt and n prefixes: the model continues five starts by 5, then by 10 tokens (released code).

    Sampled from the five most likely tokens with a seed (the released code leaves that to the model's generation
    settings). Braces are removed.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(n):
        start = PREFIX_STARTS[i % len(PREFIX_STARTS)]
        more = PREFIX_TOKENS[(i // len(PREFIX_STARTS)) % len(PREFIX_TOKENS)]
        length = int(lm.encode([start]).lengths[0]) + more
        (text,) = generate(lm, [start], length, generator)
        texts.append(" ".join(text.replace("{", " ").replace("}", " ").split()))
    return ContextTemplates(((SLOT,), *(((f"{text} {SLOT}"),) for text in texts)))
