"""Neuron-level sequential editing (NSE, Jiang et al. 2024): choose neurons by key mass, solve on those only.

A neuron is a coordinate of the key (a column of W). Shapes: K (d, n), R (m, n), C (d, d), Delta and E (m, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from editkit.base.errors import ConfigError, NumericsError
from editkit.linear.postprocess import gradient_cache
from editkit.linear.system import as_float64, as_gram, factorize


def select_neurons(K, threshold: float = 0.8) -> Tensor:
    """Indices of the neurons with the largest ``sum_i |K_ji|``, in that order, while their cumulative mass
    stays at or below `threshold` of the total; 1.0 selects all neurons. At least one neuron is returned.
    """
    K = as_float64(K, "K", (None, None))
    if not 0.0 < threshold <= 1.0:
        raise ConfigError(f"neuron_threshold is {threshold!r}; it is a share of key mass, 0 < threshold <= 1")
    mass, order = K.abs().sum(dim=1).sort(descending=True, stable=True)
    if threshold == 1.0:
        return order
    count = int((mass.cumsum(0) <= threshold * mass.sum()).sum())
    return order[:max(count, 1)]


def restricted_update(K, R, C, neurons, E=None) -> Tensor:
    """``Delta_I C_II = (R K^T - E)_I``, zero outside the selected neurons I; returns Delta (m, d).

    C (d, d) = lam C0 + S + K K^T, the accumulated Gram matrix with the current batch. E None is the released
    solve, which forgets the gradient that earlier restricted steps left on I; with ``E = A_{t-1} C_{t-1} -
    B_{t-1}`` (`nse_step` keeps it) the step is an exact block-coordinate minimisation of the one-time
    objective.
    """
    K = as_float64(K, "K", (None, None))
    d = K.shape[0]
    B = as_float64(R, "R", (None, K.shape[1])) @ K.T
    if E is not None:
        B = B - as_float64(E, "E", tuple(B.shape))
    index = torch.as_tensor(neurons, device=K.device).long().flatten()
    distinct = index.unique().numel() == index.numel()
    if not distinct or not index.numel() or int(index.min()) < 0 or int(index.max()) >= d:
        raise NumericsError(f"neurons must be distinct indices in 0..{d - 1}, at least one; "
                            "use select_neurons(K)")
    C = as_gram(C, "C_t", d)
    delta = torch.zeros_like(B)
    delta[:, index] = factorize(C[index][:, index], "C_t on the selected neurons").solve(B[:, index])
    return delta


def nse_step(K, R, C, neurons, E=None, *, consistent: bool = True) -> tuple[Tensor, Tensor | None]:
    """One step and the cache for the next: (Delta, E_t); consistent=False is the released form, E_t None."""
    if not consistent:
        return restricted_update(K, R, C, neurons), None
    delta = restricted_update(K, R, C, neurons, E)
    return delta, gradient_cache(E, K, R, delta, C)
