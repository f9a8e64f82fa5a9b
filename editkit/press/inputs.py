"""What a run depends on: checked notebooks and parameters, and the one key that decides if it is executed.

The key of a finished run holds hashes of its code cells and of its parameters, of every file that it has read (modules
and data of the package, helper modules, corpora, models), of the environment variables that the code names, and the
versions of the packages that it imported. What a notebook reads is decided by its own code and by what it reads, so an
unchanged key means that another execution would read the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat

from ..base.downloads import download_dir
from ..base.errors import DataError
from ..base.sources import (
    ABSENT,
    PACKAGE,
    digest,
    environment_names,
    file_hash,
    files_below,
    source_hash,
    tree_hash,
)
from ..models.pretrained import model_dir
from . import notebook as nb
from .layout import Layout, finished
from .provenance import package_versions
from .study import RunSpec, data_root

OLDER = "recorded before the key held all files"
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")  # opened by libraries that Python does not hear of
_SCRATCH = {".editkit", ".git", ".venv", "_build", "__pycache__"}
_ELSEWHERE = ("data:", "model:", "downloads:", "hub:", "path:")
# Variables with a meaning of their own here: what they lead to is in the key, or it cannot change a number.
_OWN = {
    "EDITKIT_RUN_DIR",
    "EDITKIT_WORK_DIR",
    "EDITKIT_CACHE",
    "EDITKIT_RUN_PARAMETERS",
    "EDITKIT_DATA",
    "EDITKIT_DOWNLOADS",
}


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


# -------------------------------------------------------------------- names of files


def _places(root: Path) -> list[tuple[str, Path]]:
    """Where files of a run may lie: what a name in the key begins with, and the folder."""
    from huggingface_hub.constants import HF_HUB_CACHE

    data = [("data:", data_root(root)), ("model:", model_dir()), ("downloads:", download_dir())]
    return [("editkit/", PACKAGE), *data, ("hub:", Path(HF_HUB_CACHE)), ("", root)]


def _name(path: Path, root: Path, given: Sequence[str]) -> str | None:
    """A file's name in the key; None for what does not count: scratch, results, installed packages, the system."""
    for prefix, folder in _places(root):
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).parts
            if (
                folder == PACKAGE and path.suffix != ".py"
            ):  # all data of that folder: what is added there counts, too
                return "/".join(["editkit", *parts[:-1], "*"])
            scratch = _SCRATCH & set(parts) or parts[:2] == ("book", "runs")
            return None if scratch and not prefix else prefix + "/".join(parts)
    return f"path:{path}" if any(path.is_relative_to(folder) for folder in given) else None


def _hash(name: str, root: Path) -> str:
    """Hash of the file that is called so in a key."""
    if name.startswith("module:"):
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name.removeprefix("module:"))
            return source_hash(Path(spec.origin)) if spec and spec.origin else ABSENT
        return ABSENT
    places = [("path:", Path("/")), *_places(root)]
    prefix, folder = next((p, f) for p, f in places if name.startswith(p))
    path = folder / name.removeprefix(prefix)
    if path.name == "*" and path.parent.is_dir():
        data = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p.suffix != ".py"]
        return digest(*(f"{p.name} {file_hash(p)}" for p in data))
    return source_hash(path) if path.suffix == ".py" else tree_hash(path)


# -------------------------------------------------------------------- the key


def package_files() -> dict[str, str]:
    """{file of the package: hash of its bytes}, to see what is edited while a run executes."""
    return {f"editkit/{p.relative_to(PACKAGE).as_posix()}": file_hash(p) for p in files_below(PACKAGE)}


def early_key(run: Prepared, root: Path) -> str:
    """Key of what is known before a run: everything that it might read. Names its checkpoints."""
    data = {name: _hash(name, root) for name in _declared(run)}
    folders = {p: tree_hash(Path(p)) for p in _given(run.parameters)}
    code = nb.code_hash(run.template), package_versions(), tree_hash(PACKAGE)
    return digest(json.dumps([run.parameters, data, folders, code], sort_keys=True))


def _declared(run: Prepared) -> list[str]:
    return sorted({*run.spec.inputs, *run.spec.requires})


def _given(parameters: dict[str, Any]) -> list[str]:
    """Folders that parameters name, such as a model's."""
    return [x for x in parameters.values() if isinstance(x, str) and os.path.isabs(x) and os.path.isdir(x)]


