"""Committed reference results: the sidecars (with figures and small tables) of the best runs so far."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..base.errors import DataError
from .inputs import prepare, stale
from .layout import SIDECAR, Layout, finished, read_sidecar, sidecar_files
from .study import RunSpec

MAX_FILE = 512 * 1024  # bytes; larger data files stay out of the repository


def collect(specs: Sequence[RunSpec], layout: Layout, *, allow_dirty: bool = False) -> list[Path]:
    """Copy finished runs into results/<alias>/, replacing what is there; returns the folders.

    Raises DataError for a run that is not finished or whose inputs have changed since, or that was made by code in no
    commit (nobody could trace its numbers; `allow_dirty` accepts it).
    """
    chosen = []
    for run in prepare(specs, layout.root):
        spec = run.spec
        done = finished(layout, spec.run_id)
        if done is None:
            raise DataError(f"run {spec.run_id} is not finished; execute it with `editkit run`")
        if reasons := stale(done[0]["inputs"], run.template, run.parameters, layout.root):
            raise DataError(
                f"run {spec.run_id} is stale ({'; '.join(reasons)}); execute it again with `editkit run`"
            )
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
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".", dir=target.parent
    ) as whole:  # a full disk leaves the old reference
        made, old = Path(whole) / "new", Path(whole) / "old"
        made.mkdir()
        for file in sidecar_files(sidecar):
            shutil.copy2(source / file, made / file)
        (made / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        made.rename(target)
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
