"""The rows of one WISE edit: texts, losses and routing activations, as in the paper or as released."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.activations import ACT2FN

from ...base.errors import ModelError
from ...locate.contexts import ContextTemplates, generate
from ...locate.target_rows import encode_targets
from ...models.facts import SLOT, Fact
from ...models.hooks import trace
from ...models.lm import LM
from .base import MemoryEditor
from .layer_pass import LayerPass

_STARTS = ("I", "You", "Because", "Yes", "Q: ")


def sample_wise_contexts(lm: LM, n: int, seed: int) -> ContextTemplates:
    """Bare prompt and n texts "... {}" of five and ten new tokens, as EasyEdit makes for WISE."""
    if not n:
        return ContextTemplates()
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(n):
        start = _STARTS[i % len(_STARTS)]
        length = len(lm.tokenizer(start)["input_ids"]) + (5 if i < (n + 1) // 2 else 10)
        texts += generate(lm, [start], length, generator)
    clean = (" ".join(t.replace("{", " ").replace("}", " ").split()) for t in texts)
    return ContextTemplates(((SLOT,), tuple(f"{t} {SLOT}" for t in clean)))


def hinge(values: Tensor, positive_only: bool) -> Tensor:
    """Mean of max(0, value); with positive_only over the positive entries alone (released), else over all."""
    kept = values.clamp(min=0)
    if not positive_only:
        return kept.mean()
    return kept.sum() / (values > 0).sum().clamp(min=1)


def _sigma(wise: MemoryEditor):
    config = wise.lm.model.config
    name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if name not in ACT2FN:
        raise ModelError(
            f"the configuration of {wise.lm.name} names no activation function; use form='paper'"
        )
    return ACT2FN[name]


def distance(
    wise: MemoryEditor, x: Tensor, S: Tensor, W: Tensor, mask: Tensor | None, *, largest: bool = False
) -> Tensor:
    """Routing activation (b,) of inputs x (b, t, d): mean (or largest) over the tokens of mask (b, t) of
    || x S^T - x W^T ||; in the released form behind the model's activation function. mask None: all tokens.
    """
    if wise.config.form == "released":
        sigma = _sigma(wise)
        norms = (sigma(wise.project(x, S)) - sigma(wise.project(x, W))).norm(dim=-1)
    else:
        # The difference first: two large outputs would cancel. A zero has no direction to be pushed to.
        norms = ((x @ (S - W).T).square().sum(-1) + 1e-12).sqrt()
    if mask is None:
        return norms.amax(-1) if largest else norms.mean(-1)
    mask = mask.to(norms.device)
    if largest:
        return torch.where(mask.bool(), norms, 0).amax(-1)
    return torch.where(mask.bool(), norms, 0).sum(-1) / mask.to(norms).sum(-1)


@dataclasses.dataclass
class Rows:
    """One edit: its rows in all contexts, and what must not activate.

    x (r, t, d): layer inputs of the edit's rows; x_out (1, t', d): of the irrelevant text.
    mask, mask_out: tokens over which activations are averaged in the loss; None: all.
    """

    wise: MemoryEditor
    upper: LayerPass
    places: Tensor  # (t, 3) row, column that predicts, token
    divisors: Tensor  # (rows,) of the rows' summed losses
    x: Tensor
    x_out: Tensor
    mask: Tensor | None
    mask_out: Tensor | None
    labels: Tensor | None = None  # released form only

    def loss(self, S: Tensor) -> Tensor:
        """Cross entropy of the answer under W' = S."""

        def replace(own: Tensor) -> Tensor:
            return self.wise.project(self.upper.x.to(S), S).to(own)

        if self.labels is not None:
            return self._released_loss(replace)
        said = self.upper.log_probs(self.places, replace)
        total = torch.zeros(len(self.divisors), dtype=said.dtype, device=said.device)
        total = total.index_add(0, self.places[:, 0].to(said.device), -said)
        return (total / self.divisors.to(said)).mean()

    def _released_loss(self, replace) -> Tensor:
        """Sum over label tokens / (positions from one before the supposed boundary on), mean over the rows."""
        labels = self.labels[:-1]
        logits = self.wise.lm.head(self.upper.states(replace)[:-1, :-1]).float()
        each = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(
            len(labels), -1
        )
        boundary = (labels == -100).sum(-1) - 1
        columns = torch.arange(each.shape[1], device=each.device)
        counted = (columns >= (boundary - 1)[:, None]).to(each)
        return ((each * counted).sum(-1) / counted.sum(-1)).mean()

    def inside(self, S: Tensor, *, masked: bool = True) -> Tensor:
        """Activations (r,) of the edit's rows."""
        return distance(self.wise, self.x.to(S), S, self.wise.weight, self.mask if masked else self._plain)

    @property
    def _plain(self) -> Tensor | None:
        return None if self.wise.config.form == "released" else self.mask

    def activation_loss(self, S: Tensor) -> Tensor:
        """The three hinges of the routing loss."""
        cfg, positive = self.wise.config, self.wise.config.form == "released"
        inside = self.inside(S)
        outside = distance(self.wise, self.x_out.to(S), S, self.wise.weight, self.mask_out)
        return (
            hinge(outside[:, None] - inside + cfg.gamma, positive)
            + hinge(outside - cfg.alpha, positive)
            + hinge(cfg.beta - inside, positive)
        )

    def mean_activation(self, S: Tensor) -> float:
        """Mean activation of the edit's rows, kept for the threshold."""
        return float(self.inside(S, masked=False).mean())


