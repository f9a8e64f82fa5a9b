"""The table of architectures: where each keeps its parts.

What differs between architectures is one row here, never an `if` in a method.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ArchSpec:
    """Where an architecture keeps its parts.

    Paths of block parts are relative to a block, the others to the model. `up` are the projections into the
    MLP's hidden layer (two for gated MLPs), `down` is the one out of it: its input is the key, its output the
    value of the MLP seen as a linear associative memory (ROME section 3.1; MEMIT section 4.2).
    orientation: "linear" stores (m, d), "conv1d" stores (d, m) [m value width, d key width].
    block_output: what a block's forward returns in current transformers (documentation; hooks accept both).
    """

    model_types: tuple[str, ...]
    blocks: str
    mlp: str
    down: str
    up: tuple[str, ...]
    attn: str
    attn_out: str
    norm: str
    head: str
    embed: str
    orientation: Literal["linear", "conv1d"]
    block_output: Literal["tensor", "tuple"]


GPT2 = ArchSpec(
    model_types=("gpt2",),
    blocks="transformer.h", mlp="mlp", down="mlp.c_proj", up=("mlp.c_fc",),
    attn="attn", attn_out="attn.c_proj",
    norm="transformer.ln_f", head="lm_head", embed="transformer.wte",
    orientation="conv1d", block_output="tensor",
)  # fmt: skip
GPTJ = ArchSpec(
    model_types=("gptj",),
    blocks="transformer.h", mlp="mlp", down="mlp.fc_out", up=("mlp.fc_in",),
    attn="attn", attn_out="attn.out_proj",
    norm="transformer.ln_f", head="lm_head", embed="transformer.wte",
    orientation="linear", block_output="tuple",
)  # fmt: skip
GPT_NEOX = ArchSpec(
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers", mlp="mlp", down="mlp.dense_4h_to_h", up=("mlp.dense_h_to_4h",),
    attn="attention", attn_out="attention.dense",
    norm="gpt_neox.final_layer_norm", head="lm_head", embed="gpt_neox.embed_in",
    orientation="linear", block_output="tensor",
)  # fmt: skip
LLAMA = ArchSpec(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers", mlp="mlp", down="mlp.down_proj", up=("mlp.gate_proj", "mlp.up_proj"),
    attn="self_attn", attn_out="self_attn.o_proj",
    norm="model.norm", head="lm_head", embed="model.embed_tokens",
    orientation="linear", block_output="tensor",
)  # fmt: skip

ARCHITECTURES: dict[str, ArchSpec] = {
    t: spec for spec in (GPT2, GPTJ, GPT_NEOX, LLAMA) for t in spec.model_types
}
