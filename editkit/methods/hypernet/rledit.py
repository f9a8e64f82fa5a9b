"""RLEdit: MALMEN's network trained over a sequence of batches, the earlier edits staying in the model.

One training step is one sequence (`training.Trainer.sequence`): batch t is planned on the model that carries
batches 1..t-1, and the loss looks back over the last `depth` batches,

    L_t = sum_{i < depth} decay^i CE(paraphrases of batch t-i) + loc_coef KL + reg ||Delta_t||^2 .

Gradients of all L_t with respect to Delta_t add up, and the network is updated once at the end of the sequence.
As in the published code, L_t reaches the network through Delta_t only, not through earlier shifts.
`training="released"` (with the released moments: `RELEASED`) is what the published code computes instead:

- KL is taken over the last `depth` batches, with the weights decay^i, against the model before batch t;
- its backward pass runs after Delta_t was taken out, so on the unedited weights;
- the accumulated gradient is clipped after every batch, not once;
- max(x, 0) has slope 1 at 0, where a fresh block is, so that its B and bias learn;
- the L2 term has no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ...base.config import option
from .data import TupleBatch, answer_logits, cross_entropy, kl_divergence
from .malmen import MALMEN, MALMENConfig
from .meta import Pass, weight_gradients
from .network import Rows, method
from .sites import add_shifts, weights

RELEASED = {"training": "released", "moments": "released"}
"""Options that make RLEdit compute what its published code computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLEditConfig(MALMENConfig):
    """Options of RLEdit; for the published code pass `**rledit.RELEASED`."""

    rank: int = option(1024, "rank of the blocks", source="RLEdit code", low=1)
    n_blocks: int = option(4, "residual blocks", source="RLEdit code", low=0)
    depth: int = option(10, "batches that a loss looks back", source="back_depth", low=1)
    decay: float = option(0.95, "weight of a batch per step back", source="time_decay", above=0, high=1)
    reg: float = option(1e-4, "weight of the squared norm of each shift", source="reg_coef", low=0)
    training: Literal["exact", "released"] = option(
        "exact", "gradients of the loss, or those of the published code (see the module)"
    )


@method
class RLEdit(MALMEN):
    """MALMEN for sequences."""

    name = "rledit"
    Config = RLEditConfig
    config: RLEditConfig

    def activation(self) -> Callable[[Tensor], Tensor]:
        return _clamp if self.config.training == "released" else torch.relu


def _clamp(x: Tensor) -> Tensor:
    """max(x, 0) with slope 1 at 0."""
    return x.clamp(min=0)


class Walk:
    """A sequence of batches whose shifts stay in the model; on exit the model has its own bits back.

    trainer: the `training.Trainer` of an RLEdit network.   asked: (paraphrases, unrelated) of every batch.
    """

    def __init__(
        self, trainer: Any, asked: Sequence[tuple[Sequence[TupleBatch], Sequence[TupleBatch]]]
    ) -> None:
        self.trainer, self.asked = trainer, asked
        self.released = trainer.net.config.training == "released"
        self._locality = [] if self.released else [trainer._locality(unrelated) for _, unrelated in asked]
        self._start = weights(trainer.lm, trainer.net.sites)
        self._total: list[Tensor] = []
        self._done = 0

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        lm, net = self.trainer.lm, self.trainer.net
        with torch.no_grad():
            for site, W in zip(net.sites, self._start, strict=True):
                lm.parameter(site.weight_name).copy_(W)

    def batch(self, rows: Rows) -> Pass:
        """Plan the next batch, write it, and add the network's gradients of L_t.

        Losses come unweighted: the newest batch first, then those before it.
        """
        lm, net, t = self.trainer.lm, self.trainer.net, self._done
        back = range(min(t + 1, net.config.depth))
        net.observe(rows)
        plan = net.plan(rows)
        before = weights(lm, net.sites)
        # The published locality asks the model without this batch's shift: read it while it is there.
        locality = self._against_now(t, back) if self.released else self._locality[t]
        self._total = [a + b for a, b in zip(self._total, plan.shifts, strict=True)] if t else plan.shifts
        self._done += 1
        add_shifts(lm, net.sites, self._start, self._total)
        losses = [
            (net.config.decay**i, self.trainer._entered(cross_entropy, b))
            for i in back
            for b in self.asked[t - i][0]
        ]
        if self.released:
            grads, gen = weight_gradients(lm, net, losses)
            more, loc = weight_gradients(lm, net, locality, behind=before)
            grads = [a + b for a, b in zip(grads, more, strict=True)]
        else:
            grads, values = weight_gradients(lm, net, losses + locality)
            gen, loc = values[: len(losses)], values[len(losses) :]
        reg = 0.0 if self.released else net.config.reg
        plan.backward([G.to(S) + 2 * reg * S for G, S in zip(grads, plan.shifts, strict=True)])
        if self.released:
            self.trainer.clip()
        return Pass(plan, grads, gen, loc)

    def _against_now(self, t: int, back: range) -> list:
        """(weight, KL against the model as it is) of the unrelated batches looked back on."""
        trainer, out = self.trainer, []
        for i in back if trainer.config.loc_coef else ():
            weight = trainer.config.loc_coef * trainer.net.config.decay**i
            for b in self.asked[t - i][1]:
                with torch.no_grad():
                    now = log_softmax(trainer._entered(answer_logits, b)(), -1)
                out.append((weight, trainer._entered(kl_divergence, b, now)))
        return out
