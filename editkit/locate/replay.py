"""Repeated forward passes that differ only from one token and one block on.

When a vector is added to the output of block l at token t, nothing changes below block l and nothing changes
before token t (attention is causal). `Replay` computes all of that once, keeps the keys and values of the
tokens before t and the states that enter block l from t on, and afterwards runs only the rest. Target
optimisation repeats such passes twenty times and more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from ..models.batching import Encoding
from ..models.hooks import EditFn, bypassed, entering, trace
from ..models.lm import LM


@dataclasses.dataclass(frozen=True)
class Replay:
    """The part of a batch that changes: per row the tokens from its edited column on, moved to column 0.

    inputs: input_ids and position_ids (rows, s), attention_mask (rows, p + s) over p columns of prefix and s
            of suffix; columns of the prefix that a row does not own are masked.
    past:   keys and values of the prefix in the blocks that run, each (rows, heads, p, head width).
    entry:  (rows, s, m) states that enter block `layer`, or leave it if `after`.
    after:  block `layer` itself is not run again; its hooks see `entry` as its output.
    """

    inputs: dict[str, Tensor]
    past: list[tuple[Tensor, Tensor]]
    entry: Tensor
    layer: int
    after: bool = False

    @property
    def first(self) -> int:
        """The first block that runs."""
        return self.layer + self.after

    @staticmethod
    def possible(lm: LM, encoding: Encoding) -> bool:
        """False for attention that looks back over fewer tokens than the batch is long: the prefix is stored
        with gaps, and a sliding window counts columns.
        """
        window = getattr(lm.model.config, "sliding_window", None)
        return window is None or window >= 2 * encoding.input_ids.shape[1]

    @classmethod
    def of(
        cls, lm: LM, encoding: Encoding, columns: Tensor, layer: int, stop_at: str, after: bool = False
    ) -> Replay:
        """Run a batch once. columns: (rows,) first column to be edited; stop_at: last module needed.

        after: what is edited is the output of block `layer`, so that the block itself need not run again.
        """
        return cls.several(lm, encoding, columns, [layer], stop_at=stop_at, after=after)[0][layer]

    @classmethod
    @torch.no_grad()
    def several(
        cls,
        lm: LM,
        encoding: Encoding,
        columns: Tensor,
        layers: Sequence[int],
        *,
        stop_at: str,
        after: bool = False,
        edit: Mapping[str, EditFn] | None = None,
        record: Sequence[str] = (),
    ) -> tuple[dict[int, Replay], dict[str, Tensor]]:
        """One run, from which passes can begin at each of some layers; and outputs of modules, moved like `entry`.

        edit: applied in this run (and part of what the later passes start from). The prefixes are stored once.
        """
        cache = DynamicCache()
        blocks = [lm.block_name(i) for i in layers]
        with trace(
            lm.model, {*blocks, *record}, inputs=not after, outputs=True, edit=edit, stop_at=stop_at
        ) as seen:
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

        def moved(states: Tensor) -> Tensor:
            return states.gather(1, index.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))

        # Copies, so that the whole pass is not kept alive by views of it.
        past = {
            i: (kv.keys[:, :, :prefix].clone(), kv.values[:, :, :prefix].clone())
            for i, kv in enumerate(cache.layers)
            if i >= min(layers) + after
        }
        entries = seen.output if after else seen.input
        made = {
            i: cls(
                inputs, [past[j] for j in past if j >= i + after], moved(entries[lm.block_name(i)]), i, after
            )
            for i in layers
        }
        return made, {name: moved(seen.output[name]) for name in record}

    def take(self, rows: Sequence[int]) -> Replay:
        """Some of the rows."""
        index = torch.as_tensor(rows, dtype=torch.long)

        def pick(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        inputs = {name: pick(value) for name, value in self.inputs.items()}
        past = [(pick(keys), pick(values)) for keys, values in self.past]
        return dataclasses.replace(self, inputs=inputs, past=past, entry=pick(self.entry))

    def forward(self, lm: LM) -> None:
        """Run the model on the suffixes, from block `first` on; read the states with `hooks.trace`."""
        rows, prefix = self.entry.shape[0], self.inputs["attention_mask"].shape[1] - self.entry.shape[1]
        # Blocks that do not run have a prefix of the right length, as narrow as can be: the first tells the length.
        empty = self.entry.new_zeros(rows, 1, prefix, 1)
        # Every pass appends its own suffix to the stored prefix.
        cache = DynamicCache([(empty, empty)] * self.first + self.past)
        below = [lm.block_name(i) for i in range(self.first)]
        as_tuple = lm.spec.block_output == "tuple"
        with (
            bypassed(lm.model, below, as_tuple=as_tuple),
            entering(lm.model, lm.block_name(self.layer), self.entry),
        ):
            lm.model(**self.inputs, past_key_values=cache, use_cache=True, return_dict=True)


def run(lm: LM, inputs: Encoding | Replay) -> None:
    """A forward pass over whole rows or over suffixes."""
    inputs.forward(lm) if isinstance(inputs, Replay) else lm.forward(inputs)
