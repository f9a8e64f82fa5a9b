"""Where runs live on disk, and reading finished ones back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nbformat

from ..base.errors import DataError
from .notebook import failure
from .report import RESULTS

SIDECAR = "run.json"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Paths of a project: finished runs, committed reference results, and scratch space."""

    root: Path

    @property
    def runs(self) -> Path:
        """Finished runs, one folder each, ignored by git."""
        return self.root / "book" / "runs"

    @property
    def results(self) -> Path:
        """Committed reference results, one folder per alias: sidecar, figures, small tables."""
        return self.root / "results"

    @property
    def scratch(self) -> Path:
        """Staging, checkpoints, caches, locks and logs; ignored by git, safe to delete."""
        return self.root / ".editkit"

    def run_dir(self, run_id: str) -> Path:
        return self.runs / run_id

    def notebook(self, run_id: str) -> Path:
        return self.run_dir(run_id) / f"{run_id}.ipynb"

    def outcome(self, run_id: str) -> Path:
        """Why a run has no result from its last execution; absent if it has."""
        return self.scratch / "outcomes" / f"{run_id}.json"

    def log(self, run_id: str) -> Path:
        return self.scratch / "logs" / f"{run_id}.log"


def find_root(start: Path | None = None) -> Path:
    """The project's folder: the nearest one upwards with `studies/` and `book/`.

    Raises DataError when there is none; give it with `--root`.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "studies").is_dir() and (folder / "book").is_dir():
            return folder
    raise DataError(
        f"no project (a folder with studies/ and book/) at or above {start}; change there or give --root"
    )


def read_sidecar(folder: Path) -> dict | None:
    """The sidecar of a run or reference folder, None when there is none. Raises DataError if damaged."""
    path = folder / SIDECAR
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged ({error}); delete the folder and run again") from error
    if sidecar.get("schema") != SCHEMA:
        raise DataError(
            f"{path} has schema {sidecar.get('schema')!r}, expected {SCHEMA}; run again with --force"
        )
    missing = [file for file in sidecar_files(sidecar) if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {missing}; delete the folder and run again")
    return sidecar


def sidecar_files(sidecar: dict) -> list[str]:
    """Names of the tables, figures and data files a sidecar refers to."""
    files = [table["file"] for table in sidecar["tables"].values()]
    for figure in sidecar["figures"].values():
        files += [figure["file"]] + ([figure["data"]] if figure["data"] else [])
    return [file for file in files if file]


def finished(layout: Layout, run_id: str) -> tuple[dict, nbformat.NotebookNode] | None:
    """Sidecar and notebook of a finished run that passes the gate; None when there is none.

    Raises DataError when a failed or damaged notebook lies where only finished ones may lie.
    """
    sidecar = read_sidecar(layout.run_dir(run_id))
    path = layout.notebook(run_id)
    if sidecar is None or not path.is_file():
        return None
    notebook = nbformat.read(path, as_version=4)
    if problem := failure(notebook):
        raise DataError(f"{path} must not be published: {problem}; delete its folder and run again")
    return sidecar, notebook


__all__ = ["RESULTS", "SCHEMA", "SIDECAR", "Layout", "find_root", "finished", "read_sidecar", "sidecar_files"]
