"""Engine that keeps the Cholesky factor of the accumulated Gram matrix, updated and down-dated by blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from editkit.base.errors import NumericsError
from editkit.linear.recursive import AccumulatedLeastSquares, capacity
from editkit.linear.system import factorize


class CholeskyGram(AccumulatedLeastSquares):
    """Keeps L with ``C = L L^T`` only: O(d^2 n) a batch and backward stable for additions, so nothing to
    re-factorise.

    ``C_new = L L^T + s K K^T`` is factorised by columns of blocks (Bennett 1965, method C1 of Gill et al.
    1974): with Z = L^{-1} K and M the (n, n) matrix of what is left, M_0 = I,

        N_b N_b^T = L_bb L_bb^T + s K_b M K_b^T,   K_r <- K_r - L_rb Z_b,
        N_rb = L_rb L_bb^{-1} N_b + s K_r M K_b^T N_b^{-T},   M^{-1} <- M^{-1} + s Z_b^T Z_b.
    """

    name = "cholesky"

    def __init__(self, M0, d: int | None = None, *, basis=None, tag: str = "", block: int = 128):
        if block < 1:
            raise NumericsError("block must be at least 1")
        self.block = block
        super().__init__(M0, d, basis=basis, tag=tag)

    def _start(self) -> None:
        factor = factorize(self._M0(), "M0")
        if factor.lower is None:
            raise NumericsError(f"the prior is too ill-conditioned for a Cholesky factor (condition "
                                f"{factor.condition:.1e}); add a ridge to M0 or use DirectGram")
        self._L = factor.lower

    def _absorb(self, K: Tensor, sign: int) -> Tensor:
        Z = torch.linalg.solve_triangular(self._L, K, upper=False)
        H = torch.linalg.solve_triangular(self._L.T, Z, upper=True)      # C^{-1} K
        out = torch.cholesky_solve(H.T, capacity(Z, Z, sign)) if K.shape[1] else H.T
        self._L = self._updated(K, Z, sign)
        return out

    def _updated(self, K: Tensor, Z: Tensor, sign: int) -> Tensor:
        L, rest = self._L.clone(), K.clone()
        T = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)         # M^{-1}
        for i in range(0, self.rank, self.block):
            j = min(i + self.block, self.rank)
            L_bb, K_b, Z_b = L[i:j, i:j].clone(), rest[i:j], Z[i:j]
            MK = torch.cholesky_solve(K_b.T, torch.linalg.cholesky(T))     # M K_b^T, (n, b)
            N, failed = torch.linalg.cholesky_ex(L_bb @ L_bb.T + sign * (K_b @ MK))
            if int(failed):
                raise NumericsError("the down-date lost positive definiteness to round-off; raise the prior "
                                    "or rebuild the engine from the remaining keys")
            if j < self.rank:
                rest[j:] -= L[j:, i:j] @ Z_b
                ratio = torch.linalg.solve_triangular(L_bb, N, upper=False)               # L_bb^{-1} N
                gain = torch.linalg.solve_triangular(N, MK.T, upper=False).T              # M K_b^T N^{-T}
                L[j:, i:j] = L[j:, i:j] @ ratio + sign * (rest[j:] @ gain)
            L[i:j, i:j] = N
            T = T + sign * (Z_b.T @ Z_b)
        return L

    def _solve(self, B: Tensor) -> Tensor:
        return torch.cholesky_solve(B.T, self._L).T

    def _times(self, X: Tensor) -> Tensor:
        return (X @ self._L) @ self._L.T

    def _tensors(self) -> dict[str, Tensor]:
        return {"L": self._L}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._L = tensors["L"]
