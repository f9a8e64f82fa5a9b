"""What is computed once and found again: names made of content, and one process at a time per name.

Second moments and targets are kept in files that are named by a hash of everything that decides their values, so a
file is never stale, whatever method, run or study wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from .paths import to_folder
from .stored import read_stored, write_stored

_FORMAT = "editkit-cached-1"


def content_key(content: Any) -> str:
    """32 hex digits of the sha256 of JSON values; equal content gives equal keys in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def locked(folder: str | os.PathLike, name: str) -> Iterator[Path]:
    """The folder, made if need be, held for one process: others that want the same name wait, then find its files."""
    folder = to_folder(folder)
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / f"{name}.lock"):
        yield folder


def found_or_made(
    folder: str | os.PathLike, kind: str, content: Any, make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors kept under their content: read if they are there, else made and written.

    kind: word in front of the file's name.   content: JSON values that decide what `make` returns.
    The tensors are on the CPU when read. Raises DataError for a file that cannot be read: delete it.
    """
    name = f"{kind}_{content_key(content)}"
    with locked(folder, name) as place:
        path = place / f"{name}.safetensors"
        if path.exists():
            what = f"{kind} saved by editkit"
            return read_stored(path, form=_FORMAT, key="content", what=f"a {what}", saver="found_or_made")[1]
        made = dict(make())
        write_stored(path, made, {"content": content}, form=_FORMAT, key="content")
        return made
