"""Low-memory engine: keys only, through the push-through form of the inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from editkit.base.errors import NumericsError
from editkit.linear.recursive import AccumulatedLeastSquares, capacity
from editkit.linear.system import factorize


class KeysOnly(AccumulatedLeastSquares):
    """Keeps the keys ``K`` (d, N), ``Y = M0^{-1} K`` and the Cholesky factor of ``T = I + K^T Y`` (N, N).

    ``C^{-1} = M0^{-1} - Y T^{-1} Y^T``. For a scalar prior nothing of size d^2 exists (AlphaEdit in its
    basis, ridge MEMIT). Retiring a fact deletes its column, which is exact; the factor of T is then rebuilt,
    O(N^3). Worth it while N stays below d.
    """

    name = "keys"

    def _start(self) -> None:
        self._factor = factorize(self._M0(), "M0") if self._prior.ndim else None
        if self._factor is None and float(self._prior) == 0.0:
            raise NumericsError("M0 is 0; keys alone need a positive prior: use a ridge > 0 or DirectGram")
        self._set(torch.zeros(self.rank, 0, dtype=torch.float64, device=self.device))

    def _inv(self, B: Tensor) -> Tensor:
        """``B M0^{-1}``."""
        return B / self._prior if self._factor is None else self._factor.solve(B)

    def _set(self, K: Tensor) -> None:
        Y = self._inv(K.T).T
        T = K.T @ Y
        L = torch.linalg.cholesky((T + T.T) / 2 + torch.eye(K.shape[1], dtype=K.dtype, device=K.device))
        self._K, self._Y, self._L = K, Y, L

    def _absorb(self, K: Tensor, sign: int) -> Tensor:
        if sign < 0:
            keep = torch.ones(self._K.shape[1], dtype=torch.bool, device=K.device)
            for k in K.T:
                gaps = torch.where(keep, (self._K - k[:, None]).abs().amax(dim=0), torch.inf)
                j = int(gaps.argmin()) if gaps.numel() else -1
                if j < 0 or not float(gaps[j]) <= 1e-12 * float(k.abs().max()):
                    raise NumericsError("a retired key is not among the stored ones; pass the keys as added")
                keep[j] = False
            self._set(self._K[:, keep])
            return self._solve(K.T)
        Y = self._inv(K.T).T
        F = torch.linalg.solve_triangular(self._L, self._K.T @ Y, upper=False)          # (N, n)
        H = Y - self._Y @ torch.linalg.solve_triangular(self._L.T, F, upper=True)       # C^{-1} K
        corner = capacity(K, H, +1)
        top = torch.cat([self._L, self._L.new_zeros(self._L.shape[0], K.shape[1])], dim=1)
        self._L = torch.cat([top, torch.cat([F.T, corner], dim=1)])
        self._K, self._Y = torch.cat([self._K, K], dim=1), torch.cat([self._Y, Y], dim=1)
        return torch.cholesky_solve(H.T, corner)

    def _solve(self, B: Tensor) -> Tensor:
        return self._inv(B) - torch.cholesky_solve((B @ self._Y).T, self._L).T @ self._Y.T

    def _times(self, X: Tensor) -> Tensor:
        prior = X * self._prior if self._factor is None else X @ self._prior
        return prior + (X @ self._K) @ self._K.T

    def _tensors(self) -> dict[str, Tensor]:
        return {"K": self._K, "L": self._L}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._K, self._L = tensors["K"], tensors["L"]
        self._Y = self._inv(self._K.T).T
