"""Scores between facts as products of factors, so that any block of pairs is one matrix product.

A score of facts i and j is  f(left_i . right_j)  with f the identity or the absolute value:

    cosine            left = right = h / ||h||                       CLaRE's entanglement E_ij
    centered cosine   the same of h - mean over the corpus           ablation
    whitened          left = C^-1 k / (k^T C^-1 k), right = k, |.|   asymmetric: i is edited, j is looked at
    whitened cosine   left = right = L^-1 k / ||L^-1 k||, C = L L^T, |.|   its symmetric relative
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ..base.errors import ConfigError, NumericsError


@dataclasses.dataclass(frozen=True)
class Score:
    """Factors of a score: `block(rows, columns)` gives any part of the (n, n') matrix.

    left: (n, width) of the edited facts.   right: (n', width) of the probes.
    absolute: |left . right| is the score.   symmetric: E_ij = E_ji where both sides are the same facts.
    """

    name: str
    left: Tensor
    right: Tensor
    absolute: bool = False
    symmetric: bool = True

    def __len__(self) -> int:
        return len(self.left)

    def block(self, rows: slice | Tensor = slice(None), columns: slice | Tensor = slice(None)) -> Tensor:
        """Scores (rows, columns), in the dtype of the factors."""
        product = self.left[rows] @ self.right[columns].T
        return product.abs_() if self.absolute else product

    def matrix(self) -> Tensor:
        """All scores, (n, n')."""
        return self.block()

    def to(self, dtype: torch.dtype) -> Score:
        """The same factors in another dtype (float32 for corpora)."""
        same = self.left is self.right
        left = self.left.to(dtype)
        return dataclasses.replace(self, left=left, right=left if same else self.right.to(dtype))


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    if size < 1:
        raise ConfigError(f"the block size must be at least 1, got {size}")
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _checked(H: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    right = H if probes is None else probes
    for X in (H, right):
        if X.ndim != 2 or not len(X):
            raise NumericsError(
                f"representations must be a matrix (n, width) with n > 0, got {tuple(X.shape)}"
            )
        if not torch.isfinite(X).all():
            raise NumericsError("the representations have NaN or Inf; read them again in float32")
    if H.shape[1] != right.shape[1]:
        raise NumericsError(f"widths differ: {H.shape[1]} and {right.shape[1]}; read both at the same place")
    return H, right


def _unit(X: Tensor) -> Tensor:
    norm = X.norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        bad = int((norm[:, 0] == 0).nonzero()[0])
        raise NumericsError(
            f"representation {bad} is zero and has no direction; drop the fact or read another module"
        )
    return X / norm


def cosine(H: Tensor, probes: Tensor | None = None) -> Score:
    """CLaRE's entanglement: cos(h_i, h_j). H: (n, width); probes: (n', width) or None for H itself."""
    H, right = _checked(H, probes)
    left = _unit(H)
    return Score("cosine", left, left if probes is None else _unit(right))


def centered_cosine(H: Tensor, probes: Tensor | None = None, mean: Tensor | None = None) -> Score:
    """cos(h_i - mu, h_j - mu), an ablation; mean: mu (width,), default the mean of all given rows."""
    H, right = _checked(H, probes)
    if mean is None:
        mean = (H if probes is None else torch.cat([H, right])).double().mean(0).to(H)
    left = _unit(H - mean)
    return Score("centered cosine", left, left if probes is None else _unit(right - mean))


def whitened(keys: Tensor, C: Tensor, probes: Tensor | None = None, *, lam: float | None = None) -> Score:
    """Whitened key similarity: the share of an edit's residual that reaches a probe (eq-clare-whitened).

        s_ij = |k_i^T C^-1 k_j| / (k_i^T C^-1 k_i)            lam=None: ROME, and MEMIT for lam -> 0
        s_ij = |k_i^T M^-1 k_j| / (1 + k_i^T M^-1 k_i)        M = lam C: MEMIT's update of one fact

    keys: (n, d) of the edited facts; C: (d, d) second moment, positive definite; probes: (n', d). Works in
    float64. Raises NumericsError for a singular C.
    """
    keys, right = _checked(keys, probes)
    K = keys.double()
    P = torch.cholesky_solve(K.T, _cholesky(C, K)).T
    energy = (P * K).sum(-1, keepdim=True)
    if lam is None:
        left = P / energy
    else:
        if not lam > 0:
            raise ConfigError(f"lam must be positive, got {lam}; use lam=None for the limit")
        left = P / (lam + energy)
    return Score("whitened", left, right.double(), absolute=True, symmetric=False)


def whitened_cosine(keys: Tensor, C: Tensor, probes: Tensor | None = None) -> Score:
    """|k_i^T C^-1 k_j| / sqrt(k_i^T C^-1 k_i k_j^T C^-1 k_j): the symmetric form, for graphs."""
    keys, right = _checked(keys, probes)
    L = _cholesky(C, keys.double())
    left = _unit(torch.linalg.solve_triangular(L, keys.double().T, upper=False).T)
    if probes is not None:
        right = _unit(torch.linalg.solve_triangular(L, right.double().T, upper=False).T)
    return Score("whitened cosine", left, left if probes is None else right, absolute=True)


def _cholesky(C: Tensor, K: Tensor) -> Tensor:
    C = C.to(K)
    if C.shape != (K.shape[1], K.shape[1]):
        raise NumericsError(f"the second moment is {tuple(C.shape)}, the keys have width {K.shape[1]}")
    L, failed = torch.linalg.cholesky_ex(C)
    if failed or not torch.isfinite(L).all():
        raise NumericsError(
            "the second moment is not positive definite; use more text than key directions, or a small ridge"
        )
    return L
