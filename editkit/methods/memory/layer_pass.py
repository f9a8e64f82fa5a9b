"""Training passes of a memory: everything below its block stays as it is and is computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...base.errors import ModelError, NumericsError
from ...models.answers import log_probs_of
from ...models.batching import Encoding
from ...models.hooks import bypassed, entering, submodule, trace
from ...models.lm import LM


def module_path(lm: LM, layer: int, module: str) -> str:
    """Path of a module of a block; "" is its down projection. Raises ModelError if there is none."""
    path = f"{lm.block_name(layer)}.{module}" if module else lm.down_name(layer)
    if getattr(submodule(lm.model, path), "weight", None) is None:
        raise ModelError(f"{path} of {lm.name} has no weight; name a linear module inside the block")
    return path


def widths(lm: LM, layer: int, module: str) -> tuple[int, int]:
    """(input width, output width) of such a module."""
    rows, columns = submodule(lm.model, module_path(lm, layer, module)).weight.shape
    return (rows, columns) if lm.spec.orientation == "conv1d" else (columns, rows)


class LayerPass:
    """One batch of rows, run again and again with another output of one module.

    x (rows, tokens, width in), out (rows, tokens, width out): the module's input and its own output; neither
    can change while only outputs of this module are replaced.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, encoding: Encoding, layer: int, module: str = "") -> None:
        self.lm, self.encoding, self.layer = lm, encoding, layer
        self.block, self.name = lm.block_name(layer), module_path(lm, layer, module)
        with trace(lm.model, [self.block, self.name], inputs=True, stop_at=self.block) as seen:
            lm.forward(encoding)
        self.entry, self.x, self.out = seen.input[self.block], seen.input[self.name], seen.output[self.name]
        self.block_out = seen.output[self.block]

    def states(self, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """Output of the last block (rows, tokens, m) when the module's output is `replace` of its own."""
        end = self.lm.block_name(self.lm.n_layers - 1)
        below = [self.lm.block_name(i) for i in range(self.layer)]
        as_tuple = self.lm.spec.block_output == "tuple"
        with (
            bypassed(self.lm.model, below, as_tuple=as_tuple),
            entering(self.lm.model, self.block, self.entry),
            trace(self.lm.model, [end], edit={self.name: replace}, stop_at=end) as seen,
        ):
            self.lm.forward(self.encoding)
        return seen.output[end]

    def log_probs(self, places: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """Log-probabilities (t,) of target tokens: places (t, 3) row, column that predicts, token."""
        return log_probs_of(self.lm, self.states(replace), places)


def check_loss(method: str, loss: Tensor, step: int, lr: float) -> float:
    """The loss as a number; raises NumericsError if it is NaN or Inf."""
    value = float(loss.detach())
    if value != value or abs(value) == float("inf"):
        raise NumericsError(f"{method}: the loss is {value} after {step} steps; lower lr = {lr:g}")
    return value
