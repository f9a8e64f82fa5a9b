"""A store of bit masks, searched by overlap.

Masks are packed into 64-bit words: 15,000 masks of 1,024 columns take 1.9 MB instead of 61 MB as float32, and a
query is an AND and a population count over them. `benchmarks/memoir_lookup.py` compares that with a matrix
product and with bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import NumericsError

WORD = 64
_CHUNK = 1 << 22  # words compared at once: bounds the memory of a look-up


def pack(masks: Tensor) -> Tensor:
    """(n, d) bool -> (n, ceil(d / 64)) int64, bit j of word w is column 64 w + j."""
    n, d = masks.shape
    words = -(-d // WORD)
    bits = torch.zeros(n, words * WORD, dtype=torch.int64, device=masks.device)
    bits[:, :d] = masks
    # The sign bit takes part like any other: the sum is one of distinct powers of two, modulo 2^64.
    powers = torch.ones((), dtype=torch.int64, device=masks.device) << torch.arange(WORD, device=masks.device)
    return (bits.view(n, words, WORD) * powers).sum(-1)


def unpack(packed: Tensor, d: int) -> Tensor:
    """Inverse of `pack`: (n, d) bool."""
    bits = (packed[..., None] >> torch.arange(WORD, device=packed.device)) & 1
    return bits.flatten(-2)[..., :d].bool()


def popcount(words: Tensor) -> Tensor:
    """Number of set bits of each int64 word, as int64 (on the CPU by numpy, elsewhere by shifts and sums)."""
    if words.device.type == "cpu":
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64)).astype(np.int64))
    return _popcount_by_shifts(words)


def _popcount_by_shifts(words: Tensor) -> Tensor:
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56


class MaskStore:
    """Masks of d columns, added one at a time; equal masks are kept once.

    d: columns.   device: where look-ups run.
    """

    def __init__(self, d: int, device: torch.device | str | None = None) -> None:
        self.d = d
        self._words = torch.zeros(0, -(-d // WORD), dtype=torch.int64, device=device)
        self._n = 0
        self._index: dict[bytes, int] = {}

    def __len__(self) -> int:
        return self._n

    @property
    def packed(self) -> Tensor:
        """(n, words) int64, all masks in the order they came."""
        return self._words[: self._n]

    @classmethod
    def of(cls, packed: Tensor, d: int, device: torch.device | str | None = None) -> MaskStore:
        """From packed masks as `packed` gives them."""
        store = cls(d, device)
        store._words = packed.to(store._words.device, copy=True)
        store._n = len(packed)
        store._index = {row.numpy().tobytes(): i for i, row in enumerate(packed.cpu())}
        if len(store._index) != len(packed):
            raise NumericsError("a mask is stored twice; the store keeps each mask once")
        return store

    def add(self, mask: Tensor) -> int:
        """Index of the mask (d,) bool in the store, which has it afterwards."""
        row = pack(mask[None].to(self._words.device))
        key = row[0].cpu().numpy().tobytes()
        if key not in self._index:
            if self._n == len(self._words):  # doubling keeps the cost of n additions linear
                room = torch.zeros(
                    max(64, self._n), self._words.shape[1], dtype=torch.int64, device=row.device
                )
                self._words = torch.cat([self._words, room])
            self._words[self._n] = row[0]
            self._index[key] = self._n
            self._n += 1
        return self._index[key]

    def masks(self, index: Tensor) -> Tensor:
        """Masks (n, d) bool at the given indices."""
        return unpack(self.packed[index.to(self._words.device)], self.d)

    def overlaps(self, queries: Tensor) -> Tensor:
        """Number of common columns of each query (b, d) with each stored mask: (b, n) int64."""
        packed = pack(queries.to(self._words.device))
        found = torch.empty(len(queries), self._n, dtype=torch.int64, device=self._words.device)
        step = max(1, _CHUNK // self._words.shape[1])
        for start in range(0, self._n, step):
            rows = self.packed[start : start + step]
            for i, query in enumerate(packed):
                found[i, start : start + step] = _count(rows & query)
        return found

    def best(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(overlap, index), each (b,): the stored mask that shares most columns with each query.

        Ties go to the oldest. Raises NumericsError for an empty store.
        """
        if not self._n:
            raise NumericsError("the store has no masks; add one before looking up")
        overlaps = self.overlaps(queries)
        most = overlaps.amax(-1)
        # argmax does not promise the first of several maxima
        return most, (overlaps == most[:, None]).to(torch.uint8).argmax(-1)


def _count(words: Tensor) -> Tensor:
    """Set bits of each row of int64 words."""
    if words.device.type == "cpu":
        counts = np.bitwise_count(words.numpy().view(np.uint64))
        return torch.from_numpy(counts.sum(-1, dtype=np.int64))
    return _popcount_by_shifts(words).sum(-1)
