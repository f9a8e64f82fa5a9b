"""A store of bit masks, searched by overlap.

Masks are packed into 64-bit words: 15,000 masks of 1,024 columns take 1.9 MB instead of 61 MB as float32, and a
query is an AND and a population count over them. `benchmarks/memoir_lookup.py` compares that with a matrix
product and with bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...base.errors import NumericsError

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
        # (words, room): word w of all masks lies together, so that counting runs over long rows
        self._words = torch.zeros(-(-d // WORD), 0, dtype=torch.int64, device=device)
        self._n = 0
        self._index: dict[bytes, int] = {}

    def __len__(self) -> int:
        return self._n

    @property
    def packed(self) -> Tensor:
        """(n, words) int64, all masks in the order they came."""
        return self._words[:, : self._n].T.contiguous()

    @classmethod
    def of(cls, packed: Tensor, d: int, device: torch.device | str | None = None) -> MaskStore:
        """From packed masks as `packed` gives them."""
        store = cls(d, device)
        store._words = packed.to(store._words.device).T.contiguous()
        store._n = len(packed)
        store._index = {row.numpy().tobytes(): i for i, row in enumerate(packed.cpu())}
        if len(store._index) != len(packed):
            raise NumericsError("a mask is stored twice; the store keeps each mask once")
        return store

    def add(self, mask: Tensor) -> int:
        """Index of the mask (d,) bool in the store, which has it afterwards."""
        row = pack(mask[None].to(self._words.device))[0]
        key = row.cpu().numpy().tobytes()
        if key not in self._index:
            words, room = self._words.shape
            if self._n == room:  # doubling keeps the cost of n additions linear
                more = torch.zeros(words, max(64, room), dtype=torch.int64, device=row.device)
                self._words = torch.cat([self._words, more], dim=1)
            self._words[:, self._n] = row
            self._index[key] = self._n
            self._n += 1
        return self._index[key]

    def masks(self, index: Tensor) -> Tensor:
        """Masks (n, d) bool at the given indices."""
        return unpack(self._words[:, index.to(self._words.device)].T, self.d)

    def overlaps(self, queries: Tensor) -> Tensor:
        """Number of common columns of each query (b, d) with each stored mask: (b, n) int64."""
        packed = pack(queries.to(self._words.device))
        if not self._n:
            return torch.zeros(len(packed), 0, dtype=torch.int64, device=packed.device)
        return torch.stack([self._counts(query) for query in packed])

    def best(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(overlap, index), each (b,): the stored mask that shares most columns with each query.

        Ties go to the oldest. Raises NumericsError for an empty store.
        """
        if not self._n:
            raise NumericsError("the store has no masks; add one before looking up")
        found = []
        for query in pack(queries.to(self._words.device)):
            counts = self._counts(query)
            # of several maxima numpy gives the first, torch any
            index = int(counts.numpy().argmax()) if counts.device.type == "cpu" else _first_largest(counts)
            found.append(torch.stack([counts[index], torch.as_tensor(index, device=counts.device)]))
        return tuple(torch.stack(found).unbind(-1))

    def _counts(self, query: Tensor) -> Tensor:
        """Common columns (n,) int64 with one packed query (words,)."""
        words = self._words[:, : self._n]
        if words.device.type != "cpu":
            total = torch.zeros(self._n, dtype=torch.int64, device=words.device)
            step = max(1, _CHUNK // len(words))
            for start in range(0, self._n, step):
                part = words[:, start : start + step] & query[:, None]
                total[start : start + step] = _popcount_by_shifts(part).sum(0)
            return total
        rows, bits = words.numpy().view(np.uint64), query.numpy().view(np.uint64)
        common, ones = np.empty(self._n, np.uint64), np.empty(self._n, np.uint8)
        total = np.zeros(self._n, np.uint16 if self.d < 1 << 16 else np.uint32)
        for row, bit in zip(rows, bits, strict=True):
            np.bitwise_and(row, bit, out=common)
            np.bitwise_count(common, out=ones)
            total += ones
        return torch.from_numpy(total.astype(np.int64))


def _first_largest(counts: Tensor) -> Tensor:
    return (counts == counts.max()).to(torch.uint8).argmax()
