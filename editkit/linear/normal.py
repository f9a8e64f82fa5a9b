"""Normal equations of ROME, MEMIT, AlphaEdit and the one-time solution. Float64, no model.

Sources: ROME (Meng et al. 2022), MEMIT (Meng et al. 2023), AlphaEdit (Fang et al. 2025), The Labyrinth and
the Thread (arXiv 2605.26670); the chapter book/labyrinth/derivation.md proves what is used here.

Symbols: d key width, m value width, n facts of the batch, W (m, d), K (d, n), V and R = V - W K (m, n), C0
(d, d) mean over tokens of k k^T, S (d, d) sum of k k^T over earlier facts, Delta (m, d) is added to W. All
functions accept tensors or arrays, compute in float64 on the inputs' device, and raise NumericsError on
NaN/Inf, wrong shapes and singular systems.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from editkit.base.errors import NumericsError
from editkit.linear.system import Factor, as_float64, as_gram, as_nonnegative, factorize

FEW = 0.005  # share of directions below which a null space counts as empty, and its complement too


class Projector(NamedTuple):
    """Orthogonal projector ``P = U U^T`` (d, d) with its orthonormal basis U (d, r)."""

    P: Tensor
    U: Tensor

    @property
    def rank(self) -> int:
        """Dimension r of the subspace in which the update may move."""
        return self.U.shape[1]


def null_projector(C0, threshold: float) -> Projector:
    """Projector on the eigenvectors of C0 (d, d) with eigenvalue strictly below `threshold` (AlphaEdit).

    The threshold is absolute, so the rank depends on the scale of the activations: a warning gives the spectrum where
    (next to) everything or (next to) nothing is left.

    Raises NumericsError: C0 not positive semi-definite, or no eigenvalue below the threshold.
    """
    C0 = as_gram(C0, "C0")
    values, vectors = torch.linalg.eigh(C0)
    if float(values[0]) < -1e-6 * float(values[-1]):
        raise NumericsError(f"C0 has the negative eigenvalue {float(values[0]):.3g}; a second moment has "
                            "none: recompute it")
    U = vectors[:, values < threshold]
    if U.shape[1] == 0:
        raise NumericsError(f"no eigenvalue of C0 is below {threshold:g} (smallest {float(values[0]):.3g}); "
                            f"raise the null-space threshold: {_spectrum(values)}")
    share = U.shape[1] / len(values)
    if share > 1 - FEW or share < FEW:
        what = "all of them, so that nothing is protected" if share == 1 else f"{share:.1%} of them"
        warnings.warn(f"the null space of C0 at threshold {threshold:g} has {U.shape[1]} of {len(values)} directions, "
                      f"{what}; {_spectrum(values)}", stacklevel=2)
    return Projector(U @ U.T, U)


def _spectrum(values: Tensor) -> str:
    """Eigenvalues in ascending order as a sentence, with the thresholds that keep 1, 5 and 10 % of the directions."""
    d = len(values)
    kept = ", ".join(f"{float(values[min(d - 1, max(1, round(q * d)))]):.3g} for {q:.0%}" for q in (0.01, 0.05, 0.1))
    least, middle, most = (float(values[i]) for i in (0, d // 2, d - 1))
    return (f"its eigenvalues go from {least:.3g} over {middle:.3g} (median) to {most:.3g}; a threshold that keeps few "
            f"directions would be {kept}")


def as_projector(P, d: int) -> Projector:
    """Projector from a `Projector` or a (d, d) matrix with ``P = P^T = P^2`` up to 1e-4 (float32 files pass).
    """
    if isinstance(P, Projector):
        return Projector(as_float64(P.P, "P", (d, d)), as_float64(P.U, "U", (d, None)))
    P = as_float64(P, "P", (d, d))
    P = (P + P.T) / 2
    values, vectors = torch.linalg.eigh(P)
    off = torch.minimum(values.abs(), (values - 1).abs()).max()
    if float(off) > 1e-4:
        raise NumericsError(f"P is not an orthogonal projector (an eigenvalue is {float(off):.3g} away from "
                            "0 and 1); build it with null_projector(C0, threshold)")
    U = vectors[:, values > 0.5]
    return Projector(U @ U.T, U)


def _batch(K, R, name: str = "R") -> tuple[Tensor, Tensor]:
    K = as_float64(K, "K", (None, None))
    return K, as_float64(R, name, (None, K.shape[1]))


def _step(factor: Factor, K: Tensor, R: Tensor, E: Tensor | None) -> Tensor:
    """Solution of ``Delta C = R K^T - E`` with the factorised C; the thinner of the two right-hand sides is
    solved.
    """
    if E is None and K.shape[1] < R.shape[0]:
        return R @ factor.solve(K.T)
    return factor.solve(R @ K.T if E is None else R @ K.T - as_float64(E, "E", (R.shape[0], K.shape[0])))


def solve_step(K, R, C, E=None, *, singular: str = "raise", info: bool = False):
    """Accumulated-constraint step ``Delta C_t = R K^T - E`` (Labyrinth, Theorem 1 and Algorithm 1); Delta (m,
    d).

    K (d, n), R (m, n), C (d, d) = M_0 + S_{t-1} + K K^T, i.e. with the current keys already in it; E (m, d)
    the compensation cache, or None. With info=True returns (Delta, Factor).
    """
    K, R = _batch(K, R)
    factor = factorize(as_gram(C, "C_t", K.shape[0]), "C_t", singular)
    delta = _step(factor, K, R, E)
    return (delta, factor) if info else delta


def memit_update(K, R, C0, lam: float, S=None, *, ridge: float = 0.0, E=None, singular: str = "raise",
                 info: bool = False):
    """MEMIT: ``Delta (lam C0 + S + ridge I + K K^T) = R K^T - E``; returns Delta (m, d).

    K (d, n) keys, R (m, n) residuals against the current weights, C0 (d, d) mean second moment, lam >= 0 its
    weight in tokens. S (d, d), the Gram matrix of earlier keys, makes it MEMIT with history (MEMIT-seq); None
    is plain MEMIT. ridge 1 with E (m, d) is the released error-compensated solve. With info=True returns
    (Delta, Factor).

    Raises NumericsError: shapes, NaN/Inf, or a singular system (lam 0 with n < d) unless singular="min_norm".
    """
    K, R = _batch(K, R)
    d = K.shape[0]
    C = as_nonnegative(lam, "lam") * as_gram(C0, "C0", d) + K @ K.T
    if S is not None:
        C = C + as_gram(S, "S", d)
    if as_nonnegative(ridge, "ridge"):
        C = C + ridge * torch.eye(d, dtype=C.dtype, device=C.device)
    factor = factorize(C, "lam C0 + S + K K^T", singular)
    delta = _step(factor, K, R, E)
    return (delta, factor) if info else delta


def rome_direction(C, k) -> Tensor:
    """ROME's key direction ``u = C^{-1} k / ||C^{-1} k||`` (d,); with C None ``k / ||k||``.

    C: (d, d) second moment, or its `Factor`, for many keys.
    """
    k = as_float64(k, "k", (None,))
    if C is None:
        u = k
    else:
        factor = C if isinstance(C, Factor) else factorize(as_gram(C, "C", k.shape[0]), "C")
        u = factor.solve(k[None])[0]
    norm = torch.linalg.vector_norm(u)
    if float(norm) == 0.0:
        raise NumericsError("the key is zero; check the lookup token and the layer")
    return u / norm


def rome_update(W, k, v, u) -> Tensor:
    """ROME's rank-one update ``Delta = (v - W k) u^T / (k . u)`` (m, d): ``(W + Delta) k = v`` exactly.

    W (m, d), k (d,) key at which the value is imposed, v (m,) target output, u (d,) from `rome_direction`.
    The released code takes u from the template-averaged key and k from the bare prompt; R-ROME uses one key
    for both.
    """
    k = as_float64(k, "k", (None,))
    W = as_float64(W, "W", (None, k.shape[0]))
    v = as_float64(v, "v", (W.shape[0],))
    u = as_float64(u, "u", (k.shape[0],))
    overlap = torch.dot(k, u)
    if float(overlap.abs()) <= 1e-12 * float(torch.linalg.vector_norm(k) * torch.linalg.vector_norm(u)):
        raise NumericsError("k and u are orthogonal, the rank-one update is unbounded; use one key for both "
                            "(R-ROME)")
    return torch.outer(v - W @ k, u) / overlap


def alphaedit_update(K, R, P, S=None, ridge: float = 10.0, *, form: str = "symmetric", dtype=torch.float64,
                     info: bool = False):
    """AlphaEdit: ``Delta ((S + K K^T) P + ridge I) = R K^T P``; returns Delta (m, d), ``Delta P = Delta``.

    P: `Projector` (preferred) or (d, d) matrix, which costs an eigendecomposition; S (d, d) Gram matrix of
    earlier keys (None: without history); ridge >= 0 is the released L2.

    form "symmetric" solves the r x r positive definite system ``E (U^T (S + K K^T) U + ridge I) = R K^T U``
    by Cholesky, ``Delta = E U^T``, minimum norm when ridge is 0. form "released" solves the transposed
    non-symmetric d x d system of the official code by LU in `dtype` (torch.float32 reproduces it, rounding
    included), with the ridge rounded to float32 as there; it needs ridge > 0. With info=True returns (Delta,
    Factor or None).
    """
    K, R = _batch(K, R)
    d, ridge = K.shape[0], as_nonnegative(ridge, "ridge")
    G = K @ K.T if S is None else K @ K.T + as_gram(S, "S", d)
    if form == "symmetric":
        U = as_projector(P, d).U
        inner = U.T @ G @ U + ridge * torch.eye(U.shape[1], dtype=K.dtype, device=K.device)
        factor = factorize(inner, "U^T (S + K K^T) U + ridge I", "raise" if ridge else "min_norm")
        delta = _step(factor, U.T @ K, R, None) @ U.T
        return (delta, factor) if info else delta
    if form != "released":
        raise NumericsError(f"form={form!r} is unknown; use 'symmetric' or 'released'")
    if ridge == 0.0:
        raise NumericsError("the released d x d system is singular for ridge 0; use form='symmetric' or a "
                            "ridge > 0")
    P = as_float64(P.P if isinstance(P, Projector) else P, "P", (d, d)).to(dtype)
    left = P @ G.to(dtype) + (ridge * torch.eye(d, dtype=torch.float32, device=K.device)).to(dtype)
    delta = torch.linalg.solve(left, P @ (K.to(dtype) @ R.to(dtype).T)).T.to(torch.float64)
    return (delta, None) if info else delta


def one_time_solution(K, V, W0, M0, projector=None, *, info: bool = False):
    """Minimiser A (m, d) of ``tr(A M0 A^T) + ||(W0 + A) K - V||_F^2``; over ``A = A P`` with a projector.

    K (d, N), V (m, N) all facts at once, W0 (m, d) original weights, M0 prior: (d, d) matrix or a scalar
    ridge. MEMIT: M0 = lam C0. AlphaEdit: M0 = L2 with the null-space projector. A singular system gives the
    minimum-norm minimiser (Moore-Penrose). To weigh facts, scale the columns of K and V by the square root of
    the weight. With info=True returns (A, Factor).
    """
    K, V = _batch(K, V, "V")
    d = K.shape[0]
    W0 = as_float64(W0, "W0", (V.shape[0], d))
    C = as_gram(M0, "M0", d).to(K.device) + K @ K.T
    B = (V - W0 @ K) @ K.T
    if projector is None:
        factor = factorize(C, "M0 + K K^T", "min_norm")
        A = factor.solve(B)
    else:
        U = as_projector(projector, d).U
        inner = U.T @ C @ U
        factor = factorize((inner + inner.T) / 2, "U^T (M0 + K K^T) U", "min_norm")
        A = factor.solve(B @ U) @ U.T
    return (A, factor) if info else A