@torch.no_grad()
def _inputs(wise: MemoryEditor, text: str) -> Tensor:
    """Layer inputs (1, t, d) of a text."""
    name = wise.modules()[0]
    with trace(wise.lm.model, [name], inputs=True, outputs=False, stop_at=name) as seen:
        wise.lm.forward(wise.lm.encode([text]))
    return seen.input[name]


def paper_rows(wise: MemoryEditor, fact: Fact, irrelevant: str) -> Rows:
    """Rows of the paper's form: activations over prompt tokens (what the router sees), loss over the answer."""
    cfg, lm = wise.config, wise.lm
    rows = encode_targets(lm, [fact], wise.contexts, "last")
    encoding, last, places = rows.take([0])
    upper = LayerPass(lm, encoding, cfg.layer, cfg.module)
    columns = torch.arange(encoding.input_ids.shape[1], device=last.device)
    prompt = (columns <= last[:, None]) & encoding.attention_mask.bool()
    counts = places[:, 1].bincount(minlength=len(last))
    if cfg.scope == "subject":
        first = encode_targets(lm, [fact], wise.contexts, "subject_first").take([0])[1]
        end = encode_targets(lm, [fact], wise.contexts, "subject_last").take([0])[1]
        subject = prompt & (columns >= first[:, None]) & (columns <= end[:, None])
        x_out, outside = upper.x, prompt & ~subject
        prompt = subject
    else:
        x_out, outside = _inputs(wise, irrelevant), None
    return Rows(wise, upper, places[:, 1:], counts, upper.x, x_out, prompt, outside)


def released_rows(wise: MemoryEditor, fact: Fact, irrelevant: str) -> Rows:
    """Rows as EasyEdit makes them: one left-padded batch with the irrelevant text as its last row, the label
    boundary at the width of the padded prompts, activations over all columns.
    """
    cfg, lm = wise.config, wise.lm
    prompts = [t.replace(SLOT, fact.text) for t in wise.contexts.flat]
    encoding = lm.encode(
        [*(t.replace(SLOT, fact.statement) for t in wise.contexts.flat), irrelevant], "left"
    )
    boundary = lm.encode(prompts, "left").input_ids.shape[1]
    labels = encoding.input_ids.clone()
    labels[:-1, :boundary] = -100
    labels[encoding.input_ids == lm.tokenizer.pad_token_id] = -100
    encoding["attention_mask"] = _released_attention(encoding.attention_mask, wise.weight.dtype)
    upper = LayerPass(lm, encoding, cfg.layer, cfg.module)
    x = upper.x
    empty = torch.zeros(0, 3, dtype=torch.long)
    if irrelevant in fact.text:
        inside = _subject_columns(lm, encoding.input_ids[:-1], irrelevant)
        return Rows(wise, upper, empty, empty[:, 0], x[:-1], x[:-1], inside, ~inside, labels)
    return Rows(wise, upper, empty, empty[:, 0], x[:-1], x[-1:], None, None, labels)


def _released_attention(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (rows, 1, t, t): padded positions, which see nothing, attend evenly to every column, as with
    the transformers release of the recordings (4.40); their states enter the activation loss.
    """
    allowed = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    allowed = allowed & mask.bool()[:, None, None, :]
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)


def _subject_columns(lm: LM, ids: Tensor, subject: str) -> Tensor:
    """(rows, tokens) bool, first occurrence of the subject's tokens, with a leading space if that is there."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    variants = [lm.tokenizer(s, add_special_tokens=False)["input_ids"] for s in (f" {subject}", subject)]
    for i, row in enumerate(ids.tolist()):
        for piece in variants:
            starts = [j for j in range(len(row) - len(piece) + 1) if row[j : j + len(piece)] == piece]
            if starts:
                mask[i, starts[0] : starts[0] + len(piece)] = True
                break
    return mask
