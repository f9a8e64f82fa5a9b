"""Engine that keeps the inverse of the accumulated Gram matrix: recursive least squares proper."""

from __future__ import annotations

import torch
from torch import Tensor

from editkit.base.errors import NumericsError
from editkit.linear.recursive import AccumulatedLeastSquares, capacity
from editkit.linear.system import factorize

# The engine keeps its symmetric matrices in the lower block triangle only: 60 % of the work at d = 4096.
_BLOCK = 1024


def _blocks(d: int):
    return ((i, min(i + _BLOCK, d)) for i in range(0, d, _BLOCK))


def add_symmetric_(M: Tensor, A: Tensor, B: Tensor) -> None:
    """In place ``M += A^T B``, a symmetric product of A, B (n, d), on the lower block triangle of M (d, d).
    """
    for i, j in _blocks(M.shape[0]):
        M[i:, i:j].addmm_(A[:, i:].T, B[:, i:j])


def times_symmetric(X: Tensor, M: Tensor) -> Tensor:
    """``X M`` (q, d) for X (q, d) and M (d, d) given by its lower block triangle."""
    out = torch.zeros_like(X)
    for i, j in _blocks(M.shape[0]):
        out[:, i:j].addmm_(X[:, i:], M[i:, i:j])
        out[:, j:].addmm_(X[:, i:j], M[j:, i:j].T)
    return out


def symmetric(M: Tensor) -> Tensor:
    """Full symmetric matrix from its lower block triangle."""
    lower = torch.tril(M)
    return lower + torch.tril(lower, -1).T


class InverseGram(AccumulatedLeastSquares):
    """Keeps ``Pi = C^{-1}`` by the Woodbury identity, O(d^2 n) a batch.

    With ``H = Pi K`` and ``T = I + s K^T H`` (s = +1 add, -1 retire): ``K^T C_new^{-1} = T^{-1} H^T`` and
    ``Pi_new = Pi - s Y Y^T`` with ``Y = H T^{-1/2}``, so Pi stays symmetric. C is needed for checks,
    re-factorisation and compensation, not for the update: new keys wait beside it and are folded in when
    `fold_after` of them wait (default 4 d, at most 4 d^2 numbers) or when a product with C gets cheaper so.

    Round-off grows with the number of updates, and a down-date cancels: what it takes away may be nearly all there
    is. So after every `check_every` batches, and after every retirement, the error ``||Pi C - I||_F`` is estimated
    (`error`) and Pi is re-factorised from C, O(d^3), when it exceeds `tolerance` and is
    ten times worse than a fresh factor was (`floor`, set by the conditioning). `refactored` counts those,
    `last_error` is the latest estimate.
    """

    name = "inverse"

    def __init__(self, M0, d: int | None = None, *, basis=None, tag: str = "", tolerance: float = 1e-9,
                 check_every: int = 10, fold_after: int | None = None):
        if tolerance <= 0 or check_every < 1:
            raise NumericsError("tolerance must be > 0 and check_every at least 1")
        self.tolerance, self.check_every = tolerance, check_every
        self.refactored, self.last_error, self.floor = 0, 0.0, 0.0
        super().__init__(M0, d, basis=basis, tag=tag)
        self.fold_after = fold_after or 4 * self.rank

    def _start(self) -> None:
        self._C = self._M0()
        self._Pi = factorize(self._C, "M0").inverse()
        self._waiting: list[tuple[int, Tensor]] = []        # sign and keys (n, d) not yet in C
        self._since = 0
        self.last_error = self.floor = self.error(probes=4)

    def _absorb(self, K: Tensor, sign: int) -> Tensor:
        keys = K.T.clone(memory_format=torch.contiguous_format)              # never the memory of the caller
        H = times_symmetric(keys, self._Pi)                                  # K^T C^{-1}
        L = capacity(K, H.T, sign)
        Y = torch.linalg.solve_triangular(L, H, upper=False)
        add_symmetric_(self._Pi, Y * -sign, Y)
        self._waiting.append((sign, keys))
        if sum(len(keys) for _, keys in self._waiting) >= self.fold_after:
            self._fold()
        self._since += 1
        if sign < 0 or self._since >= self.check_every:
            self._since, self.last_error = 0, self.error(probes=4, seed=self.steps)
            if not self.last_error <= max(self.tolerance, 10.0 * self.floor):
                self.refactor()
                return times_symmetric(keys, self._Pi)
        return torch.linalg.solve_triangular(L.T, Y, upper=True)

    def _fold(self) -> None:
        while self._waiting:                                                 # at most about d keys at a time
            group = [self._waiting.pop(0)]
            while self._waiting and sum(len(keys) for _, keys in group) < self.rank:
                group.append(self._waiting.pop(0))
            keys = torch.cat([keys for _, keys in group])
            add_symmetric_(self._C, torch.cat([sign * keys for sign, keys in group]), keys)

    def refactor(self) -> float:
        """Recompute Pi from C, O(d^3), and return the error that remains (estimate)."""
        self._fold()
        self._Pi = factorize(symmetric(self._C), "C_t").inverse()
        self.refactored += 1
        self.last_error = self.floor = self.error(probes=4, seed=self.steps)
        return self.last_error

    def _solve(self, B: Tensor) -> Tensor:
        return times_symmetric(B, self._Pi)

    def _times(self, X: Tensor) -> Tensor:
        if 4 * len(X) > self.rank:
            self._fold()
        out = times_symmetric(X, self._C)
        for sign, keys in self._waiting:
            out.addmm_(X @ keys.T, keys, alpha=sign)
        return out

    def _tensors(self) -> dict[str, Tensor]:
        counts = [self._since, self.refactored, self.floor, self.last_error]
        keys = torch.cat([self._C.new_zeros(0, self.rank)] + [keys for _, keys in self._waiting])
        batches = [[sign, len(keys)] for sign, keys in self._waiting]
        batches = torch.tensor(batches, dtype=torch.int64).reshape(-1, 2)
        return {"C": self._C, "Pi": self._Pi, "waiting": keys, "batches": batches,
                "counts": torch.tensor(counts, dtype=torch.float64)}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._C, self._Pi = tensors["C"], tensors["Pi"]
        batches = tensors["batches"].tolist()
        chunks = tensors["waiting"].split([n for _, n in batches])
        self._waiting = [(sign, keys) for (sign, _), keys in zip(batches, chunks)]
        since, refactored, self.floor, self.last_error = tensors["counts"].tolist()
        self._since, self.refactored = int(since), int(refactored)
