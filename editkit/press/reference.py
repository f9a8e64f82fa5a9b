"""Committed reference results: the sidecars (with figures and small tables) of the best runs so far."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..base.errors import DataError
from .layout import SIDECAR, Layout, finished, read_sidecar, sidecar_files
from .study import RunSpec

MAX_FILE = 512 * 1024  # bytes; larger data files stay out of the repository


def collect(specs: Sequence[RunSpec], layout: Layout, *, allow_dirty: bool = False) -> list[Path]:
    """Copy finished runs into results/<alias>/, replacing what is there; returns the folders.

    Raises DataError for a run that is not finished, or that was made by code in no commit (nobody could trace
    its numbers; `allow_dirty` accepts it).
    """
    chosen = []
    for spec in specs:
        done = finished(layout, spec.run_id)
        if done is None:
            raise DataError(f"run {spec.run_id} is not finished; execute it with `editkit run`")
        if (done[0]["git"]["dirty"] or done[0]["git"]["commit"] is None) and not allow_dirty:
            raise DataError(
                f"run {spec.run_id} was made by uncommitted code; commit and run again (or use --allow-dirty)"
            )
        chosen.append((spec, done[0]))
    return [
        _copy(sidecar, layout.run_dir(spec.run_id), layout.results / spec.alias) for spec, sidecar in chosen
    ]


def _copy(sidecar: dict, source: Path, target: Path) -> Path:
    for figure in sidecar["figures"].values():
        if figure["data"] and (source / figure["data"]).stat().st_size > MAX_FILE:
            figure["data"] = None  # the executed notebook can make it again
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sidecar_files(sidecar):
        shutil.copy2(source / file, target / file)
    (target / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    return target


def references(layout: Layout) -> dict[str, tuple[dict, Path]]:
    """{alias: (sidecar, folder)} of all committed references."""
    found = {}
    folders = sorted(layout.results.iterdir()) if layout.results.is_dir() else []
    for folder in folders:
        sidecar = read_sidecar(folder) if folder.is_dir() else None
        if sidecar is not None:
            found[sidecar["alias"]] = (sidecar, folder)
    return found
