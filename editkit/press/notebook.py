"""Reading notebooks: declared parameters, checks before a run, hashes, and the gate after it."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import re
import tokenize
from pathlib import Path
from typing import Any

import nbformat

from ..base import sources
from ..base.config import check_known
from ..base.errors import ConfigError
from ..base.sources import digest

TAG = "parameters"
_TYPES = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
    "None": (type(None),),
}
_END = r"([-+]?\d*\.?\d*(?:e[-+]?\d+)?)"
_RANGE = re.compile(rf"\[{_END}\.\.{_END}\]\s*$")


@dataclasses.dataclass(frozen=True)
class Declared:
    """One declared parameter: `name: type = default  # help [range]`."""

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
    """The parameters a notebook declares, by name, in order. Raises ConfigError.

    Exactly one cell must be tagged 'parameters'; papermill itself would run on with its defaults otherwise.
    """
    tagged = [c for c in notebook.cells if c.cell_type == "code" and TAG in c.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise ConfigError(f"{name}: exactly one code cell must be tagged {TAG!r}, found {len(tagged)}")
    return declared_in(tagged[0].source, name)


def declared_in(source: str, name: str) -> dict[str, Declared]:
    """The parameters that the source of a parameters cell declares, each `name: type = literal  # help [range]`.

    Raises ConfigError for any other line of code, a value that is no literal and a range that cannot be read.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    declared = {}
    for line in ast.parse(source).body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
            raise ConfigError(
                f"{name}: cannot read the declaration {ast.unparse(line)!r}; write name: type = value  # help [range]"
            )
        key, kind = line.target.id, ast.unparse(line.annotation)
        try:
            default = ast.literal_eval(line.value)
        except ValueError as error:
            raise ConfigError(f"{name}: parameter {key!r} needs a literal value") from error
        declared[key] = Declared(key, kind, default, comments.get(line.end_lineno, ""))
    return declared


def check_parameters(declared: dict[str, Declared], given: dict[str, Any], name: str) -> dict[str, Any]:
    """All parameters of a run, defaults filled in. Raises ConfigError for unknown names, wrong types, values out of
    the declared range.
    """
    check_known(given, declared, f"parameter of {name}")
    for key, value in given.items():
        kinds = [kind.split("[")[0].strip() for kind in declared[key].type.split("|")]
        allowed = [t for kind in kinds for t in _TYPES.get(kind, (object,))]
        wrong_bool = isinstance(value, bool) and not {"bool", "object"} & set(kinds)
        if wrong_bool or not isinstance(value, tuple(allowed)):
            raise ConfigError(f"{name}: {key} is declared as {declared[key].type}, got {value!r}")
    values = {key: given.get(key, entry.default) for key, entry in declared.items()}
    for key, value in values.items():
        _check_range(value, declared[key], name)
    return values


def _check_range(value: Any, declared: Declared, name: str) -> None:
    """Numbers, in lists too, are finite and above zero, or in the range that ends the help: [0..], [0..1]."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        free = dataclasses.replace(declared, help="[..]") if isinstance(value, dict) else declared
        for x in inside:  # what stands in a dict has a meaning of its own, so it has only to be finite
            _check_range(x, free, name)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    found = _RANGE.search(declared.help)
    low, high = (float(end) if end else None for end in found.groups()) if found else (None, None)
    if not math.isfinite(value):
        wanted = "a finite number"
    elif not found and value <= 0:
        wanted = "a number above 0"
    elif (low is not None and value < low) or (high is not None and value > high):
        wanted = f"a number in {found[0].strip()}"
    else:
        return
    raise ConfigError(f"{name}: {declared.name} = {value!r}; give {wanted}")


def check_notebook(notebook: nbformat.NotebookNode, name: str) -> dict[str, Declared]:
    """Everything that can be refused before a kernel starts; returns the declared parameters."""
    declared = declared_parameters(notebook, name)
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    for call in ("start(globals()", ".finish()"):
        if call not in code:
            raise ConfigError(f"{name}: no cell has the call {call}; see book/contributing/notebooks.md")
    tagged = [TAG in c.metadata.get("tags", ()) for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    for text, is_parameters in zip(cells_code(notebook), tagged, strict=True):
        if changed := set() if is_parameters else _assigned(text) & declared.keys():
            raise ConfigError(f"{name}: a later cell assigns the parameter {sorted(changed)}; give it another name")
    return declared


def _assigned(text: str) -> set[str]:
    """Names that a cell assigns outside of functions, classes and comprehensions."""
    own = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.comprehension)
    try:
        queue: list[ast.AST] = [ast.parse(text)]
    except SyntaxError:  # a line for the shell
        return set()
    found = set()
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        queue += [child for child in ast.iter_child_nodes(node) if not isinstance(child, own)]
    return found


def cells_code(notebook: nbformat.NotebookNode) -> list[str]:
    """The sources of the code cells that are not empty."""
    return [c.source for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of what is executed: the code of the cells in order, and which of them takes the parameters."""
    tagged = [
        TAG in c.metadata.get("tags", ())
        for c in notebook.cells
        if c.cell_type == "code" and c.source.strip()
    ]
    return digest(
        json.dumps([[sources.code_hash(text), tag] for text, tag in zip(cells_code(notebook), tagged)])
    )


def with_prose(executed: nbformat.NotebookNode, template: nbformat.NotebookNode) -> nbformat.NotebookNode:
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
