"""RLEdit: MALMEN's network trained over a sequence of batches, the earlier edits staying in the model.

One training step is one sequence (`training.Trainer.sequence`): batch t is planned on the model that carries
batches 1..t-1, and the loss looks back over the last `depth` batches,

    L_t = sum_{i < depth} decay^i CE(paraphrases of batch t-i) + loc_coef KL + reg ||Delta_t||^2 .

Gradients of all L_t with respect to Delta_t add up, and the network is updated once at the end of the sequence.
As in the published code, L_t reaches the network through Delta_t only, not through earlier shifts.
Differences, each for a reason: the L2 term has its gradient (published: inert, `reg=0` is the same), and
locality is measured on the edited model against the model before the sequence (published: behind the shift's
removal, so that it never trained anything).
"""

from __future__ import annotations

import dataclasses

from ...base.config import option
from .malmen import MALMEN, MALMENConfig
from .network import method


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLEditConfig(MALMENConfig):
    """Options of RLEdit."""

    rank: int = option(1024, "rank of the blocks", source="RLEdit code", low=1)
    n_blocks: int = option(4, "residual blocks", source="RLEdit code", low=0)
    depth: int = option(10, "batches that a loss looks back", source="back_depth", low=1)
    decay: float = option(0.95, "weight of a batch per step back", source="time_decay", above=0, high=1)
    reg: float = option(1e-4, "weight of the squared norm of each shift", source="reg_coef", low=0)


@method
class RLEdit(MALMEN):
    """MALMEN for sequences."""

    name = "rledit"
    Config = RLEditConfig
    config: RLEditConfig
