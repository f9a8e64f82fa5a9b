"""In-context editing: the nearest stored edits are written in front of the prompt.

    "Imagine that <edit>. Imagine that <edit>. <prompt>"       (the form of Cohen et al. 2024)

No parameter and no activation is touched; a model that has learned to use its context gives the answer. Prompts
are compared by TF-IDF over tokens. The prefix is put into the forward pass itself: callers see the columns they
fed, so that scoring, batches and `generate()` with a KV cache work as for every other editor. The sequence's
first token stays first, before the edits; where the tokenizer would join an edit and what follows without a space,
the edit ends its line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...base.config import Config, option
from ...base.errors import ConfigError, ModelError, RequestError
from ...models.facts import Fact
from ...models.hooks import hidden, with_hidden
from ...models.prompts import PromptReader, PromptState
from ..base import register
from .base import MemoryEditor
from .token_index import TokenIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextConfig(Config):
    """Options of in-context editing."""

    n_edits: int = option(1, "stored edits in front of a prompt, nearest last", low=1)
    threshold: float = option(0.5, "least TF-IDF cosine of an edit that is shown", low=0, high=1)
    template: str = option("Imagine that {}.", "how an edit is told", source="Cohen et al. 2024")


class _PrefixReader(PromptReader):
    """Puts prefixes in front of the rows of a forward pass, and keeps the cache's book-keeping right."""

    def __init__(self, editor: InContext) -> None:
        self.editor = editor
        super().__init__(editor.lm)

    def _read(self, given: Mapping[str, Any]) -> PromptState:
        cache = given.get("past_key_values")
        before = None if cache is None else self._seen.get(cache)
        if before is not None and before.route is not None:
            # The cache holds the prefix, the caller's mask does not.
            mask, prefix = given.get("attention_mask"), before.route
            if mask is None:
                cached = int(given["past_key_values"].get_seq_length())
                columns = given["input_ids"].shape[1]
                width = cached - prefix.shape[1] + columns
                mask = torch.ones(len(prefix), width, dtype=torch.long, device=prefix.device)
            given = {**given, "attention_mask": torch.cat([(prefix >= 0).to(mask), mask], dim=1)}
        return super()._read(given)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        super().before(module, args, kwargs)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        state, ids = self.state, given.get("input_ids")
        if state.prefill:
            if ids is None:
                raise ModelError("in-context editing reads token ids; call the model with input_ids")
            state.route = self.editor.prefixes(state)
        if state.route is None:
            return None
        prefix = state.route
        shown = (prefix >= 0).long()
        mask = given.get("attention_mask")
        positions = given.get("position_ids")
        if mask is None:
            total = ids.shape[1]
            if not state.prefill:
                total += int(given["past_key_values"].get_seq_length()) - prefix.shape[1]
            mask = torch.ones(len(ids), total, dtype=torch.long, device=ids.device)
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        limit, width = self.editor.lm.max_tokens, prefix.shape[1] + mask.shape[1]
        if limit is not None and width > limit:
            raise RequestError(
                f"{prefix.shape[1]} tokens of edits and {mask.shape[1]} of prompt and answer are more than the "
                f"{limit} of {self.editor.lm.name}; lower n_edits, or give shorter prompts"
            )
        # A prefix that brings the sequence's first token takes the place of the prompt's own.
        moved = self.editor.begins(prefix)
        first = mask.long().argmax(-1, keepdim=True)
        mask = mask.scatter(1, first, mask.gather(1, first) * (~moved)[:, None].to(mask))
        positions = (positions - moved[:, None].to(positions)).clamp(min=0)
        given["attention_mask"] = torch.cat([shown.to(mask), mask], dim=1)
        given["position_ids"] = positions + shown.sum(-1, keepdim=True)
        given.pop("cache_position", None)
        if state.prefill:
            pad = self.editor.lm.tokenizer.pad_token_id
            given["input_ids"] = torch.cat([torch.where(prefix >= 0, prefix, pad), ids], dim=1)
            own = (shown.cumsum(-1) - 1).clamp(min=0)
            given["position_ids"] = torch.cat([own, given["position_ids"]], dim=1)
        return (), given

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> object | None:
        state = self.state
        super().after(module, args, kwargs, output)
        if state is None or state.route is None or not state.prefill or output is None:
            return None
        states = hidden(output)
        return with_hidden(output, states[:, state.route.shape[1] :])


