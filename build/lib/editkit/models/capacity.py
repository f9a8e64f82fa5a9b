"""How much memory an edit takes, how much there is, and what to change when the one exceeds the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from .hooks import submodule
from .lm import LM
from .preflight import gib, weight_bytes

# method -> float64 (d, d) matrices that stay per layer (prior and Gram matrix; AlphaEdit: basis, projector and Gram
# matrix; ROME: a factor), and those that one solve needs for its time (prior, checks, system, factor).
SQUARES: dict[str, tuple[int, int]] = {
    "rome": (1, 2), "memit": (0, 5), "memit_seq": (2, 3), "alphaedit": (3, 3), "nse": (1, 5),
}  # fmt: skip


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
        return self.weights + self.covariance + self.beside

    @property
    def first(self) -> int:
        """`beside` of a stream's first batch: when its targets are optimised there is no history yet."""
        return self.masters + max(self.targets, self.history + self.solve)

    @property
    def beside(self) -> int:
        """What an edit adds to weights and second moments."""
        return self.masters + self.history + max(self.solve, self.targets)


def memory_plan(
    lm: LM,
    layers: Sequence[int],
    dtype: torch.dtype,
    method: str = "memit",
    tokens_per_batch: int = 8192,
    *,
    repeated: float = 1.0,
) -> Plan:
    """Memory of editing `layers` with a locate-then-edit method. `lm` may be on the meta device.

    masters: float32 copies of the edited matrices, if the model stores less.   covariance: float64, one (d, d) per
    layer.   history: what stays per layer, and solve: what one layer needs for its time, by `SQUARES`, and three
    float64 matrices (m, d): weight, update, sum.   targets: `target_bytes`.
    """
    m, d = lm.d_model, lm.d_key
    n = len(layers)
    below_float32 = torch.promote_types(dtype, torch.float32) != dtype
    kept, passing = SQUARES.get(method, SQUARES["memit"])
    return Plan(
        weights=weight_bytes(lm.model, dtype),
        masters=n * m * d * 4 if below_float32 else 0,
        covariance=n * d * d * 8,
        history=n * kept * d * d * 8,
        solve=(passing * d * d + 3 * m * d) * 8,
        targets=target_bytes(lm, max(layers), dtype, tokens_per_batch, repeated=repeated),
    )


def target_bytes(
    lm: LM, layer: int, dtype: torch.dtype, tokens_per_batch: int, *, repeated: float = 1.0
) -> int:
    """What target optimisation keeps of a full batch; an estimate, compared with measurements on the page of costs.

    repeated: share of the tokens that lie behind the edited one, which every step runs again; all of them unless the
    caller knows better. For each of these and each block above the edited one a backward pass keeps (6 m + 4 d)
    numbers, below float32 4 m float32 numbers more (norms), for every token 3 m (keys and values, as attention reads
    them); one block more passes through. Three float32 rows of logits for an eighth of the repeated tokens.
    """
    m, d = lm.d_model, lm.d_key
    again = repeated * tokens_per_batch
    block = (again * (6 * m + 4 * d) + tokens_per_batch * 3 * m) * dtype.itemsize
    if dtype.itemsize < 4:
        block += again * 4 * m * 4
    vocabulary = submodule(lm.model, lm.spec.head).weight.shape[0]
    return round(block * (lm.n_layers - layer) + again / 8 * 3 * vocabulary * 4)


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
    if not fits() and len(memory) > 1 and memory.get("host", 0) > plan.covariance + plan.history + plan.solve:
        yield "nothing more for history and solve: an editor that finds no room solves on the host (slower)"
        elsewhere += plan.history + max(plan.solve - plan.targets, 0)
    if not fits() and dtype.itemsize > 2:
        dtype = torch.bfloat16
        before, plan = plan, memory_plan(lm, layers, dtype, method, tokens)
        yield f"load in bfloat16 (weights {gib(plan.weights)} instead of {gib(before.weights)})"
    if not fits() and len(memory) > 1:
        yield "split the model over the accelerators and the host: load_lm(..., device_map='auto')"
        elsewhere += plan.weights
    if not fits():
        yield f"edit fewer than {len(layers)} layers, or use a machine with {gib(plan.peak)}"
