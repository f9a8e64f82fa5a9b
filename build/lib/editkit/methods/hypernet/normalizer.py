"""Running mean and standard deviation of the rows [key ; gradient] that a hypernetwork has been trained on.

Only training updates it (`update`); predicting and evaluating only read it, so statistics of facts that a
page is scored on never reach the network. Accumulated in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...base.errors import NumericsError

Moments = Literal["exact", "released"]


class RunningMoments(nn.Module):
    """Mean and deviation of all rows seen, merged batch by batch (Chan, Golub and LeVeque 1983).

    size: width of a row.   moments: "exact", or "released": the published update, which adds n_b times the
    unbiased variance of a batch, hence slightly too much, and is undefined for a batch of one row.

    Buffers: n () rows seen, mean (size,), m2 (size,) sum of squared deviations; all float64.
    """

    def __init__(self, size: int, moments: Moments = "exact") -> None:
        super().__init__()
        self.moments = moments
        self.register_buffer("n", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(size, dtype=torch.float64))

    def _apply(self, fn, recurse: bool = True):
        """Moved with the network, but never cast: deviations of gradients underflow in float16."""
        device = fn(self.mean).device
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(device)
        return self

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take the rows x (n_b, size) into the moments. Raises NumericsError for NaN, or what "released"
        cannot take.
        """
        if x.ndim != 2 or x.shape[1] != self.mean.shape[0] or not len(x):
            raise NumericsError(
                f"the normaliser takes rows of width {self.mean.shape[0]}, at least one; got a tensor of "
                f"shape {tuple(x.shape)}"
            )
        if not torch.isfinite(x).all():
            raise NumericsError("keys or gradients have NaN or Inf; check the edit loss of this batch")
        if self.moments == "released" and len(x) == 1:
            raise NumericsError(
                "a batch with one row has no unbiased variance, which the released normaliser needs; use "
                'moments="exact", or batches with more answer tokens'
            )
        x = x.to(self.mean)
        added, mean = float(len(x)), x.mean(0)
        n = self.n + added
        gap = mean - self.mean
        within = (x - mean).square().sum(0)
        if self.moments == "released":
            within = added / (added - 1) * within
        self.mean = self.mean + added / n * gap
        self.m2 = self.m2 + within + self.n * added / n * gap.square()
        self.n = n

    @property
    def std(self) -> Tensor:
        """(size,) float64 standard deviation (n - 1). Raises NumericsError before two rows were seen."""
        if self.n < 2:
            raise NumericsError(
                f"the normaliser has seen {int(self.n)} row(s), so the variance is undefined; train the "
                "hypernetwork for at least one step, on two answer tokens or more"
            )
        small = torch.finfo(torch.float32).eps if self.moments == "released" else 0.0
        return (self.m2 / (self.n - 1 + small)).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Standardised rows, in the dtype of x. A coordinate that never varied gives 0 (as released: noise)."""
        std, eps = self.std, torch.finfo(torch.float32).eps
        out = (x - self.mean) / (std + eps)
        if self.moments == "exact":
            out = torch.where(std > 0, out, 0.0)
        return out.to(x.dtype)
