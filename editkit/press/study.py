"""Studies: YAML files that name notebooks, parameters and grids, expanded into runs.

title: Default profile
runs:
  - notebook: notebooks/locate_then_edit.ipynb
    alias: locate-then-edit          # stable name the book quotes; "{name}" inserts a parameter
    title: Locate-then-edit          # page title of the run in the appendix
    parameters: {n_edits: 100}
    grid: {seed: [0, 1, 2]}          # one run per combination; the alias must tell them apart
    inputs: [notes.txt]              # files that count although the notebook does not open them itself
    requires: [data:zsre/zsre.json]  # without it not available here (data: below EDITKIT_DATA; model:smollm2: fetched)
    tags: [labyrinth]
    gpus: 0                          # resources, for the scheduler
    threads: 2
    memory_gib: 4
    minutes: 2                       # about how long it takes; long runs start first
include: [labyrinth.yaml]            # studies in the same folder whose runs belong to this one, too
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..base.errors import ConfigError
from ..base.sources import digest
from ..models.pretrained import description_of

_FIELDS = {
    "notebook": str, "alias": str, "title": str, "parameters": dict, "grid": dict, "inputs": list,
    "requires": list, "tags": list, "gpus": int, "threads": int, "memory_gib": (int, float),
    "minutes": (int, float),
}  # fmt: skip
_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]*")


class _Loader(yaml.SafeLoader):
    """YAML as people mean it, and nothing else: texts, numbers as JSON writes them, true, false, null, lists, mappings.

    1e-5 is a number; no, 2024-01-01, 010, 12:30 and 1_0 are text, as written. Tags, anchors and keys that stand
    twice are errors with their place.
    """

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "anchor", None) or (getattr(event, "tag", None) or "!") != "!":
            what = "anchors and aliases" if getattr(event, "anchor", None) else f"the tag {event.tag}"
            raise yaml.constructor.ConstructorError(
                None, None, f"{what} cannot be used here; write the value", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: set[Any] = set()
        for key, _ in node.value:
            text = key.tag == "tag:yaml.org,2002:str"
            if not text or key.value in seen:
                problem = f"the key {key.value!r} stands twice" if text else "a key must be a text"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        text = self.construct_scalar(node)
        if len(text) > 30:
            raise yaml.constructor.ConstructorError(
                None, None, "a number of more than 30 signs", node.start_mark
            )
        return int(text) if node.tag.endswith("int") else float(text)


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9]\d*)", "-+0123456789"),
    ("float", r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def parse_yaml(text: str) -> Any:
    """Parse YAML with the rules above. Raises yaml.YAMLError with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run of a study: a notebook with parameters, and what it needs."""

    study: str
    notebook: str
    alias: str
    parameters: dict[str, Any]
    title: str = ""
    inputs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    gpus: int = 0
    threads: int | None = None
    memory_gib: float | None = None
    minutes: float | None = None

    @property
    def run_id(self) -> str:
        """Readable and unique: the alias and a short hash of notebook and parameters."""
        named = digest(self.notebook, json.dumps(self.parameters, sort_keys=True))
        return f"{self.alias}-{named[:8]}"


@dataclasses.dataclass(frozen=True)
class Study:
    """An expanded study file."""

    name: str
    title: str
    runs: tuple[RunSpec, ...]

    def select(self, only: Sequence[str] = ()) -> list[RunSpec]:
        """The runs whose alias, run id, tag or notebook stem is in `only` (all if empty).

        Raises ConfigError for a name that selects nothing.
        """
        if not only:
            return list(self.runs)
        names = [{run.alias, run.run_id, Path(run.notebook).stem, *run.tags} for run in self.runs]
        for wanted in only:
            if not any(wanted in known for known in names):
                aliases = ", ".join(run.alias for run in self.runs)
                raise ConfigError(f"study {self.name!r} has no run {wanted!r}; it has: {aliases}")
        return [run for run, known in zip(self.runs, names, strict=True) if known & set(only)]

    def find(self, run_id: str) -> RunSpec:
        """The run with this id (or alias). Raises ConfigError if there is none."""
        found = [run for run in self.runs if run_id in (run.run_id, run.alias)]
        if not found:
            raise ConfigError(f"study {self.name!r} has no run {run_id!r}; see `editkit run STUDY --list`")
        return found[0]


def load_study(
    path: Path, overrides: dict[str, Any] | None = None, *, _parents: tuple[Path, ...] = ()
) -> Study:
    """Read and expand a study file; `overrides` replace parameters (and grid axes) of every run.

    Raises ConfigError naming the file and the entry for unknown keys, wrong types and ambiguous aliases.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the study {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("runs", [] if "include" in raw else None), list):
        raise ConfigError(f"{path}: a study has a list 'runs' (and optionally 'title' and 'include')")
    if unknown := set(raw) - {"title", "runs", "include"}:
        raise ConfigError(
            f"{path}: unknown keys {sorted(unknown)}; a study has 'title', 'runs' and 'include'"
        )
    included = raw.get("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: 'include' is a list of study files, e.g. [labyrinth.yaml]")
    if (_parents and path in _parents) or path.name in included:
        raise ConfigError(f"{path} includes itself; remove it from 'include'")
    runs = [
        run for i, entry in enumerate(raw.get("runs", [])) for run in _expand(path, i, entry, overrides or {})
    ]
    for name in included:
        more = load_study(path.parent / name, overrides, _parents=(*_parents, path))
        runs += [dataclasses.replace(run, study=path.stem) for run in more.runs]
    for attribute in ("alias", "run_id"):
        seen: set[str] = set()
        for run in runs:
            name = getattr(run, attribute)
            if name in seen:
                raise ConfigError(
                    f"{path}: two runs share the {attribute} {name!r}; name them apart, "
                    "e.g. alias: my-run-s{seed}"
                )
            seen.add(name)
    return Study(path.stem, str(raw.get("title", path.stem)), tuple(runs))


