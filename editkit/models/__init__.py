"""The model and its facts: loading, the architecture table, hooks, batches, token positions, requests and prompts.

    from editkit.models import LM, Fact, Probe, load_lm

May import `base`.
"""

from __future__ import annotations

import importlib

__all__ = ["LM", "Fact", "Probe", "load_lm"]

# Loaded on first use: requests and checks before a load need neither torch nor transformers.
_LAZY = {"LM": ".lm", "load_lm": ".lm", "Fact": ".facts", "Probe": ".facts"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
