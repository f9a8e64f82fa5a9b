"""Checked inputs and symmetric positive (semi-)definite solves, float64, no model.

Every solve of the package has the form ``X C = B`` with a symmetric Gram matrix ``C`` (d, d) and rows of
``X`` and ``B`` (m, d). `factorize` tries Cholesky, estimates the condition number, and falls back to an
eigendecomposition (minimum-norm solution, Moore-Penrose) when ``C`` is singular to working precision.

Symbols: d key width, m value width, n number of facts; keys K (d, n) are columns, values V (m, n), weights W
(m, d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editkit.base.errors import NumericsError

EPS = torch.finfo(torch.float64).eps


def as_float64(x, name: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
    """Return `x` (tensor or array-like) as a detached float64 tensor on its own device, checked.

    `shape` lists the expected sizes; None stands for any size. Low-precision inputs are widened, never the
    reverse.

    Raises NumericsError: not numeric, wrong shape, or NaN/Inf entries (message gives name, count and first
    index).
    """
    try:
        # dtype at once: a Python float must not pass through float32
        out = torch.as_tensor(x, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise NumericsError(f"{name} cannot be read as a float64 tensor ({error}); "
                            "pass a torch tensor or a NumPy array of numbers") from error
    if shape is not None:
        fits = out.ndim == len(shape) and all(s is None or s == t for s, t in zip(shape, out.shape))
        if not fits:
            wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
            raise NumericsError(f"{name} has shape {tuple(out.shape)}, expected {wanted}; keys are columns "
                                "(d, n), values (m, n), weights (m, d): transpose or re-collect it")
    # A finite sum has finite terms; only the search for the first bad entry needs a mask of them all.
    if not torch.isfinite(out.sum()) and (bad := ~torch.isfinite(out)).any():
        first = tuple(bad.nonzero()[0].tolist())
        raise NumericsError(f"{name} has {int(bad.sum())} NaN or Inf entries (first at index {first}); "
                            "recompute it in float32 or higher and check the forward pass that produced it")
    return out


def as_gram(C, name: str, d: int | None = None) -> Tensor:
    """Return `C` as a float64 symmetric (d, d) tensor; a scalar c stands for ``c I`` and needs `d`.

    Asymmetry up to 1e-6 relative (float32 accumulation) is averaged away; more is refused.
    """
    C = as_float64(C, name)
    if C.ndim == 0:
        if d is None:
            raise NumericsError(f"{name} is a scalar; pass the (d, d) matrix")
        if C < 0:
            raise NumericsError(f"{name} is {float(C):g}; a scalar prior must be >= 0")
        return C * torch.eye(d, dtype=torch.float64, device=C.device)
    size = C.shape[0] if d is None else d
    C = as_float64(C, name, (size, size))
    if torch.equal(C, C.T):
        return C.clone()
    gap = float((C - C.T).abs_().max()) if C.numel() else 0.0
    if gap > 1e-6 * max(float(C.abs().max()), 1e-300):
        raise NumericsError(f"{name} is not symmetric (largest difference {gap:.3g}); "
                            "pass a second-moment or Gram matrix such as K @ K.T")
    return (C + C.T).div_(2)


def as_nonnegative(x: float, name: str) -> float:
    """Return `x` as a finite float >= 0, else raise NumericsError."""
    value = float(x)
    if not 0.0 <= value < float("inf"):
        raise NumericsError(f"{name} is {value!r}; it must be a finite number >= 0")
    return value


@dataclass(frozen=True)
class Factor:
    """A factorised Gram matrix: ``solve(B)`` returns X with ``X C = B`` (minimum norm where C is singular).

    Attributes: method "cholesky" or "eigh"; condition estimated 1-norm condition number (a lower estimate,
    inf when singular); rank numerical rank (d for Cholesky).
    """

    method: str
    condition: float
    rank: int
    lower: Tensor | None = None     # Cholesky factor, None for "eigh"
    _U: Tensor | None = None        # eigenvectors of the kept eigenvalues
    _inv: Tensor | None = None      # their reciprocals

    def solve(self, B: Tensor) -> Tensor:
        """X (m, d) with ``X C = B`` for B (m, d); C symmetric."""
        if self.lower is not None:
            return torch.cholesky_solve(B.T, self.lower).T
        return ((B @ self._U) * self._inv) @ self._U.T

    def inverse(self) -> Tensor:
        """Symmetric (pseudo-)inverse (d, d)."""
        if self.lower is not None:
            return torch.cholesky_inverse(self.lower)
        return (self._U * self._inv) @ self._U.T


def _condition(C: Tensor, L: Tensor) -> float:
    """Hager's 1-norm estimate of cond(C) from a Cholesky factor: at most ten O(d^2) solves, deterministic."""
    d = C.shape[0]
    x = torch.full((d, 1), 1.0 / d, dtype=C.dtype, device=C.device)
    estimate, visited = 0.0, set()
    for _ in range(5):
        y = torch.cholesky_solve(x, L)
        estimate = max(estimate, float(y.abs().sum()))
        z = torch.cholesky_solve(torch.where(y >= 0, 1.0, -1.0).to(C.dtype), L)
        j = int(z.abs().argmax())
        if j in visited or float(z.abs().max()) <= float((z * x).sum()):
            break
        visited.add(j)
        x = torch.zeros_like(x)
        x[j] = 1.0
    return estimate * float(C.abs().sum(dim=0).max())


def factorize(C: Tensor, name: str = "the Gram matrix", singular: str = "raise") -> Factor:
    """Factorise a symmetric positive semi-definite float64 matrix C (d, d).

    Cholesky first; when it breaks down, or leaves no correct digit (estimated condition above 0.1 / eps), an
    eigendecomposition decides. `singular`: "raise" refuses a singular C, "min_norm" solves on its range
    (Moore-Penrose).

    Raises NumericsError: C singular and singular="raise", or C indefinite beyond round-off.
    """
    if singular not in ("raise", "min_norm"):
        raise NumericsError(f"singular={singular!r} is unknown; use 'raise' or 'min_norm'")
    d = C.shape[0]
    L, failed = torch.linalg.cholesky_ex(C)
    if not int(failed):
        condition = _condition(C, L)
        if condition * EPS < 0.1:
            return Factor("cholesky", condition, d, lower=L)
    values, vectors = torch.linalg.eigh(C)
    top = float(values.abs().max()) if d else 0.0
    cutoff = d * EPS * top
    if d and float(values[0]) < -max(1e-8 * top, cutoff):
        raise NumericsError(f"{name} is indefinite (smallest eigenvalue {float(values[0]):.3g}, largest "
                            f"{top:.3g}); a fact was removed that was never added, or the covariance is "
                            "corrupt: rebuild it")
    keep = values > cutoff
    rank = int(keep.sum())
    if rank < d and singular == "raise":
        raise NumericsError(f"{name} is singular (rank {rank} of {d}); raise the covariance weight, add a "
                            "ridge > 0, use a covariance from more tokens, or ask for singular='min_norm'")
    condition = float(values[-1] / values[0]) if rank == d else float("inf")
    return Factor("eigh", condition, rank, _U=vectors[:, keep], _inv=1.0 / values[keep])
