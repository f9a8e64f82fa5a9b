"""Where the prompt ends: the one place that tells hooks which tokens of a forward pass they may look at.

A memory that decides by the prompt (MEMOIR, GRACE, WISE, ...) has to know which tokens are prompt, which are
answer and which are padding, and that a decoding step belongs to a prompt read earlier. A `PromptReader` hooked
onto the model's backbone works that out once per forward pass, as a `PromptState`:

- without further information every real token of an uncached pass is prompt;
- teacher-forced passes over prompt + answer say where the prompts end: `with prompts(lm, lengths): lm.model(...)`;
- a pass of one token with a filled KV cache is a decoding step: it gets the state of the pass that filled it;
- several new tokens with a filled cache are the rest of a prompt read in pieces, and refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..base.errors import ModelError, RequestError
from .hooks import submodule
from .lm import LM


@dataclasses.dataclass
class PromptState:
    """The tokens of one forward pass, b rows and t columns, as a memory sees them.

    prompt:  (b, t) bool, the column is a token of the row's prompt; nowhere true while decoding.
    real:    (b, t) bool, the column is a token (prompt or answer), not padding.
    lengths: (b,) tokens of each row's prompt; while decoding those of the prompt read earlier.
    ids:     (b, t) token ids, or None if the pass was given embeddings.
    prefill: this pass reads the prompts; False for a decoding step.
    route:   what the memory decided when it read the prompts; carried over to the decoding steps.
    """

    prompt: Tensor
    real: Tensor
    lengths: Tensor
    ids: Tensor | None
    prefill: bool
    route: Any = None

    @property
    def last(self) -> Tensor:
        """(b,) column of each prompt's last token (of a pass that reads the prompts)."""
        columns = torch.arange(self.prompt.shape[1], device=self.prompt.device)
        return torch.where(self.prompt, columns, -1).amax(-1)

    def mean(self, states: Tensor) -> Tensor:
        """(b, t, width) -> (b, width), the mean over each prompt's tokens, in at least float32."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        mask = self.prompt.to(wide)
        # Multiplying would spread a NaN of a padded position, which attention never shows to anybody.
        kept = torch.where(self.prompt[..., None].to(wide.device), wide, 0)
        return kept.sum(1) / mask.sum(1, keepdim=True)

    def at_last(self, states: Tensor) -> Tensor:
        """(b, t, width) -> (b, width), the state at each prompt's last token."""
        rows = torch.arange(states.shape[0], device=states.device)
        return states[rows, self.last.to(states.device)]


class PromptReader:
    """Hooks on a model's backbone that keep `state` up to date during its forward passes (None outside).

    The state of a pass that fills a KV cache is remembered as long as that cache lives.
    """

    def __init__(self, lm: LM) -> None:
        self.name = lm.name
        self.lengths: Tensor | None = None
        self.state: PromptState | None = None
        self._seen: weakref.WeakKeyDictionary[Cache, PromptState] = weakref.WeakKeyDictionary()
        backbone = _backbone(lm)
        self._signature = inspect.signature(backbone.forward)
        self._handles = [
            backbone.register_forward_pre_hook(self.before, with_kwargs=True),
            backbone.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict) -> PromptReader:
        raise ModelError(
            f"a memory is attached to {self.name}, and a copy of the model would not carry it: detach() it, copy "
            "the model, and give the copy the memory by its own save() and load()"
        )

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        self.state = self._read(given)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        state, self.state = self.state, None
        if state is None or output is None:  # the pass failed
            return
        for value in output.values() if isinstance(output, Mapping) else output:
            if isinstance(value, Cache):
                self._seen[value] = state

    def _read(self, given: Mapping[str, Any]) -> PromptState:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise ModelError(f"{self.name} was called without input_ids")
        rows, columns = source.shape[:2]
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        if mask is None:
            mask = torch.ones(rows, cached + columns, dtype=torch.bool, device=source.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != cached + columns:
            raise ModelError(
                "an attached memory needs a 2-d attention mask (rows, tokens) to know the padding; "
                "generate with the default (dynamic) cache"
            )
        real = mask[:, -columns:].bool()
        if cached:
            return self._decode(cache, cached, real, ids)
        prompt = real
        if self.lengths is not None:
            if len(self.lengths) != rows:
                raise RequestError(
                    f"{len(self.lengths)} prompt lengths were given for a batch of {rows} rows; "
                    "give prompts(lm, lengths) one per row"
                )
            prompt = real & (real.cumsum(-1) <= self.lengths.to(real.device)[:, None])
        lengths = prompt.sum(-1)
        if not bool(lengths.all()):
            raise RequestError(
                f"row {int((lengths == 0).nonzero()[0])} has no prompt token: an attached memory finds its "
                "edits by the prompt; give a prompt, or check the attention mask"
            )
        return PromptState(prompt, real, lengths, ids, prefill=True)

    def _decode(self, cache: Cache, cached: int, real: Tensor, ids: Tensor | None) -> PromptState:
        before = self._seen.get(cache)
        if before is None:
            raise ModelError(
                "this KV cache was filled without the memory that is attached now (or is a copy); "
                "read the prompts again with the memory attached"
            )
        if len(before.lengths) != len(real):
            raise ModelError(
                f"a decoding step has {len(real)} rows, its prompts had {len(before.lengths)}; "
                "keep the rows of a batch together"
            )
        if real.shape[1] > 1 and (self.lengths is None or int(self.lengths.max()) > cached):
            # A prompt read in pieces: the memory has decided by the first piece alone.
            raise ModelError(
                f"{real.shape[1]} new tokens came with a filled KV cache, so a part of the prompt was read "
                "before: an attached memory finds its edits by the whole prompt, read in one pass. Generate "
                "without prefill_chunk_size, and give a chat's turns together in one prompt without a cache; "
                "for a longer answer say where the prompts end: with prompts(lm, lengths)"
            )
        return PromptState(torch.zeros_like(real), real, before.lengths, ids, False, before.route)


def readers(lm: LM) -> list[PromptReader]:
    """The readers hooked onto a model now; empty when no memory is attached."""
    hooks = _backbone(lm)._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, PromptReader)]


def check_unread(lm: LM, what: str) -> None:
    """Raise ModelError if a memory is attached: `what` would be of the model with it, under the model's name."""
    if readers(lm):
        raise ModelError(f"a memory is attached to {lm.name}, and {what} is for the model alone; detach() it first")


@contextmanager
def prompts(lm: LM, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """Tell attached memories how many tokens of each row are prompt (padding not counted).

    For teacher-forced passes over prompt and answer; without it the whole row counts as prompt. Means nothing
    to a model without a memory. Raises RequestError for a length below 1.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.long)
    if lengths.ndim != 1 or not bool((lengths > 0).all()):
        raise RequestError(f"prompt lengths must be a list of positive numbers, got {lengths.tolist()}")
    found = readers(lm)
    before = [reader.lengths for reader in found]
    try:
        for reader in found:
            reader.lengths = lengths
        yield
    finally:
        for reader, value in zip(found, before, strict=True):
            reader.lengths = value


def _backbone(lm: LM) -> nn.Module:
    """The module that owns the blocks: every pass through the model calls it once, with ids, mask and cache."""
    return submodule(lm.model, lm.spec.blocks.rpartition(".")[0])
