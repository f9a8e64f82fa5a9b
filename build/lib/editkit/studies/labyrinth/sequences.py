"""Sequences of batches on one matrix with fixed keys and targets: how far from the one-time solution?

No model and no randomness beyond the given tensors; float64 unless a variant lowers the precision on
purpose.
Conditions and error formulas: Labyrinth sections 3 and 4 (book/labyrinth/derivation.md).

Symbols: d key width, m value width, N facts; K (d, N), V (m, N), W0 (m, d), M0 (d, d) prior.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from ...base.config import check_known
from ...base.errors import ConfigError
from ...linear.normal import one_time_solution, solve_step
from ...linear.postprocess import compensation_cache, prune_spectrum, rect
from ...linear.system import as_float64, as_gram


@dataclasses.dataclass(frozen=True)
class Problem:
    """One matrix and everything that is to be written into it.

    K (d, N) keys, V (m, N) absolute targets, W0 (m, d) original weights, M0 (d, d) prior (MEMIT: lam C0).
    """

    K: Tensor
    V: Tensor
    W0: Tensor
    M0: Tensor

    def __post_init__(self) -> None:
        K = as_float64(self.K, "K", (None, None))
        object.__setattr__(self, "K", K)
        object.__setattr__(self, "V", as_float64(self.V, "V", (None, K.shape[1])))
        object.__setattr__(self, "W0", as_float64(self.W0, "W0", (len(self.V), len(K))))
        object.__setattr__(self, "M0", as_gram(self.M0, "M0", len(K)))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A sequential rule: the aligned one (all defaults), or with conditions of the theorem dropped.

    history: keys of earlier batches stay in the solve.   prior: "once" in C_t, or added again at
        "every_step".
    residual: measured on the "current" weights or on the "original" ones.
    post: what thins out the solved update.   compensate: its error is fed back (Algorithm 1).
    solve, store: precision of the solve, and of the weights between batches.
    """

    label: str
    history: bool = True
    prior: Literal["once", "every_step"] = "once"
    residual: Literal["current", "original"] = "current"
    post: Literal["none", "rect", "prune"] = "none"
    compensate: bool = False
    solve: Literal["float64", "float32"] = "float64"
    store: Literal["float64", "float32", "bfloat16"] = "float64"


VARIANTS: dict[str, Variant] = {
    "aligned": Variant("aligned (history)"),
    "float32-weights": Variant("weights kept in float32", store="float32"),
    "float32-solve": Variant("solved in float32", solve="float32"),
    "bfloat16-weights": Variant("weights kept in bfloat16", store="bfloat16"),
    "no-history": Variant("no history", history=False),
    "recounted-prior": Variant("prior counted again each step", prior="every_step"),
    "stale-residual": Variant("residual against original weights", residual="original"),
    "rect": Variant("RECT, history only", post="rect"),
    "rect-compensated": Variant("RECT, history and compensation", post="rect", compensate=True),
    "prune": Variant("PRUNE, history only", post="prune"),
    "prune-compensated": Variant("PRUNE, history and compensation", post="prune", compensate=True),
}


def random_problem(
    d: int, m: int, n: int, seed: int, *, weight: float = 0.02, change: float = 1.0
) -> Problem:
    """Gaussian keys with a common mean and a decaying spectrum, targets `change` away from present values.

    The prior is `weight` times the Gram matrix of 4 d more keys of the same distribution: what should stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.linspace(1.5, 0.2, d, dtype=torch.float64)[:, None]
    mean = normal(d, 1)
    W0 = normal(m, d) / d**0.5
    old = mean + scale * normal(d, 4 * d)
    K = mean + scale * normal(d, n)
    return Problem(K, W0 @ K + change * normal(m, n), W0, weight * old @ old.T)


def batches_of(n: int, size: int) -> list[slice]:
    """Slices of `size` facts that cover 0..n. Raises ConfigError for a size below one."""
    if size < 1:
        raise ConfigError(f"batch = {size}: a batch has at least one fact")
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def one_time_path(problem: Problem, size: int) -> list[Tensor]:
    """A*_t (m, d) after each batch: the solution of everything so far at once."""
    return [
        one_time_solution(problem.K[:, : b.stop], problem.V[:, : b.stop], problem.W0, problem.M0)
        for b in batches_of(problem.K.shape[1], size)
    ]


def sequence(
    problem: Problem, size: int, variant: Variant, *, keep: float = 0.2, curve: str = "log"
) -> list[Tensor]:
    """Total update A_t (m, d) after each batch under a rule.

    keep: share of entries RECT writes.   curve: PRUNE's map of singular values above the largest one of W.
    """
    K, W0, M0 = problem.K, problem.W0, problem.M0
    W, S, E = _store(W0, variant), torch.zeros_like(M0), None
    path = []
    for t, b in enumerate(batches_of(K.shape[1], size), 1):
        k, v = K[:, b], problem.V[:, b]
        R = v - (W if variant.residual == "current" else W0) @ k
        C = (t if variant.prior == "every_step" else 1) * M0 + k @ k.T
        C = C + S if variant.history else C
        if variant.solve == "float32":
            B = R @ k.T if E is None else R @ k.T - E
            raw = torch.linalg.solve(C.float(), B.T.float()).T.double()
        else:
            raw = solve_step(k, R, C, E)
        written = raw
        if variant.post == "rect":
            written = rect(raw, W, keep)
        elif variant.post == "prune":
            written = prune_spectrum(raw, W, curve)
        E = compensation_cache(raw, written, C) if variant.compensate else None
        W = _store(W + written, variant)
        S = S + k @ k.T
        path.append(W - W0)
    return path


def _store(W: Tensor, variant: Variant) -> Tensor:
    return W.to(getattr(torch, variant.store)).to(torch.float64)


def relative(A: Tensor, B: Tensor) -> float:
    """||A - B|| / ||B|| (Frobenius)."""
    return float(torch.linalg.matrix_norm(A - B) / torch.linalg.matrix_norm(B))


def fit_error(problem: Problem, A: Tensor, facts: slice = slice(None)) -> float:
    """||(W0 + A) K - V|| / ||W0 K - V|| over some facts: 0 written exactly, 1 as if never written."""
    K, V = problem.K[:, facts], problem.V[:, facts]
    wanted = V - problem.W0 @ K
    return float(torch.linalg.matrix_norm(wanted - A @ K) / torch.linalg.matrix_norm(wanted))


def distance_curves(
    problem: Problem,
    size: int,
    variants: Sequence[str] = tuple(VARIANTS),
    *,
    keep: float = 0.2,
    curve: str = "log",
) -> pd.DataFrame:
    """Every variant against the one-time solution, one row per variant and step.

    Columns: variant, label, step, facts, distance ||A_t - A*_t|| / ||A*_t||, error (fit error of all
        facts so far), first (that of the first batch), one_time (fit error of the one-time solution).
    """
    check_known(variants, VARIANTS, "variant")
    exact = one_time_path(problem, size)
    cuts = batches_of(problem.K.shape[1], size)
    rows = []
    for name in variants:
        variant = VARIANTS[name]
        path = sequence(problem, size, variant, keep=keep, curve=curve)
        for step, (A, best, cut) in enumerate(zip(path, exact, cuts, strict=True), 1):
            so_far = slice(0, cut.stop)
            rows.append({
                "variant": name, "label": variant.label, "step": step, "facts": cut.stop,
                "distance": relative(A, best), "error": fit_error(problem, A, so_far),
                "first": fit_error(problem, A, cuts[0]), "one_time": fit_error(problem, best, so_far),
            })  # fmt: skip
    return pd.DataFrame(rows)
