"""Shapes of models, and models of a shape with random weights, made on the device in the wanted dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

from ...base.config import check_known
from ...base.device import is_accelerator
from ...base.errors import ConfigError
from ...models.lm import LM, load_lm
from ...models.preflight import check_fits, empty_model, weight_bytes


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: hidden width m, MLP width d, blocks, heads, key-value heads, vocabulary.

    source: where the sizes stand.
    """

    name: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    source: str = "config.json of the model on the Hub"

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads, self.vocab)
        if min(sizes) < 1:
            raise ConfigError(f"the shape {self.name!r} has a size below 1: {sizes}")
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ConfigError(
                f"the shape {self.name!r}: {self.heads} heads do not divide the width {self.hidden} evenly, or "
                f"{self.kv_heads} key-value heads do not divide them; choose sizes that do"
            )

    def config(self) -> transformers.PretrainedConfig:
        """The configuration of such a model."""
        common: dict[str, Any] = {"vocab_size": self.vocab, "bos_token_id": 0, "eos_token_id": 0}
        if self.model_type in ("gpt2", "gptj"):
            sizes = {
                "n_embd": self.hidden,
                "n_inner": self.intermediate,
                "n_layer": self.layers,
                "n_head": self.heads,
            }
            sizes |= {"n_positions": 2048}
            if self.model_type == "gptj":
                sizes["rotary_dim"] = min(64, self.hidden // self.heads)
        else:
            sizes = {
                "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "max_position_embeddings": 4096, "tie_word_embeddings": False,
            }  # fmt: skip
        return transformers.AutoConfig.for_model(self.model_type, **common, **sizes)


SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("gpt2-xl", "gpt2", 1600, 6400, 48, 25, 25, 50257),
        Shape("gpt-j-6b", "gptj", 4096, 16384, 28, 16, 16, 50400),
        Shape("llama-2-7b", "llama", 4096, 11008, 32, 32, 32, 32000),
        Shape("llama-3-8b", "llama", 4096, 14336, 32, 32, 8, 128256),
        Shape("mistral-7b", "mistral", 4096, 14336, 32, 32, 8, 32000),
        Shape("qwen2-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064),
    )
}
"""The models of the papers. `small` scales one down."""


def small(hidden: int, layers: int, vocab: int = 8192, name: str = "") -> Shape:
    """Llama-3-8B scaled to a width (a multiple of 64) and a number of blocks: MLP 3.5 times as wide, heads of 32."""
    heads = max(1, hidden // 32)
    kv = max(1, heads // 4)
    return Shape(
        name or f"llama-{hidden}x{layers}",
        "llama",
        hidden,
        hidden * 7 // 2,
        layers,
        heads,
        kv,
        vocab,
        "scaled",
    )


def shape_named(name: str | dict[str, Any]) -> Shape:
    """A shape of `SHAPES` by name, or one from its sizes.

    A dictionary with hidden, layers (and vocab) alone gives `small`. Raises ConfigError for unknown names and keys.
    """
    if isinstance(name, str):
        check_known([name], sorted(SHAPES), "shape")
        return SHAPES[name]
    known = {f.name for f in dataclasses.fields(Shape)}
    check_known(list(name), sorted(known), "size of a shape")
    if set(name) <= {"hidden", "layers", "vocab", "name"}:
        return small(**name)
    return Shape(**{"name": "custom", "source": "given", **name})


def make_random(shape: Shape, device: torch.device, dtype: torch.dtype, tokenizer, seed: int = 0) -> LM:
    """A model of the shape with random weights, made on the device in that dtype; nothing is downloaded.

    tokenizer: any whose ids fit the vocabulary. Raises ConfigError if they do not, ModelError without the memory.
    """
    if len(tokenizer) > shape.vocab:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the shape {shape.name!r} a vocabulary of {shape.vocab}; "
            "give a larger one"
        )
    config = shape.config()
    if device.type == "cpu":
        check_fits(weight_bytes(empty_model(config), dtype), dtype, shape.name)
    kind = {"device_type": device.type} if is_accelerator(device) else {}
    with torch.random.fork_rng(devices=[device] if kind else [], **kind):
        torch.manual_seed(seed)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm = load_lm(model, tokenizer)
    lm.name = f"{shape.name} (random weights)"
    return lm
