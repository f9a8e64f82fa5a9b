"""editkit: model editing methods, scorers and reproducible runs, one readable implementation of each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import moved
from .models.facts import Fact, Probe

if TYPE_CHECKING:
    from .methods import make_editor
    from .models.lm import load_lm

moved.install()

__version__ = "0.1.0"
__all__ = ["Fact", "Probe", "load_lm", "make_editor"]

# Loaded on first use: importing editkit for its command line or its mathematics stays light.
_LAZY = {"load_lm": ".models", "make_editor": ".methods"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