@register
class InContext(MemoryEditor):
    """Nearest edits in front of the prompt."""

    name = "in_context"
    Config = InContextConfig
    config: InContextConfig

    def check(self) -> None:
        if self.config.template.count("{}") != 1:
            raise ConfigError(f"template = {self.config.template!r} must contain '{{}}' once, for the edit")

    def modules(self) -> list[str]:
        return [self.lm.block_name(0)]

    def reset_memory(self) -> None:
        self.told: list[list[int]] = []  # tokens of every edit as it is told
        self.index = TokenIndex(self.lm.embeddings().shape[0])

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        flat = [t for row in self.told for t in row]
        return {"told": self.told, "rows": self.index.rows}, {"told": torch.tensor(flat, dtype=torch.int32)}

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.told = values["told"]
        self.index = TokenIndex(self.index.vocabulary, values["rows"])

    def attach(self) -> None:
        if self.is_attached:
            return
        self._check_base()
        self._check_alone()
        self._reader = _PrefixReader(self)

    def route(self, x: Tensor, out: Tensor, state: PromptState) -> Any:
        return state.route  # found by the reader, before the pass

    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> None:
        return None

    def prefixes(self, state: PromptState) -> Tensor | None:
        """Prefix tokens (b, p), -1 on the left of shorter ones; None if no row has any."""
        if not self.told:
            return None
        rows = [row[keep].tolist() for row, keep in zip(state.ids, state.prompt, strict=True)]
        best, cosine = self.index.find(rows, self.config.n_edits)
        found = [
            [
                t
                for i, c in reversed(list(zip(b, s, strict=True)))
                if c >= self.config.threshold - 1e-6  # a prompt finds itself: its cosine is 1 up to rounding
                for t in self.told[i]
            ]
            for b, s in zip(best, cosine, strict=True)
        ]
        width = max(map(len, found))
        if not width:
            return None
        bos = self.lm.tokenizer.bos_token_id
        found = [
            [bos, *told] if told and bos is not None and row[:1] == [bos] else told
            for row, told in zip(rows, found, strict=True)
        ]
        width = max(map(len, found))
        rows = [[-1] * (width - len(row)) + row for row in found]
        return torch.tensor(rows, device=state.ids.device)

    def begins(self, prefix: Tensor) -> Tensor:
        """(b,) whether the row's prefix (b, p) starts with the tokenizer's first token, moved there."""
        bos = self.lm.tokenizer.bos_token_id
        if bos is None:
            return torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
        first = (prefix >= 0).long().argmax(-1, keepdim=True)
        return prefix.gather(1, first)[:, 0] == bos

    def _tell(self, fact: Fact) -> list[int]:
        """Tokens of the edit as it is told, with a line's end where the prompt would join without a space."""
        tokenizer, text = self.lm.tokenizer, self.config.template.replace("{}", fact.statement)
        prompt = tokenizer(fact.text, add_special_tokens=False)["input_ids"]
        for end in ("", "\n", " "):
            told = tokenizer(text + end, add_special_tokens=False)["input_ids"]
            head, whole = tokenizer.decode(told), tokenizer.decode(told + prompt)
            if head[-1:].isspace() or whole[len(head) :][:1].isspace():
                return told
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        limit = self.lm.max_tokens
        for fact in facts:
            told = self._tell(fact)
            row = self.lm.tokenizer(fact.text)["input_ids"]
            if limit is not None and self.config.n_edits * len(told) + len(row) > limit:
                raise RequestError(
                    f"{self.config.n_edits} edits like {fact.statement!r} leave {self.lm.name} no room"
                )
            if row in self.index.rows:  # a prompt edited again: the latest answer
                self.told[self.index.rows.index(row)] = told
                continue
            self.told.append(told)
            self.index.add(row)
        return {"stored": len(self.told)}
