"""What is computed once and found again: names made of content, and one process at a time per name.

Second moments and targets are kept in files that are named by a hash of everything that decides their values, so a
file is never stale, whatever method, run or study wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


def content_key(content: Any) -> str:
    """32 hex digits of the sha256 of JSON values; equal content gives equal keys in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def locked(folder: str | os.PathLike, name: str) -> Iterator[Path]:
    """The folder, made if need be, held for one process: others that want the same name wait, then find its files."""
    folder = Path(folder)
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / f"{name}.lock"):
        yield folder
