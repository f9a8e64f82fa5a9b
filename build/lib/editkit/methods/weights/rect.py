"""RECT (Gu et al. 2024): of each update only the entries with the largest relative change |Delta / W| are
written.

As published on top of MEMIT without history. `history=True` aligns it with the one-time edit up to what the
mask drops, `compensate=True` feeds that back as well.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...base.config import option
from ...linear.postprocess import rect
from ..base import register
from .postprocessed import PostprocessedConfig, PostprocessedEditor


@dataclasses.dataclass(frozen=True, kw_only=True)
class RECTConfig(PostprocessedConfig):
    """Options of RECT."""

    keep: float = option(
        0.2, "share of entries that are written (released: 0.4, with error compensation 0.2)",
        source="RECT section 5", above=0, high=1,
    )  # fmt: skip


@register
class RECT(PostprocessedEditor):
    """MEMIT with relative-change masking."""

    name = "rect"
    Config = RECTConfig
    config: RECTConfig

    def post(self, raw: Tensor, W: Tensor) -> Tensor:
        return rect(raw, W, self.config.keep)
