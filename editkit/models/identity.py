"""Which function a model computes: a hash of what decides it, and the models whose function cannot be known.

One answer for caches, deltas, memories, hypernetworks and second moments (`LM.fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from .hooks import check_not_compiled

# Config values that decide what the weights compute and mean the same in every transformers release; the
# whole config would tie a fingerprint to one release, because keys with default values come and go.
_IDENTITY = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim",
    "hidden_act", "activation_function", "hidden_activation", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "norm_eps", "norm_epsilon", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim",
    "sliding_window", "layer_types", "attention_types", "window_size", "no_rope_layers", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "use_parallel_residual", "clip_qkv",
)  # fmt: skip


def fingerprint_of(
    model: nn.Module, known: dict[str, tuple[tuple, str]], exclude: Collection[str] = ()
) -> str:
    """sha256 (hex) over config values that compute, adapter states, parameters and persistent buffers.

    known: name -> (sums of the bits, hash) of earlier calls on this model, updated; what has not changed is not hashed
    again.   exclude: parameters that do not count. Raises ModelError for weights that are not in memory.
    """
    digest = hashlib.sha256()
    config = {key: getattr(model.config, key, None) for key in _IDENTITY}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(_adapters(model), default=str).encode())
    persistent = model.state_dict().keys()
    buffers = [(n, b) for n, b in model.named_buffers() if n in persistent]
    for name, value in sorted([*model.named_parameters(), *buffers], key=lambda item: item[0]):
        if name in exclude:
            continue
        check_resident(name, value)
        key = _same(value)
        if key is None or name not in known or known[name][0] != key:
            known[name] = (key or (), hash_of(value))
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {known[name][1]}".encode())
    return digest.hexdigest()


def hash_of(value: Tensor) -> str:
    """sha256 (hex) of a tensor's bytes."""
    return hashlib.sha256(value.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy()).hexdigest()


def _same(value: Tensor) -> tuple | None:
    """Equal for equal values, and in practice for no others: sums of the bits over rows and columns, weighted.

    Several times faster than sha256, on the tensor's own device; versions alone miss writes through `.data`.
    None for a tensor whose rows are not whole 64-bit words (hashed anew each time).
    """
    value = value.detach()
    if value.ndim < 2 or not value.is_contiguous() or value.shape[-1] * value.element_size() % 8:
        return None
    bits = value.flatten(0, -2).view(torch.int64)
    sums = []
    for part in (bits.sum(0), bits.sum(1)):
        weights = torch.arange(1, len(part) + 1, device=part.device) * 0x9E3779B97F4A7C1 + 1
        sums.append(int((part * weights).sum()))
    return (*value.shape, value.dtype, *sums)


def _adapters(model: nn.Module) -> list:
    """What decides beside the weights how adapter layers of peft compute; empty for a model without."""
    states = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return [
        [name, *(getattr(module, state, None) for state in states)]
        for name, module in model.named_modules() if hasattr(module, "active_adapters") and hasattr(module, "scaling")
    ]  # fmt: skip


def check_resident(name: str, value: Tensor) -> None:
    """Raise ModelError for an offloaded weight: what is written to it would be lost."""
    if value.is_meta:
        raise ModelError(
            f"{name} is not in memory (offloaded, device 'meta'), so it cannot be read or written; load the model "
            "whole: on a larger device, on the CPU (device_map=None), or with dtype=torch.bfloat16"
        )


def check_plain(model: nn.Module) -> None:
    """Raise ModelError for compiled models, whose hooks do not run, and wrapped ones."""
    check_not_compiled(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise ModelError(
            "the model is wrapped by peft, which hides and freezes its weights; merge the adapter first: "
            "load_lm(peft_model.merge_and_unload())"
        )
