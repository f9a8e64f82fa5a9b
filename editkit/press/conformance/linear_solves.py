"""Adapter for the recorded solves of MEMIT, AlphaEdit, their variants and ROME on random float64 data.

`cases` in case.json maps the prefix of a set of arrays to its hyper-parameters; which solves were recorded is
read off the arrays themselves. Residuals are `targets` over the number of layers that are left. The official
ridge of AlphaEdit is a float32 identity times L2, so 0.1 enters as float32(0.1); both of our forms are fed
that number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ...linear.normal import alphaedit_update, memit_update, null_projector, rome_direction
from ...linear.sequential import latest_update
from ...linear.system import factorize
from .case import CannotHandle, Case, Comparison, adapter, compare

TOLERANCE = 1e-9  # relative to the largest entry; both sides solve in float64


class _Recorded:
    """The arrays of one prefix, as float64 tensors, and the comparison of those that were recorded."""

    def __init__(self, case: Case, prefix: str, hparams: dict[str, Any]):
        self.arrays, self.prefix, self.hparams = case.arrays, prefix, hparams

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}_{name}" in self.arrays

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise CannotHandle(f"arrays.npz lacks the input {self.prefix}_{name}")
        return torch.from_numpy(np.asarray(self.arrays[f"{self.prefix}_{name}"], dtype=np.float64))

    def number(self, name: str) -> float:
        if name not in self.hparams:
            raise CannotHandle(f"case.json lacks {name} of {self.prefix}")
        return self.hparams[name]

    @property
    def divisor(self) -> float:
        return self.hparams.get(
            "residual_divisor", self.hparams.get("n_layers", 1) - self.hparams.get("layer_index_i", 0)
        )

    def check(self, name: str, ours: torch.Tensor, note: str = "") -> Iterator[Comparison]:
        """Nothing when `name` was not recorded."""
        if name in self:
            label = f"{self.prefix}_{name}" + (f" ({note})" if note else "")
            yield compare(label, ours, self[name], TOLERANCE, relative=True)


@adapter("linear_solves")
def linear_solves(case: Case) -> list[Comparison]:
    """Every recorded solve of every set of arrays against `editkit.linear`."""
    sets = case.data.get("cases")
    if not isinstance(sets, dict) or not sets:
        raise CannotHandle("case.json has no field 'cases' that lists the sets of arrays")
    out: list[Comparison] = []
    for prefix, hparams in sets.items():
        recorded = _Recorded(case, prefix, hparams)
        out += list(_single(recorded) if "K" in recorded else _sequence(recorded))
    return out


def _single(r: _Recorded) -> Iterator[Comparison]:
    """One batch of any size, also with more facts than key dimensions."""
    K, R = r["K"], r["targets"] / r.divisor
    if "memit_upd" in r:
        yield from r.check("memit_upd", memit_update(K, R, r["cov"], r.number("mom2_update_weight")))
    if "alphaedit_upd" in r:
        yield from _alphaedit(r, "alphaedit_upd", K, R, r["P"], None)
    yield from _projector(r)


def _sequence(r: _Recorded) -> Iterator[Comparison]:
    """Batches in order, each method with its own history."""
    batches = 0
    while f"K{batches}" in r:
        batches += 1
    if not batches:
        raise CannotHandle(f"arrays.npz has no keys {r.prefix}_K or {r.prefix}_K0")
    Ks = [r[f"K{b}"] for b in range(batches)]
    Rs = [r[f"targets{b}"] / r.divisor for b in range(batches)]
    yield from _projector(r)
    yield from _memit(r, Ks, Rs)
    if "P" in r:
        yield from _alphaedit_sequence(r, Ks, Rs)
    yield from _latest(r, Ks, Rs)
    if "err_solve_adjk" in r:
        delta = memit_update(
            Ks[0],
            Rs[0],
            r["cov"],
            r.number("mom2_update_weight"),
            Ks[1] @ Ks[1].T,
            ridge=1.0,
            E=r["errcache_in"],
        )
        yield from r.check("err_solve_adjk", delta.T)
    if "rome_u" in r:
        yield from r.check("rome_u", rome_direction(r["cov"], Ks[0][:, 0]))


def _projector(r: _Recorded) -> Iterator[Comparison]:
    if "svals" in r:
        yield from r.check("svals", torch.linalg.eigvalsh(r["cov"]).flip(0))
    if "P" in r and "nullspace_threshold" in r.hparams:
        projector = null_projector(r["cov"], r.hparams["nullspace_threshold"])
        yield from r.check("P", projector.P)
        if "null_dim" in r.hparams:
            yield compare(f"{r.prefix} null_dim", projector.rank, r.hparams["null_dim"], 0.0)


def _memit(r: _Recorded, Ks: list[torch.Tensor], Rs: list[torch.Tensor]) -> Iterator[Comparison]:
    """MEMIT on independent batches, and with the Gram matrix of all earlier keys."""
    if not any(f"{name}0" in r for name in ("memit_upd", "memitseq_upd", "memit_adjk", "memit_resid")):
        return
    cov, lam = r["cov"], r.number("mom2_update_weight")
    S = torch.zeros_like(cov)
    for b, (K, R) in enumerate(zip(Ks, Rs)):
        yield from r.check(f"memit_resid{b}", R)
        yield from r.check(f"memit_adjk{b}", factorize(lam * cov + K @ K.T).solve(K.T).T)
        yield from r.check(f"memit_upd{b}", memit_update(K, R, cov, lam))
        yield from r.check(f"memitseq_upd{b}", memit_update(K, R, cov, lam, S))
        S = S + K @ K.T
        yield from r.check(f"memitseq_cache{b}", S)


def _alphaedit(r: _Recorded, name: str, K, R, P, S) -> Iterator[Comparison]:
    """Both forms of the solve against one recorded update, stored (d_k, d_v)."""
    ridge = float(np.float32(r.number("L2")))
    for form in ("released", "symmetric"):
        yield from r.check(name, alphaedit_update(K, R, P, S, ridge, form=form).T, form)


def _alphaedit_sequence(r: _Recorded, Ks: list[torch.Tensor], Rs: list[torch.Tensor]) -> Iterator[Comparison]:
    S, total = torch.zeros_like(r["P"]), 0.0
    ridge = float(np.float32(r.number("L2")))
    for b, (K, R) in enumerate(zip(Ks, Rs)):
        yield from _alphaedit(r, f"alphaedit_upd{b}", K, R, r["P"], S)
        total = total + alphaedit_update(K, R, r["P"], S, ridge)
        S = S + K @ K.T
        yield from r.check(f"alphaedit_cache{b}", S)
        yield from _alphaedit(r, f"alphaedit_nocache_upd{b}", K, R, r["P"], None)
    if "W0" in r:
        yield from r.check("alphaedit_W", r["W0"] + total)


def _latest(r: _Recorded, Ks: list[torch.Tensor], Rs: list[torch.Tensor]) -> Iterator[Comparison]:
    """Memorize-the-latest, in both orientations of the weight."""
    if "forget_linear_upd0" not in r and "forget_conv1d_upd0" not in r:
        return
    total = None
    for b, (K, R) in enumerate(zip(Ks, Rs)):
        delta = latest_update(K, R, r["cov"], r.number("mom2_update_weight"), total)
        total = delta if total is None else total + delta
        yield from r.check(f"forget_linear_upd{b}", delta)
        yield from r.check(f"forget_conv1d_upd{b}", delta.T)
    yield from r.check("forget_linear_total", total)
    yield from r.check("forget_conv1d_total", total.T)