def key(run: Prepared, root: Path, seen: dict[str, Any]) -> dict[str, Any]:
    """The key of an executed run. seen: see `kernel.what_was_read`."""
    given = _given(run.parameters)
    opened = {Path(path) for path in seen["opened"]}
    beside = {file for folder in {p.parent for p in opened} for kind in WEIGHTS for file in folder.glob(kind)}
    sources = {Path(file).resolve() for file in seen["modules"].values()}
    names = {
        _name(path, root, given) for path in opened | {b for b in beside if _name(b, root, given)} | sources
    }
    names |= {
        f"module:{name}"
        for name, file in seen["modules"].items()
        if _name(Path(file).resolve(), root, given) is None
    }
    files = {name: _hash(name, root) for name in sorted({*names - {None}, *_declared(run)})}
    texts = [path.read_text(encoding="utf-8") for path in sorted(sources) if path.is_file()]
    record = {
        "notebook": nb.code_hash(run.template),
        "parameters": digest(json.dumps(run.parameters, sort_keys=True)),
        "files": {name: found for name, found in files.items() if found != ABSENT or name in _declared(run)},
        "packages": {name: _public(version) for name, version in seen["packages"].items()},
        "environment": _environment([*texts, *nb.cells_code(run.template)]),
    }
    return record | {"hash": digest(json.dumps(record, sort_keys=True))}


def _environment(texts: Iterable[str]) -> dict[str, str | None]:
    names = sorted(set().union(*(_named(text) for text in texts)) - _OWN)
    return {name: _value(name) for name in names}


_named = functools.lru_cache(maxsize=2048)(environment_names)


def _value(name: str) -> str | None:
    return digest(os.environ[name]) if name in os.environ else None


def _public(version: str) -> str:
    return version.split("+")[0]  # 2.9.0+cpu and 2.9.0+cu128 are one version


@functools.lru_cache(maxsize=256)
def _installed(name: str) -> str | None:
    try:
        return _public(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def stale(
    old: dict, template: nbformat.NotebookNode | None, parameters: dict | None, root: Path
) -> list[str]:
    """Why a result with the key `old` is no longer what its notebook would give; [] when nothing has changed.

    template: None if the notebook is gone.
    parameters: of the run now; None for a committed reference: those it was made with, and data or models that are not
                on this machine count as unchanged.
    """
    if "files" not in old:
        return [OLDER]
    now = {"notebook": template and nb.code_hash(template), "parameters": old["parameters"]}
    if parameters is not None:
        now["parameters"] = digest(json.dumps(parameters, sort_keys=True))
    reasons = [f"{part} changed" for part in now if now[part] != old[part]]
    for name, was in old["files"].items():
        found = _hash(name, root)
        if found != was and not (parameters is None and found == ABSENT and name.startswith(_ELSEWHERE)):
            reasons.append(f"{name} changed")
    reasons += [f"{name} changed" for name, was in old["packages"].items() if _installed(name) != was]
    return reasons + [f"${name} changed" for name, was in old["environment"].items() if _value(name) != was]


def changes(run: Prepared, layout: Layout) -> list[str]:
    """Why a run must be executed: [] when its result is there and none of its inputs has changed."""
    try:
        done = finished(layout, run.run_id)
    except DataError as error:
        return [str(error)]
    if done is None:
        return ["no result yet"]
    return stale(done[0]["inputs"], run.template, run.parameters, layout.root)


def edited(
    files: dict[str, str], package: dict[str, str], begin: float, run: Prepared, root: Path
) -> list[str]:
    """Files that were read and may have been read in another state than the key says."""
    changed = {name for name, _ in package.items() ^ package_files().items()}
    changed |= {f"{name.rpartition('/')[0]}/*" for name in changed if not name.endswith(".py")}
    found = sorted(changed & files.keys())
    for name in below(files, root):
        if (path := root / name).is_file() and not path.is_relative_to(PACKAGE):
            found += [name] if begin < path.stat().st_mtime < time.time() else []
    same = nb.code_hash(nb.read_notebook(root / run.spec.notebook)) == nb.code_hash(run.template)
    return found if same else [*found, run.spec.notebook]


def below(files: dict[str, str], root: Path) -> list[str]:
    """Those files of a key that lie in the project, as paths from its root."""
    names = [name for name in files if ":" not in name]
    if not PACKAGE.is_relative_to(root):
        return [name for name in names if not name.startswith("editkit/")]
    inside = PACKAGE.parent.relative_to(root).as_posix()
    return [f"{inside}/{name}" if inside != "." and name.startswith("editkit/") else name for name in names]
