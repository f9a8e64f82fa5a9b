"""MEND (Mitchell et al. 2022): the update is the sum of the tokens' rank-one pseudo gradients.

    Delta_l = - eta_l sum_i g'_i u'_i^T

For one fact this is a gradient step in better coordinates. For many facts the rank-one steps interfere, since
no solve takes care of how their keys overlap: this is where MALMEN begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .network import HyperConfig, Hypernetwork, Rows, method


@dataclasses.dataclass(frozen=True, kw_only=True)
class MENDConfig(HyperConfig):
    """Options of MEND; the ridge is not used."""


@method
class MEND(Hypernetwork):
    """Sum of rank-one pseudo gradients."""

    name = "mend"
    Config = MENDConfig

    def plan(self, rows: Rows) -> MENDPlan:
        return MENDPlan(self, rows)


class MENDPlan:
    """shifts: (m, d) float64 of each site."""

    def __init__(self, net: MEND, rows: Rows) -> None:
        self.net, self.rows = net, rows
        self.shifts: list[Tensor] = []
        with torch.no_grad():
            for i, site in enumerate(net.sites):
                part, k = net.net(i)
                total = torch.zeros(site.m, site.d, dtype=torch.float64, device=part.lr.device)
                for _, keys, grads in net.chunks(rows, i):
                    u, g = part(keys, grads, k)
                    total -= part.lr[k].double() * (g.double().T @ u.double())
                self.shifts.append(total)

    def backward(self, grads: Sequence[Tensor]) -> None:
        """<G, Delta(theta)> is a sum over rows, so its gradient is taken chunk by chunk."""
        for i, G in enumerate(grads):
            part, k = self.net.net(i)
            G = G.to(part.lr)
            for _, keys, values in self.net.chunks(self.rows, i):
                with torch.enable_grad():
                    u, g = part(keys, values, k)
                    (-part.lr[k] * ((u @ G.T) * g).sum()).backward()
