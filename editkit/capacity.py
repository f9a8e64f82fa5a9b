"""How much memory an edit takes, how much there is, and what to change when the one exceeds the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from .hooks import submodule
from .models import LM
from .preflight import gib, weight_bytes

HISTORY = ("memit_seq", "alphaedit", "nse")  # methods that keep a Gram matrix of earlier keys per layer


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes an edit needs, by purpose. The last two are needed one after the other, the others all the time."""

    weights: int
    masters: int
    covariance: int
    history: int
    solve: int
    targets: int

    @property
    def peak(self) -> int:
        return self.weights + self.masters + self.covariance + self.history + max(self.solve, self.targets)


def memory_plan(
    lm: LM, layers: Sequence[int], dtype: torch.dtype, method: str = "memit", tokens_per_batch: int = 8192
) -> Plan:
    """Memory of editing `layers` with a locate-then-edit method. `lm` may be on the meta device.

    masters: float32 copies of the edited matrices, if the model stores less.   covariance: float64, one (d, d) per
    layer.   history: the same, for methods that accumulate keys.   solve: C0 on the device, the system, its factor
    and the update of one layer.   targets: what a backward pass keeps of tokens_per_batch tokens, estimated as
    (10 m + 4 d) numbers per token and block above the last edited one, where the target is, and three float32 rows of
    logits for an eighth of the tokens.
    """
    m, d = lm.d_model, lm.d_key
    n = len(layers)
    below_float32 = torch.promote_types(dtype, torch.float32) != dtype
    saved = (10 * m + 4 * d) * (lm.n_layers - max(layers)) * dtype.itemsize
    vocabulary = submodule(lm.model, lm.spec.head).weight.shape[0]
    return Plan(
        weights=weight_bytes(lm.model, dtype),
        masters=n * m * d * 4 if below_float32 else 0,
        covariance=n * d * d * 8,
        history=n * d * d * 8 if method in HISTORY else 0,
        solve=(3 * d * d + m * d) * 8,
        targets=tokens_per_batch * saved + tokens_per_batch // 8 * 3 * vocabulary * 4,
    )


def savings(
    lm: LM,
    layers: Sequence[int],
    dtype: torch.dtype,
    method: str,
    tokens_per_batch: int,
    free: int,
    memory: Mapping[str, int],
) -> Iterator[str]:
    """What to change, the cheapest first, until the plan fits `free` bytes; `memory` has the other places."""
    plan, tokens, elsewhere = memory_plan(lm, layers, dtype, method, tokens_per_batch), tokens_per_batch, 0

    def fits() -> bool:
        return plan.peak - elsewhere <= free

    while not fits() and plan.targets > plan.solve and tokens > 512:
        tokens //= 2
        plan = memory_plan(lm, layers, dtype, method, tokens)
    if tokens < tokens_per_batch:
        yield f"lower z_tokens_per_batch from {tokens_per_batch} to {tokens}"
    if not fits() and len(memory) > 1 and memory.get("host", 0) > plan.covariance:
        yield "keep the second moments on the host (Covariance.to); a layer's comes to its device for the solve"
        elsewhere += plan.covariance
    if not fits() and dtype.itemsize > 2:
        dtype = torch.bfloat16
        before, plan = plan, memory_plan(lm, layers, dtype, method, tokens)
        yield f"load in bfloat16 (weights {gib(plan.weights)} instead of {gib(before.weights)})"
    if not fits() and len(memory) > 1:
        yield "split the model over the accelerators and the host: load_lm(..., device_map='auto')"
        elsewhere += plan.weights
    if not fits():
        yield f"edit fewer than {len(layers)} layers, or use a machine with {gib(plan.peak)}"
