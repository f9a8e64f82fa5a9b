"""Target values: the hidden state that makes the model say the new object (MEMIT equation 16, ROME equation
4).

A vector delta is added to the output of a block (MEMIT) or of an MLP (ROME) at the lookup token, and
optimised by Adam so that the target follows the prompt in every context, while the next-token distribution
after "{subject} is a" stays (KL term) and delta stays short. All facts of a batch are optimised in one
forward and one backward pass per step: their losses do not interact and Adam works elementwise, so each fact
takes exactly the steps it would take alone.

Symbols: m value width, n facts, h_i state of fact i before editing, z_i = h_i + delta_i.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..base.cached import found_or_made
from ..base.config import Config, option
from ..base.errors import NumericsError
from ..base.progress import bar
from ..models.answers import log_probs_of, logits_of
from ..models.batching import Encoding, by_length
from ..models.facts import Fact, as_facts
from ..models.hooks import frozen, trace
from ..models.lm import LM
from ..models.lookup import Where, check_where
from ..models.products import products
from .contexts import ContextTemplates
from .keys import read_states
from .moments import tokenizer_hash
from .replay import Replay, run
from .target_rows import TargetRows, encode_targets

LOSSES = ("total", "nll", "kl", "decay")
_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetConfig(Config):
    """How targets are optimised. Defaults are MEMIT's for GPT2-XL; released figures of other models are in
    the papers' hyper-parameter files. Released choices that differ from the obvious reading are options here.
    """

    lr: float = option(0.5, "Adam's step size", source="v_lr", above=0)
    steps: int = option(
        20, "evaluations of the loss, one more than Adam steps", source="v_num_grad_steps", low=1
    )
    weight_decay: float = option(0.5, "weight of the length penalty", source="v_weight_decay", low=0)
    clamp_factor: float | None = option(
        0.75, "longest ||delta|| in units of ||h||; None: no limit", source="clamp_norm_factor", above=0
    )
    kl_factor: float = option(0.0625, "weight of the KL term", source="kl_factor", low=0)
    loss_threshold: float = option(0.05, "a fact stops when its loss is below", source="released code", low=0)
    loss_layer: int | None = option(
        None, "block whose output goes through norm and head for the target loss; None: the last, i.e. the "
        "model's own logits", source="v_loss_layer", low=0
    )  # fmt: skip
    decay_form: Literal["norm_over_norm2", "norm2_over_norm2"] = option(
        "norm_over_norm2",
        "||delta|| / ||h||^2 as released, or its square-over-square form",
        source="released code",
    )
    kl_direction: Literal["edited_original", "original_edited"] = option(
        "edited_original", "KL(edited || original) as in ROME equation 4 and as released, or the reverse"
    )
    kl_prompt: str = option("{} is a", "prompt of the KL term", source="ROME section 3.1")
    final_step: bool = option(
        False, "take an Adam step also after the last evaluation (not so in released code)"
    )
    tokens_per_batch: int = option(8192, "rows x longest row of one forward pass", low=1)
    reuse_prefix: bool = option(
        True, "compute what lies below the edited block or before the edited token once, not at every step"
    )
    products: Literal["model", "bfloat16"] = option(
        "model", "'bfloat16': round the factors of the blocks' products, where a processor is faster at it"
    )


@dataclasses.dataclass(frozen=True)
class TargetResult:
    """Optimised targets.

    z, init:  (m, n) float64, target and original state at the lookup token of the bare prompt.
    losses:   (n, steps, 4) float64, columns as in LOSSES; NaN after a fact has stopped.
    """

    z: Tensor
    init: Tensor
    losses: Tensor

    @property
    def iterations(self) -> Tensor:
        """Number of evaluated iterations of each fact, (n,)."""
        return torch.isfinite(self.losses[..., 0]).sum(-1)


def _evaluate(
    lm: LM, batch: tuple[Encoding | Replay, Tensor, Tensor], delta: Tensor, names: tuple[str, str, str],
    start: dict[str, Tensor], n_rows: int, cfg: TargetConfig,
) -> Tensor:  # fmt: skip
    """Losses (facts, 4) of the current delta (facts, m). The first call fills `start` with h and the original
    distribution of the KL row.
    """
    inputs, columns, places = batch
    edited, read, end = names
    n = delta.shape[0]

    def add(out: Tensor) -> Tensor:
        rows = torch.arange(out.shape[0], device=out.device)
        old = out[rows, columns.to(out.device)]
        start.setdefault("h", old[::n_rows].detach().to(delta))
        added = delta[:, None].expand(-1, n_rows, -1).reshape(-1, delta.shape[1])
        return out.index_put((rows, columns.to(out.device)), old + added.to(out))

    with trace(lm.model, {read, end}, edit={edited: add}, stop_at=end) as seen:
        run(lm, inputs)

    fact, row = places[:, 0], places[:, 1]
    said = log_probs_of(lm, seen.output[read], places[:, 1:]).to(delta.device)
    # Mean over a row's target tokens, then over the contexts; every row of a fact has the same target, but a
    # tokenizer may cut it differently behind different texts.
    per_row = torch.zeros(n * n_rows, dtype=delta.dtype, device=delta.device).index_add(
        0, row.to(delta.device), torch.ones_like(said, dtype=delta.dtype)
    )
    weight = 1 / (per_row[row.to(delta.device)] * (n_rows - 1))
    nll = torch.zeros(n, dtype=delta.dtype, device=delta.device)
    nll = nll.index_add(0, fact.to(delta.device), -(said.to(delta.dtype) * weight))

    if cfg.kl_factor:
        kl_rows = torch.arange(n_rows - 1, n * n_rows, n_rows, device=columns.device)
        states = seen.output[end]
        now = log_softmax(logits_of(lm, states[kl_rows.to(states.device), columns[kl_rows].to(states.device)]), -1)
        then = start.setdefault("kl", now.detach())
        p, q = (now, then) if cfg.kl_direction == "edited_original" else (then, now)
        kl = cfg.kl_factor * (p.exp() * (p - q)).sum(-1).to(device=delta.device, dtype=delta.dtype)
    else:
        kl = torch.zeros_like(nll)
    length, scale = delta.norm(dim=-1), start["h"].norm(dim=-1)
    power = 1 if cfg.decay_form == "norm_over_norm2" else 2
    decay = cfg.weight_decay * length**power / scale**2
    return torch.stack([nll + kl + decay, nll, kl, decay], dim=-1)


def _suffixes(replay: Replay, batch: tuple[Encoding, Tensor, Tensor]) -> tuple[Replay, Tensor, Tensor]:
    """A batch of whole rows as one of suffixes, in which every row begins with its edited token."""
    _, columns, places = batch
    places = places.clone()
    places[:, 2] -= columns[places[:, 1]]
    return replay, torch.zeros_like(columns), places


@torch.enable_grad()
def _optimize(
    lm: LM,
    rows: TargetRows,
    facts: list[int],
    names: tuple[str, str, str],
    layer: int,
    cfg: TargetConfig,
    start: dict[str, Tensor],
    label,
) -> tuple[Tensor, Tensor, Tensor]:
    """delta (b, m), h (b, m) and losses (b, steps, 4) of one batch of facts. start: their h, if it is known."""
    device = rows.positions.device
    dtype = torch.promote_types(lm.dtype, torch.float32)
    n, R = len(facts), rows.per_fact
    delta = torch.zeros(n, lm.weight_shape(layer)[0], dtype=dtype, device=device)
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    losses = torch.full((n, cfg.steps, len(LOSSES)), torch.nan, dtype=torch.float64)
    active = torch.arange(n)  # facts still being optimised; the others keep their delta and leave the batch
    whole: dict[str, Tensor] = {}
    batch = encoding, columns, _ = rows.take(facts)
    replay = None
    if cfg.reuse_prefix and Replay.possible(lm, encoding):
        replay = Replay.of(lm, encoding, columns, layer, names[2], after=names[0] == lm.block_name(layer))
        batch = _suffixes(replay, batch)
    for step in range(cfg.steps):
        here = delta[active].requires_grad_(True)
        value = _evaluate(lm, batch, here, names, start, R, cfg)
        whole = whole or dict(start)
        seen = value.detach().double().cpu()
        losses[active, step] = seen
        if not torch.isfinite(seen[:, 0]).all():
            bad = facts[int(active[~torch.isfinite(seen[:, 0])][0])]
            raise NumericsError(
                f"the loss of {label(bad)} is NaN or Inf at step {step}; lower the step size "
                f"(lr = {cfg.lr:g}) or load the model in float32"
            )
        keep = seen[:, 0] >= cfg.loss_threshold
        if not keep.any() or (step == cfg.steps - 1 and not cfg.final_step):
            break
        (gradient,) = torch.autograd.grad(value[keep.to(value.device), 0].sum(), here)
        stay, active = keep.to(device), active[keep]
        moved = here.detach()[stay]
        _adam(moved, gradient[stay], mean, square, active.to(device), step + 1, cfg.lr)
        if cfg.clamp_factor is not None:
            limit = cfg.clamp_factor * whole["h"][active.to(device)].norm(dim=-1)
            length = moved.norm(dim=-1)
            long = length > limit
            moved[long] = moved[long] * limit[long, None] / length[long, None]
        delta[active.to(device)] = moved
        if not keep.all():
            batch = rows.take([facts[i] for i in active.tolist()])
            if replay is not None:
                batch = _suffixes(replay.take([i * R + r for i in active.tolist() for r in range(R)]), batch)
        start = {name: value[active.to(value.device)] for name, value in whole.items()}
    return delta, whole["h"], losses


def _adam(
    value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rows: Tensor, step: int, lr: float
) -> None:
    """One Adam step on `value` (rows of the whole), in the order of operations of torch.optim.Adam."""
    m = mean[rows].lerp_(gradient, 1 - _BETAS[0])
    v = square[rows].mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    mean[rows], square[rows] = m, v
    denominator = (v.sqrt() / (1 - _BETAS[1] ** step) ** 0.5).add_(_EPS)
    value.addcdiv_(m, denominator, value=-lr / (1 - _BETAS[0] ** step))


def optimize_targets(
    lm: LM,
    facts: Sequence[Fact],
    layer: int,
    cfg: TargetConfig | None = None,
    *,
    contexts: ContextTemplates | Sequence | None = None,
    token: Where = "subject_last",
    module: Literal["block", "mlp"] = "block",
    cache_dir: str | os.PathLike | None = None,
) -> TargetResult:
    """Targets of all facts at one layer, on the current weights.

    layer:  block whose output ("block", MEMIT) or MLP output ("mlp", ROME) is optimised.
    token:  lookup token in the prompt. The KL prompt is edited at its subject: at the same token of the
            subject, and at the last one for lookup tokens outside it.
    cache_dir: folder in which targets are found again by whatever method asks for the same ones: named by a hash of
            model weights, tokenizer, facts, contexts, layer, token, module and all options.
    Facts are batched under `cfg.tokens_per_batch`; a fact that has reached the loss threshold takes no
    further steps and leaves the batch.

    Raises RequestError (subject, slot, target), ModelError (layer), NumericsError (loss NaN or Inf).
    """
    cfg, facts = TargetConfig.make(cfg), as_facts(facts, "optimise targets for")
    check_where(token)
    layer = lm.check_layer(layer)
    contexts = ContextTemplates.of(contexts)
    if cache_dir is None:
        return _optimize_all(lm, facts, layer, cfg, contexts, token, module)
    content = {
        "format": "editkit-targets-1", "fingerprint": lm.fingerprint(), "tokenizer": tokenizer_hash(lm),
        "facts": [fact.request for fact in facts], "contexts": contexts.groups,
        "place": [layer, module, token], "options": cfg.to_dict(),
    }  # fmt: skip
    found = found_or_made(
        cache_dir,
        "targets",
        content,
        lambda parts: {p: vars(_optimize_all(lm, facts, layer, cfg, contexts, token, module)) for p in parts},
        __file__,
    )["all"]
    return TargetResult(*(found[x].to(lm.device(layer)) for x in ("z", "init")), found["losses"])


def _optimize_all(
    lm: LM,
    facts: list[Fact],
    layer: int,
    cfg: TargetConfig,
    contexts: ContextTemplates,
    token: Where,
    module: str,
) -> TargetResult:
    last = lm.n_layers - 1
    read = lm.check_layer(last if cfg.loss_layer is None else max(cfg.loss_layer, layer))
    edited = lm.block_name(layer) if module == "block" else lm.mlp_name(layer)
    names = (edited, lm.block_name(read), lm.block_name(last if cfg.kl_factor else read))
    rows = encode_targets(lm, facts, contexts, token, cfg.kl_prompt)
    width = lm.weight_shape(layer)[0]
    z = torch.empty(len(facts), width, dtype=torch.float64, device=lm.device(layer))
    init = torch.empty_like(z)
    losses = torch.full((len(facts), cfg.steps, len(LOSSES)), torch.nan, dtype=torch.float64)
    batches = by_length([rows.per_fact * length for length in rows.lengths], cfg.tokens_per_batch)
    start: dict[str, Tensor] = {}
    if (
        cfg.products != "model"
    ):  # z = h + delta is compared with states read exactly, so h has to be exact too
        bare = [(contexts.fill(fact.prompt)[0], fact.subject) for fact in facts]
        start["h"] = read_states(lm, bare, outputs=[edited], token=token).output[edited].T.to(lm.dtype)
    with frozen(lm.model), products(lm, cfg.products):
        for batch in bar(batches, f"targets of {len(facts)} facts", unit="batch"):
            known = {name: value[batch] for name, value in start.items()}
            delta, h, seen = _optimize(
                lm, rows, batch, names, layer, cfg, known, lambda i: f"fact {i} ({facts[i].text!r})"
            )
            init[batch] = h.to(init)
            z[batch] = (h + delta).to(z)
            losses[batch] = seen
    return TargetResult(z.T.contiguous(), init.T.contiguous(), losses)
