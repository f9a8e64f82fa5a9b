"""What is computed once and found again: named by its inputs and by the code that computes it.

Second moments, targets and the states of long streams are kept in files whose name is a hash of everything that
decides their values: the inputs, the source of what computes them with all it imports from this package, and the
versions of torch and transformers. So a file is never stale, whatever method, run or study wrote it.

joblib.Memory has the same rule and was looked at first. It sees the source of the one function that is called, not
of what that calls; it hashes arguments by pickling them, whole models included; it has no lock, so two processes
compute the same; and it keeps pickles. What is left is less than what would be needed around it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from .paths import to_folder
from .sources import closure_hash
from .stored import read_stored, write_stored

_FORMAT = "editkit-cached-2"


def content_key(content: Any) -> str:
    """32 hex digits of the sha256 of JSON values; equal content gives equal keys in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def made_key(content: Any, *makers: str) -> str:
    """Key of what `makers` (module files, `__file__`) compute from content: changed code or libraries, another key."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return content_key([content, closure_hash(*makers), versions])


@contextmanager
def locked(folder: str | os.PathLike, name: str) -> Iterator[Path]:
    """The folder, made if need be, held for one process: others that want the same name wait, then find its files."""
    folder = to_folder(folder)
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / f"{name}.lock"):
        yield folder


def found_or_made(
    folder: str | os.PathLike,
    kind: str,
    content: Any,
    make: Callable[[list[str]], Mapping[str, Mapping[str, Tensor]]],
    maker: str,
    parts: Sequence[str] = ("all",),
) -> dict[str, dict[str, Tensor]]:
    """{part: tensors}, each read if it is there, else made and written; the tensors are on the CPU when read.

    kind: word in front of the files' names.   content: JSON values that decide what `make` returns.
    make: of the missing parts, in one call; one process makes, others that want any part of it wait.
    maker: file of the module that computes (`__file__`).
    Raises DataError for a file that cannot be read: delete it.
    """
    key = made_key(content, maker)
    with locked(folder, f"{kind}_{key}") as place:
        paths = {part: place / f"{kind}_{part}_{key}.safetensors" for part in parts}
        what = {"form": _FORMAT, "key": "content"}
        about = {"what": f"a {kind} saved by editkit", "saver": "found_or_made"}
        found = {part: read_stored(path, **what, **about)[1] for part, path in paths.items() if path.exists()}
        missing = [part for part in parts if part not in found]
        for part, tensors in (make(missing) if missing else {}).items():
            write_stored(paths[part], tensors, {"content": content}, **what)
            found[part] = dict(tensors)
    return found
