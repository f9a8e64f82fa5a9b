"""Imports from before the rooms were rearranged still work, with a warning that names the new place."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old name -> new name; the longest one that fits counts, and what stands behind it is taken over.
MOVED = {
    "config": "base.config",
    "device": "base.device",
    "errors": "base.errors",
    "facts": "models.facts",
    "hooks": "models.hooks",
    "lookup": "models.lookup",
    "prompts": "models.prompts",
    "statistics": "locate.moments",
    "world": "corpora.world",
    "world.testbed": "studies.testbed",
    "presets": "methods.presets",
    "doctor": "methods.doctor",
    "testing": "methods.contract",
    "editors": "methods.weights",
    "editors.base": "methods.base",
    "editors.delta": "methods.delta",
    "memory": "methods.memory",
    "hypernet": "methods.hypernet",
    "runs": "press",
    "plotting": "press.plotting",
    "conformance": "press.conformance",
    "labyrinth": "studies.labyrinth",
    "lifelong": "studies.memoir",
    "compare": "studies.compare",
    "cost": "studies.cost",
}
# Packages whose names are found one room up.
_NAMES = {"editors": "methods"}


class _Forward(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        old = fullname.removeprefix("editkit.")
        if not fullname.startswith("editkit.") or old.split(".")[0] not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("editkit.")
        head = max((o for o in MOVED if f"{old}.".startswith(f"{o}.")), key=len)
        new = "editkit." + _NAMES.get(old, MOVED[head] + old[len(head) :])
        target = importlib.import_module(new)
        warnings.warn(f"editkit.{old} has moved: import {new}", FutureWarning, stacklevel=2)
        module.__getattr__ = lambda name: getattr(target, name)


def install() -> None:
    """Look old names up after everything else; once per process."""
    if not any(isinstance(finder, _Forward) for finder in sys.meta_path):
        sys.meta_path.append(_Forward())
