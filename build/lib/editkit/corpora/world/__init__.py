"""The companion world, its records and the companion model.

    from editkit.corpora.world import World, edit_facts
    facts = edit_facts(World(), n=100, seed=0)    # counterfactual edits with all their probes
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..table import Statement
from .biographies import Biography
from .consequences import must_change, must_not_change
from .records import edit_facts
from .world import World

if TYPE_CHECKING:
    from .companion import load_companion, load_world

__all__ = [
    "Biography", "Statement", "World", "edit_facts", "load_companion", "load_world", "must_change",
    "must_not_change",
]  # fmt: skip

# The model needs torch, the world does not.
_LAZY = {"load_companion": ".companion", "load_world": ".companion"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
