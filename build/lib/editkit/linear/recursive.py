"""Editing as recursive least squares: engines that keep the accumulated Gram matrix solvable at every batch.

Each engine holds ``C_t = M_0 + sum_s K_s K_s^T`` in some form and returns the accumulated-constraint step
``Delta_t C_t = R_t K_t^T - E_{t-1}`` (Labyrinth, Theorem 1 and Algorithm 1; book/labyrinth/derivation.md).
`engines.make_engine` builds one by name. All give the same update; they differ in cost for d key width, n
facts of the batch, N facts so far:

    DirectGram    O(d^3)        a batch, d^2 numbers    re-solves every time: the baseline
    InverseGram   O(d^2 n)      a batch, 2 d^2 numbers  keeps C^{-1} by Woodbury, and keys (inverse_gram.py)
    CholeskyGram  O(d^2 n)      a batch, d^2 numbers    keeps the Cholesky factor (cholesky_gram.py)
    KeysOnly      O(d N n)      a batch, 2 d N numbers  keeps keys only, for N below d (keys_only.py)

Symbols: K (d, n) keys as columns, R (m, n) residuals against the current weights, Delta (m, d), E (m, d).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.base.errors import NumericsError
from editkit.linear.system import as_float64, as_gram, factorize

_DIGEST = 16  # bytes of the hash that remembers a written key


class AccumulatedLeastSquares(ABC):
    """Base of the engines: checks, the record of written keys, add / retire / revise, errors, saving.

    M0: prior, a (d, d) matrix (MEMIT: lam C0) or a scalar ridge with `d`. basis: orthonormal U (d, r)
    restricts updates to ``Delta = Delta U U^T`` (AlphaEdit); a matrix prior is then restricted to U too. tag:
    free text naming what the history belongs to (model fingerprint, layer); a saved state is accepted only by
    an equal tag.

    Raises NumericsError: shapes, NaN/Inf, a prior that is singular where the engine needs its inverse.
    """

    name: ClassVar[str]

    def __init__(self, M0, d: int | None = None, *, basis=None, tag: str = ""):
        prior = as_float64(M0, "M0")
        self.d = d if d is not None else (prior.shape[0] if prior.ndim == 2 else None)
        if self.d is None:
            raise NumericsError("M0 is a scalar; give the key width d as well")
        self.basis = None if basis is None else as_float64(basis, "basis", (self.d, None))
        self.rank = self.d if self.basis is None else self.basis.shape[1]
        if self.basis is not None:
            prior = as_gram(prior, "M0", self.d) if prior.ndim else prior
            identity = torch.eye(self.rank, dtype=torch.float64, device=self.basis.device)
            if float((self.basis.T @ self.basis - identity).abs().max()) > 1e-8:
                raise NumericsError("the columns of basis are not orthonormal; use Projector.U of "
                                    "null_projector")
            prior = self.basis.T @ prior @ self.basis if prior.ndim else prior
        if prior.ndim == 0 and float(prior) < 0:
            raise NumericsError(f"M0 is {float(prior):g}; a scalar prior must be >= 0")
        self._prior = prior if prior.ndim == 0 else as_gram(prior, "M0", self.rank)
        self.device = prior.device if self.basis is None else self.basis.device
        self.tag = tag
        self.steps = 0
        self._written: Counter[bytes] = Counter()
        self._start()

    def _M0(self) -> Tensor:
        """The prior as a fresh (r, r) matrix."""
        if self._prior.ndim:  # checked and symmetric since the engine was made
            return self._prior.to(self.device, copy=True)
        return as_gram(self._prior, "M0", self.rank).to(self.device)

    # What an engine provides.

    @abstractmethod
    def _start(self) -> None:
        """Build the state of ``C_0 = M_0``."""

    @abstractmethod
    def _absorb(self, K: Tensor, sign: int) -> Tensor:
        """Replace C by ``C + sign K K^T`` and return ``K^T C_new^{-1}`` (n, r); on failure change nothing."""

    @abstractmethod
    def _solve(self, B: Tensor) -> Tensor:
        """``B C^{-1}`` for B (m, r)."""

    @abstractmethod
    def _times(self, X: Tensor) -> Tensor:
        """``X C`` for X (m, r)."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """State to save; `_restore` reads it back."""

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `_tensors`."""

    # What a user calls.

    @property
    def n_facts(self) -> int:
        """Number of facts (key columns) in force."""
        return sum(self._written.values())

    def add(self, K, R, E=None) -> Tensor:
        """Add facts and return Delta (m, d): ``Delta C_t = R K^T - E`` with ``C_t = C_{t-1} + K K^T``.

        K (d, n), R = V - W_{t-1} K (m, n), E (m, d) the cache of `postprocess.compensated_step` or None.
        """
        K, R = self._batch(K, R)
        if E is not None:
            E = as_float64(E, "E", (R.shape[0], self.d))
        delta = R @ self._absorb(self._to_basis(K.T).T, +1)
        if E is not None:
            delta = delta - self._solve(self._to_basis(E))
        self._written.update(_digests(K))
        self.steps += 1
        return self._from_basis(delta)

    def retire(self, K, R) -> Tensor:
        """Remove facts and return Delta (m, d): ``Delta C_t = -R K^T`` with ``C_t = C_{t-1} - K K^T``.

        K (d, n) exactly the keys given to `add`, R = V_old - W_{t-1} K (m, n). Raises NumericsError for a key
        that is not in force.
        """
        K, R = self._batch(K, R)
        keys = self._in_force(K)
        delta = -R @ self._absorb(self._to_basis(K.T).T, -1)
        self._written -= keys
        self.steps += 1
        return self._from_basis(delta)

    def revise(self, K_old, R_old, K_new, R_new, E=None) -> Tensor:
        """Retire-and-replace (Proposition 3.5): both residuals are against the weights before the call.

        ``Delta C_t = R_new K_new^T - R_old K_old^T - E``, ``C_t = C_{t-1} - K_old K_old^T + K_new K_new^T``.
        The new facts are added first, so the Gram matrix never gets smaller than needed.
        """
        K_old, R_old = self._batch(K_old, R_old)
        self._in_force(K_old)
        first = self.add(K_new, R_new, E)
        return first + self.retire(K_old, R_old - first @ K_old)

    def solve(self, B) -> Tensor:
        """``B C_t^{-1}`` (m, d) for B (m, d), on the basis if there is one."""
        return self._from_basis(self._solve(self._to_basis(as_float64(B, "B", (None, self.d)))))

    def times(self, X) -> Tensor:
        """``X C_t`` (m, d) for X (m, d): with X = Q(Delta) - Delta this is the compensation cache E_t."""
        return self._from_basis(self._times(self._to_basis(as_float64(X, "X", (None, self.d)))))

    def error(self, probes: int | None = 8, seed: int = 0) -> float:
        """Frobenius norm of ``C^{-1} C - I`` as applied: it bounds the relative error of the next update.

        probes random sign vectors estimate it without bias in its square, O(d^2) each; None measures it,
        O(d^3).
        """
        if probes is None:
            B = torch.eye(self.rank, dtype=torch.float64)
        else:
            generator = torch.Generator().manual_seed(seed)
            B = torch.randint(0, 2, (probes, self.rank), generator=generator).to(torch.float64) * 2 - 1
        B = B.to(self.device)
        gap = self._times(self._solve(B)) - B
        return float(torch.linalg.vector_norm(gap)) / (1.0 if probes is None else probes**0.5)

    def state_dict(self) -> dict[str, Any]:
        """{"meta": JSON-able description, "tensors": name -> tensor}; continuing from it repeats every bit.
        """
        keys = b"".join(sorted(self._written.elements()))
        written = torch.tensor(list(keys), dtype=torch.uint8).reshape(-1, _DIGEST)
        return {"meta": self._identity() | {"steps": self.steps},
                "tensors": {"written": written} | {k: v.clone() for k, v in self._tensors().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of an engine of the same kind, prior, basis and tag, else NumericsError says which.
        """
        for field, value in self._identity().items():
            found = state["meta"].get(field)
            if found != value:
                raise NumericsError(f"the saved history has {field} {found!r}, this engine {value!r}: it "
                                    "belongs to another model, layer or configuration; start a new history "
                                    "or load the right one")
        rows = bytes(state["tensors"]["written"].reshape(-1).tolist())
        self._written = Counter(rows[i:i + _DIGEST] for i in range(0, len(rows), _DIGEST))
        self.steps = int(state["meta"]["steps"])
        self._restore({k: v.clone().to(self.device) for k, v in state["tensors"].items() if k != "written"})

    # Helpers.

    def _identity(self) -> dict[str, Any]:
        content = hashlib.sha256(self._prior.cpu().numpy().tobytes())
        if self.basis is not None:
            content.update(self.basis.cpu().contiguous().numpy().tobytes())
        return {"engine": self.name, "d": self.d, "rank": self.rank, "tag": self.tag,
                "prior": content.hexdigest()}

    def _batch(self, K, R) -> tuple[Tensor, Tensor]:
        K = as_float64(K, "K", (self.d, None)).to(self.device)
        return K, as_float64(R, "R", (None, K.shape[1])).to(self.device)

    def _in_force(self, K: Tensor) -> Counter[bytes]:
        """Hashes of the columns of K; NumericsError names those that are not in force."""
        columns = _digests(K)
        keys = Counter(columns)
        missing = [i for i, key in enumerate(columns) if keys[key] > self._written[key]]
        if missing:
            raise NumericsError(f"columns {missing[:8]} of K were never added (or already retired); pass "
                                "the keys as stored when they were written, not keys recomputed on the "
                                "edited model")
        return keys

    def _to_basis(self, X: Tensor) -> Tensor:
        X = X.to(self.device)
        return X if self.basis is None else X @ self.basis

    def _from_basis(self, X: Tensor) -> Tensor:
        return X if self.basis is None else X @ self.basis.T


def _digests(K: Tensor) -> list[bytes]:
    rows = K.T.contiguous().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=_DIGEST).digest() for row in rows]


def capacity(K: Tensor, H: Tensor, sign: int) -> Tensor:
    """Cholesky factor (n, n) of ``I + sign K^T H``, H = C^{-1} K; refuses to remove what C does not contain.
    """
    inner = sign * (K.T @ H)
    inner = (inner + inner.T) / 2
    inner.diagonal().add_(1.0)
    L, failed = torch.linalg.cholesky_ex(inner)
    if int(failed):
        raise NumericsError("retiring these keys would make the Gram matrix indefinite: they are not in it, "
                            "or the prior is too small next to them; raise the prior or rebuild from the "
                            "remaining keys")
    return L


class DirectGram(AccumulatedLeastSquares):
    """Keeps C and factorises it at every step, O(d^3): the baseline, and the engine for a singular prior.

    method "cholesky" (minimum norm where C is singular) or "lu" (general solve, as the released code does).
    """

    name = "direct"

    def __init__(self, M0, d: int | None = None, *, basis=None, tag: str = "", method: str = "cholesky"):
        if method not in ("cholesky", "lu"):
            raise NumericsError(f"method={method!r} is unknown; use 'cholesky' or 'lu'")
        self.method = method
        super().__init__(M0, d, basis=basis, tag=tag)

    def _start(self) -> None:
        self._C = self._M0()

    def _absorb(self, K: Tensor, sign: int) -> Tensor:
        C = torch.addmm(self._C, K, K.T, alpha=sign)
        if self.method == "lu":
            out = torch.linalg.solve(C, K).T
        else:
            out = factorize(C, "C_t", "min_norm").solve(K.T)
        self._C = C
        return out

    def _solve(self, B: Tensor) -> Tensor:
        return factorize(self._C, "C_t", "min_norm").solve(B)

    def _times(self, X: Tensor) -> Tensor:
        return X @ self._C

    def _tensors(self) -> dict[str, Tensor]:
        return {"C": self._C}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._C = tensors["C"]
