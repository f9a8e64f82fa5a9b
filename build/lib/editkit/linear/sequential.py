"""Sequential steps beside the accumulated one: memorize-the-latest, and general convex regularisers.

The one-time objective after t batches is a quadratic known by two matrices, C_t (d, d) and B_t (m, d):
``L_t(A) = tr(A C_t A^T) - 2 tr(A B_t^T) + const``. Shapes otherwise as in `normal`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from editkit.base.errors import NumericsError
from editkit.linear.normal import as_projector
from editkit.linear.system import as_float64, as_gram, as_nonnegative, factorize


def latest_update(K, R, C0, lam: float, A=None, *, projector=None, ridge: float = 0.0,
                  simplified: bool = False) -> Tensor:
    """Memorize-the-latest: keep general knowledge and the newest batch only; returns Delta (m, d).

    Full:        ``Delta (lam C0 + ridge I + K K^T) = R K^T - lam A C0``

    Simplified:  ``Delta (ridge I + K K^T) = R K^T``, the terms in C0 dropped as if ``C0 P = 0`` held exactly

    both restricted to ``Delta = Delta P`` when a projector is given. A (m, d) is the sum of all earlier
    updates (None: first batch). The full form stays anchored at W_0; the simplified one re-bases preservation
    on the damaged weights.
    """
    K = as_float64(K, "K", (None, None))
    d = K.shape[0]
    B = as_float64(R, "R", (None, K.shape[1])) @ K.T
    prior = as_nonnegative(lam, "lam") * as_gram(C0, "C0", d)
    C = K @ K.T
    if not simplified:
        C = C + prior
        if A is not None:
            B = B - as_float64(A, "A", tuple(B.shape)) @ prior
    U = torch.eye(d, dtype=K.dtype, device=K.device) if projector is None else as_projector(projector, d).U
    inner = U.T @ C @ U
    inner = (inner + inner.T) / 2
    inner.diagonal().add_(as_nonnegative(ridge, "ridge"))
    factor = factorize(inner, "the Gram matrix of the latest batch", "min_norm")
    return factor.solve(B @ U) @ U.T


@dataclass(frozen=True)
class Regularizer:
    """A convex R(A): its value and its proximal map ``prox(A, h) = argmin_X R(X) + ||X - A||^2 / (2 h)``."""

    value: Callable[[Tensor], float]
    prox: Callable[[Tensor, float], Tensor]


def l1(weight: float) -> Regularizer:
    """``weight * sum |A_ij|``: convex counterpart of RECT's mask."""
    return Regularizer(lambda A: weight * float(A.abs().sum()),
                       lambda A, h: A.sign() * (A.abs() - weight * h).clamp_min(0.0))


def nuclear(weight: float) -> Regularizer:
    """``weight * sum of singular values``: convex counterpart of PRUNE's squashed spectrum."""

    def prox(A: Tensor, h: float) -> Tensor:
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        return (U * (s - weight * h).clamp_min(0.0)) @ Vh

    return Regularizer(lambda A: weight * float(torch.linalg.svdvals(A).sum()), prox)


def neuron_groups(weight: float) -> Regularizer:
    """``weight * sum_j ||A_:j||`` over columns (neurons): convex counterpart of NSE's selection."""

    def prox(A: Tensor, h: float) -> Tensor:
        norms = torch.linalg.vector_norm(A, dim=0, keepdim=True)
        return A * (1.0 - weight * h / norms.clamp_min(weight * h + 1e-300)).clamp_min(0.0)

    return Regularizer(lambda A: weight * float(torch.linalg.vector_norm(A, dim=0).sum()), prox)


def minimize_convex(C, B, regularizer: Regularizer, start=None, *, tol: float = 1e-12,
                    max_iter: int = 50_000) -> Tensor:
    """Minimiser A (m, d) of ``tr(A C A^T) - 2 tr(A B^T) + R(A)``: accelerated proximal gradient, restarted.

    C (d, d) positive definite, B (m, d). Stops when a proximal step moves A by less than `tol` relative.

    Raises NumericsError: not converged after `max_iter` iterations.
    """
    B = as_float64(B, "B", (None, None))
    C = as_gram(C, "C", B.shape[1])
    h = 0.5 / float(torch.linalg.eigvalsh(C)[-1])                     # 1 / Lipschitz constant of the gradient
    A = torch.zeros_like(B) if start is None else as_float64(start, "start", tuple(B.shape))
    Y, momentum = A, 1.0
    for _ in range(max_iter):
        new = regularizer.prox(Y - 2.0 * h * (Y @ C - B), h)
        moved = float(torch.linalg.vector_norm(new - Y))
        if moved <= tol * max(1.0, float(torch.linalg.vector_norm(new))):
            return new
        if float(((Y - new) * (new - A)).sum()) > 0.0:                # the momentum points uphill: restart it
            momentum = 1.0
        following = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        Y = new + (momentum - 1.0) / following * (new - A)
        A, momentum = new, following
    raise NumericsError(f"the convex solver moved {moved:.2e} after {max_iter} iterations; raise max_iter or "
                        "tol, or improve the conditioning of C with a larger prior")


def convex_step(A, C, B, regularizer: Regularizer, **options) -> Tensor:
    """Sequential step for any convex regulariser (Proposition 3.4); returns Delta_t (m, d).

    ``Delta_t = argmin tr(Delta C_t Delta^T) + 2 <A C_t - B_t, Delta> + R(A + Delta)`` at the current total
    update A = A_{t-1}, with C_t and B_t of the problem after batch t. When A is the one-time solution of
    batch t - 1, the step is the difference of two consecutive one-time solutions, ``A*_t - A*_{t-1}``;
    `options` go to the solver.
    """
    A = as_float64(A, "A", (None, None))
    C = as_gram(C, "C", A.shape[1])
    B = as_float64(B, "B", tuple(A.shape))
    shifted = Regularizer(lambda D: regularizer.value(A + D), lambda D, h: regularizer.prox(A + D, h) - A)
    return minimize_convex(C, B - A @ C, shifted, **options)
