"""Post-processing of solved updates (RECT, PRUNE) and the error compensation that keeps a sequence exact.

Sources: RECT (Gu et al. 2024), PRUNE (Ma et al. 2025), Labyrinth (arXiv 2605.26670) Algorithm 1. Shapes: W,
Delta, E (m, d); C (d, d); K (d, n); R (m, n).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from editkit.base.errors import ConfigError, NumericsError
from editkit.linear.recursive import AccumulatedLeastSquares
from editkit.linear.system import as_float64

# base of the logarithm, None for the linear curve
CURVES: dict[str, float | None] = {"log": math.e, "log2": 2.0, "log1.5": 1.5, "log1.2": 1.2, "linear": None}


def rect_mask(delta, W, keep: float = 0.2, eps: float = 1e-8) -> Tensor:
    """RECT's mask (m, d, bool): entries with the largest relative change ``|Delta / (W + eps)|``.

    keep: share of entries that survive, 0 < keep <= 1; 0.2 in the RECT paper and the error-compensated
    releases, 0.4 in the released memit_rect and memit_seq_rect. As released, the threshold is the k-th
    smallest ratio with k = floor((1 - keep) numel), and entries equal to it survive, so one entry more than
    the share does.
    """
    delta = as_float64(delta, "Delta")
    W = as_float64(W, "W", tuple(delta.shape))
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep is {keep!r}; it is a share of entries, 0 < keep <= 1")
    ratio = (delta / (W + eps)).abs()
    k = int(delta.numel() * (1.0 - keep) + 1e-9)
    if k < 1:
        return torch.ones_like(ratio, dtype=torch.bool)
    return ratio >= ratio.flatten().kthvalue(k).values


def rect(delta, W, keep: float = 0.2, eps: float = 1e-8) -> Tensor:
    """Delta with everything outside `rect_mask` set to zero."""
    return as_float64(delta, "Delta") * rect_mask(delta, W, keep, eps)


def squash(s: Tensor, limit: float, curve: str = "log") -> Tensor:
    """PRUNE's map of singular values: those above `limit` become ``log_b(s) - log_b(limit) + limit``.

    curve: "log" (base e, the default of the paper), "log2", "log1.5", "log1.2", or "linear" ((s + limit) /
    2). A logarithm has slope ``1 / (s ln b)``: for ``s < 1 / ln b`` it *enlarges* singular values, so on
    weights with a small spectral norm PRUNE amplifies instead of damping.
    """
    if curve not in CURVES:
        raise ConfigError(f"curve={curve!r} is unknown; use one of {', '.join(CURVES)}")
    if not limit > 0.0:
        raise NumericsError(f"the spectral limit is {limit!r}; it must be > 0 (is the weight matrix zero?)")
    base = CURVES[curve]
    if base is None:
        squashed = (s + limit) / 2
    else:
        squashed = torch.log(s.clamp_min(limit) / limit) / math.log(base) + limit
    return torch.where(s > limit, squashed, s)


def prune_spectrum(delta, W, curve: str = "log") -> Tensor:
    """PRUNE: squash the singular values of Delta (m, d) above the largest singular value of W (m, d).

    The paper applies it once, to the total update, against the original weights: ``W_0 + prune_spectrum(A_T,
    W_0)``. The released sequential variants apply it at each step against the current weights.
    """
    delta = as_float64(delta, "Delta")
    W = as_float64(W, "W", tuple(delta.shape))
    limit = float(torch.linalg.matrix_norm(W, ord=2))
    U, s, Vh = torch.linalg.svd(delta, full_matrices=False)
    if not s.numel() or float(s[0]) <= limit:
        return delta.clone()
    return (U * squash(s, limit, curve)) @ Vh


def compensation_cache(raw, written, C) -> Tensor:
    """``E_t = (Q(Delta_t) - Delta_t) C_t`` (m, d): half the gradient of the objective at the written weights.

    raw: the solved Delta_t, written: what was added to the weights, C (d, d) the Gram matrix of that solve.
    """
    raw = as_float64(raw, "raw")
    C = as_float64(C, "C", (raw.shape[1], raw.shape[1]))
    return (as_float64(written, "written", tuple(raw.shape)) - raw) @ C


def compensated_step(engine: AccumulatedLeastSquares, K, R, E, post: Callable[[Tensor], Tensor]
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Algorithm 1 for any post-processing map Q = `post`; returns (written, raw, E_t), each (m,
    d).

    Solves ``raw C_t = R K^T - E`` with the engine, writes Q(raw) and returns the cache for the next step. E
    is None at the first step; always passing None gives the uncompensated sequence. R = V - W_{t-1} K is
    measured on the written (post-processed) weights. The released ``*_err`` variants have an extra identity
    in the normal matrix: give the engine the prior lam C0 + I for those.
    """
    raw = engine.add(K, R, E)
    written = as_float64(post(raw), "post(Delta)", tuple(raw.shape))
    return written, raw, engine.times(written - raw)


def gradient_cache(E, K, R, delta, C) -> Tensor:
    """Cache for any written Delta_t: ``E_t = A_t C_t - B_t = E_{t-1} - R_t K_t^T + Delta_t C_t`` (m, d).

    E (m, d) or None, R against the weights before the step, C = C_t. Equals `compensation_cache` after an
    exact solve.
    """
    delta = as_float64(delta, "Delta")
    K = as_float64(K, "K", (delta.shape[1], None))
    R = as_float64(R, "R", (delta.shape[0], K.shape[1]))
    out = delta @ as_float64(C, "C", (delta.shape[1], delta.shape[1])) - R @ K.T
    return out if E is None else out + as_float64(E, "E", tuple(delta.shape))
