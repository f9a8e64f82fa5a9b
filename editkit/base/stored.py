"""Objects in one safetensors file: tensors, and everything else as JSON in the header.

Edits, editor states, memories, hypernetworks and training checkpoints are all stored like this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ConfigError, DataError
from .paths import file_to_read, user_path, written


def write_stored(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, form: str, key: str
) -> Path:
    """Write tensors (copied to the CPU) and meta; whoever reads the path finds the old file or the whole new one.

    form: name and version of the format.   key: header entry that holds meta as JSON.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with written(path) as part:
        save_file(own, part, metadata={"format": form, key: json.dumps(meta, sort_keys=True)})
    return user_path(path)


def read_stored(
    path: str | os.PathLike, *, form: str, key: str, what: str, saver: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(meta, tensors) of a file by `write_stored`.

    what, saver: words of the error, e.g. "an edit saved by editkit" and "Delta.save".
    Raises DataError naming the file if it cannot be read or is of another kind.
    """
    noun = what.split(maxsplit=1)[1].removesuffix(" saved by editkit")
    try:
        with safe_open(str(file_to_read(path, f"the {noun}")), framework="pt") as file:
            found = file.metadata() or {}
            if found.get("format") != form:
                raise DataError(f"{path} is not {what}; save it with {saver}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the {noun} {path}: {error}; delete it and make it again") from error
    return json.loads(found[key]), tensors


def refuse_other_options(
    what: str, name: str, options: Mapping[str, Any], saved_name: str, saved: Mapping[str, Any]
) -> None:
    """Raise ConfigError, naming the difference, unless something was saved by the same editor and options."""
    differ = [k for k in sorted({*options, *saved}) if options.get(k) != saved.get(k)]
    if saved_name == name and not differ:
        return
    made = (
        f"editor {saved_name!r}"
        if saved_name != name
        else ", ".join(f"{k} = {saved.get(k)!r} (here {options.get(k)!r})" for k in differ)
    )
    raise ConfigError(f"the saved {what} was made with {made}; make the editor with the same options")
