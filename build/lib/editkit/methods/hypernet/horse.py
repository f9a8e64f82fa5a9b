"""HORSE (arXiv 2601.11441): MALMEN with the residual of each module made orthogonal to that of the one before.

    R^_l = R_l - p_l R_{l-1},        p_l = <R_l, R_{l-1}> / <R_{l-1}, R_{l-1}>            ("consecutive")

The published code subtracts p_l times the previous module's raw gradient instead ("released"), takes that as a
constant in training, and leaves the ridge untrained. Every strategy of `editkit.linear.spread` can be chosen.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from ...base.config import option
from ...base.errors import ConfigError
from ...linear.spread import spread
from .malmen import MALMEN, MALMENConfig
from .network import method

Spread = Literal["uniform", "linear_decay", "consecutive", "gram_schmidt", "released"]
RELEASED = {"spread": "released", "detach": True, "learn_ridge": False, "moments": "released"}
"""Options that make HORSE compute what its published code computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HORSEConfig(MALMENConfig):
    """Options of HORSE; for the published code pass `**horse.RELEASED`."""

    spread: Spread = option("consecutive", "how the modules share the residual", source="horse.md section 5")  # noqa: RUF009
    detach: bool = option(
        False, "training takes the previous module's residual as a constant", source="published code"
    )


@method
class HORSE(MALMEN):
    """MALMEN with an orthogonal residual spread."""

    name = "horse"
    Config = HORSEConfig
    config: HORSEConfig

    def check(self) -> None:
        widths = sorted({site.m for site in self.sites})
        if len(widths) > 1 and self.config.spread != "uniform":
            raise ConfigError(
                f"the spread {self.config.spread!r} compares the residuals of the modules, which have widths "
                f"{widths}; edit modules of equal output width, or use spread='uniform' or the method 'malmen'"
            )

    def spread(self, R: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        if self.config.spread == "uniform":
            return R
        return spread(R, self.config.spread, gradients=grads, detach=self.config.detach)
