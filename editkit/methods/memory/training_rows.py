"""Training rows of a residual memory: a `LayerPass` whose replaced output is the module's own plus something."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.answers import log_probs_of
from ...models.batching import Encoding
from ...models.hooks import bypassed, entering, trace
from ...models.lm import LM
from ...models.prompts import PromptState
from .layer_pass import LayerPass


class TrainingRows(LayerPass):
    """Rows of one edit (r rows, t columns): bare prompt first, then its contexts, each with the target.

    places: (n, 4) target tokens: fact, row, column that predicts, token.   state: prompt of the bare row.
    additive: what is added to the down projection's output appears unchanged in the block's output, so that only
    the blocks above have to run again. like: rows of an earlier edit, whose finding on that holds here.
    """

    def __init__(
        self, lm: LM, layer: int, encoding: Encoding, places: Tensor, state: PromptState,
        like: TrainingRows | None = None,
    ) -> None:  # fmt: skip
        super().__init__(lm, encoding, layer)
        self.places, self.state = places, state
        self.additive = _is_additive(self) if like is None else like.additive

    @property
    def feature(self) -> Tensor:
        """Mean input over the bare prompt, (1, d)."""
        return self.state.mean(self.x[:1])

    def loss(self, memory: Tensor, extra: int = 0) -> Tensor:
        """Mean over rows of -log p of the target's tokens, summed and divided by their number + extra.

        memory: (r, t, m), the memory's output at the layer's down projection.
        """
        if self.additive:
            states = self._above(self.block_out + memory.to(self.block_out))
        else:
            states = self.states(lambda out: out + memory.to(out))
        said = log_probs_of(self.lm, states, self.places[:, 1:])
        row = self.places[:, 1].to(said.device)
        count = torch.zeros(len(self.x), dtype=said.dtype, device=said.device)
        count = count.index_add(0, row, torch.ones_like(said)) + extra
        return -(said / count[row]).sum() / len(count)

    def _above(self, states: Tensor) -> Tensor:
        """Output of the last block when the memory's block gives `states`."""
        lm, last = self.lm, self.lm.n_layers - 1
        if self.layer == last:
            return states
        end, first = lm.block_name(last), self.layer + 1
        below = [lm.block_name(i) for i in range(first)]
        with (
            bypassed(lm.model, below, as_tuple=lm.spec.block_output == "tuple"),
            entering(lm.model, lm.block_name(first), states),
            trace(lm.model, [end], stop_at=end) as seen,
        ):
            lm.forward(self.encoding)
        return seen.output[end]


@torch.no_grad()
def _is_additive(rows: TrainingRows) -> bool:
    """True for every architecture of the table; not for blocks with a norm behind the MLP."""
    lm, output = rows.lm, rows.block_out
    shift = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output) * output.std()
    with trace(lm.model, [rows.block], edit={rows.name: lambda out: out + shift}, stop_at=rows.block) as seen:
        lm.forward(rows.encoding)
    error = (seen.output[rows.block] - output - shift)[
        rows.encoding.attention_mask.bool()
    ].norm() / shift.norm()
    return bool(error < 1e-3 if output.dtype in (torch.float32, torch.float64) else error < 0.05)
