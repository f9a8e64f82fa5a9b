"""Repeated forward passes that differ only from one token and one block on.

When a vector is added to the output of block l at token t, nothing changes below block l and nothing changes
before token t (attention is causal). `Replay` computes all of that once, keeps the keys and values of the
tokens before t and the states that enter block l from t on, and afterwards runs only the rest. Target
optimisation repeats such passes twenty times and more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from ..models.batching import Encoding
from ..models.hooks import bypassed, entering, trace
from ..models.lm import LM


@dataclasses.dataclass(frozen=True)
class Replay:
    """The part of a batch that changes: per row the tokens from its edited column on, moved to column 0.

    inputs: input_ids and position_ids (rows, s), attention_mask (rows, p + s) over p columns of prefix and s
            of suffix; columns of the prefix that a row does not own are masked.
    past:   per block the keys and values of the prefix, each (rows, heads, p, head width).
    entry:  (rows, s, m) states that enter block `layer`.
    """

    inputs: dict[str, Tensor]
    past: list[tuple[Tensor, Tensor]]
    entry: Tensor
    layer: int

    @staticmethod
    def possible(lm: LM, encoding: Encoding) -> bool:
        """False for attention that looks back over fewer tokens than the batch is long: the prefix is stored
        with gaps, and a sliding window counts columns.
        """
        window = getattr(lm.model.config, "sliding_window", None)
        return window is None or window >= 2 * encoding.input_ids.shape[1]

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LM, encoding: Encoding, columns: Tensor, layer: int, stop_at: str) -> Replay:
        """Run a batch once. columns: (rows,) first column to be edited; stop_at: last module needed."""
        cache = DynamicCache()
        block = lm.block_name(layer)
        with trace(lm.model, [block], inputs=True, outputs=False, stop_at=stop_at) as seen:
            lm.forward(encoding, use_cache=True, past_key_values=cache)
        prefix = int(columns.max())
        here = torch.arange(prefix, device=columns.device)
        owned = encoding.attention_mask[:, :prefix] * (here < columns[:, None])
        length = int((encoding.last - columns).max()) + 1
        index = columns[:, None] + torch.arange(length, device=columns.device)
        inside = index <= encoding.last[:, None]
        index = torch.where(inside, index, columns[:, None])
        inputs = {name: encoding[name].gather(1, index) for name in ("input_ids", "position_ids")}
        inputs["attention_mask"] = torch.cat([owned, inside.to(owned)], dim=1)
        entry = seen.input[block]
        at = index.to(entry.device)[..., None].expand(-1, -1, entry.shape[-1])
        past = [(kv.keys[:, :, :prefix], kv.values[:, :, :prefix]) for kv in cache.layers]
        return cls(inputs, past, entry.gather(1, at), layer)

    def take(self, rows: Sequence[int]) -> Replay:
        """Some of the rows."""
        index = torch.as_tensor(rows, dtype=torch.long)

        def pick(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        inputs = {name: pick(value) for name, value in self.inputs.items()}
        past = [(pick(keys), pick(values)) for keys, values in self.past]
        return Replay(inputs, past, pick(self.entry), self.layer)

    def forward(self, lm: LM) -> None:
        """Run the model on the suffixes, from block `layer` on; read the states with `hooks.trace`."""
        cache = DynamicCache(self.past)  # every pass appends its own suffix to the stored prefix
        below = [lm.block_name(i) for i in range(self.layer)]
        as_tuple = lm.spec.block_output == "tuple"
        with (
            bypassed(lm.model, below, as_tuple=as_tuple),
            entering(lm.model, lm.block_name(self.layer), self.entry),
        ):
            lm.model(**self.inputs, past_key_values=cache, use_cache=True, return_dict=True)
