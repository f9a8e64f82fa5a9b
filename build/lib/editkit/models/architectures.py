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
    model_types=("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "stablelm"),
    blocks="model.layers", mlp="mlp", down="mlp.down_proj", up=("mlp.gate_proj", "mlp.up_proj"),
    attn="self_attn", attn_out="self_attn.o_proj",
    norm="model.norm", head="lm_head", embed="model.embed_tokens",
    orientation="linear", block_output="tensor",
)  # fmt: skip
# One matrix makes gate and up value; the down projection, which holds the memory, is as usual.
PHI3 = dataclasses.replace(LLAMA, model_types=("phi3",), up=("mlp.gate_up_proj",))
PHI = dataclasses.replace(
    LLAMA, model_types=("phi",), down="mlp.fc2", up=("mlp.fc1",), attn_out="self_attn.dense",
    norm="model.final_layernorm",
)  # fmt: skip
STARCODER2 = dataclasses.replace(LLAMA, model_types=("starcoder2",), down="mlp.c_proj", up=("mlp.c_fc",))

ARCHITECTURES: dict[str, ArchSpec] = {
    t: spec for spec in (GPT2, GPTJ, GPT_NEOX, LLAMA, PHI3, PHI, STARCODER2) for t in spec.model_types
}

_NORM_BEHIND = (
    "a norm stands behind its MLP, so what is written into the down projection is rescaled before it reaches the "
    "hidden states, and the solve of locate-then-edit methods does not hold"
)
_EXPERTS = "its MLPs are mixtures of experts: a block has no single down projection that holds the memory"
_SCALED = "it scales the residual branches or the logits by constants, which the table cannot describe"
_ENCODER = "it is an encoder without causal language modelling"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4"), _NORM_BEHIND),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "dbrx",
         "granitemoe", "llama4_text"), _EXPERTS,
    ),
    **dict.fromkeys(("granite", "cohere", "cohere2"), _SCALED),
    **dict.fromkeys(("bert", "roberta", "distilbert", "electra", "deberta", "deberta-v2", "modernbert"), _ENCODER),
    "opt": "its MLP sees all tokens of a batch in one long row, where a lookup by row and column finds the wrong ones",
    "bloom": "its MLP adds the residual itself, so its output is not the value of the memory",
}  # fmt: skip
