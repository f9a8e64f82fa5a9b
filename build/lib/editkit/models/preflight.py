"""Checks that need a model's configuration only: before gigabytes are loaded, or on a machine that could not.

`read_config` finds the configuration, `check_config` refuses what editkit cannot edit, `empty_model` builds the
model without memory (torch's meta device), `tiny_model` a runnable one of the same class, `check_fits` compares the
weights with the memory there is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..base.errors import EditkitError, ModelError
from .architectures import ARCHITECTURES, UNSUPPORTED, ArchSpec

GIB = 2**30
# Small enough to run in a moment, and nothing in it is equal by chance.
_TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def read_config(source: str, **kwargs: Any) -> PretrainedConfig:
    """The configuration of a Hub name or folder; kwargs as in `load_lm` (revision, ...).

    Raises ModelError if there is none.
    """
    known = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "trust_remote_code")}
    try:
        return AutoConfig.from_pretrained(source, **known)
    except EditkitError:
        raise
    except (OSError, ValueError, KeyError) as error:
        kind = "folder without config.json" if Path(source).is_dir() else "name on the Hub, nor a folder here"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{source!r} is {'a ' if Path(source).is_dir() else 'no '}{kind}, or it cannot be reached: {reason}. Check "
            "the name or path, whether the model is gated (log in to the Hub), and the network"
        ) from error


def check_config(config: PretrainedConfig, name: str, spec: ArchSpec | None = None) -> ArchSpec:
    """The architecture row of a configuration. Raises ModelError for what cannot be edited."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder ({config.model_type}); editkit edits decoder-only models: choose one, e.g. "
            "gpt2-xl or Qwen/Qwen2.5-7B"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        about = quantised if isinstance(quantised, dict) else vars(quantised)
        raise ModelError(
            f"{name} is quantised ({about.get('quant_method', 'unknown method')}) and cannot be edited exactly; take "
            "the checkpoint it was made from and load it in bfloat16 or float32"
        )
    if spec is not None:
        return spec
    if config.model_type in UNSUPPORTED:
        raise ModelError(
            f"{name} ({config.model_type}) cannot be edited: {UNSUPPORTED[config.model_type]}. Choose a model of the "
            f"architecture table ({', '.join(ARCHITECTURES)}), or, knowing this, pass an "
            "ArchSpec as load_lm(..., spec=...)"
        )
    inner = getattr(config, "text_config", None)
    if inner is not None and config.model_type not in ARCHITECTURES:
        kind = getattr(inner, "model_type", "unknown")
        raise ModelError(
            f"{name} ({config.model_type}) wraps a language model ({kind}) together with other inputs; editkit edits "
            "the language model alone: load that as a causal LM and pass the object to load_lm, or take a text "
            "checkpoint" + ("" if kind in ARCHITECTURES else f" (of a class of the table; {kind} is none)")
        )
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"no row for model type {config.model_type!r} in the architecture table ({', '.join(ARCHITECTURES)}); "
            "write an editkit.models.lm.ArchSpec with its module paths and pass it as load_lm(..., spec=...)"
        )
    return ARCHITECTURES[config.model_type]


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model without any memory behind its parameters: shapes and modules only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A real model of the same class and vocabulary with two narrow layers, random and seeded, float32."""
    small = copy.deepcopy(config)
    for name, value in _TINY.items():
        if hasattr(small, name):
            setattr(small, name, value)
    if hasattr(small, "n_inner"):  # gpt2 and gptj name the MLP's width so; None would be 4 widths
        small.n_inner = _TINY["intermediate_size"]
    if getattr(small, "num_key_value_heads", None):
        small.num_key_value_heads = 2
    if getattr(small, "head_dim", None):
        small.head_dim = 8
    if getattr(small, "rotary_dim", None):
        small.rotary_dim = 4
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types)[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32)


def gib(n_bytes: float) -> str:
    """Bytes in words."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= 0.1 * GIB else f"{n_bytes / 2**20:.1f} MiB"


def weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all parameters in that dtype; tied ones count once."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def free_memory() -> dict[str, int]:
    """Free bytes of the host and of every accelerator: {"host": ..., "<type>:0": ...}."""
    found = {"host": int(psutil.virtual_memory().available)}
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None and accelerator.is_available():
        kind = accelerator.current_accelerator().type
        measure = getattr(torch.get_device_module(kind), "mem_get_info", None)
        for i in range(accelerator.device_count()):
            if measure is not None:
                found[f"{kind}:{i}"] = int(measure(i)[0])
    return found


def check_fits(needed: int, dtype: torch.dtype, name: str, memory: Mapping[str, int] | None = None) -> None:
    """Raise ModelError unless the weights fit: into one accelerator, all of them and the host together, or the host.

    needed: bytes in `dtype`.   memory: free bytes by place, as of `free_memory`, which is asked if None.
    """
    memory = free_memory() if memory is None else memory
    total = sum(memory.values())
    if needed <= total:
        return
    n_params = needed // dtype.itemsize
    advice = []
    if dtype.itemsize > 2:
        half = n_params * 2
        word = "would fit" if half <= total else f"would need {gib(half)}, which does not fit either"
        advice.append(f"in bfloat16 it {word}")
    advice.append(f"here fits a model of up to {total // 2 / 1e9:.1f} billion parameters in bfloat16")
    raise ModelError(
        f"the weights of {name} need {gib(needed)} in {str(dtype).removeprefix('torch.')}, free are "
        f"{gib(total)} ({', '.join(f'{k} {gib(v)}' for k, v in memory.items())}): {gib(needed - total)} are missing; "
        + "; ".join(advice)
    )


def check_source(source: str, dtype: torch.dtype, spec: ArchSpec | None = None, **kwargs: Any) -> None:
    """All of the above for a model that is about to be loaded. Raises ModelError.

    Memory is not compared where transformers was told how to place the weights (device_map, offload_folder), nor for
    models with code of their own.
    """
    config = read_config(source, **kwargs)
    name = Path(source).resolve().name if Path(source).is_dir() else source
    check_config(config, name, spec)
    if not {"device_map", "offload_folder", "trust_remote_code"} & set(kwargs):
        check_fits(weight_bytes(empty_model(config), dtype), dtype, name)
