"""How the wanted change is divided among several edited layers: the residual spreads. Float64, no model.

Every edited layer l = 1..m (shallow to deep) has a residual R_l, the change of its output that its facts ask
for. Written as they are, the layers repeat each other, because in a residual network late layers see nearly
the same output gradient. A strategy turns the list R_1, ..., R_m into the list that is written:

    uniform        R_l                                            MALMEN (Tan et al. 2024)
    linear_decay   R_l / (m - l + 1)                              MEMIT (Meng et al. 2023), algorithm 1
    consecutive    R_l - p_l R_{l-1}                              HORSE (arXiv 2601.11441), as derived
    gram_schmidt   R_l - sum_{j<l} q_{lj} Q_j, Q_j those before   orthogonal to all previous layers
    released       R_l - p_l g_{l-1}                              HORSE, as its published code does

with p_l = <R_l, R_{l-1}> / <R_{l-1}, R_{l-1}>, q_{lj} = <R_l, Q_j> / <Q_j, Q_j> and g_{l-1} the gradient of
the edit loss with respect to the previous layer's output. Theorems and proofs: book/horse/derivation.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from editkit.base.errors import ConfigError, NumericsError
from editkit.linear.system import EPS

Residuals = Sequence[Tensor]
Strategy = Callable[..., list[Tensor]]


def projection_coefficient(R: Tensor, direction: Tensor, axis: int | None = None) -> Tensor:
    """p = <R, D> / <D, D>, over all entries, or with `axis` over that one (kept, of size 1).

    A direction that is zero has coefficient 0: nothing has to be removed.
    """
    over = tuple(range(R.ndim)) if axis is None else (axis,)
    square = (direction * direction).sum(over, keepdim=True)
    p = (R * direction).sum(over, keepdim=True) / torch.where(square > 0, square, 1.0)
    return torch.where(square > 0, p, 0.0)


def uniform(
    R: Residuals, *, gradients: Residuals | None = None, detach: bool = False, axis: int | None = None
) -> list[Tensor]:
    """Every layer writes its own residual (MALMEN)."""
    return list(R)


def linear_decay(
    R: Residuals, *, gradients: Residuals | None = None, detach: bool = False, axis: int | None = None
) -> list[Tensor]:
    """Layer l of m writes its residual over the number of layers still to come, itself included (MEMIT)."""
    return [r / (len(R) - i) for i, r in enumerate(R)]


def consecutive(
    R: Residuals, *, gradients: Residuals | None = None, detach: bool = False, axis: int | None = None
) -> list[Tensor]:
    """Each residual without its component along the previous one, as that was before its own projection."""
    return [R[0], *(_without(r, p, p, detach, axis) for p, r in itertools.pairwise(R))]


def gram_schmidt(
    R: Residuals, *, gradients: Residuals | None = None, detach: bool = False, axis: int | None = None
) -> list[Tensor]:
    """Each residual without its components along all previous ones; a dependent residual becomes zero."""
    done: list[Tensor] = []
    for r in R:
        q = r
        for _ in range(2):  # a second sweep removes what rounding has left of the first
            for earlier in done:
                q = _without(q, earlier, earlier, detach, axis)
        # What is left of a dependent residual is rounding noise, and no direction for the next ones.
        over = tuple(range(r.ndim)) if axis is None else (axis,)
        size, left = ((x.detach() ** 2).sum(over, keepdim=True) for x in (r, q))
        done.append(torch.where(left > (len(R) * EPS) ** 2 * size, q, torch.zeros_like(q)))
    return done


def released(
    R: Residuals, *, gradients: Residuals | None = None, detach: bool = False, axis: int | None = None
) -> list[Tensor]:
    """As the published HORSE code: the coefficient of `consecutive`, but the previous layer's raw gradient is
    subtracted, not its residual. Not a projection: see the derivation.
    """
    if gradients is None:
        raise ConfigError(
            "the spread 'released' subtracts the value gradients of the previous layer; pass "
            "gradients=[g_1, ..., g_m], or use 'consecutive'"
        )
    return [R[0], *(_without(r, p, g, detach, axis) for p, g, r in zip(R, gradients, R[1:]))]


def _without(R: Tensor, along: Tensor, subtract: Tensor, detach: bool, axis: int | None) -> Tensor:
    """R - p `subtract`, p the projection coefficient of R on `along`."""
    if detach:
        along, subtract = along.detach(), subtract.detach()
    return R - projection_coefficient(R, along, axis) * subtract


STRATEGIES: dict[str, Strategy] = {
    f.__name__: f for f in (uniform, linear_decay, consecutive, gram_schmidt, released)
}


def spread(
    value_diffs: Sequence[Tensor],
    strategy: str,
    *,
    gradients: Sequence[Tensor] | None = None,
    detach: bool = False,
    axis: int | None = None,
) -> list[Tensor]:
    """The residuals to write, one per layer, shallow to deep, float64 on the inputs' devices.

    value_diffs: R_1, ..., R_m, equal shapes, in either orientation ((m, n) columns or (n, m) rows).
    strategy:    a name in `STRATEGIES`.
    gradients:   g_1, ..., g_m in the shapes of the residuals; only "released" reads them.
    detach:      take previous layers as constants, so that gradients reach R_l through R_l alone, as in the
                 published code. Off, gradients are those of the formula.
    axis:        None takes one coefficient for the whole layer, as published. An axis takes one per fact:
                 the axis along which a single fact's residual lies (0 for columns (m, n), 1 for rows (n, m)).

    Differentiable. Raises ConfigError for an unknown strategy, axis, or missing gradients; NumericsError for
    an empty list, unequal shapes, NaN or Inf.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown spread {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    R = _checked(value_diffs, "residual", axis)
    if gradients is not None:
        gradients = _checked(gradients, "gradient", axis)
        if [g.shape for g in gradients] != [r.shape for r in R]:
            raise NumericsError("residuals and gradients differ in number or shape; pass one each per layer")
    return STRATEGIES[strategy](R, gradients=gradients, detach=detach, axis=axis)


def _checked(tensors: Sequence[Tensor], what: str, axis: int | None) -> list[Tensor]:
    tensors = [torch.as_tensor(t).double() for t in tensors]
    if not tensors:
        raise NumericsError(f"no {what}s to spread: the list is empty")
    first = tensors[0]
    if axis is not None and not -first.ndim <= axis < first.ndim:
        raise ConfigError(f"axis = {axis} does not exist in a {what} of shape {tuple(first.shape)}")
    for i, t in enumerate(tensors):
        if t.shape != first.shape:
            raise NumericsError(
                f"the {what} of layer {i} is {tuple(t.shape)}, that of layer 0 "
                f"{tuple(first.shape)}; spread only modules of equal shape together"
            )
        if not torch.isfinite(t).all():
            raise NumericsError(
                f"the {what} of layer {i} has NaN or Inf; check the forward pass and the "
                "edit loss, or lower the learning rate of the hypernetwork"
            )
    return tensors


def alignment(residuals: Sequence[Tensor]) -> Tensor:
    """Cosines between layers' residuals, (layers, layers) float64, all entries flattened.

    A zero residual has cosine 0 with every other, and 1 with itself.
    """
    X = torch.stack([r.reshape(-1) for r in _checked(residuals, "residual", None)])
    X = X / torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    return (X @ X.T).fill_diagonal_(1.0)
