"""The ridge problem of MALMEN and its adjoint, float64, no model.

    S = argmin ||U S - R||^2 + e^lambda ||S||^2 = A^-1 U^T R,      A = U^T U + e^lambda I

Rows are answer tokens: U (N, d) keys, R (N, m) value differences. The update of a weight W (m, d) is
Delta = S^T. With fewer rows than keys are wide the same S comes from the N x N system,
A^-1 U^T = U^T (U U^T + e^lambda I)^-1, which is what makes a batch of edits cheap.

Training needs the adjoint of S: with G (m, d) the gradient of the meta loss with respect to W + Delta,

    dL/dR = U A^-1 G^T,        dL/dlambda = - e^lambda <A^-1 G^T, S>             (horse.md equation 2)

so the language model and the hypernetwork never have to hold their graphs at the same time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...base.errors import NumericsError
from ...linear.system import as_float64


class RidgeSystem:
    """The factorised normal matrix of one module.

    U: (N, d) keys, rows.   log_ridge: lambda.
    Raises NumericsError for NaN, an empty U, or a matrix that is singular to working precision.
    """

    def __init__(self, U: Tensor, log_ridge: float) -> None:
        self.U = as_float64(U, "U (rows of keys)", (None, None))
        n, d = self.U.shape
        if not n:
            raise NumericsError("no rows of keys: the batch has no answer tokens")
        if not math.isfinite(log_ridge) or abs(log_ridge) > 300:
            raise NumericsError(
                f"log ridge = {log_ridge!r}: the ridge has left the range of numbers; lower meta_lr"
            )
        self.ridge = math.exp(log_ridge)
        self.dual = n < d
        gram = self.U @ self.U.T if self.dual else self.U.T @ self.U
        gram.diagonal().add_(self.ridge)
        self._factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed):
            raise NumericsError(
                f"U^T U + ridge I is singular to working precision (ridge {self.ridge:.3g}, {n} rows); "
                "give a larger log_ridge"
            )

    def _solve(self, B: Tensor) -> Tensor:
        return torch.cholesky_solve(B, self._factor)

    def shift(self, R: Tensor) -> Tensor:
        """Delta (m, d) for value differences R (N, m)."""
        R = as_float64(R, "R (rows of value differences)", (len(self.U), None))
        return self._solve(R).T @ self.U if self.dual else self._solve(self.U.T @ R).T

    def adjoint(self, G: Tensor, R: Tensor) -> tuple[Tensor, float]:
        """(dL/dR (N, m), dL/dlambda) for G = dL/dDelta (m, d)."""
        G = as_float64(G, "G (gradient of the weight)", (R.shape[1], self.U.shape[1]))
        R = as_float64(R, "R (rows of value differences)", (len(self.U), None))
        if self.dual:
            X = self._solve(self.U @ G.T)  # (N, m)
            return X, -self.ridge * float((X * self._solve(R)).sum())
        M = self._solve(G.T)  # (d, m)
        return self.U @ M, -self.ridge * float((M * self._solve(self.U.T @ R)).sum())
