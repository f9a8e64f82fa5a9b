"""Reading notebooks: declared parameters, checks before a run, hashes, and the gate after it."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import nbformat

from ..base.errors import ConfigError
from .provenance import digest

TAG = "parameters"
_TYPES = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}


@dataclasses.dataclass(frozen=True)
class Declared:
    """One declared parameter: `name: type = default  # help`."""

    name: str
    type: str
    default: Any
    help: str


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """The notebook in the current format version. Raises ConfigError when it cannot be read."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no notebook {path}") from error
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a readable notebook: {error}") from error
    # Which Python runs it is decided by the runner; papermill only wants to read "python" here.
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def declared_parameters(notebook: nbformat.NotebookNode, name: str) -> dict[str, Declared]:
    """The parameters a notebook declares, by name, in order.

    Raises ConfigError unless exactly one cell is tagged 'parameters', and for a value that is not a literal.
    papermill itself would run on with its defaults in both cases.
    """
    import ast

    tagged = [c for c in notebook.cells if c.cell_type == "code" and TAG in c.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise ConfigError(f"{name}: exactly one code cell must be tagged {TAG!r}, found {len(tagged)}")
    logging.getLogger("papermill").setLevel(logging.WARNING)
    from papermill.inspection import inspect_notebook

    found = inspect_notebook(notebook)
    assigned = [n for s in ast.parse(tagged[0].source).body for n in ast.walk(s) if isinstance(n, ast.Name)]
    if unread := {n.id for n in assigned if isinstance(n.ctx, ast.Store)} - set(found):
        raise ConfigError(
            f"{name}: papermill cannot read the declaration of {sorted(unread)}; "
            "write one line each, with a plain type: name: type = value  # meaning"
        )
    declared = {}
    for parameter in found.values():
        try:
            default = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError) as error:
            raise ConfigError(f"{name}: parameter {parameter['name']!r} needs a literal value") from error
        kind = parameter["inferred_type_name"]
        declared[parameter["name"]] = Declared(
            parameter["name"], "" if kind == "None" else kind, default, parameter["help"]
        )
    return declared


def check_parameters(declared: dict[str, Declared], given: dict[str, Any], name: str) -> dict[str, Any]:
    """All parameters of a run, defaults filled in. Raises ConfigError for unknown names, wrong types."""
    if unknown := sorted(set(given) - set(declared)):
        raise ConfigError(f"{name} does not declare {unknown}; it declares {sorted(declared)}")
    for key, value in given.items():
        kind = declared[key].type
        allowed = _TYPES.get(kind.split("[")[0].strip())
        wrong_bool = isinstance(value, bool) and kind != "bool"
        if allowed and (wrong_bool or not isinstance(value, allowed)):
            raise ConfigError(f"{name}: {key} is declared as {kind}, got {value!r}")
    return {key: given.get(key, entry.default) for key, entry in declared.items()}


def check_notebook(notebook: nbformat.NotebookNode, name: str) -> dict[str, Declared]:
    """Everything that can be refused before a kernel starts; returns the declared parameters."""
    declared = declared_parameters(notebook, name)
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    for call in ("start(globals()", ".finish()"):
        if call not in code:
            raise ConfigError(f"{name}: no cell has the call {call}; see book/contributing/notebooks.md")
    return declared


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of what is executed: the code cells in order, and which of them takes the parameters."""
    cells = [(c.source, TAG in c.metadata.get("tags", ())) for c in notebook.cells if c.cell_type == "code"]
    return digest(json.dumps([cell for cell in cells if cell[0].strip()]))


def prose_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of everything that is shown but not executed: all cells in order with their metadata."""
    return digest(json.dumps([(c.cell_type, c.source, c.metadata) for c in notebook.cells], sort_keys=True))


def refresh_prose(executed: nbformat.NotebookNode, template: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The template's cells in its present order and wording, with the outputs of the executed code cells.

    Only valid while `code_hash` is unchanged. The injected parameters stay behind the parameters cell.
    """
    fresh = nbformat.from_dict(json.loads(json.dumps(template)))
    code = [c for c in executed.cells if c.cell_type == "code" and c.source.strip()]
    injected = [c for c in code if "injected-parameters" in c.metadata.get("tags", ())]
    ran = iter([c for c in code if c not in injected])
    cells = []
    for cell in fresh.cells:
        if cell.cell_type == "code" and cell.source.strip():
            done = next(ran)
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
            cell.metadata = {**done.metadata, **cell.metadata}
        cells.append(cell)
        if TAG in cell.metadata.get("tags", ()):
            cells += injected
    fresh.cells = cells
    fresh.metadata = executed.metadata
    return fresh


def failure(notebook: nbformat.NotebookNode) -> str | None:
    """Why an executed notebook must not be published, or None: this is the gate of the book.

    A failed papermill run leaves a complete-looking file behind, and Jupyter Book would publish it.
    """
    record = notebook.metadata.get("papermill")
    if record is None:
        return "it was not executed by papermill"
    if record.get("exception") not in (None, False):
        return "papermill recorded an exception"
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        for output in cell.outputs:
            if output.output_type == "error":
                return f"cell {i} raised {output.ename}: {output.evalue}"
        if cell.get("execution_count") is None:
            return f"cell {i} was not executed"
        if cell.metadata.get("papermill", {}).get("exception"):
            return f"cell {i} raised an exception"
    return None


def stderr_cells(notebook: nbformat.NotebookNode) -> list[int]:
    """Indices of cells that wrote to stderr (warnings, progress bars): they do not belong on a page."""
    return [
        i
        for i, c in enumerate(notebook.cells)
        if c.cell_type == "code" and any(o.output_type == "stream" and o.name == "stderr" for o in c.outputs)
    ]
