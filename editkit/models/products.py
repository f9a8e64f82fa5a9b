"""Matrix products in bfloat16, everything else as it is: many processors multiply bfloat16 several times as fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..base.config import check_known
from .hooks import submodule
from .lm import LM

Products = Literal["model", "bfloat16"]


@contextmanager
def products(lm: LM, how: Products = "bfloat16") -> Iterator[None]:
    """Inside, the linear maps of the model's blocks round their factors to bfloat16.

    Sums inside a product, the residual stream, attention weights, norms and the head stay float32: 8 bits are too
    coarse to decide between 50,000 tokens. how: "model" changes nothing. The weights are not touched; the rounded
    copies live until the end and take half as much memory as the blocks. A model that is not in float32 is left
    alone. Raises ConfigError for another name.
    """
    check_known([how], ("model", "bfloat16"), "kind of product")
    chosen: list[nn.Module] = []
    if how == "bfloat16":
        chosen = [
            m for m in submodule(lm.model, lm.spec.blocks).modules() if isinstance(m, (nn.Linear, Conv1D))
        ]
    chosen = [m for m in chosen if m.weight.dtype == torch.float32]
    former = [m.__dict__.get("forward") for m in chosen]
    try:
        for module in chosen:
            module.forward = _rounded(module)
        yield
    finally:
        for module, forward in zip(chosen, former, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _rounded(module: nn.Linear | Conv1D):
    weight = module.weight.detach()
    if isinstance(module, Conv1D):
        weight = weight.T
    weight = weight.to(torch.bfloat16).contiguous()

    def forward(x: Tensor) -> Tensor:
        out = linear(x.to(torch.bfloat16), weight).to(x.dtype)
        return out if module.bias is None else out + module.bias

    return forward
