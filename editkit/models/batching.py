"""Texts as rows of tokens, padded batches of them, and batches under an explicit token budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..base.errors import ConfigError

PaddingSide = Literal["left", "right"]


class Encoding(dict):
    """A padded batch, ready for `model(**encoding)`: input_ids, attention_mask, position_ids, each (batch,
    tokens).

    offsets: LongTensor (batch, tokens, 2), character spans of the tokens in `texts` (0, 0 for padding and
    special tokens), or None for tokenizers without offsets. padding_side: "left" or "right".
    """

    def __init__(
        self, tensors: dict[str, Tensor], texts: Sequence[str], offsets: Tensor | None, padding_side: str
    ) -> None:
        super().__init__(tensors)
        self.texts, self.offsets, self.padding_side = list(texts), offsets, padding_side

    @property
    def input_ids(self) -> Tensor:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        return self["attention_mask"]

    @property
    def position_ids(self) -> Tensor:
        return self["position_ids"]

    @property
    def lengths(self) -> Tensor:
        """Number of real tokens of each row, (batch,)."""
        return self.attention_mask.sum(-1)

    @property
    def first(self) -> Tensor:
        """Column of the first real token of each row, (batch,)."""
        return self.attention_mask.argmax(-1)

    @property
    def last(self) -> Tensor:
        """Column of the last real token of each row, (batch,)."""
        return self.first + self.lengths - 1

    def take(self, rows: Sequence[int]) -> tuple[Encoding, int]:
        """Some rows, without the columns that are padding in all of them, and how many left columns were cut.

        Column positions found in the whole batch have to be lowered by that number.
        """
        index = torch.as_tensor(rows, dtype=torch.long, device=self.input_ids.device)
        used = self.attention_mask[index].any(0).nonzero().squeeze(-1)
        left, right = int(used[0]), int(used[-1]) + 1
        tensors = {k: v[index, left:right] for k, v in self.items()}
        offsets = None if self.offsets is None else self.offsets[index, left:right]
        return Encoding(tensors, [self.texts[i] for i in index.tolist()], offsets, self.padding_side), left

    def select(self, rows: Tensor) -> Encoding:
        """Rows in any order and number, with all columns."""
        index = rows.to(self.input_ids.device)
        tensors = {k: v[index] for k, v in self.items()}
        offsets = None if self.offsets is None else self.offsets[index]
        return Encoding(tensors, [self.texts[i] for i in index.tolist()], offsets, self.padding_side)

    def to(self, device: torch.device | str) -> Encoding:
        """The same batch on another device."""
        tensors = {k: v.to(device) for k, v in self.items()}
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Encoding(tensors, self.texts, offsets, self.padding_side)


def _added(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it."""
    whole, bare = (
        tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)
    )
    for i in range(len(whole) - len(bare) + 1):
        if whole[i : i + len(bare)] == bare:
            return whole[:i], whole[i + len(bare) :]
    return [], []


def token_rows(
    tokenizer, texts: Sequence[str], *, add_special_tokens: bool = True, max_length: int | None = None
) -> tuple[list[list[int]], list[list[tuple[int, int]]] | None]:
    """Token ids of each text, and their character spans (None for tokenizers that know none).

    One rule for editing, scoring, perplexity and generation: what the tokenizer puts in front of a text (a begin
    token) stands there once, also if the text has it already; what it appends (an end token) is left out, since
    every text here is read to be continued. max_length cuts on the right.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    front, behind = _added(tokenizer) if add_special_tokens else ([], [])
    raw = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, padding=False, truncation=max_length is not None,
        max_length=max_length, return_offsets_mapping=fast, return_attention_mask=False, verbose=False,
    )  # fmt: skip
    rows, spans = [], []
    for i, ids in enumerate(raw["input_ids"]):
        stop = len(ids) - len(behind) if behind and ids[-len(behind) :] == behind else len(ids)
        again = len(front) if ids[: 2 * len(front)] == 2 * front else 0
        own = slice(len(front) + again, stop)
        rows.append(ids[: len(front)] + ids[own])
        if fast:
            span = raw["offset_mapping"][i]
            spans.append(span[: len(front)] + span[own])
    return rows, spans if fast else None


def padded(rows: Sequence[Sequence[int]], pad: int, side: PaddingSide) -> dict[str, Tensor]:
    """input_ids, attention_mask, position_ids of rows of ids, each (rows, width).

    position_ids count real tokens only, so that left padding gives the same results as right padding also with
    absolute positions. Raises ConfigError for another side than "left" and "right".
    """
    if side not in ("left", "right"):
        raise ConfigError(f"padding_side must be 'left' or 'right', got {side!r}")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Split sequences into batches of similar length.

    lengths: tokens of each sequence. Returns lists of indices, shortest sequences first, such that rows times
    longest row <= tokens_per_batch in every batch (a single longer sequence forms a batch of its own).
    Raises ConfigError for a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ConfigError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
    batches: list[list[int]] = []
    current: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if current and (len(current) + 1) * lengths[i] > tokens_per_batch:
            batches.append(current)
            current = []
        current.append(i)
    return [*batches, current] if current else batches
