"""Padded batches, and batches of sequences under an explicit token budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.errors import ConfigError


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
