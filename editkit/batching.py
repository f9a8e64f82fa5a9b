"""Batches of sequences under an explicit token budget."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError


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
