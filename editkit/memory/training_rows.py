"""Training rows of an edit, run once up to the memory's layer: every step then starts from there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..batching import Encoding
from ..hooks import bypassed, entering, trace
from ..models import LM
from ..prompts import PromptState


@dataclasses.dataclass(frozen=True)
class Upper:
    """Rows of one edit (r rows, t columns): bare prompt first, then its contexts, each with the target.

    x:       (r, t, d) input of the memory layer's down projection.   feature: (1, d) mean over the bare prompt.
    states:  (r, t, m) what enters the first block that has to run again: the memory layer's output where the
             memory's output is simply added to it (`additive`), else that layer's input.
    places:  (n, 4) target tokens: fact, row, column that predicts, token.   state: prompt of the bare row.
    """

    lm: LM
    layer: int
    encoding: Encoding
    places: Tensor
    state: PromptState
    x: Tensor
    states: Tensor
    additive: bool

    @property
    def feature(self) -> Tensor:
        return self.state.mean(self.x[:1])

    @classmethod
    @torch.no_grad()
    def of(
        cls, lm: LM, layer: int, encoding: Encoding, places: Tensor, state: PromptState, like: Upper | None = None
    ) -> Upper:  # fmt: skip
        """Run the rows up to the layer. like: rows of an earlier edit, whose finding on `additive` holds here."""
        block, down = lm.block_name(layer), lm.down_name(layer)
        with trace(lm.model, [block, down], inputs=True, stop_at=block) as seen:
            lm.forward(encoding)
        if like is None:
            additive = _is_additive(lm, layer, encoding, seen.output[block])
        else:
            additive = like.additive
        states = seen.output[block] if additive else seen.input[block]
        return cls(lm, layer, encoding, places, state, seen.input[down], states, additive)

    def loss(self, memory: Tensor, extra: int = 0) -> Tensor:
        """Mean over rows of -log p of the target's tokens, summed and divided by their number + extra.

        memory: (r, t, m), the memory's output at the layer's down projection.
        """
        lm, (_, row, column, token) = self.lm, self.places.unbind(-1)
        last = lm.n_layers - 1
        if self.additive and self.layer == last:
            final = self.states + memory.to(self.states)
        else:
            final = self._run(memory)
        logits = lm.head(final[row.to(final.device), column.to(final.device)])
        said = log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        said = said.gather(-1, token.to(said.device)[:, None])[:, 0]
        row = row.to(said.device)
        count = torch.zeros(len(self.x), dtype=said.dtype, device=said.device)
        count = count.index_add(0, row, torch.ones_like(said)) + extra
        return -(said / count[row]).sum() / len(count)

    def _run(self, memory: Tensor) -> Tensor:
        lm = self.lm
        first = self.layer + 1 if self.additive else self.layer
        end, down = lm.block_name(lm.n_layers - 1), lm.down_name(self.layer)
        entry = self.states + memory.to(self.states) if self.additive else self.states
        edit = None if self.additive else {down: lambda out: out + memory.to(out)}
        below = [lm.block_name(i) for i in range(first)]
        with (
            bypassed(lm.model, below, as_tuple=lm.spec.block_output == "tuple"),
            entering(lm.model, lm.block_name(first), entry),
            trace(lm.model, [end], edit=edit, stop_at=end) as seen,
        ):
            lm.forward(self.encoding)
        return seen.output[end]


def _is_additive(lm: LM, layer: int, encoding: Encoding, output: Tensor) -> bool:
    """Whether what is added to the down projection's output appears unchanged in the block's output.

    True for every architecture of the table; not for blocks with a norm behind the MLP.
    """
    block, down = lm.block_name(layer), lm.down_name(layer)
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(output.shape, generator=generator).to(output) * output.std()
    with trace(lm.model, [block], edit={down: lambda out: out + shift}, stop_at=block) as seen:
        lm.forward(encoding)
    error = (seen.output[block] - output - shift)[encoding.attention_mask.bool()].norm() / shift.norm()
    return bool(error < 1e-3 if output.dtype in (torch.float32, torch.float64) else error < 0.05)
