"""Phase 1 of a training step: gradients of the meta loss with respect to the weights of the edited model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...base.errors import NumericsError
from ...models.hooks import frozen
from ...models.lm import LM
from .network import Hypernetwork, Plan
from .sites import oriented

Loss = tuple[float, Callable[[], Tensor]]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one batch of edits gave: plan, dL/dW (m, d) of each site, losses of each batch of the language model."""

    plan: Plan
    grads: list[Tensor]
    generalization: list[float]
    locality: list[float]


def weight_gradients(
    lm: LM, net: Hypernetwork, losses: Sequence[Loss], behind: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[float]]:
    """Phase 1: weighted sum of the losses' gradients with respect to the edited weights, (m, d), at least
    float32.

    losses: (weight, function without arguments) each, run one after the other, so that one graph lives at a
    time. behind: weights, in the model's orientation, that stand in for the edited ones during the backward
    passes only (RLEdit as published); None is the gradient.
    Returns the gradients and the unweighted losses. Raises NumericsError if a loss is not finite.
    """
    params = [lm.parameter(name) for name in net.parameter_names()]
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    values = []
    with frozen(lm.model):
        for p in params:
            p.requires_grad_(True)
        for weight, loss_of in losses:
            with torch.enable_grad():
                loss = loss_of()
            values.append(float(loss.detach()))
            if not torch.isfinite(loss):
                raise NumericsError(
                    f"a meta loss is {values[-1]}: the edited model has lost its numbers; lower lr (the step "
                    "size eta of the hypernetwork) or meta_lr"
                )
            with _swapped(params, behind):
                grads = torch.autograd.grad(loss, params)
            for sum_, grad in zip(total, grads, strict=True):
                sum_ += weight * grad
    return [oriented(lm, s, g).contiguous() for s, g in zip(net.sites, total, strict=True)], values


@contextmanager
def _swapped(params: Sequence[Tensor], values: Sequence[Tensor] | None) -> Iterator[None]:
    """Other values in the parameters, unseen by autograd (`.data`), and the old ones back afterwards."""
    kept = [p.detach().clone() for p in params] if values is not None else []
    try:
        for p, value in zip(params, values or (), strict=values is not None):
            p.data.copy_(value)
        yield
    finally:
        for p, value in zip(params, kept, strict=values is not None):
            p.data.copy_(value)


def mean(values: Sequence[float]) -> float:
    """Mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