def _expand(path: Path, index: int, entry: Any, overrides: dict[str, Any]) -> list[RunSpec]:
    where = f"{path}: runs[{index}]"
    if not isinstance(entry, dict) or "notebook" not in entry:
        raise ConfigError(f"{where}: each run is a mapping with at least 'notebook'")
    if unknown := set(entry) - set(_FIELDS):
        raise ConfigError(f"{where}: unknown keys {sorted(unknown)}; known are {sorted(_FIELDS)}")
    for key, value in entry.items():
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise ConfigError(f"{where}: {key!r} has the wrong type ({type(value).__name__})")
    base = entry.get("parameters", {})
    grid = {k: v for k, v in entry.get("grid", {}).items() if k not in overrides}
    if both := set(base) & set(grid):
        raise ConfigError(f"{where}: {sorted(both)} stand in 'parameters' and in 'grid'")
    if bad := [k for k, v in grid.items() if not isinstance(v, list) or not v]:
        raise ConfigError(f"{where}: grid axes must be non-empty lists: {bad}")
    runs = []
    for combination in itertools.product(*grid.values()):
        parameters = {**base, **dict(zip(grid, combination, strict=True)), **overrides}
        runs.append(
            RunSpec(
                study=path.stem,
                notebook=Path(entry["notebook"]).as_posix(),
                alias=_alias(where, entry, parameters, list(grid)),
                parameters=parameters,
                title=_fill(where, entry.get("title", ""), parameters),
                **{k: tuple(map(str, entry.get(k, ()))) for k in ("inputs", "requires", "tags")},
                **{k: entry[k] for k in ("gpus", "threads", "memory_gib", "minutes") if k in entry},
            )
        )
    return runs


def _fill(where: str, template: str, parameters: dict[str, Any]) -> str:
    try:
        return template.format(**parameters)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"{where}: {template!r} names {error}, which is not a parameter of this run"
        ) from error


def _alias(where: str, entry: dict, parameters: dict[str, Any], axes: list[str]) -> str:
    if "alias" in entry:
        alias = _fill(where, entry["alias"], parameters)
    else:
        parts = [Path(entry["notebook"]).stem, *(f"{axis}-{parameters[axis]}" for axis in axes)]
        alias = re.sub(r"[^a-z0-9.-]+", "-", "-".join(parts).lower()).strip("-.")
    if not _ALIAS.fullmatch(alias):
        raise ConfigError(f"{where}: the alias {alias!r} must be lower case letters, digits and . _ -")
    return alias


def data_root(root: Path) -> Path:
    """Where data sets lie: EDITKIT_DATA, else ../shared/data beside the project."""
    given = os.environ.get("EDITKIT_DATA")
    return Path(given) if given else root.parent / "shared" / "data"


def resolve_file(reference: str, root: Path) -> Path:
    """The path behind an entry of `inputs` or `requires`.

    "data:..." lies below EDITKIT_DATA, "model:..." is the description of a fetched model, others lie below the project.
    """
    if reference.startswith("model:"):
        return description_of(reference.removeprefix("model:"))
    if reference.startswith("data:"):
        return data_root(root) / reference.removeprefix("data:")
    return root / reference


def missing_files(run: RunSpec, root: Path) -> list[str]:
    """Those of the required files that are not there."""
    return [reference for reference in run.requires if not resolve_file(reference, root).exists()]


def how_to_get(reference: str) -> str:
    """A missing file of `requires`, and what brings it."""
    model = reference.removeprefix("model:")
    return f"{reference} ({'set EDITKIT_DATA' if model == reference else f'run `editkit fetch {model}`'})"
