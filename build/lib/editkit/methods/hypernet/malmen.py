"""MALMEN (Tan et al. 2024): one least-squares problem makes the value differences of all facts at once.

    Delta_l = argmin || U_l Delta^T - R_l ||^2 + e^{lambda_l} || Delta ||^2              (`solve.RidgeSystem`)

Training goes through the normal equation in two phases (horse.md section 4). Phase 1: the edited language
model gives G = dL/dW. Phase 2: dL/dR = U A^-1 G^T, and the surrogate <dL/dR, R(theta)> has the gradient of the
meta loss with respect to theta; its rows are independent, so it is taken in chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...base.config import option
from .network import HyperConfig, Hypernetwork, Rows, method
from .solve import RidgeSystem


@dataclasses.dataclass(frozen=True, kw_only=True)
class MALMENConfig(HyperConfig):
    """Options of MALMEN."""

    learn_ridge: bool = option(True, "train lambda; off: the ridge stays e^0 = 1", source="MALMEN code")


@method
class MALMEN(Hypernetwork):
    """Least squares over the value differences; every module writes its own full residual."""

    name = "malmen"
    Config = MALMENConfig
    config: MALMENConfig

    def plan(self, rows: Rows) -> LeastSquaresPlan:
        return LeastSquaresPlan(self, rows)

    def spread(self, R: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The residuals that are written, for the value differences R of each site; differentiable."""
        return R


class LeastSquaresPlan:
    """shifts: (m, d) float64.   residuals: R_l (N, m) before the spread;   written: after it."""

    def __init__(self, net: MALMEN, rows: Rows) -> None:
        self.net, self.rows = net, rows
        self.systems: list[RidgeSystem] = []
        self.residuals: list[Tensor] = []
        raw = []
        with torch.no_grad():
            for i in range(len(net.sites)):
                part, k = net.net(i)
                keys, grads = net.rows(rows, i)
                pieces = [part.value_differences(u, g, k) for _, u, g in net.chunks(rows, i)]
                self.residuals.append(torch.cat(pieces).double())
                self.systems.append(RidgeSystem(keys, float(part.log_ridge[k])))
                raw.append(grads.double())
        self._leaves = [R.detach().requires_grad_() for R in self.residuals]
        with torch.enable_grad():
            self._written = net.spread(self._leaves, raw)
        self.written = [R.detach() for R in self._written]
        self.shifts = [s.shift(R) for s, R in zip(self.systems, self.written, strict=True)]

    def backward(self, grads: Sequence[Tensor]) -> None:
        """Adjoint of the solve, of the spread, and of the networks in chunks; adds to `.grad`."""
        net = self.net
        upstream = []
        for i, G in enumerate(grads):
            part, k = net.net(i)
            dR, dlambda = self.systems[i].adjoint(G.to(part.lr.device), self.written[i])
            upstream.append(dR)
            if net.config.learn_ridge:
                add = torch.zeros_like(part.log_ridge)
                add[k] = dlambda
                part.log_ridge.grad = add if part.log_ridge.grad is None else part.log_ridge.grad + add
        dR = torch.autograd.grad(self._written, self._leaves, upstream, retain_graph=True)
        for i, D in enumerate(dR):
            part, k = net.net(i)
            D = D.to(part.lr.dtype)
            for where, keys, values in net.chunks(self.rows, i):
                with torch.enable_grad():
                    (D[where] * part.value_differences(keys, values, k)).sum().backward()
