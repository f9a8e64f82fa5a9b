"""What goes into a run: checked notebooks and parameters, and the hashes that decide if it is executed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from ..base.errors import DataError
from . import notebook as nb
from .layout import Layout, finished
from .provenance import NUMERIC_PACKAGES, PACKAGE, digest, package_versions, sources_changed, tree_hash
from .study import RunSpec, data_hashes

SHIPPED = ("corpora/world/companion",)  # data inside the package that results depend on


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that passed all checks that need no kernel."""

    spec: RunSpec
    template: nbformat.NotebookNode
    declared: dict[str, nb.Declared]
    parameters: dict[str, Any]

    @property
    def run_id(self) -> str:
        return self.spec.run_id


def prepare(specs: Sequence[RunSpec], root: Path) -> list[Prepared]:
    """Read and check the notebooks of all runs. Raises ConfigError before anything is executed."""
    read: dict[str, tuple] = {}
    prepared = []
    for spec in specs:
        if spec.notebook not in read:
            template = nb.read_notebook(root / spec.notebook)
            read[spec.notebook] = template, nb.check_notebook(template, spec.notebook)
        template, declared = read[spec.notebook]
        parameters = nb.check_parameters(declared, spec.parameters, f"{spec.notebook} (run {spec.alias})")
        prepared.append(Prepared(spec, template, declared, parameters))
    return prepared


def input_record(run: Prepared, root: Path) -> dict:
    """Hashes of everything known before the run: notebook, parameters, data, shipped model, packages."""
    return {
        "notebook": nb.code_hash(run.template),
        "parameters": digest(json.dumps(run.parameters, sort_keys=True)),
        "data": data_hashes(run.spec, root),
        "shipped": {name: tree_hash(PACKAGE / name) for name in SHIPPED},
        "packages": package_versions(NUMERIC_PACKAGES),
    }


def changes(run: Prepared, layout: Layout) -> list[str]:
    """Why a run must be executed: [] when its result is there and none of its inputs has changed."""
    try:
        done = finished(layout, run.run_id)
    except DataError as error:
        return [str(error)]
    if done is None:
        return ["no result yet"]
    old, new = done[0]["inputs"], input_record(run, layout.root)
    reasons = [f"{part} changed" for part in ("notebook", "parameters") if old[part] != new[part]]
    for part in ("data", "shipped", "packages"):
        names = sorted(set(old[part]) | set(new[part]))
        reasons += [f"{name} changed" for name in names if old[part].get(name) != new[part].get(name)]
    return reasons + [f"editkit/{name} changed" for name in sources_changed(old["modules"])]
